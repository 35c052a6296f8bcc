"""Draws the loss of an interrupted run over that of an uninterrupted one, and compares every single value.

    python demo/curves.py UNINTERRUPTED INTERRUPTED PICTURE.png

Ends with status 1 if one loss differs in one bit.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def interruptions(run: Path) -> list[tuple[int, int]]:
    """(last step that samples/ saw before a kill, step of the checkpoint that the next start went on from)."""
    consumed = [json.loads(line) for line in (run / "samples" / "rank-0.jsonl").open() if line.endswith("}\n")]
    resumed = [row for row in map(json.loads, (run / "events.jsonl").open()) if row["event"] == "resume"]
    return [
        (max(row["step"] for row in consumed if row["attempt"] == resume["attempt"] - 1), resume["step"])
        for resume in resumed
    ]


def draw(whole: dict[int, float], killed: dict[int, float], kills: list[tuple[int, int]], picture: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 4), dpi=150, layout="constrained")
    axes.plot(list(whole), list(whole.values()), color="#9ecae1", linewidth=5, label="never interrupted")
    axes.plot(list(killed), list(killed.values()), color="#08306b", linewidth=1, label="killed, and gone on")
    for number, (at, resumed) in enumerate(kills):
        axes.axvline(at, color="#cb181d", linewidth=1, label=None if number else "SIGKILL")
        axes.axvline(resumed, color="#238b45", linestyle="--", linewidth=1, label=None if number else "checkpoint")
    axes.set(
        xlabel="step", ylabel="training loss", title="One run killed in the middle, one never: every loss is equal"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def main(uninterrupted: Path, interrupted: Path, picture: Path) -> int:
    whole, killed = losses(uninterrupted), losses(interrupted)
    kills = interruptions(interrupted)
    differing = [step for step in sorted(whole.keys() | killed.keys()) if whole.get(step) != killed.get(step)]
    if differing:
        print(f"{len(differing)} of {len(whole)} losses DIFFER, first at step {differing[0]}")
        return 1
    draw(whole, killed, kills, picture)
    for at, resumed in kills:
        print(f"killed at step {at}, went on from the checkpoint of step {resumed}: {at - resumed} steps done twice")
    print(f"all {len(whole)} losses of the interrupted run are those of the uninterrupted one, bit for bit")
    print(f"{picture} shows both")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))

"""Draws the loss of an interrupted run over that of an uninterrupted one, and compares every step.

    python demo/curves.py UNINTERRUPTED INTERRUPTED PICTURE.png

Ends with status 1 if a step took other samples, if a loss differs in one bit while the number of ranks was the same,
or by 1 % within the ten steps after that.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import itertools

import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Start:
    """One start of a run: its ranks, the step it began from and its last one."""

    ranks: int
    first: int
    last: int


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """Skips the half line that a killed process may leave."""
    return (json.loads(line) for line in file.open() if line.endswith("}\n"))


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run / "metrics.jsonl") if "loss" in row}


def samples(run: Path) -> dict[int, list[tuple[int, str]]]:
    """The keys of each step's samples by slot of the global batch; of a step done twice, the later ones."""
    found = [row for file in (run / "samples").glob("*.jsonl") for row in rows(file)]
    newest: dict[int, int] = {}
    for row in found:
        newest[row["step"]] = max(row["attempt"], newest.get(row["step"], 0))
    steps: dict[int, list[tuple[int, str]]] = {step: [] for step in newest}
    for row in found:
        if row["attempt"] == newest[row["step"]]:
            steps[row["step"]] += zip(row["slots"], row["keys"], strict=True)
    return {step: sorted(taken) for step, taken in steps.items()}


def starts(run: Path) -> list[Start]:
    """All starts that trained, in order."""
    done: dict[int, int] = {}
    for row in rows(run / "samples" / "rank-0.jsonl"):
        done[row["attempt"]] = max(row["step"], done.get(row["attempt"], 0))
    ranks, found = {}, []
    for event in rows(run / "events.jsonl"):
        if event["event"] == "attempt_started":
            ranks[event["attempt"]] = event["world_size"]
        elif event["event"] in ("training_started", "training_resumed"):
            last = done.get(event["attempt"], event["step"])
            found.append(Start(ranks[event["attempt"]], event["step"], last))
    return found


def draw(whole: dict[int, float], broken: dict[int, float], begun: list[Start], picture: Path) -> None:
    layout = {"height_ratios": [4, 1], "hspace": 0.05}
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 5), dpi=150, layout="constrained", gridspec_kw=layout
    )
    above.plot(list(whole), list(whole.values()), color="#9ecae1", linewidth=5, label="never interrupted")
    above.plot(list(broken), list(broken.values()), color="#08306b", linewidth=1, label="interrupted, and resumed")
    for number, (before, after) in enumerate(itertools.pairwise(begun)):
        above.axvline(before.last, color="#cb181d", linewidth=0.8, label=None if number else "interrupted")
        above.axvline(after.first, color="#238b45", ls="--", linewidth=0.8, label=None if number else "resumed from")
    ends = [*(start.first for start in begun[1:]), begun[-1].last]
    below.stairs([start.ranks for start in begun], [begun[0].first, *ends], fill=True, color="#6baed6")
    times = len(begun) - 1
    above.set(
        ylabel="training loss", title=f"One run interrupted {f'{times} times' if times > 1 else 'once'}, one never"
    )
    below.set(xlabel="step", ylabel="ranks", yticks=sorted({0, *(start.ranks for start in begun)}))
    above.legend(frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


def compare(uninterrupted: Path, interrupted: Path, begun: list[Start]) -> Iterator[tuple[bool, str]]:
    """For each comparison whether the runs agree, and a line that says how."""
    whole, broken = losses(uninterrupted), losses(interrupted)
    same = samples(uninterrupted) == samples(interrupted)
    yield same, f"all {len(whole)} steps took {'the same' if same else 'NOT the same'} samples"
    alike = next((start.first for start in begun if start.ranks != begun[0].ranks), len(whole))
    differing = [step for step in whole if step <= alike and whole[step] != broken.get(step)]
    exact = "equal, bit for bit" if not differing else f"NOT equal, first at step {differing[0]}"
    yield not differing, f"the losses up to step {alike}, on {begun[0].ranks} ranks, are {exact}"
    apart = {step: abs(broken[step] / whole[step] - 1) for step in whole if step > alike}
    if apart:
        next_ten = max(value for step, value in apart.items() if step <= alike + 10)
        yield (
            next_ten < 0.01,
            f"then, on other ranks, the next ten to {100 * next_ten:.2f} %, all to"
            f" {100 * sum(apart.values()) / len(apart):.1f} % on average",
        )


def main(uninterrupted: Path, interrupted: Path, picture: Path) -> int:
    begun = starts(interrupted)
    for before, after in itertools.pairwise(begun):
        print(
            f"interrupted at step {before.last} on {before.ranks} ranks, resumed from the checkpoint of step"
            f" {after.first} on {after.ranks}: {before.last - after.first} steps done twice"
        )
    verdicts = list(compare(uninterrupted, interrupted, begun))
    for _, line in verdicts:
        print(line)
    draw(losses(uninterrupted), losses(interrupted), begun, picture)
    print(f"{picture} shows both")
    return 0 if all(good for good, _ in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:4])))

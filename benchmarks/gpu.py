"""What a GPU shows of this project in ten minutes: ceilings, values, kernels, speed, memory, data, faults.

    coatnet bench gpu --minutes 10
    python -P coatnet_main.py benchmarks.gpu    # the same from a clone, where torch is all that is installed

Every check is a process of its own with a time limit, its share of the time that is left; one that fails or hangs stops
none of the others. After each a line goes to the results file; at the end comes all of it as text. A check that needs
what is not installed says so. With `--device cpu` everything is small: that shows that the checks work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
SHOWN, LAST_LINES = 5, 3
NOT_HERE = "not here"


@dataclass(frozen=True)
class Entry:
    """A check: its name, its share of the time, about in seconds of ten minutes, and its function."""

    name: str
    seconds: int
    function: str
    argument: str = ""
    not_on_a_cpu: str = ""
    """Why it is left out there."""


SLOW = "too slow on a CPU; coatnet_0 shows that the check works"
CHECKS = (
    Entry("versions and ceilings", 20, "benchmarks.gpu_checks.hardware.versions_and_ceilings"),
    Entry("values beside the CPU's", 50, "benchmarks.gpu_checks.networks.values_beside_the_cpu"),
    Entry("attention kernels", 20, "benchmarks.gpu_checks.networks.attention_kernels"),
    Entry("waits of a step", 50, "benchmarks.gpu_checks.training.waits_of_a_step"),
    Entry("speed of coatnet_0", 70, "benchmarks.gpu_checks.networks.speed", "coatnet_0"),
    Entry("speed of coatnet_2", 90, "benchmarks.gpu_checks.networks.speed", "coatnet_2", SLOW),
    Entry("speed of coatnet_4", 110, "benchmarks.gpu_checks.networks.speed", "coatnet_4", SLOW),
    Entry("depthwise convolutions", 25, "benchmarks.gpu_checks.networks.depthwise_convolutions"),
    Entry("attention backends", 60, "benchmarks.gpu_checks.networks.attention_backends"),
    Entry("DALI", 80, "benchmarks.gpu_checks.decoding.rates"),
    Entry("odd samples", 20, "benchmarks.gpu_checks.decoding.odd_samples"),
    Entry("kill and resume", 50, "benchmarks.gpu_checks.training.kill_and_resume"),
    Entry("the same, to the bit", 50, "benchmarks.gpu_checks.training.kill_and_resume", "true"),
    Entry("checkpoint and live state", 20, "benchmarks.gpu_checks.training.checkpoint_beside_live_state"),
    Entry("guards", 40, "benchmarks.gpu_checks.training.guards"),
    Entry(
        "advice on memory", 40, "benchmarks.gpu_checks.training.advice_when_memory_runs_out",
        not_on_a_cpu="a process that fills a CPU's memory is killed by Linux",
    ),
    Entry("coatnet_5", 30, "benchmarks.gpu_checks.training.large_network", "coatnet_5"),
    Entry("coatnet_6", 40, "benchmarks.gpu_checks.training.large_network", "coatnet_6", SLOW),
    Entry("coatnet_7", 50, "benchmarks.gpu_checks.training.large_network", "coatnet_7", SLOW),
)  # fmt: skip


def run(checks: Iterable[Entry], device: str, seconds: float, results: Path) -> Iterator[dict[str, Any]]:
    """Runs the checks in order, in so many seconds; every result is a line of the file as soon as it is there."""
    left, deadline = list(checks), time.monotonic() + seconds
    while left:
        entry = left[0]
        if device == "cpu" and entry.not_on_a_cpu:
            result = {"state": NOT_HERE, "seconds": 0.0, "reason": entry.not_on_a_cpu, "rows": []}
        else:
            weights = [each.seconds for each in left if device != "cpu" or not each.not_on_a_cpu]
            result = run_one(entry, device, entry.seconds / sum(weights) * (deadline - time.monotonic()))
        result = {"check": left.pop(0).name, **result}
        with results.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(line_of(result), file=sys.stderr, flush=True)
        yield result


def run_one(entry: Entry, device: str, limit: float) -> dict[str, Any]:
    """A check's state, seconds, reason where it is not ok, and the rows that it had by its end, however it ended."""
    with tempfile.TemporaryDirectory(prefix="coatnet-gpu-", ignore_cleanup_errors=True) as name:
        folder, began = Path(name), time.monotonic()
        command = [sys.executable, "-P", str(ROOT / "coatnet_main.py"), "benchmarks.gpu_checks.one"]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(
                [*command, entry.function, device, name, *filter(None, [entry.argument])],
                stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **hidden}, start_new_session=True,
            )  # fmt: skip
            try:
                status = process.wait(max(0.0, limit))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(process)
        file = folder / "rows.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        state, reason = _end(status, rows, limit, (folder / "log").read_text())
        return {"state": state, "seconds": round(time.monotonic() - began, 1), "reason": reason, "rows": rows}


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what a check has left running, itself included."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(status: int | None, rows: list[dict[str, Any]], limit: float, log: str) -> tuple[str, str]:
    """The state of a check that ended with this status (None: it was out of time), and the reason."""
    if status is None:
        return "out of time", f"took more than {limit:.0f} s; raise --minutes to give it more"
    if status != 0:
        said = " | ".join(line.strip() for line in log.strip().splitlines()[-LAST_LINES:])
        return "failed", f"{f'ended by signal {-status}' if status < 0 else f'status {status}'}: {said}"
    if rows and NOT_HERE in rows[-1] and len(rows[-1]) == 1:
        return NOT_HERE, rows.pop()[NOT_HERE]
    errors = [row["error"] for row in rows if "error" in row]
    return ("partly", errors[0]) if errors else ("ok", "")


# -------------------------------------------------------------------------------------------------------------- text


def line_of(result: dict[str, Any]) -> str:
    """A check in one line: its state, its time, and what it says or why it has nothing to say."""
    said = next((row["said"] for row in reversed(result["rows"]) if "said" in row), "")
    text = "; ".join(filter(None, [said, result["reason"]]))
    return f"{result['check']:26}{result['state']:12}{result['seconds']:6.1f} s  {text[:300]}"


def report(results: list[dict[str, Any]]) -> str:
    """All figures, a section for each check, and then the checks in a line each."""
    sections = [
        f"{result['check']}\n{'-' * len(result['check'])}\n{_figures(result['rows'])}"
        for result in results
        if result["rows"]
    ]
    return "\n\n".join([*sections, "\n".join(["summary\n-------", *map(line_of, results)])])


def _figures(rows: list[dict[str, Any]]) -> str:
    figures = [row for row in rows if "said" not in row]
    return "\n\n".join(_table(list(alike)) for _, alike in groupby(figures, key=_columns))


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, value in row.items() if not isinstance(value, list))


def _table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same columns under one heading; lists stand below their row, the longest kernels of a network."""
    columns = _columns(rows[0])
    cells = [columns, *([_text(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    heading, *lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]
    below = [
        [f"    {_text(each)}" for value in row.values() if isinstance(value, list) for each in value[:SHOWN]]
        for row in rows
    ]
    return "\n".join([heading, *(line for pair in zip(lines, below, strict=True) for line in (pair[0], *pair[1]))])


def _text(value: Any) -> str:
    if isinstance(value, dict):  # a kernel
        return f"{value['share']:6.1%} {value['ms']:9.3f} ms {value['calls']:5} x  {value['name'][:100]}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def main() -> None:
    """Runs the checks; exit status 1 where one of them failed or was out of time."""
    parser = argparse.ArgumentParser("coatnet bench gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="limit for all checks together; default: 10")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda; on cpu all is small")
    parser.add_argument("--out", type=Path, metavar="FILE", help="results, a line per check; default: named by time")
    parser.add_argument(
        "--only", action="append", metavar="CHECK", choices=[each.name for each in CHECKS], help="may be repeated"
    )
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device (coatnet doctor says why); --device cpu shows that the checks work")
    out = asked.out or Path(time.strftime("bench-gpu-%Y%m%d-%H%M%S.jsonl"))
    out.write_text(json.dumps({"command": sys.argv, "device": asked.device, "minutes": asked.minutes}) + "\n")
    checks = [each for each in CHECKS if not asked.only or each.name in asked.only]
    print(f"{len(checks)} checks on {asked.device}, {asked.minutes:g} minutes, results: {out}", file=sys.stderr)
    results = list[dict[str, Any]]()
    try:
        for result in run(checks, asked.device, 60 * asked.minutes, out):
            results.append(result)
    finally:
        print(report(results))
    sys.exit(int(any(result["state"] in ("failed", "partly", "out of time") for result in results)))


if __name__ == "__main__":
    main()

"""The choice of attention's backend agrees with the recorded results; benchmarks are found; `bench gpu` says all."""

import importlib
import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from models.attention import fastest
from tests.pipeline.runs import coatnet

ROOT = Path(__file__).parents[1]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "attention.json").read_text())["rows"]


def chosen(row: dict[str, Any]) -> float:
    """Milliseconds of the backend that is chosen for what a row measured, at best."""
    dtype = getattr(torch, row["dtype"])
    return row["best"][fastest(row["device"], dtype, prod(row["grid"]), row["with_gradient"])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['heads']}-{row['grid'][0]}-{row['dtype']}")
def test_the_chosen_backend_is_within_a_quarter_of_the_fastest(row):
    assert chosen(row) <= 1.25 * min(row["best"].values())


def test_over_all_shapes_the_chosen_backends_are_within_a_twentieth_of_the_fastest():
    assert sum(map(chosen, ROWS)) <= 1.05 * sum(min(row["best"].values()) for row in ROWS)


def test_bench_lists_the_benchmarks_and_refuses_unknown_names():
    listed = [line.split()[0] for line in coatnet("bench").stdout.splitlines()]
    assert {"attention", "model", "order"} <= set(listed)
    refused = coatnet("bench", "machine")
    assert refused.returncode == 2
    assert refused.stderr == f"coatnet: benchmark 'machine' does not exist; choose from {', '.join(listed)}\n"


def test_a_benchmark_gets_its_own_options():
    assert "--resolution" in coatnet("bench", "model", "--help").stdout


# ----------------------------------------------------------------------------------------------------------- bench gpu

WAYS = {
    "passes": ("ok", ""),
    "crashes": ("failed", "ended by signal 11"),
    "raises": ("failed", "ValueError: no such thing"),
    "hangs": ("out of time", "--minutes"),
    "lacks_a_package": ("not here", "of_nobody is not installed"),
    "lacks_memory": ("not here", "needs 9 GiB"),
    "misses_a_figure": ("partly", "ZeroDivisionError"),
}
"""How each check of gpu_check_samples.py ends, and part of the reason."""


def test_a_check_that_ends_badly_stops_no_other_and_each_has_its_line(tmp_path):
    shares = {"hangs": 1}  # of 60 seconds; what a check leaves is the later ones'
    checks = [
        gpu.Entry(name, shares.get(name, 10), f"tests.gpu_check_samples.{name}", "large" * (name == "passes"))
        for name in reversed(WAYS)
    ]
    left_out = gpu.Entry("left out", 10, "tests.gpu_check_samples.passes", not_on_a_cpu="it is large")
    results = list(gpu.run([*checks, left_out], "cpu", 60, tmp_path / "results"))
    assert [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()] == results
    ended = {result["check"]: (result["state"], result["reason"]) for result in results}
    assert ended.pop("left out") == ("not here", "it is large")
    assert {name: state for name, (state, _) in ended.items()} == {name: state for name, (state, _) in WAYS.items()}
    assert all(part in ended[name][1] for name, (_, part) in WAYS.items())
    rows = {result["check"]: result["rows"] for result in results}
    assert [row["size"] for row in rows["misses_a_figure"]] == [1, 2]
    assert all(rows[name] == [{"before": 1}] for name in ("crashes", "raises", "hangs", "lacks_a_package"))
    summary = gpu.report(results).partition("summary")[2]
    assert all(name in summary for name in (*WAYS, "large on cpu", "needs 9 GiB", "it is large"))


def test_every_check_of_bench_gpu_is_a_function_that_is_there():
    names = [entry.function.rpartition(".") for entry in gpu.CHECKS]
    assert all(callable(getattr(importlib.import_module(module), name)) for module, _, name in names)


SHORT = ["versions and ceilings", "values beside the CPU's", "depthwise convolutions"]
ALL = pytest.param([entry.name for entry in gpu.CHECKS], marks=pytest.mark.torture, id="all")


@pytest.mark.parametrize("checks", [pytest.param(SHORT, id="short"), ALL])
def test_bench_gpu_on_a_cpu_gives_figures_or_the_reason_why_not(tmp_path, checks):
    only = [part for name in checks for part in ("--only", name)]
    command = [sys.executable, "-P", ROOT / "coatnet_main.py", "benchmarks.gpu", "--device", "cpu", "--minutes", "10"]
    done = subprocess.run([*command, "--out", tmp_path / "out", *only], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()[1:]]
    assert [result["check"] for result in results] == checks
    assert all(
        result["reason"] if result["state"] == "not here" else "said" in result["rows"][-1] for result in results
    )
    assert all(gpu.line_of(result) in done.stdout for result in results)

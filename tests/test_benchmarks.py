"""The choice of attention's backend agrees with the recorded results, and benchmarks are found by name."""

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

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
    assert refused.stderr == f"coatnet: benchmark 'machine' does not exist; there are {', '.join(listed)}\n"


def test_a_benchmark_gets_its_own_options():
    assert "--resolution" in coatnet("bench", "model", "--help").stdout

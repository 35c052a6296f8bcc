"""That the rule for attention agrees with what is recorded, and that the benchmarks are found by name."""

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
    """Milliseconds of the backend that is taken for what a row measured, at best."""
    dtype = getattr(torch, row["dtype"])
    return row["best"][fastest(row["device"], dtype, prod(row["grid"]), row["with_gradient"])]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['heads']}-{row['grid'][0]}-{row['dtype']}")
def test_the_backend_that_is_taken_is_within_a_quarter_of_the_fastest_one(row):
    assert chosen(row) <= 1.25 * min(row["best"].values())


def test_over_all_shapes_the_backends_that_are_taken_are_within_a_twentieth_of_the_fastest_ones():
    assert sum(map(chosen, ROWS)) <= 1.05 * sum(min(row["best"].values()) for row in ROWS)


def test_bench_lists_the_benchmarks_and_refuses_what_is_none():
    listed = [line.split()[0] for line in coatnet("bench").stdout.splitlines()]
    assert {"attention", "model", "order"} <= set(listed)
    refused = coatnet("bench", "peers")
    assert refused.returncode == 2
    assert refused.stderr == f"coatnet: benchmark 'peers' does not exist; there are {', '.join(listed)}\n"


def test_a_benchmark_gets_its_own_options():
    assert "--resolution" in coatnet("bench", "model", "--help").stdout

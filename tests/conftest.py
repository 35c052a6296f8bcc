"""HYPOTHESIS_PROFILE: quick (the default, the same examples every time) or long; the images that most tests train on.

`make gpu` refuses to run where all tests with the marker gpu would skip.
"""

import gc
import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.pipeline.runs import pack_digits

settings.register_profile("quick", max_examples=35, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


LONGEST = [
    "test_end_to_end", "test_saving", "test_jobs", "test_zero", "test_damaged_files", "test_watchdog",
    "test_documents", "test_replay", "test_cold_starts", "test_guards", "test_storage", "test_attempts",
    "test_mirror", "test_stops", "test_schedules", "test_restore", "test_launch",
    "test_rank_doctor", "test_checkpoint", "test_ablations", "test_benchmarks", "test_interrupted_pack", "test_index",
    "test_compiled", "test_forked", "test_report",
]  # fmt: skip
"""The files that take longest, run first: the last to begin would run alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: make gpu")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits of the demo, packed in shards of 200: FOLDER/train and FOLDER/val. Read-only."""
    return pack_digits(tmp_path_factory.mktemp("digits"))


def pytest_unconfigure() -> None:
    gc.freeze()  # else a collection at exit visits every object of torch: a second or two

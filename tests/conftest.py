"""How long property tests look: HYPOTHESIS_PROFILE is quick (the default, the same examples every time) or long.

And the images that most runs of the tests train on, and what the marker gpu needs; `make gpu` refuses to run where all
of these would skip.
"""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.pipeline.runs import pack_digits

settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device: make gpu")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits of the demo, packed in shards of 200: FOLDER/train and FOLDER/val. To be read, not to be changed."""
    return pack_digits(tmp_path_factory.mktemp("digits"))

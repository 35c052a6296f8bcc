"""A Slurm for each module of tests; they are skipped where none can run, except in CI."""

import os
from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def slurm_here() -> None:
    """Skips where no cluster can run, but fails in CI, where a skip would go unnoticed."""
    if reason := missing():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no Slurm for tests: {reason}")


@pytest.fixture(scope="module")
def cluster(slurm_here: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of four CPUs each."""
    with running_cluster(tmp_path_factory.mktemp("slurm"), nodes=2, cpus=4) as it:
        yield it

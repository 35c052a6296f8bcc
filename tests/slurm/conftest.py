"""The throw-away Slurm of tests/cluster, for these tests too."""

from tests.cluster.conftest import cluster, slurm_here

__all__ = ["cluster", "slurm_here"]

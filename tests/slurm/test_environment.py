"""What a job gets of the environment in which it is submitted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.environment import _KEPT, for_sbatch, outside_jobs

PERSONAL = {"HOME": "/home/me", "SLURM_CONF": "/etc/slurm.conf", "RANKING": "1", "OMPI_MCA_btl": "tcp"}
NAMES = st.from_regex(r"(SLURM|SRUN|SALLOC|SQUEUE|PMIX|TORCHELASTIC|COATNET)_[A-Z]+", fullmatch=True)
RANK = st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])


@given(st.dictionaries(NAMES.filter(lambda name: name not in _KEPT) | RANK, st.text()))
def test_nothing_of_another_job_step_or_rank_is_left(outer: dict[str, str]) -> None:
    assert outside_jobs(PERSONAL | outer) == for_sbatch(PERSONAL | outer, ()) == PERSONAL


def test_gpus_are_left_out_only_where_another_job_chose_them() -> None:
    chosen = PERSONAL | {"CUDA_VISIBLE_DEVICES": "3"}
    assert for_sbatch(chosen, ()) == chosen
    assert for_sbatch(chosen | {"SLURM_JOB_ID": "7"}, ()) == PERSONAL


@pytest.mark.parametrize(("options", "kept"), [((), {"SBATCH_ACCOUNT": "mine"}), (("account", "mem"), {})])
def test_a_persons_defaults_for_sbatch_hold_where_the_request_is_silent(
    options: tuple[str, ...], kept: dict[str, str]
) -> None:
    others = {"SBATCH_MEM_PER_CPU": "100", "SBATCH_OUTPUT": "/dev/null", "SBATCH_WAIT": "1"}
    assert for_sbatch(PERSONAL | {"SBATCH_ACCOUNT": "mine"} | others, options) == PERSONAL | kept

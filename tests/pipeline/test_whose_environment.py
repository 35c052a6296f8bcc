"""A process is a rank only where a launcher's whole set of variables says so; no command but a rank's looks at them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.environment import ADDRESS, IDENTITY, STEP, rank_variables
from pipeline.distributed.launcher import COMMANDS
from pipeline.errors import UsageError
from tests import forked

TORCHRUN = dict(zip((*IDENTITY, *ADDRESS), ["5", "8", "1", "4", "n1", "29500"], strict=True))
JOB = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
BATCH = JOB | {"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}
STEP_ALONE = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1"}
STEP_OF_4 = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_STEP_NODELIST": "n[1-2]"}
TASK_3 = BATCH | STEP_OF_4 | {"SLURM_PROCID": "3", "SLURM_NODEID": "1"}
PTY = {"SLURM_PTY_PORT": "44679"}
"""As seen on Slurm 22.05."""


@pytest.mark.parametrize(
    ("environment", "interactive", "found"),
    [
        ({}, True, []),
        (dict.fromkeys(TORCHRUN, ""), False, []),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, False, []),
        (TORCHRUN, False, ["5", "8", "1", "4"]),
        (BATCH, False, []),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, True, []),  # the shell of salloc
        (BATCH | STEP_ALONE | PTY, True, []),  # of salloc, where use_interactive_step is set
        (JOB | STEP_ALONE | PTY | {"SLURM_NTASKS": "1"}, True, []),  # of srun --pty
        (BATCH | STEP_OF_4 | PTY, True, []),  # of srun --ntasks=4 --pty
        (
            TASK_3 | PTY,
            False,
            ["3", "4", "0", "1"],
        ),  # of an srun that was typed there, or started by --pty
        (TASK_3, True, ["3", "4", "0", "1"]),
        (TASK_3 | {"MASTER_ADDR": "n1", "WORLD_SIZE": "4"}, False, ["3", "4", "0", "1"]),
        (BATCH | STEP_OF_4 | {"SLURM_NTASKS": "1"}, False, []),  # a batch script submitted by one of four tasks
        (JOB | STEP_ALONE, False, []),
        (JOB | STEP_ALONE | {"COATNET_START": "7.0"}, False, ["0", "1", "0", "1"]),
        ({"COATNET_START": "local-7.0"}, False, []),
        (TASK_3 | TORCHRUN, False, ["5", "8", "1", "4"]),  # torchrun, started by srun on each node
    ],
)
def test_a_process_is_a_rank_only_if_a_launcher_says_so(
    environment: Mapping[str, str], interactive: bool, found: list[str]
) -> None:
    variables = rank_variables(environment, interactive)
    assert [variables[name] for name in IDENTITY if name in variables] == found


NUMBERS = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")


def problem(environment: Mapping[str, str]) -> str:
    with pytest.raises(UsageError) as refused:
        rank_variables(environment, interactive=False)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@given(st.sets(st.sampled_from(list(TORCHRUN))))
def test_half_of_a_launchers_variables_is_refused_naming_the_rest(names: set[str]) -> None:
    environment = {name: TORCHRUN[name] for name in names}
    claimed, missing = names & set(IDENTITY), TORCHRUN.keys() - names
    if not claimed or not missing:
        assert rank_variables(environment, interactive=False) == (environment if claimed else {})
        return
    said, _, advice = problem(environment).partition(": ")
    assert set(said.partition("but ")[2].replace(",", "").split()) & TORCHRUN.keys() == missing
    assert advice.endswith("unset " + " ".join(name for name in IDENTITY if name in claimed))


@pytest.mark.parametrize("name", [name for name in STEP if name != "SLURM_STEP_NUM_TASKS"])
def test_half_of_sruns_variables_is_refused_naming_the_rest(name: str) -> None:
    assert f"but {name} is not set" in problem({key: value for key, value in TASK_3.items() if key != name})


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        (TORCHRUN | {"RANK": "8"}, "RANK=8, WORLD_SIZE=8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4, LOCAL_WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE=9"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1'"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (TASK_3 | {"RANK": "0"}, "RANK=0, but srun says RANK=3"),
        (TASK_3 | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but srun says WORLD_SIZE=4"),
        *((TASK_3 | {name: wrong}, f"{name}='{wrong}'") for name in NUMBERS for wrong in ("x", "-5")),
        *((TASK_3 | {name: "9"}, f"{name}=9") for name in ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID")),
        (TASK_3 | dict.fromkeys(["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"], "3"), "SLURM_STEP_NUM_TASKS=3"),
        (TASK_3 | dict.fromkeys(["SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"], "x"), "SLURM_STEP_NUM_TASKS='x'"),
        (TASK_3 | {"SLURM_STEP_TASKS_PER_NODE": "x"}, "SLURM_STEP_TASKS_PER_NODE=x"),
    ],
)
def test_variables_that_cannot_be_are_refused(environment: Mapping[str, str], named: str) -> None:
    said = problem(environment)
    assert named in said and "unset" in said
    assert environment.keys() & IDENTITY or not re.search(r"\bRANK|WORLD_SIZE", said)


NONSENSE = {"RANK": "x", "LOCAL_RANK": "7", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    "words",
    ["--help", "keys", "pretrain --help", "pretrain configs/tiny.yaml --check", "finetune configs/tiny.yaml --check"],
)
def test_what_is_no_rank_does_not_look_at_a_launchers_variables(words: str) -> None:
    done = forked.run(COMMANDS, *words.split(), timeout=60, env=os.environ | NONSENSE)
    expected = forked.run(COMMANDS, *words.split(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.stdout, expected.stderr)


@pytest.mark.parametrize("words", ["pretrain configs/tiny.yaml", "evaluate run --data digits", "doctor"])
def test_what_may_be_a_rank_says_what_is_wrong_in_one_line(words: str) -> None:
    done = forked.run(COMMANDS, *words.split(), timeout=60, env=os.environ | {"RANK": "0", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("coatnet: RANK=0, WORLD_SIZE=2 would make") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("launcher", "unset"), [(TORCHRUN, "RANK"), (TASK_3, "SLURM_STEP_NUM_TASKS")])
def test_ranks_that_are_asked_for_beside_a_launcher_are_refused(launcher: dict[str, str], unset: str) -> None:
    done = forked.run(COMMANDS, "pretrain", "a.yaml", "--procs", 2, timeout=60, env=os.environ | launcher)
    assert done.returncode == 2
    assert "leave out --procs" in done.stderr and f"unset {unset}" in done.stderr and done.stderr.count("\n") == 1

"""The table of causes and decisions, row by row, and what holds for every history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slurm.history import JobStart
from slurm.requeue import (
    FAILURES,
    Cause,
    Ending,
    bad_nodes,
    classify_exit,
    classify_missing_exit,
    nodes_of_killed_tasks,
    nodes_reported_failed,
    requeue_decision,
    srun_error,
)

LONG = 10**5
"""Seconds left of a job that has just begun."""


@pytest.mark.parametrize(
    ("ending", "cause"),
    [
        (Ending(0, "finished"), Cause.DONE),
        (Ending(0, "finished", cancelled=True), Cause.DONE),
        (Ending(3, "interrupted", "SIGTERM", seconds_left=LONG, signal_seconds=300), Cause.PREEMPTED),
        (Ending(3, "interrupted", "SIGUSR2", seconds_left=LONG, signal_seconds=300), Cause.PREEMPTED),
        (Ending(3, "interrupted", "SIGUSR2", seconds_left=290, signal_seconds=300), Cause.TIME_LIMIT),
        (Ending(143, "interrupted", "SIGTERM", seconds_left=None), Cause.PREEMPTED),
        (Ending(3, statuses=(3, 3), seconds_left=LONG, signal_seconds=300), Cause.PREEMPTED),
        (Ending(3, statuses=(3, 3), seconds_left=290, signal_seconds=300), Cause.TIME_LIMIT),
        (Ending(143, statuses=(3,)), Cause.PREEMPTED),
        (Ending(140), Cause.PREEMPTED),
        (Ending(143, statuses=(3, 1)), Cause.CRASH),
        (Ending(143, statuses=(3,), killed=True), Cause.KILLED_RANK),
        (Ending(137, statuses=(3,)), Cause.KILLED_RANK),
        (Ending(143, statuses=(3, 2)), Cause.BAD_REQUEST),
        (Ending(3, "interrupted", "SIGINT"), Cause.CANCELLED),
        (Ending(3, "interrupted", "SIGTERM", cancelled=True), Cause.CANCELLED),
        (Ending(137, cancelled=True), Cause.CANCELLED),
        (Ending(1, statuses=(1, 1)), Cause.CRASH),
        (Ending(143, statuses=(2, 2)), Cause.BAD_REQUEST),
        (Ending(143, statuses=(1, 2)), Cause.BAD_REQUEST),
        (Ending(2), Cause.BAD_REQUEST),
        (Ending(1, "heartbeat_lost"), Cause.HANG),
        (Ending(1, "heartbeat_lost", statuses=(1,)), Cause.HANG),
        (Ending(1, "hang"), Cause.HANG),
        (Ending(137, "hang", statuses=(1,)), Cause.HANG),
        (Ending(137), Cause.KILLED_RANK),
        (Ending(1, srun_error="srun: fatal: --mem and --mem-per-cpu are mutually exclusive"), Cause.BAD_REQUEST),
        (Ending(1, srun_error="srun: error: Unable to create step for job 2: ..."), Cause.NOT_STARTED),
        (Ending(0, srun_error="srun: error: task 0 launch failed: ..."), Cause.NOT_STARTED),
        (Ending(127), Cause.NOT_STARTED),
        (Ending(137, lost=("n2",)), Cause.NODE_LOST),
        (Ending(1, statuses=(1,), lost=("n2",)), Cause.NODE_LOST),
        (Ending(1, "heartbeat_lost", lost=("n2",)), Cause.NODE_LOST),
        (Ending(1, "hang", lost=("n2",)), Cause.NODE_LOST),
    ],
)
def test_why_a_start_ended(ending: Ending, cause: Cause) -> None:
    assert classify_exit(ending) is cause


REQUEUED = "slurmstepd-n1: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-24T18:19:18 DUE TO JOB REQUEUE ***\n"
LOST = "slurmstepd-n1: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-24T18:20:11 DUE TO NODE FAILURE, SEE SLURMCTLD LOG\n"
TOO_LONG = "slurmstepd-n1: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-24T18:20:11 DUE TO TIME LIMIT ***\n"
CANCELLED = "slurmstepd-n1: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-24T18:20:11 ***\n"
STEP = "slurmstepd-n2: error: *** STEP 2.0 ON n2 CANCELLED AT 2026-11-24T18:20:10 ***\n"
"""Also where srun ends a step itself."""


@pytest.mark.parametrize(
    ("log", "lost", "expected"),
    [
        ([REQUEUED], (), (Cause.PREEMPTED, ())),
        ([REQUEUED], ("n2",), (Cause.NODE_LOST, ("n2",))),
        (["srun: error: Node failure on n2\n", LOST], (), (Cause.NODE_LOST, ("n2",))),  # it is back
        ([LOST], (), (Cause.NODE_LOST, ())),
        (["srun: error: n2: task 3: Exited with exit code 1\n"], (), (Cause.NODE_LOST, ("n1",))),
        ([], (), (Cause.NODE_LOST, ("n1",))),
        ([STEP], (), (Cause.NODE_LOST, ("n1",))),
        ([STEP, REQUEUED], (), (Cause.PREEMPTED, ())),
        ([TOO_LONG], (), (Cause.TIME_LIMIT, ())),
        ([CANCELLED], (), (Cause.CANCELLED, ())),
    ],
)
def test_why_a_batch_script_was_killed(log: list[str], lost: tuple[str, ...], expected: object) -> None:
    assert classify_missing_exit(log, ("n1", "n2"), lost) == expected


def test_a_local_script_that_was_killed_with_its_machine_leaves_no_node_to_blame() -> None:
    assert classify_missing_exit([], (), ()) == (Cause.KILLED_RANK, ())


def test_srun_reports_the_nodes_of_killed_tasks_and_failed_launches() -> None:
    log = [
        "srun: launch/slurm: _step_signal: Terminating StepId=2.0\n",
        "srun: error: n1: tasks 0-1: Exited with exit code 1\n",
        "srun: error: n2: task 3: Segmentation fault (core dumped)\n",
        "srun: error: n1: task 1: Killed\n",
        "srun: error: n1: task 0: Terminated\n",
        "srun: error: n1: task 2: User defined signal 2\n",
    ]
    assert nodes_of_killed_tasks(log) == ["n2", "n1"]
    refused = "srun: error: Task launch for StepId=2.0 failed on node n7: Communication connection failure\n"
    assert nodes_reported_failed([*log, refused]) == ["n7"]
    assert srun_error(log) is None


STEP_REFUSED = "error: Unable to create step for job 2: "


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause.BAD_REQUEST, words) for words in (
            "unrecognized option '--foo=1'", "invalid option -- 'y'", "option '--mem' requires an argument",
            "option '--e=1' is ambiguous; possibilities: '--epilog' '--error'", "fatal: No command given to execute.",
            "error: Invalid --mem specification", 'error: unrecognized --mem-bind argument "foo"',
            'error: Invalid numeric value "abc" for --wait.', "error: --propagate=FOO is not valid.",
            "error: Invalid MPI type 'foo', --mpi=list for acceptable types",
            "error: Only allocated 2 nodes asked for 3",
            STEP_REFUSED + "More processors requested than permitted", STEP_REFUSED + "Invalid qos specification",
            STEP_REFUSED + "Memory required by task is not available",
        )
    ] + [
        (Cause.NOT_STARTED, words) for words in (
            STEP_REFUSED + "Requested nodes are busy", STEP_REFUSED + "Socket timed out on send/recv operation",
            STEP_REFUSED + "Requested node configuration is not available",  # a node may be away
            "error: Unable to confirm allocation for job 2: Unable to contact slurm controller (connect failure)",
            "error: Application launch failed: Invalid job credential",
            "fatal: Could not establish a configuration source",
        )
    ],
)  # fmt: skip
def test_what_srun_can_never_do_is_not_tried_again_and_the_rest_is(cause: Cause, words: str) -> None:
    """Its words as Slurm 22.05 prints them, for options as well as from slurmctld."""
    refused = srun_error(["srun: Warning: can't honor --ntasks-per-node set to 2\n", f"srun: {words}\n"])
    assert refused == f"srun: {words}" and classify_exit(Ending(255, srun_error=refused)) is cause


def ended(*causes_and_steps: tuple[Cause, int], node: str = "n1") -> list[JobStart]:
    return [
        JobStart(f"7.{number}", (node,), 0.0, 1.0, cause, step, (node,) if cause in FAILURES else (), "")
        for number, (cause, step) in enumerate(causes_and_steps)
    ]


def decided(*history: tuple[Cause, int], max_restarts: int = 20) -> tuple[bool, float]:
    decision = requeue_decision(history[-1][0], ended(*history), max_restarts, backoff=60)
    assert decision.why
    return decision.again, decision.after


@pytest.mark.parametrize(
    ("cause", "again", "after"),
    [
        (Cause.DONE, False, 0), (Cause.CANCELLED, False, 0), (Cause.BAD_REQUEST, False, 0),
        (Cause.PREEMPTED, True, 0), (Cause.TIME_LIMIT, True, 0), (Cause.NODE_LOST, True, 0),
        (Cause.CRASH, True, 60), (Cause.KILLED_RANK, True, 60), (Cause.HANG, True, 60),
    ],
)  # fmt: skip
def test_what_follows_from_a_first_end(cause: Cause, again: bool, after: float) -> None:
    assert decided((cause, 40)) == (again, after)


def test_the_backoff_doubles_until_a_step_is_gained() -> None:
    crash = Cause.CRASH
    assert decided((crash, 40), (crash, 40)) == (True, 120)
    assert decided((crash, 40), (crash, 40), (crash, 44)) == (True, 60)


def test_three_failures_at_the_same_step_are_the_end_whatever_came_between() -> None:
    crash, killed = (Cause.CRASH, 40), (Cause.KILLED_RANK, 40)
    assert decided(crash, killed, crash) == (False, 0)
    assert decided(crash, (Cause.PREEMPTED, 40), killed, (Cause.TIME_LIMIT, 40), crash) == (False, 0)
    assert decided(crash, (Cause.CRASH, 44), killed, crash)[0]


@given(st.lists(st.sampled_from([Cause.PREEMPTED, Cause.TIME_LIMIT, Cause.NODE_LOST]), min_size=1, max_size=200))
def test_preemptions_time_limits_and_lost_nodes_use_up_no_restarts(causes: list[Cause]) -> None:
    assert decided(*((cause, 0) for cause in causes), max_restarts=0) == (True, 0)


@given(st.integers(0, 10), st.integers(0, 12))
def test_failures_are_restarted_max_restarts_times(most: int, failures: int) -> None:
    history = [(Cause.CRASH, step) for step in range(failures + 1)]
    assert decided(*history, max_restarts=most)[0] == (failures + 1 <= most)


def test_a_node_that_failed_twice_is_excluded_and_another_is_not() -> None:
    once = ended((Cause.CRASH, 1), node="n1") + ended((Cause.CRASH, 2), node="n2")
    assert bad_nodes(once) == ()
    twice = [*once, *ended((Cause.KILLED_RANK, 3), node="n2")]
    assert requeue_decision(Cause.KILLED_RANK, twice, 20, 60).exclude == ("n2",)

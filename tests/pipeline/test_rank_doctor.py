"""Many ranks' checks become one report that a person can read, and a rank that reports nothing is named in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.launcher import free_port
from pipeline.doctor.checks import SEVERITY, Check, exit_status
from pipeline.doctor.merge import ALIKE, Report, merge
from pipeline.doctor.ranks import collect, missing_ranks, rendezvous_dir, report
from tests.pipeline.runs import PATIENCE_SECONDS, ROOT, coatnet, command, pack_two

WORDS = st.sampled_from(["2.12.0", "2.13.0", "not installed", ""])
CHECKS = st.builds(
    Check,
    st.sampled_from(["torch", "GPU 0", "run.dir", "clocks"]),
    st.sampled_from(SEVERITY),
    WORDS,
    WORDS,
    st.dictionaries(st.sampled_from(["read", "free"]), st.just("7 MB/s")),
)
REPORTS = st.lists(
    st.builds(Report, st.sampled_from(["n1", "n2", "n3"]), st.lists(CHECKS, max_size=4).map(tuple)), max_size=8
)


def merged(checks: list[Check]) -> Check:
    """One check of each of the hosts n1, n2 ... as one."""
    (check,) = merge([Report(f"n{number}", (check,)) for number, check in enumerate(checks, 1)])
    return check


# ------------------------------------------------------------------------------------------------------------ the merge


@given(REPORTS)
def test_each_thing_is_one_check_in_the_worst_state_of_any_rank(reports: list[Report]) -> None:
    given_checks = [check for report in reports for check in report.checks]
    found = merge(reports)
    assert [check.what for check in found] == list(dict.fromkeys(check.what for check in given_checks))
    for check in found:
        of_it = [each for each in given_checks if each.what == check.what]
        worst = max((each.state for each in of_it), key=SEVERITY.index)
        differs = check.what in ALIKE and len({each.detail for each in of_it}) > 1
        assert check.state == ("broken" if differs else worst)


@given(st.lists(CHECKS, unique_by=lambda check: check.what))
def test_the_checks_of_a_single_rank_read_as_it_reported_them(checks: list[Check]) -> None:
    def read(found: list[Check]) -> list[tuple[str, ...]]:
        return [(each.what, each.state, str(each), each.advice) for each in found]

    assert read(merge([Report("n1", tuple(checks))])) == read(checks)


@given(st.lists(st.text("abc", max_size=3), min_size=1, max_size=400))
def test_a_check_of_hundreds_of_hosts_can_be_read(details: list[str]) -> None:
    assert len(merged([Check("GPU 0", "ok", detail, f"do {detail}") for detail in details]).detail) < 200


@pytest.mark.parametrize(
    ("checks", "state", "detail"),
    [
        (100 * [Check("GPU 0", "ok", "H100")], "ok", "on all 100 hosts: H100"),
        (
            [*99 * [Check("/dev/shm", "ok", "large")], Check("/dev/shm", "note", "small", "enlarge it")],
            "note",
            "n100: small; n1, n2, n3 and 96 more: large",
        ),
        (
            [Check("interpreter", "ok", f"/node{number}/python") for number in range(6)],
            "ok",
            "n1: /node0/python; n2: /node1/python; n3: /node2/python; n4: /node3/python; and 2 more",
        ),
        (
            [Check("run.dir", "ok", "/scratch", figures={"read": f"{speed} MB/s"}) for speed in (300, 20)],
            "ok",
            "on all 2 hosts: /scratch; read 300 MB/s (measured on n1)",
        ),
    ],
    ids=["equal", "one is worse", "all differ", "figures"],
)
def test_equal_checks_are_one_line_and_the_worst_comes_first(checks: list[Check], state: str, detail: str) -> None:
    check = merged(checks)
    assert (check.state, check.detail) == (state, detail)
    assert check.advice == next((each.advice for each in checks if each.advice), "")


def test_versions_that_differ_are_broken_and_listed_by_host() -> None:
    check = merged([Check("torch", "ok", version) for version in ["2.13.0", "2.13.0", "2.12.0"]])
    assert (check.state, check.detail) == ("broken", "n1, n2: 2.13.0; n3: 2.12.0")
    assert "slurm.setup" in check.advice


# ------------------------------------------------------------------------------------------------- ranks that are there


def test_a_rank_that_never_reports_is_named_and_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 2):
        monkeypatch.setenv("SLURMD_NODENAME", f"n{rank + 1}")
        report(tmp_path, rank, [Check("run.dir", "ok", "/scratch", figures={"free": "79 GiB"})])
    reports = collect(tmp_path, 4, timeout=0.3)
    assert merge(list(reports.values()))[0].detail == "on all 2 hosts: /scratch; free 79 GiB (measured on n1)"
    missing = missing_ranks(reports, 4, ["n1", "n2", "n3"])
    assert (missing.state, missing.detail) == ("broken", "2 of 4 never reported: 1, 3; nothing from n2")
    assert "run.dir" in missing.advice and exit_status([missing]) == 1
    assert missing_ranks(reports, 4, []).detail == "2 of 4 never reported: 1, 3"


def test_a_rank_that_does_not_see_the_runs_folder_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path / "elsewhere", 3, [], timeout=0.1)
    assert "rank 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_start_meet_where_no_other_start_does(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": "29500"}
    starts = [slurm, slurm | {"SLURM_STEP_ID": "1"}, slurm | {"SLURM_RESTART_COUNT": "1"}]
    starts += [{"TORCHELASTIC_RUN_ID": "of/me", "MASTER_PORT": port} for port in ("29500", "29501")]
    folders = [rendezvous_dir(tmp_path / "run", start) for start in starts]
    assert len(set(folders)) == len(starts)
    assert {folder.parent for folder in folders} == {tmp_path}


def test_ranks_without_a_configuration_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    done = coatnet("doctor")
    assert done.returncode == 2
    assert "run.dir" in done.stderr and not done.stdout


@pytest.mark.torture
def test_two_ranks_on_two_hosts_give_one_report(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    settings = (f"run.dir={tmp_path}/runs/a", f"data.train={pack_two(tmp_path)}", "data.val=null", "--json")
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            command("doctor", "configs/tiny.yaml", *settings),
            cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (report, errors), silence = (rank.communicate(timeout=PATIENCE_SECONDS) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert silence == ("", "")
    details = {check["what"]: check["detail"] for check in json.loads(report)}
    assert details["ranks"] == "2 on n1, n2"
    assert "2 ranks all-reduce" in details["collectives"] and "bus bandwidth" in details["collectives"]
    assert {"torch", "DALI", "run.dir", "data.train", "clocks"} <= set(details)
    assert details["torch"].startswith("on all 2 hosts: ")
    assert list((tmp_path / "runs").iterdir()) == []

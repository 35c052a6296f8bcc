"""Many ranks' findings become one report that a person can read, and a rank that says nothing is named in it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.distributed.launcher import free_port
from pipeline.doctor.findings import Check, Measurement, exit_status
from pipeline.doctor.merge import ALIKE, SEVERITY, Report, abbreviate, merge
from pipeline.doctor.ranks import collect, missing_ranks, rendezvous_dir, report
from pipeline.formatting import format_ranges
from tests.pipeline.runs import PATIENCE_SECONDS, ROOT, coatnet, command, pack_two

WORDS = st.sampled_from(["2.12.0", "2.13.0", "not installed", ""])
FINDINGS = st.builds(
    Check,
    st.sampled_from(["torch", "GPU 0", "run.dir", "clocks"]),
    st.sampled_from(SEVERITY),
    WORDS,
    WORDS,
    st.lists(
        st.builds(Measurement, st.sampled_from(["read", "free"]), st.floats(0, 1e6), st.just("MB")), max_size=2
    ).map(lambda figures: tuple({figure.what: figure for figure in figures}.values())),
)
REPORTS = st.lists(
    st.builds(Report, st.sampled_from(["n1", "n2", "n3"]), st.lists(FINDINGS, max_size=4).map(tuple)), max_size=8
)


def of_hosts(findings: list[Check]) -> list[Report]:
    """One finding of each of the hosts n1, n2 ..."""
    return [Report(f"n{number}", (finding,)) for number, finding in enumerate(findings, 1)]


def merged(findings: list[Check]) -> Check:
    (finding,) = merge(of_hosts(findings))
    return finding


# ------------------------------------------------------------------------------------------------------------ the merge


@given(REPORTS)
def test_each_thing_is_one_finding_in_the_worst_state_that_any_rank_found_it_in(reports: list[Report]) -> None:
    said = [finding for report in reports for finding in report.findings]
    found = merge(reports)
    assert [finding.what for finding in found] == list(dict.fromkeys(finding.what for finding in said))
    for finding in found:
        of_it = [each for each in said if each.what == finding.what]
        worst = max((each.state for each in of_it), key=SEVERITY.index)
        differs = finding.what in ALIKE and len({each.detail for each in of_it}) > 1
        assert finding.state == ("broken" if differs else worst)


@given(st.lists(FINDINGS, unique_by=lambda finding: finding.what))
def test_what_one_rank_alone_found_reads_as_it_said_it(findings: list[Check]) -> None:
    def read(found: list[Check]) -> list[tuple[str, ...]]:
        return [(each.what, each.state, str(each), each.advice) for each in found]

    assert read(merge([Report("n1", tuple(findings))])) == read(findings)


@given(st.lists(st.text("abc", max_size=3), min_size=1, max_size=400))
def test_a_finding_of_hundreds_of_hosts_can_be_read(details: list[str]) -> None:
    assert len(merged([Check("GPU 0", "ok", detail, f"do {detail}") for detail in details]).detail) < 200


def test_what_all_hosts_say_alike_is_one_line() -> None:
    assert merged(100 * [Check("GPU 0", "ok", "H100")]) == Check("GPU 0", "ok", "on all 100 hosts: H100")


def test_versions_that_differ_are_broken_and_said_by_host() -> None:
    versions = ["2.13.0", "2.13.0", "2.12.0"]
    finding = merged([Check("torch", "ok", version) for version in versions])
    assert (finding.state, finding.detail) == ("broken", "n1, n2: 2.13.0; n3: 2.12.0")
    assert "slurm.setup" in finding.advice


def test_what_is_wrong_on_one_host_comes_first_with_its_advice() -> None:
    finding = merged([*99 * [Check("/dev/shm", "ok", "large")], Check("/dev/shm", "note", "small", "enlarge it")])
    assert (finding.state, finding.detail) == ("note", "n100: small; n1, n2, n3 and 96 more: large")
    assert finding.advice == "enlarge it"


def test_of_many_different_details_a_few_are_said() -> None:
    finding = merged([Check("interpreter", "ok", f"/node{number}/python") for number in range(9)])
    assert finding.detail.endswith("n4: /node3/python; and 5 more")


def test_figures_are_said_from_the_least_to_the_most_with_their_hosts() -> None:
    speeds = [300.0, 1250.0, 20.5]
    figures = [(Measurement("read", speed, "MB/s"), Measurement("free", 7.0, "GiB")) for speed in speeds]
    finding = merged([Check("run.dir", "ok", "/scratch", figures=each) for each in figures])
    assert finding.detail == "on all 3 hosts: /scratch; read 20.5 MB/s (n3) to 1,250 MB/s (n2), free 7 GiB"


# ------------------------------------------------------------------------------------------------- ranks that are there


@given(st.sets(st.integers(0, 30)))
def test_spans_name_every_number_once(numbers: set[int]) -> None:
    named = abbreviate(format_ranges(numbers))
    if "more" not in named:
        ends = [each.split("-") for each in named.split(", ") if each]
        assert [n for begin, *end in ends for n in range(int(begin), int((end or [begin])[0]) + 1)] == sorted(numbers)
    assert abbreviate(range(5)) == "0, 1, 2 and 2 more"


def test_a_rank_that_never_comes_is_named_and_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 2):
        monkeypatch.setenv("SLURMD_NODENAME", f"n{rank + 1}")
        report(tmp_path, rank, [Check("device", "ok", "H100", figures=(Measurement("free", 79.0, "GiB"),))])
    reports = collect(tmp_path, 4, patience=0.3)
    assert merge(list(reports.values()))[0].detail == "on all 2 hosts: H100; free 79 GiB"
    missing = missing_ranks(reports, 4, ["n1", "n2", "n3"])
    assert (missing.state, missing.detail) == ("broken", "2 of 4 never came: 1, 3; nothing from n2")
    assert "run.dir" in missing.advice and exit_status([missing]) == 1
    assert missing_ranks(reports, 4, []).detail == "2 of 4 never came: 1, 3"


def test_a_rank_that_does_not_see_the_run_s_folder_says_so_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report(tmp_path / "elsewhere", 3, [], patience=0.1)
    assert "rank 3" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_one_start_meet_where_no_other_start_does(tmp_path: Path) -> None:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "MASTER_PORT": "29500"}
    starts = [slurm, slurm | {"SLURM_STEP_ID": "1"}, slurm | {"SLURM_RESTART_COUNT": "1"}]
    starts += [{"TORCHELASTIC_RUN_ID": "of/me", "MASTER_PORT": port} for port in ("29500", "29501")]
    folders = [rendezvous_dir(tmp_path / "run", start) for start in starts]
    assert len(set(folders)) == len(starts)
    assert {folder.parent for folder in folders} == {tmp_path}


def test_ranks_without_a_configuration_are_told_that_they_need_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    answer = coatnet("doctor")
    assert answer.returncode == 2
    assert "run.dir" in answer.stderr and not answer.stdout


def test_two_ranks_on_two_hosts_give_one_report(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    settings = (f"run.dir={tmp_path}/runs/a", f"data.train={pack_two(tmp_path)}", "data.val=null", "--json")
    shared = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            command("doctor", "configs/tiny.yaml", *settings),
            cwd=ROOT, env=os.environ | shared | meeting | {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank + 1}"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (report, errors), silence = (rank.communicate(timeout=PATIENCE_SECONDS) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert silence == ("", "")
    found = {finding["what"]: finding for finding in json.loads(report)}
    assert found["ranks"]["detail"] == "2 on n1, n2"
    assert "2 ranks add up" in found["collectives"]["detail"] and "bus bandwidth" in found["collectives"]["detail"]
    assert "ahead of rank 0's by" in found["clocks"]["detail"]
    assert {"torch", "DALI", "run.dir", "data.train"} <= set(found)
    assert found["torch"]["detail"].startswith("on all 2 hosts: ")
    assert list((tmp_path / "runs").iterdir()) == []

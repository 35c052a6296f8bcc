"""Work on data that is submitted in parts: what is handed on, what is refused, and what Slurm makes of it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from data.packing.work import open_work
from data.shards.manifest import Shard, write_manifest
from pipeline import cli
from pipeline.errors import UsageError
from slurm.cli import app
from slurm.parts import elements, read_jobs
from slurm.scheduler import parse_elements, show_elements
from tests.cluster.slurm import Cluster
from tests.pipeline.runs import ROOT, coatnet, contents, last_step, wait_until

SIZE = ["slurm.memory=1800M", "slurm.time=10"]
"""Two parts on each node of the cluster."""


def here(*words: object) -> str:
    """The output of a command of ours, whose error is raised."""
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The manifest of a shard, as far as a submission looks at it."""
    (folder := tmp_path / "packed").mkdir()
    write_manifest(str(folder), ["cat"], [Shard("shard-000000.tar", 1, 3, "")])
    (folder / "shard-000000.tar").write_text("tar")
    return folder


def status(place: Path) -> dict[str, Any]:
    return json.loads(here("status", place, "--json"))


def test_each_part_is_asked_for_what_was_asked_of_the_submission(packed: Path, tmp_path: Path) -> None:
    commands = typer.main.get_command(cli.data_app).commands  # type: ignore[attr-defined]
    for command, words in {
        "pack": ["it's", f"{tmp_path}/$1", "--resize=64", "--holdout", "0.1", "--seed", "0", "--json", "--overwrite"],
        "index": [f"{packed}", "--out", f"{tmp_path}/out", "--decode", "--label-field=meta.label"],
        "verify": [f"{packed}", "--workers", "2"],
    }.items():
        printed = here("submit", command, *words, "--parts", 7, "--dry-run", "slurm.command_prefix=in container")
        plan, array = (shlex.split(line) for line in re.findall("^exec in container (.*)$", printed, re.MULTILINE))
        for program, part in ((plan, "0/7"), (array, "$SLURM_ARRAY_TASK_ID/7")):
            assert program[3:8] == ["pipeline.cli", "data", command, "--part", part]
            asked = [word for word in words if program is plan or word != "--overwrite"]  # the plan begins anew
            same, handed_on = (commands[command].make_context(command, each).params for each in (asked, program[8:]))
            assert handed_on == same
        assert {"#SBATCH --array=1-7", "#SBATCH --dependency=afterok:JOB-BEFORE"} < set(printed.splitlines())
        assert printed.count("#SBATCH --requeue\n") == printed.count("#SBATCH --kill-on-invalid-dep=yes\n") == 2


def test_a_request_that_no_part_could_do_is_refused_as_it_is_submitted(packed: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    for words, message in (
        (["pack", "images", new, "slurm.nodes=2"], "slurm.nodes=2 does not apply"),
        (["pack", "images", new, "slurm.requeue=array"], "slurm.requeue=array does not apply"),
        (["pack", "images", new, "data.train=x"], "data.train=x does not apply"),
        (["pack", "images", new, "slurm.tme=2"], "slurm.tme: unknown; did you mean slurm.time"),
        (["pack", "images", new, "slurm.time=soon"], 'slurm.time is "soon"; it must be minutes'),
        (["pack", "images", new, "slurm.sbatch=[--array=2]"], "slurm.sbatch has --array=2"),
        (["pack", tmp_path, new], "is inside the source"),
        (["pack", "images", packed], "already holds shards"),
        (["pack", "images", "memory://bucket/new"], "for the jobs' files, with --logs FOLDER"),
        (["index", packed], "has a manifest.json"),
        (["index", tmp_path], "has no .tar files"),
        (["verify", tmp_path], "manifest.json does not exist"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            here("submit", *words, "--parts", 2, "--dry-run")
    result = CliRunner().invoke(app, ["submit", "pack", "images", str(new), "--parts", "2", "--resise=3"])
    assert result.exit_code == 2 and "No such option: --resise" in result.output
    assert not new.exists()


STAND_IN = """
for word; do [ "$before" = --part ] && part=${word%/*}; before=$word; done
[ -e fail-$part ] && { echo "coatnet: the disk is full"; exit 1; }
[ $part = 0 ] || echo '{}' > .packing/00000$((part - 1)).json
"""
"""For `coatnet data pack`: a part makes the record of its one shard, or fails."""


def test_what_is_submitted_again_is_what_is_missing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    (new := tmp_path / "new").mkdir()
    monkeypatch.chdir(new)
    work = open_work(str(new), ".packing", {"source": "images"})
    work.join(restart=False)
    work.publish_plan(3, images=30)
    (new / "stand-in").write_text(STAND_IN)
    (new / "fail-2").touch()
    request = ["submit", "pack", "images", new, "--parts", 3, "slurm.command_prefix=sh stand-in", *SIZE]
    here(*request, "slurm.sbatch=[--hold]")
    with pytest.raises(UsageError, match=f"has not ended; .* `coatnet cancel {new}`"):
        here(*request)
    for number, _ in read_jobs(new / ".slurm"):
        cluster.run("scontrol", "release", number)
    wait_until(lambda: status(new)["jobs"][-1]["states"] == {"COMPLETED": 2, "FAILED": 1}, seconds_between=0.2)
    facts = status(new)
    assert (facts["state"], facts["done"], facts["items"], facts["images"]) == ("packing", 2, 3, 30)
    (failed,) = facts["failed"]
    assert (failed["part"], failed["state"], failed["reason"]) == (2, "FAILED", "coatnet: the disk is full")
    assert "the disk is full" in Path(failed["log"]).read_text() and "part 2 is not done" in here("status", new)
    (new / "fail-2").unlink()
    here(*request, "slurm.sbatch=[--hold]")
    plan, array, again = (job for _, job in read_jobs(new / ".slurm"))
    assert (plan.array, array.array, again.array) == (None, "1-3", "2")
    assert "cancelled job" in here("cancel", new) and status(new)["jobs"][-1]["state"] == "CANCELLED"
    here(*request)  # a few were not enough: all
    wait_until(lambda: status(new)["done"] == 3, seconds_between=0.2)
    wait_until(lambda: status(new)["jobs"][-1]["states"] == {"COMPLETED": 3}, seconds_between=0.2)


def test_the_elements_of_an_array_are_read_as_they_are_written(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    for parts in ([4], [1, 2, 3], [number for number in range(1, 300) if number % 7 in (0, 1, 2, 5)]):
        assert parse_elements(elements(parts)) == parts
        held = ["sbatch", "--parsable", "--hold", "--mem=100", f"--array={elements(parts)}%3", "--wrap", "exit"]
        job = cluster.run(*held)
        assert sorted(show_elements(job)) == parts
        cluster.run("scancel", job)


@pytest.mark.torture
def test_data_is_prepared_by_parts_on_nodes_of_which_one_is_powered_off(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed, indexed, verified, trained on; the bytes are those of one machine."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    with tarfile.open(ROOT / "demo" / "digits.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    images, alone, parts = tmp_path / "digits" / "train", tmp_path / "alone", tmp_path / "parts"
    options = ["--samples-per-shard", 8, "--workers", 1]
    assert coatnet("data", "pack", images, alone, *options).returncode == 0

    def until_done(place: Path) -> None:
        def is_done() -> bool:
            facts = status(place)
            return facts["state"] == "done" and facts["jobs"][-1]["states"].keys() == {"COMPLETED"}

        wait_until(is_done, seconds_between=0.5)

    def equals_alone(place: Path) -> bool:
        shutil.rmtree(place / ".slurm")
        return contents(place) == contents(alone)

    here("submit", "pack", images, parts, "--parts", 4, *options, *SIZE)
    wait_until(lambda: any((parts / ".packing").glob("0*.json")))
    cluster.power_off("n2")
    try:
        wait_until(lambda: status(parts)["restarts"] > 0, seconds_between=0.5)
    finally:
        cluster.start_node("n2")
    until_done(parts)
    assert equals_alone(parts)

    for place in (alone, parts):
        for file in [*place.glob("*.idx"), *place.glob("*.npy"), place / "manifest.json"]:
            file.unlink()
    assert coatnet("data", "index", alone, "--decode").returncode == 0
    here("submit", "index", parts, "--parts", 3, "--decode", *SIZE)
    until_done(parts)
    assert equals_alone(parts)

    here("submit", "verify", parts, "--parts", 2, *SIZE)
    until_done(parts)
    assert json.loads((parts / "verified.json").read_text())["broken"] == []
    run = tmp_path / "run"
    keys = [f"data.train={parts}", "data.val=null", f"run.dir={run}", "train.steps=2", "train.micro_batch=16"]
    assert coatnet("pretrain", "configs/tiny.yaml", *keys).returncode == 0 and last_step(run) == 2

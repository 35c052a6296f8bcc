"""A run's folder after a power cut or a person: one file emptied, cut, replaced or gone, or a stranger beside it.

Every command ends as it should, and a run whose checkpoints are good resumes to the same weights.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.config.parsing import read_config
from pipeline.errors import UsageError
from slurm.history import starts
from slurm.job import read_request
from slurm.sbatch import snapshot
from slurm.submit import JobSpec, prepare
from tests import forked
from tests.pipeline.runs import PATIENCE_SECONDS, consumed, contents, curve, events, last_state, wait_until

CASES = 2


@dataclass(frozen=True)
class Begun:
    """A fine-tuning with all that a run's folder can have, after a local job and another start."""

    run: Path
    copy: Path
    source: Path
    image: Path
    val: Path
    request: list[str]
    """The command that resumes it for one more step."""

    def restored(self) -> Path:
        """The run's folder as it was."""
        shutil.rmtree(self.run)
        shutil.copytree(self.copy, self.run, symlinks=True)
        return self.run


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Begun:
    folder = tmp_path_factory.mktemp("runs")
    source, run = folder / "source", folder / "run"
    data = [
        f"data.train={digits}/train",
        "data.val=null",
        "train.epochs=null",
        "train.global_batch=32",
        "optim.decay=none",
    ]
    often = ["train.micro_batch=32", "checkpoint.every=1", "evaluate.every=null", "log.every=1"]
    pretrained = ended("pretrain", "configs/tiny.yaml", *data, *often, "train.steps=1", f"run.dir={source}")
    assert pretrained[0] == 0, pretrained
    watched = ["log.samples=pixels", "log.profile=1-1", "log.wandb=digits", f"checkpoint.mirror={folder / 'mirror'}"]
    request = ["finetune", "configs/tiny_finetune.yaml", "--from", str(source), f"run.dir={run}", *data, *often]
    submitted = ended("submit", *request, *watched, "train.steps=1", "--cluster", "local")
    assert submitted[0] == 0, submitted
    wait_until(lambda: any(start.ended for start in starts(run)))
    again = ended(*request, *watched, "train.steps=2")
    assert again[0] == 0, again
    shutil.copytree(run, folder / "copy")
    image = next((digits / "digits" / "val").rglob("*.png"))
    return Begun(run, folder / "copy", source, image, digits / "val", [*request, *watched, "train.steps=3"])


def ended(*command: object) -> tuple[int, str]:
    """The exit status of a command and what it said on standard error."""
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = forked.run("slurm.cli", *command, timeout=PATIENCE_SECONDS, env=environment)
    return done.returncode, done.stderr


def readers(begun: Begun, out: Path) -> list[list[object]]:
    """Commands that read a run; none of them changes it."""
    run = begun.run
    return [
        ["status", run],
        ["status", run.parent, "--json"],
        ["logs", run],
        ["cancel", run],
        ["export", run, out / "out.safetensors", "--overwrite"],
        ["predict", run, begun.image],
        ["evaluate", run, "--data", begun.val],
        ["finetune", "configs/tiny_finetune.yaml", "--from", run, "--check", f"run.dir={out}/new"],
        ["submit", *begun.request, "--dry-run"],
    ]


# -------------------------------------------------------------------------------------------------------------- damage

Damage = Callable[[Path], object]


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def with_line(line: bytes) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes() + line)


DAMAGES: dict[str, Damage] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "without its last byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "removed": Path.unlink,
    "a folder": as_folder,
    "with a note": with_line(b'{"note": "lowered the rate"}\n'),
    "with zeros": with_line(bytes(4096)),
}
FILES = ("note.txt", ".DS_Store", ".nfs0001", "7.json", "x-0.log", "request-x.json", ".step-00000002.swp")
FOLDERS = ("notes", "step-abc", "step-1", "x.json", "7-0.log", "7_0_log.out")


def with_strangers(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_bytes(b"\xff of mine")
    for name in FOLDERS:
        (folder / name / "more").mkdir(parents=True)
    (folder / "loop.log").symlink_to(folder / "loop.log")


def cases(copy: Path) -> Iterator[tuple[str, str, Damage]]:
    """A place in a run's folder, what happens there, and its doing; of the program's copy one folder and one module."""
    program: set[str] = set()
    for path in [copy, *sorted(copy.rglob("*"))]:
        name = path.relative_to(copy)
        if "code-" in str(name):
            if path.suffix in program:
                continue
            program.add(path.suffix)
        if name.parts[:1] != ("wandb",):  # W&B's own
            damages = {"with strangers": with_strangers} if path.is_dir() else DAMAGES
            yield from ((str(name), what, damage) for what, damage in damages.items())


WRITTEN = {"config.yaml", ".lock"}
"""A start cannot do without them, so none of them may be a folder."""
RECORDS = {"metrics.jsonl", "samples/rank-0.jsonl"}
"""Without them a run trains, and they cannot be compared."""


def faults(begun: Begun, chosen: list[tuple[str, str, Damage]], out: Path) -> list[str]:
    """What ended otherwise than it should, in these cases."""
    begun.restored()
    healthy = {str(command): ended(*command) for command in readers(begun, out)}
    assert [status for status, _ in healthy.values()] == [0, 0, 0, 2, 0, 0, 0, 0, 0], healthy
    status, said = ended(*begun.request)
    assert status == 0, said
    expected = last_state(begun.run), curve(begun.run)[-1], consumed(begun.run)[3]
    found = []
    for name, what, damage in chosen:
        damage(begun.restored() / name)
        place = f"{name} {what}"
        for command in readers(begun, out):
            status, said = ended(*command)
            is_named = said.count("\ncoatnet: ") + said.startswith("coatnet: ") == 1 and Path(name).name in said
            if "Traceback" in said or status not in (healthy[str(command)][0], *((1, 2) if is_named else ())):
                found.append(f"{place}: {command[:2]}: {status}: {said}")
        status, said = ended(*begun.request)
        blocked = what == "a folder" and name in WRITTEN
        if "Traceback" in said or (status not in (1, 2) if blocked else status != 0):
            found.append(f"{place}: {status}: {said}")
        elif not blocked and what == "a folder" and name in RECORDS:
            found += [f"{place}: other weights"] if last_state(begun.run) != expected[0] else []
        elif not blocked:
            now = last_state(begun.run), curve(begun.run)[-1], consumed(begun.run)[3]
            pairs = zip(("weights", "metrics", "samples"), now, expected, strict=True)
            found += [f"{place}: other {what}" for what, ours, theirs in pairs if ours != theirs]
    return found


def test_after_damage_to_any_file_commands_end_properly_and_runs_resume(begun: Begun, tmp_path: Path) -> None:
    assert not faults(begun, random.Random(0).sample(list(cases(begun.copy)), CASES), tmp_path)


@pytest.mark.torture
def test_after_every_damage_to_every_file_commands_end_properly_and_runs_resume(begun: Begun, tmp_path: Path) -> None:
    assert not faults(begun, list(cases(begun.copy)), tmp_path)


# ------------------------------------------------------------------------------------------------ what stands in for it


ONE = "removed"
OTHERS = [pytest.param(what, marks=pytest.mark.torture) for what in ("emptied", "cut")]


@pytest.mark.parametrize("what", [ONE, *OTHERS])
def test_without_config_yaml_a_run_is_what_its_newest_checkpoint_says(begun: Begun, what: str) -> None:
    DAMAGES[what](begun.restored() / "config.yaml")
    status, said = ended(*begun.request, "run.seed=5")
    assert status == 2 and "run.seed was 0, now 5" in said, said
    status, said = ended(*begun.request)
    assert status == 0 and f"warning: {begun.run}/config.yaml" in said, said
    (noted,) = events(begun.run, "damaged_file")
    assert noted["file"] == str(begun.run / "config.yaml") and "newest checkpoint" in noted["instead"]


@pytest.mark.parametrize("what", [ONE, *OTHERS])
def test_without_source_json_a_run_resumes_from_what_it_began_and_nothing_else(begun: Begun, what: str) -> None:
    DAMAGES[what](begun.restored() / "source.json")
    others = [str(begun.run) if word == str(begun.source) else word for word in begun.request]
    status, said = ended(*others)
    assert status == 2 and f"was started from {begun.source}, but --from is {begun.run}" in said, said
    moved = begun.source.rename(begun.source.with_name("elsewhere"))
    status, said = ended(*begun.request)
    moved.rename(begun.source)
    assert status == 0 and said.count("warning: ") == 1 and f"{begun.run}/source.json" in said, said


def test_a_submission_replaces_a_damaged_copy_of_the_program(tmp_path: Path) -> None:
    code = snapshot(tmp_path)
    whole = contents(code)
    (code / "pipeline" / "train.py").write_bytes(b"")
    (code / "slurm" / "job.py").unlink()
    (code / "data" / "mine.py").touch()
    assert snapshot(tmp_path) == code and contents(code) == whole and "pipeline/report/page.html" in whole
    assert [path.name for path in tmp_path.iterdir()] == [code.name]


def test_a_request_never_takes_the_place_of_one_that_a_job_may_wait_for(tmp_path: Path) -> None:
    config = read_config("configs/tiny.yaml", ["data.train=here", f"run.dir={tmp_path}/run"])
    for _ in range(3):
        prepare(JobSpec("pretrain", "tiny.yaml", config), tmp_path, None)
    waiting = {name: (tmp_path / name).read_bytes() for name in ("request-1.json", "request-2.json", "config-2.yaml")}
    (tmp_path / "request-0.json").unlink()
    (tmp_path / "config-0.yaml").unlink()
    prepare(JobSpec("pretrain", "tiny.yaml", config), tmp_path, None)
    assert waiting == {name: (tmp_path / name).read_bytes() for name in waiting}
    assert read_request(tmp_path / "request-3.json").command == ["pretrain", str(tmp_path / "config-3.yaml")]
    for content in (b"", b"{}", b"\xff"):
        (tmp_path / "request-3.json").write_bytes(content)
        with pytest.raises(UsageError, match=r"request-3.json is damaged: submit the run again"):
            read_request(tmp_path / "request-3.json")

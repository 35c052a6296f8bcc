"""Resuming where something is wrong: whole runs of two ranks and six steps."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.reader import FORMAT, checkpoints, digest_of, step_name
from pipeline.distributed.environment import LAUNCHER
from tests.pipeline.runs import PATIENCE_SECONDS, ROOT, coatnet, curve, events, last_state

Arguments = Callable[..., list[object]]


@pytest.fixture(scope="module")
def request_of(digits: Path) -> Arguments:
    def arguments(run: Path, *more: object, procs: int = 2) -> list[object]:
        where = [f"data.train={digits}/train", "data.val=null", f"run.dir={run}"]
        length = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=9", "log.every=1"]
        return ["pretrain", "configs/tiny.yaml", "--procs", procs, *where, *length, *more]

    return arguments


@pytest.fixture(scope="module")
def undisturbed(request_of: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a mirror beside it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = coatnet(*request_of(folder / "run", f"checkpoint.mirror={folder}/mirror"))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """The run as it was after step 4."""
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / step_name(6))
    return run


def rewrite_manifest(checkpoint: Path, **changed: Any) -> None:
    """Changes a manifest, with a checksum that agrees."""
    file = checkpoint / "manifest.json"
    manifest = {**json.loads(file.read_text()), **changed}
    del manifest["sha256"]
    file.write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))


def test_a_run_whose_folder_is_gone_resumes_from_its_mirror_to_the_bit(
    undisturbed: Path, request_of: Arguments, tmp_path: Path
) -> None:
    mirror = Path(shutil.copytree(undisturbed.parent / "mirror", tmp_path / "mirror"))
    assert [row["step"] for row in events(undisturbed, "mirrored")] == [2, 4, 6]
    shutil.rmtree(mirror / "checkpoints" / step_name(6))
    run = tmp_path / "run"
    done = coatnet(*request_of(run, f"checkpoint.mirror={mirror}"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("was restored from") == 1
    assert len(events(run, "copied")) == 1 and not events(run, "mirror_failed")
    assert [row["step"] for row in events(run, "training_resumed")] == [4]
    assert [row["attempt"] for row in events(run, "attempt_started")] == [0, 1]
    assert curve(run) == curve(undisturbed) and last_state(run) == last_state(undisturbed)


@pytest.mark.parametrize("wrong", ["another network", "newer"])
def test_a_checkpoint_of_another_network_or_newer_format_is_refused_not_skipped(
    copy: Path, request_of: Arguments, wrong: str
) -> None:
    newest = checkpoints(copy / "checkpoints")[-1]
    if wrong == "newer":
        rewrite_manifest(newest, format=FORMAT + 1)
    else:
        shapes = json.loads((newest / "manifest.json").read_text())["parameters"]
        rewrite_manifest(newest, parameters={**shapes, "stem.first.weight": [8, 3, 5, 5]})
    refused = coatnet(*request_of(copy))
    message = "a newer coatnet" if wrong == "newer" else "stem.first.weight is [8, 3, 5, 5] there and"
    assert refused.returncode == 2 and message in refused.stderr, refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("coatnet: ")]) == 1
    assert events(copy, "damaged_checkpoint") == []
    assert [folder.name for folder in checkpoints(copy / "checkpoints")] == [step_name(2), step_name(4)]


def test_without_memory_for_a_copy_the_live_state_is_written_with_one_warning(
    undisturbed: Path, request_of: Arguments, tmp_path: Path
) -> None:
    """As our launcher's single rank, in a process where copies may take none of the memory."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    assert coatnet(*request_of(alone, procs=1)).returncode == 0
    program = "from pipeline import cli; from pipeline.checkpoint import snapshot, writer\n"
    program += "writer.COPY_SHARE = 0; snapshot.CHUNK_BYTES = 1 << 20; cli.main()"
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", LAUNCHER: str(os.getpid())}
    command = [sys.executable, "-c", program, *map(str, request_of(run))]
    environment = {**os.environ, **rank}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("host memory has no room for a copy of the state") == 1
    assert [row["blocking"] for row in events(run, "checkpoint")] == [True, True, True]
    assert [row["blocking"] for row in events(alone, "checkpoint")] == [False, False, False]
    assert last_state(run) == last_state(alone)


def test_a_run_on_a_full_disk_ends_with_one_line_and_resumes_when_there_is_room(
    undisturbed: Path, request_of: Arguments, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(file.stat().st_size for file in (undisturbed / "checkpoints" / step_name(2)).iterdir())
    small = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", disk]
    if subprocess.run(small, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        ended = coatnet(*request_of(disk / "run"))
        assert ended.returncode == 1, ended.stderr
        assert "step-00000004 cannot be written: No space left on device; it needs" in ended.stderr
        assert "resumes from step 2" in ended.stderr
        assert "Traceback" not in ended.stderr
        left = [file.parent.name for file in (disk / "run" / "checkpoints").rglob("*") if file.is_file()]
        assert set(left) == {step_name(2)}
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", disk], check=True)
        done = coatnet(*request_of(disk / "run"))
        assert done.returncode == 0, done.stderr
        assert last_state(disk / "run") == last_state(undisturbed)
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)

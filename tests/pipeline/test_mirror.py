"""Laws of the mirror: its copies are complete, a failure is reported and stops nothing, a lost run is restored."""

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.storage.remote import open_fs, write_file
from pipeline.attempt import claim
from pipeline.checkpoint.mirror import Mirror, complete, list_copies, restore_from_mirror, upload
from pipeline.checkpoint.reader import FORMAT, CheckpointReader, checkpoints, digest_of, step_name
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.errors import DataError, RunFailed, UsageError
from tests.data.servers import Server, forever, s3_server
from tests.forked import ROOT, forkserver
from tests.pipeline.test_checkpoint import FILES, read_everything, two_ranks, write_ranks

URL = "s3://data/runs/tiny"


@pytest.fixture
def s3() -> Iterator[Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with its small files and the checkpoints of steps 1 to 4."""
    folder = tmp_path / "run"
    for step in range(1, 5):
        write_ranks(folder / "checkpoints", two_ranks(), step)
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl"):
        (folder / name).write_text(f"{name} of the run\n")
    return folder


def config_of(run: Path, mirror: str | None = URL) -> Config:
    more = [f"run.dir={run}", "data.train=nowhere", f"checkpoint.mirror={'null' if mirror is None else mirror}"]
    return read_config(str(ROOT / "configs" / "tiny.yaml"), more)


class Emitted(list[dict[str, Any]]):
    """The events that were written."""

    def __call__(self, event: str, **facts: Any) -> None:
        self.append({"event": event, **facts})

    def steps(self, event: str) -> list[int]:
        return [row["step"] for row in self if row["event"] == event]


def mirrored(run: Path, url: str, steps: list[int], keep_last: int = 9, keep_every: int | None = None) -> Emitted:
    """Copies these checkpoints one after the other."""
    emitted = Emitted()
    mirror = Mirror(url, run, keep_last, keep_every, emitted)
    for step in steps:
        mirror.copy(run / "checkpoints" / step_name(step))
        mirror.wait()
    return emitted


def damage(url: str) -> None:
    fs, path = open_fs(url)
    content = bytearray(fs.cat_file(path))
    content[len(content) // 2] ^= 1
    write_file(fs, path, bytes(content))


# -------------------------------------------------------------------------------------------------------------- copying


def test_a_copy_has_all_files_the_manifest_last_and_the_small_files(run, s3):
    emitted = mirrored(run, URL, [4])
    assert emitted.steps("mirrored") == [4] and len(emitted) == 1
    assert sorted(list_copies(URL)[4]) == FILES
    put = [request.path.removeprefix("/data/runs/tiny/") for request in s3.requests if request.method == "PUT"]
    assert set(put) == {f"checkpoints/{step_name(4)}/{file}" for file in FILES} | {
        "config.yaml", "metrics.jsonl", "events.jsonl", "run.json"
    }  # fmt: skip
    assert put[-1] == f"checkpoints/{step_name(4)}/manifest.json"


@pytest.mark.parametrize("place", ["s3", "folder"])
def test_superseded_and_incomplete_copies_are_deleted(run, s3, tmp_path, place):
    url = URL if place == "s3" else str(tmp_path / "mirror")
    fs, top = open_fs(url)
    fs.makedirs(f"{top}/checkpoints/{step_name(3)}", exist_ok=True)
    write_file(fs, f"{top}/checkpoints/{step_name(3)}/state.json", b"half a copy")
    mirrored(run, url, [1, 2, 4], keep_last=1, keep_every=2)
    assert sorted(list_copies(url)) == sorted(complete(list_copies(url))) == [2, 4]


def test_a_checkpoint_that_is_written_again_replaces_its_copy(run, s3, tmp_path):
    mirrored(run, URL, [4])
    shutil.rmtree(run / "checkpoints" / step_name(4))
    (rank,) = [{**two_ranks()[0], **two_ranks()[1]}]
    write_ranks(run / "checkpoints", [rank], 4)
    mirrored(run, URL, [4])
    assert "rank-00001.safetensors" not in list_copies(URL)[4]
    shutil.rmtree(run)
    restore_from_mirror(config_of(tmp_path / "other"))
    read_everything(tmp_path / "other" / "checkpoints" / step_name(4))


def test_a_failed_copy_is_reported_without_credentials_and_the_next_is_tried(run, s3, capsys):
    s3.plan = forever("403", step_name(3))
    emitted = mirrored(run, URL, [3, 4])
    assert [(row["event"], row["step"]) for row in emitted] == [("mirror_failed", 3), ("mirrored", 4)]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ") and step_name(3) in warning and emitted[0]["reason"] in warning
    assert sorted(complete(list_copies(URL))) == [4]
    emitted = mirrored(run, "no-such-protocol://user:secret@host/place", [4])
    assert emitted.steps("mirror_failed") == [4] and "secret" not in str(emitted) + capsys.readouterr().err


def test_the_newest_is_next_and_of_those_between_only_keep_every_is_copied(run, s3):
    emitted, asked, proceed = Emitted(), threading.Event(), threading.Event()

    def hold(path: str, _range: str | None, _before: int) -> None:
        asked.set()
        assert proceed.wait(60)

    s3.plan = hold
    mirror = Mirror(URL, run, 9, 2, emitted)
    folders = checkpoints(run / "checkpoints")
    mirror.copy(folders[0])
    assert asked.wait(60)
    for folder in folders[1:]:
        mirror.copy(folder)
    assert mirror.in_use() == {folders[0], folders[1], folders[3]}
    proceed.set()
    mirror.wait()
    assert emitted.steps("mirrored") == [1, 2, 4] and mirror.in_use() == set()


def test_a_rollback_does_not_wait_for_the_mirror_whose_abandoned_copies_go_first(run, s3):
    mirrored(run, URL, [2, 3])
    asked, proceed = threading.Event(), threading.Event()

    def hold(path: str, _range: str | None, _before: int) -> None:
        asked.set()
        assert proceed.wait(60)

    s3.plan = hold
    mirror = Mirror(URL, run, 9, None, Emitted())
    mirror.copy(run / "checkpoints" / step_name(4))
    assert asked.wait(60)
    mirror.delete_after(1)
    mirror.copy(run / "checkpoints" / step_name(2))  # done again
    assert not mirror.wait(0)
    proceed.set()
    assert mirror.wait(60) and sorted(list_copies(URL)) == [2]


def test_a_signal_ends_the_wait_for_a_copy_with_a_warning(run, s3, capsys):
    emitted, asked, proceed = Emitted(), threading.Event(), threading.Event()
    s3.plan = lambda path, bytes_of, before: asked.set() or (proceed.wait(60) and None)
    mirror = Mirror(URL, run, 9, None, emitted)
    mirror.copy(run / "checkpoints" / step_name(4))
    assert asked.wait(60) and not mirror.wait(0)
    mirror.leave()
    proceed.set()
    assert emitted.steps("mirror_failed") == [4] and step_name(4) in capsys.readouterr().err
    assert mirror.wait(60) and emitted.steps("mirrored") == [4]


# ------------------------------------------------------------------------------------------------------------ restoring


def test_a_lost_run_is_restored_with_its_newest_checkpoint_and_small_files(run, s3, capsys):
    mirrored(run, URL + "/", [3, 4])
    small = {name: (run / name).read_text() for name in ("config.yaml", "metrics.jsonl", "events.jsonl")}
    shutil.rmtree(run)
    restore_from_mirror(config_of(run, URL + "/"))
    assert [folder.name for folder in checkpoints(run / "checkpoints")] == [step_name(4)]
    read_everything(run / "checkpoints" / step_name(4))
    assert {name: (run / name).read_text() for name in small} == small
    assert capsys.readouterr().out == f"{run} had no checkpoint: {step_name(4)} was restored from {URL}\n"


def test_what_the_folder_still_has_is_not_replaced(run, s3):
    mirrored(run, URL, [4])
    shutil.rmtree(run / "checkpoints")
    (run / "events.jsonl").write_text("longer than the mirror's\n")
    restore_from_mirror(config_of(run))
    assert (run / "events.jsonl").read_text() == "longer than the mirror's\n"
    asked = len(s3.requests)
    restore_from_mirror(config_of(run))
    assert len(s3.requests) == asked  # there is a checkpoint now


@pytest.mark.parametrize("harm", ["flipped", "missing", "no manifest"])
def test_a_damaged_or_incomplete_copy_is_skipped_for_the_one_before(run, s3, capsys, harm):
    mirrored(run, URL, [3, 4])
    file = "manifest.json" if harm == "no manifest" else "rank-00001.safetensors"
    place = f"{URL}/checkpoints/{step_name(4)}/{file}"
    if harm == "flipped":
        damage(place)
    else:
        fs, path = open_fs(place)
        fs.rm_file(path)
    shutil.rmtree(run)
    restore_from_mirror(config_of(run))
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [step_name(3)]
    assert (step_name(4) in capsys.readouterr().err) == (harm != "no manifest")


def test_without_a_good_copy_or_with_a_newer_format_nothing_begins_again(run, s3):
    mirrored(run, URL, [3, 4])
    for step in (3, 4):
        damage(f"{URL}/checkpoints/{step_name(step)}/state.json")
    shutil.rmtree(run)
    with pytest.raises(RunFailed, match=f"none of {step_name(3)}, {step_name(4)} is good") as error:
        restore_from_mirror(config_of(run))
    assert "\n" not in str(error.value)
    fs, path = open_fs(f"{URL}/checkpoints/{step_name(4)}/manifest.json")
    manifest = json.loads(fs.cat_file(path))
    del manifest["sha256"]
    manifest["format"] = FORMAT + 1
    write_file(fs, path, json.dumps({**manifest, "sha256": digest_of(manifest)}).encode())
    with pytest.raises(UsageError, match="written by a newer coatnet"):
        restore_from_mirror(config_of(run))
    assert checkpoints(run / "checkpoints") == []


def test_a_mirror_without_checkpoints_means_a_first_start(tmp_path, s3):
    for url in (URL, str(tmp_path / "nowhere"), None):
        restore_from_mirror(config_of(tmp_path / "run", url))
        assert not (tmp_path / "run").exists()


def test_an_unreadable_mirror_stops_only_a_run_without_checkpoints(run, s3):
    s3.plan = forever("403")
    restore_from_mirror(config_of(run))
    shutil.rmtree(run)
    with pytest.raises(DataError, match=r"checkpoint\.mirror=null"):
        restore_from_mirror(config_of(run))
    assert not run.exists()


def test_a_mirror_that_is_no_folder_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "mirror").write_text("")
    with pytest.raises(DataError, match="Not a directory"):
        list_copies(str(tmp_path / "mirror"))
    assert list_copies(str(tmp_path / "nowhere")) == {}


def test_a_run_that_is_alive_elsewhere_is_not_written_into(run, s3, monkeypatch):
    monkeypatch.setattr("pipeline.run.lock.LOCK_TIMEOUT_SECONDS", 0.2)
    mirrored(run, URL, [4])
    shutil.rmtree(run)
    with claim(run).lock, pytest.raises(UsageError, match="already running"):
        restore_from_mirror(config_of(run))
    assert not (run / "checkpoints").exists()


def start(config: Config, together: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # where S3 is
    together.wait()
    restore_from_mirror(config)
    read_everything(checkpoints(Path(config.run.dir) / "checkpoints")[-1])


def test_ranks_that_start_at_once_restore_it_once(run, s3):
    upload(run / "checkpoints" / step_name(4), run, URL)
    shutil.rmtree(run)
    s3.forget()
    together = forkserver.Barrier(3)
    ranks = [forkserver.Process(target=start, args=(config_of(run), together, dict(os.environ))) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    fetched = [request for request in s3.requests if request.method == "GET" and "rank-00000" in request.path]
    assert len(fetched) == 1
    assert CheckpointReader(checkpoints(run / "checkpoints")[-1]).step == 4


# -------------------------------------------------------------------------------------------------------- wrong mirrors


def test_a_password_in_the_url_is_refused_without_repeating_it():
    with pytest.raises(UsageError, match=r"checkpoint\.mirror contains a password") as error:
        restore_from_mirror(config_of(Path("run"), "ftp://user:secret@host/place"))
    assert "secret" not in str(error.value)


def test_the_runs_own_folder_and_an_unknown_protocol_are_refused(run):
    with pytest.raises(UsageError, match=r"are the same folder, or one contains the other"):
        restore_from_mirror(config_of(run, f"file://{run}"))
    with pytest.raises(UsageError, match=r"checkpoint\.mirror: .* cannot be opened"):
        restore_from_mirror(config_of(run, "no-such-protocol://place"))

"""Laws of places: the same data, weights and run are the same wherever they lie, and others are refused there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import DataError
from data.packing.index import index
from data.shards.labels import Reading
from data.shards.manifest import read_manifest, write_manifest
from data.shards.sample_table import table_bytes
from pipeline.attempt import claim
from pipeline.checkpoint.attempts import latest_attempt
from pipeline.checkpoint.mirror import Mirror, list_copies, restore_from_mirror
from pipeline.checkpoint.reader import checkpoints, step_name
from pipeline.checkpoint.writer import GlobalState, rank_shard, write_checkpoint
from pipeline.commands.finetune import pin_source, source_of
from pipeline.commands.pretrain import set_files_aside
from pipeline.config.parsing import read_config, to_yaml
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.plan import make_plan
from pipeline.run.identity import identify, settle
from pipeline.run.restart import set_aside
from slurm import history
from slurm.submit import refuse_anothers_mirror
from tests.pipeline.networks import export_network, tiny
from tests.pipeline.runs import ROOT, as_format_1, contents, events, pack_two


def config_of(run: Path, data: object, *more: str) -> Config:
    small = ["data.val=null", "train.global_batch=2", "train.micro_batch=2", f"run.dir={run}", f"data.train={data}"]
    return read_config(str(ROOT / "configs" / "tiny.yaml"), [*small, *more])


def save(
    run: Path,
    step: int,
    value: float = 0.0,
    fingerprint: str | None = "",
    headers: str | None = None,
    data: object = "nowhere",
) -> Path:
    """A checkpoint with one number as its weight, trained on data of these fingerprints."""
    state = {"train_fingerprint": fingerprint, "train_header_fingerprint": headers, "classes": ["a"]}
    state |= {"config": config_of(run, data).model_dump(mode="json")}
    common = GlobalState({"w": (1,)}, {}, json.dumps({**state, "step": step, "ancestry": []}))
    part = rank_shard(step, {("w", "weight", 0): torch.tensor([value])}, common)
    write_checkpoint(run / "checkpoints", max(0, latest_attempt(run)), 0, 1, part)
    return run / "checkpoints" / step_name(step)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_two(tmp_path_factory.mktemp("two"))


def with_slash(packed: Path) -> str:
    return f"{packed}/"


def linked(packed: Path) -> Path:
    link = packed.with_name("link")
    link.symlink_to(packed)
    return link


def as_url(packed: Path) -> str:
    return f"file://{packed}"


def of_format_1(packed: Path) -> Path:
    as_format_1(packed)
    return packed


def without_headers(packed: Path) -> Path:
    """As early manifests of format 2 are."""
    rewritten(packed, shards=[replace(shard, headers="") for shard in read_manifest(str(packed)).shards])
    return packed


def completed_by_index(packed: Path) -> Path:
    as_format_1(packed)
    index(str(packed), None, decode=False, classes=None, label_field=None, workers=1, progress=lambda *_: None)
    return packed


def tars_apart(packed: Path) -> Path:
    """The tars in another folder than manifest and tables."""
    manifest, tars = read_manifest(str(packed)), packed.with_name("tars")
    tars.mkdir()
    for tar in packed.glob("*.tar"):
        tar.rename(tars / tar.name)
    write_manifest(str(packed), manifest.classes, manifest.shards, shards_at=str(tars))
    return packed


@pytest.mark.parametrize(
    "move", [Path, with_slash, linked, as_url, of_format_1, without_headers, completed_by_index, tars_apart]
)
def test_the_same_data_are_taken_wherever_they_lie(two: Path, tmp_path: Path, move: Callable[[Path], object]) -> None:
    save(tmp_path / "run", 1, fingerprint=read_manifest(str(two)).fingerprint or "", data=two)
    place = move(Path(shutil.copytree(two, tmp_path / "moved")))
    assert make_plan(config_of(tmp_path / "run", place), "pretrain", 1, 1).newest == 1
    was, now = read_manifest(str(two)), read_manifest(str(place))
    assert (now.fingerprint, now.header_fingerprint) == (was.fingerprint, was.header_fingerprint)


def test_data_are_the_same_whether_their_images_were_looked_at_or_not(two: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    request: dict[str, Any] = {
        "classes": str(tmp_path / "classes.txt"),
        "label_field": None,
        "workers": 1,
        "progress": lambda *_: None,
    }
    for decode in (False, True):
        index(f"{two}/*.tar", str(tmp_path / f"decode-{decode}"), decode=decode, **request)
    packed, bare, looked = map(read_manifest, map(str, (two, tmp_path / "decode-False", tmp_path / "decode-True")))
    assert looked.fingerprint == packed.fingerprint != bare.fingerprint
    for number, (before, now) in enumerate([(bare, packed), (packed, bare)]):
        run = tmp_path / f"{number}"
        save(run, 1, fingerprint=before.fingerprint, headers=before.header_fingerprint)
        assert make_plan(config_of(run, now.url), "pretrain", 1, 1).newest == 1


def other_images(packed: Path) -> None:
    """The same sizes, other bytes: only the tables tell."""
    rows = bytearray((packed / "shard-000000.npy").read_bytes())
    rows[256 + 12] ^= 1
    (packed / "shard-000000.npy").write_bytes(rows)
    as_format_1(packed)


def rewritten(packed: Path, **changes: Any) -> None:
    manifest = read_manifest(str(packed))
    options: dict[str, Any] = {"classes": manifest.classes, "shards": manifest.shards, **changes}
    write_manifest(str(packed), options.pop("classes"), options.pop("shards"), **options)


def other_order(packed: Path) -> None:
    rewritten(packed, shards=read_manifest(str(packed)).shards[::-1])


def other_classes(packed: Path) -> None:
    rewritten(packed, classes=["cat", "wolf"])


def other_reading(packed: Path) -> None:
    rewritten(packed, labels=Reading.NAMES)


@pytest.mark.parametrize("change", [other_images, other_order, other_classes, other_reading])
def test_other_data_are_refused_before_any_rank_starts_with_both_places(
    two: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    was = read_manifest(str(two))
    checkpoint = save(tmp_path / "run", 1, fingerprint=was.fingerprint, headers=was.header_fingerprint, data=two)
    place = Path(shutil.copytree(two, tmp_path / "moved"))
    change(place)
    with pytest.raises(UsageError, match="a different training set") as refused:
        make_plan(config_of(tmp_path / "run", place), "pretrain", 1, 1)
    assert all(str(each) in str(refused.value) for each in (place, two, checkpoint))
    assert "\n" not in str(refused.value)


def test_a_manifest_that_cannot_be_completed_is_read_again_with_a_warning(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Path(shutil.copytree(two, tmp_path / "moved"))
    before = as_format_1(place)

    def refuse(*_: Any) -> None:
        raise DataError("read-only")

    monkeypatch.setattr("data.shards.manifest.write_file", refuse)
    plan = make_plan(config_of(tmp_path / "run", place), "pretrain", 1, 1)
    assert plan.train.fingerprint == read_manifest(str(two)).fingerprint
    assert f"`coatnet data index {place}`" in capsys.readouterr().err
    assert (place / "manifest.json").read_bytes() == before
    (place / "shard-000000.npy").write_bytes(table_bytes(torch.zeros(0).numpy()))
    with pytest.raises(DataError, match=r"shard-000000\.npy does not have 1 samples"):
        make_plan(config_of(tmp_path / "run", place), "pretrain", 1, 1)


def test_a_checkpoint_of_an_older_version_knows_its_completed_data(two: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(two, tmp_path / "moved"))
    save(tmp_path / "run", 1, fingerprint=hashlib.sha256(as_format_1(place)).hexdigest())
    for _ in range(2):  # completed by the first
        assert make_plan(config_of(tmp_path / "run", place), "pretrain", 1, 1).newest == 1


# -------------------------------------------------------------------------------------------------------------- source


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files with other weights."""
    folder = tmp_path_factory.mktemp("exported")
    return [export_network(folder / f"{n}.safetensors", *tiny(n), list("0123456789"[:n])).folder for n in (4, 5)]


@pytest.mark.parametrize("kind", ["file", "checkpoint", "run"])
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_source_is_its_weights_wherever_they_lie(
    exported: list[Path], tmp_path: Path, kind: str, has_begun: bool
) -> None:
    run, first, moved, other = (tmp_path / name for name in ("run", "first", "moved", "other"))
    if kind == "file":
        for place, content in ((first, exported[0]), (other, exported[1])):
            shutil.copy(content, place)
    else:
        save(first, 1, 0.0), save(other, 1, 1.0)
    inside = f"checkpoints/{step_name(1)}" if kind == "checkpoint" else ""
    run.mkdir()
    pin_source(run, source_of(run, first / inside, None))
    if has_begun:
        save(run, 1)
    first.rename(moved)
    found = source_of(run, moved / inside, None)
    assert Path(found.checkpoint).exists() and Path(found.checkpoint).is_relative_to(moved)
    with pytest.raises(UsageError, match=rf"started from {first}\S*, but --from is {other}"):
        source_of(run, other / inside, None)
    other.rename(first)
    with pytest.raises(UsageError, match=rf"started from {first}\S*, but --from has other weights"):
        source_of(run, first / inside, None)
    shutil.rmtree(first) if first.is_dir() else first.unlink()
    assert source_of(run, None, None) == source_of(run, first / inside, None)
    if has_begun:
        assert source_of(run, tmp_path / "nowhere", None).run == found.run.replace("moved", "first")
    else:
        with pytest.raises(UsageError, match="which this run starts from"):
            source_of(run, first / inside, None).reader()


def test_a_source_that_has_gone_on_since_then_stops_nothing(tmp_path: Path) -> None:
    run, source, other = tmp_path / "run", tmp_path / "source", tmp_path / "other"
    run.mkdir()
    for folder in (source, other):
        save(folder, 1 if folder == source else 2)
        settle(folder)
    pin_source(run, source_of(run, source, None))
    save(run, 1), save(source, 2)
    shutil.rmtree(source / "checkpoints" / step_name(1))
    source_of(run, source, None)
    source = source.rename(tmp_path / "moved")
    source_of(run, source, None)
    with pytest.raises(UsageError, match=f"--from is {other}"):
        source_of(run, other, None)


# ----------------------------------------------------------------------------------------------------------------- run


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A run with a checkpoint at a mirror, and a job."""
    folder = tmp_path / "first"
    folder.mkdir()
    settle(folder)
    (folder / "config.yaml").write_text(to_yaml(config_of(folder, "data", f"checkpoint.mirror={tmp_path}/mirror")))
    history.record_submission(folder, job="7")
    history.record_start(folder, "7.0", ("n1",))
    assert mirrored(folder, save(folder, 1)) == ["mirrored"]
    return folder


def mirrored(run: Path, checkpoint: Path) -> list[str]:
    """Which events copying a checkpoint to the mirror makes."""
    emitted: list[str] = []
    mirror = Mirror(str(run.parent / "mirror"), run, 1, None, lambda event, **facts: emitted.append(event))
    mirror.copy(checkpoint)
    mirror.wait()
    return emitted


def start(run: Path, *more: str) -> str:
    """As a start of a run with the first one's mirror; its id."""
    restore_from_mirror(config_of(run, "data", f"checkpoint.mirror={run.parent}/mirror/", *more))
    with claim(run).lock:
        return settle(run).id


def submit(run: Path) -> None:
    """As far as what is checked of its mirror."""
    refuse_anothers_mirror(config_of(run, "data", f"checkpoint.mirror={run.parent}/mirror/"))


@pytest.mark.parametrize("how", ["renamed", "linked", "restored", "copied and removed"])
def test_a_run_that_was_moved_is_the_same_run(first: Path, how: str) -> None:
    identity, moved = identify(first), first.with_name("moved")
    if how == "renamed":
        first.rename(moved)
    elif how == "linked":
        moved.symlink_to(first)
    elif how == "restored":
        shutil.rmtree(first)
    else:
        shutil.copytree(first, moved)
        shutil.rmtree(first)
    assert start(moved) == identity.id and checkpoints(moved / "checkpoints")
    if how != "restored":  # what is known of jobs is not at the mirror
        assert [row["job"] for row in history.submissions(moved)] == ["7"] and len(history.starts(moved)) == 1
    assert mirrored(moved, save(moved, 2)) == ["mirrored"]
    recorded = [] if how == "linked" else [(str(first), str(moved))]
    assert [(row["from"], row["to"]) for row in events(moved, "moved")] == recorded


def test_a_copied_run_is_a_run_of_its_own_and_the_first_keeps_what_it_has(first: Path) -> None:
    identity, copied = identify(first), Path(shutil.copytree(first, first.with_name("copied")))
    for _ in range(2):  # before its first start, and after
        assert history.submissions(copied) == [] and history.starts(copied) == []
        for begin in (start, submit):
            with pytest.raises(UsageError, match=f"is the mirror of the run in {first}"):
                begin(copied)
        own = start(copied, "checkpoint.mirror=null")
        assert own != identity.id and identify(copied).id == own
    assert len(events(copied, "copied")) == 1
    (first / "config.yaml").unlink()  # only the mirror itself says whose it is
    before = contents(first.parent / "mirror")
    assert mirrored(copied, save(copied, 9)) == ["mirror_failed"]
    assert contents(first.parent / "mirror") == before
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UsageError, match=f"is the mirror of the run in {first}"):
        start(copied)
    assert start(first) == identity.id and [row["job"] for row in history.submissions(first)] == ["7"]
    assert mirrored(first, save(first, 2)) == ["mirrored"]


def test_a_mirror_restores_no_second_run_beside_one_that_lives(first: Path) -> None:
    with pytest.raises(UsageError, match=f"is the mirror of the run in {first}"):
        start(first.with_name("second"))
    assert not first.with_name("second").exists()


def test_a_run_that_lost_its_note_is_known_by_its_events(first: Path) -> None:
    (first / "events.jsonl").write_text(json.dumps({"event": "attempt_started", "run": identify(first).id}) + "\n")
    identity = identify(first)
    for damage in (b"", b"{", b"[]"):
        (first / "run.json").write_bytes(damage)
        assert start(first) == identity.id


def test_an_older_run_keeps_its_page_at_weights_and_biases_and_its_jobs(tmp_path: Path) -> None:
    (tmp_path / "wandb.json").write_text('{"id": "ab"}')
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.jsonl").write_text('{"job": "7", "time": 1}\n')
    assert settle(tmp_path).id == settle(tmp_path).id == "ab"
    assert [row["job"] for row in history.submissions(tmp_path)] == ["7"]


# ------------------------------------------------------------------------------------------------------ gone or anew


def write_events(run: Path, *rows: dict[str, Any]) -> None:
    run.mkdir(exist_ok=True)
    (run / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


SAVED = [{"event": "checkpoint", "step": step} for step in (2, 4)]


@pytest.mark.parametrize(
    ("rows", "lost"),
    [
        ([], None),
        (SAVED, 4),
        ([*SAVED, {"event": "rollback", "to": 3}], 2),
        ([*SAVED, {"event": "rollback", "to": 0}], None),
        ([{"event": "attempt_started"}, {"event": "interrupted", "step": 3}], 3),
        ([{"event": "attempt_started"}, {"event": "checkpoint_failed", "step": 2}], None),
    ],
)
def test_what_a_run_has_saved_and_not_abandoned_must_be_there(
    two: Path, tmp_path: Path, rows: list[dict[str, Any]], lost: int | None
) -> None:
    write_events(tmp_path / "run", *rows)
    config = config_of(tmp_path / "run", two)
    if lost is None:
        assert make_plan(config, "pretrain", 1, 1).is_new_run
    else:
        with pytest.raises(UsageError, match=f"checkpoints are gone: it had saved step {lost} .*--restart"):
            make_plan(config, "pretrain", 1, 1)


def test_a_run_whose_events_are_gone_too_does_not_begin_again(two: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 7}\n')
    with pytest.raises(UsageError, match=r"events.jsonl.* is gone too, and metrics.jsonl ends with step 7.*--restart"):
        make_plan(config_of(tmp_path / "run", two), "pretrain", 1, 1)


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "rank-00000.safetensors", None])
def test_a_run_is_done_by_a_checkpoint_whose_files_are_there(two: Path, tmp_path: Path, file: str | None) -> None:
    config = config_of(tmp_path / "run", two, "train.steps=4")
    fingerprint = read_manifest(str(two)).fingerprint or ""
    save(tmp_path / "run", 2, fingerprint=fingerprint, data=two)
    newest = save(tmp_path / "run", 4, fingerprint=fingerprint, data=two)
    assert make_plan(config, "pretrain", 1, 1).finished
    if file:
        (newest / file).unlink()
    else:  # a stranger's folder of a later step
        shutil.rmtree(newest)
        (tmp_path / "run" / "checkpoints" / step_name(5)).mkdir()
    plan = make_plan(config, "pretrain", 1, 1)
    assert plan.newest == 2 and not plan.finished
    shutil.rmtree(tmp_path / "run" / "checkpoints" / step_name(2))
    (tmp_path / "run" / "checkpoints" / step_name(2)).mkdir()
    plan = make_plan(config, "pretrain", 1, 1)
    assert not plan.finished and not plan.is_new_run


def test_setting_files_aside_loses_nothing_and_spares_a_run_that_is_alive(
    first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.lock.LOCK_TIMEOUT_SECONDS", 0.1)
    before, old = contents(first), identify(first)
    with claim(first).lock, pytest.raises(UsageError, match="already running"):
        set_aside(first)
    shutil.rmtree(first / "attempts")
    mirrored_config = config_of(first, "data", f"checkpoint.mirror={first.parent}/mirror")
    with pytest.raises(UsageError, match=r"checkpoint\.mirror=.* has checkpoints that the run would resume from"):
        set_files_aside(mirrored_config)
    assert contents(first) == before
    set_files_aside(config_of(first, "data"))
    assert contents(first / "restarted-1") == before
    assert settle(first).id != old.id and identify(first / "restarted-1").id == old.id
    assert history.submissions(first) == [] and list_copies(str(first.parent / "mirror"))
    set_files_aside(config_of(first, "data"))
    assert {path.name for path in first.iterdir()} == {".lock", "restarted-1", "restarted-2"}
    assert os.listdir(first / "restarted-2") == ["run.json"] and set_aside(first) is None

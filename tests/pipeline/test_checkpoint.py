"""Laws of checkpoints: complete or absent, every byte verified, the same values for any writers and readers."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.memory import available_bytes, available_in_group
from pipeline.checkpoint import snapshot, writer
from pipeline.checkpoint.pruning import prune, remove_leftovers
from pipeline.checkpoint.reader import (
    FORMAT,
    CheckpointReader,
    DamagedCheckpoint,
    checkpoints,
    prunable,
    step_name,
    step_of,
)
from pipeline.checkpoint.weights import latest_checkpoint
from pipeline.checkpoint.writer import CheckpointWriter, GlobalState, RankShard, rank_shard, write_checkpoint
from pipeline.config.schema import Checkpoint
from pipeline.errors import RunFailed, UsageError
from pipeline.run.events import Events
from tests.forked import forkserver
from tests.pipeline.runs import events

KINDS = ("weight", "exp_avg", "ema")
SHAPES = {"stem.weight": (7, 3, 2, 2), "stages.0.bias": (5,), "scale": (), "head.weight": (40, 6)}
FILES = ["buffers.safetensors", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors", "state.json"]
STATE = {"step": 1, "classes": ["a", "b"], "note": "straße"}
BUFFERS = {"weight:norm.running_mean": torch.linspace(0, 1, 9), "weight:count": torch.tensor([3])}


def values_of(name: str, kind: str) -> np.ndarray:
    """Numbers unlike those of every other parameter and kind, infinities and NaN among them."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {kind}".encode()).digest()[:4], "little")
    values = np.random.default_rng(seed).standard_normal(int(np.prod(SHAPES[name]))).astype(np.float32)
    values[:3] = [np.inf, np.nan, -0.0][: len(values[:3])]
    return values


def elements_of(cuts: dict[str, list[int]], owners: list[int], world_size: int) -> list[dict]:
    """What each rank owns, where parameters are cut at these places and the slices are dealt to these owners."""
    of_rank: list[dict] = [{} for _ in range(world_size)]
    number = 0
    for name, shape in SHAPES.items():
        count = int(np.prod(shape))
        borders = sorted({0, count, *(cut % (count + 1) for cut in cuts.get(name, []))})
        for start, end in itertools.pairwise(borders):
            for kind in KINDS:
                owned = of_rank[owners[number % len(owners)] % world_size]
                owned[name, kind, start] = torch.from_numpy(values_of(name, kind)[start:end].copy())
            number += 1
    return of_rank


def parts_of(of_rank: list[dict], step: int) -> list[RankShard]:
    """Each rank's part of a checkpoint."""
    common = GlobalState(SHAPES, BUFFERS, json.dumps({**STATE, "step": step}))
    return [rank_shard(step, elements, common if rank == 0 else None) for rank, elements in enumerate(of_rank)]


def write_ranks(root: Path, of_rank: list[dict], step: int = 1, attempt: int = 0) -> Path:
    """A checkpoint whose parts all ranks wrote at the same time."""
    threads = [
        threading.Thread(target=write_checkpoint, args=(root, attempt, rank, len(of_rank), part))
        for rank, part in enumerate(parts_of(of_rank, step))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return root / step_name(step)


def two_ranks() -> list[dict]:
    return elements_of({"stem.weight": [30], "head.weight": [100, 111]}, [0, 1], 2)


def read_everything(folder: Path) -> None:
    """Reads all of a checkpoint and compares it with what was written."""
    reader = CheckpointReader(folder)
    assert reader.shapes == SHAPES
    for kind in KINDS:
        for name, values in reader.tensors(kind):
            assert values.tobytes() == values_of(name, kind).tobytes() and values.shape == SHAPES[name]
    assert {name: values.tolist() for name, values in reader.buffers().items()} == {
        name: values.tolist() for name, values in BUFFERS.items()
    }
    assert reader.state() == {**STATE, "step": reader.step}


def use_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums of 64 bytes each, so that small files have many blocks."""
    monkeypatch.setattr(writer, "BLOCK_BYTES", 64)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_small_blocks(monkeypatch)
    return write_ranks(tmp_path / "checkpoints", two_ranks())


# ----------------------------------------------------------------------------------------------- written and read again

cuts = st.fixed_dictionaries({}, optional={name: st.lists(st.integers(0, 300), max_size=5) for name in SHAPES})


@given(cuts, st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(1, 5), st.data())
def test_any_slices_written_by_any_ranks_are_read_to_the_bit(tmp_path_factory, cuts_of, owners, world_size, data):
    root = tmp_path_factory.mktemp("checkpoints")
    folder = write_ranks(root, elements_of(cuts_of, owners, world_size))
    read_everything(folder)
    reader = CheckpointReader(folder)
    for _ in range(5):
        name, kind = data.draw(st.sampled_from(list(SHAPES))), data.draw(st.sampled_from(KINDS))
        start = data.draw(st.integers(0, int(np.prod(SHAPES[name]))))
        count = data.draw(st.integers(0, int(np.prod(SHAPES[name])) - start))
        expected = values_of(name, kind)[start : start + count]
        assert reader.read(name, kind, start, count).tobytes() == expected.tobytes()
    shutil.rmtree(root)


def test_the_safetensors_library_finds_each_slice_under_its_name(checkpoint):
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    for name, values in BUFFERS.items():
        assert found.pop(name).tolist() == values.tolist()
    assert len(found) == sum(map(len, two_ranks()))
    for title, values in found.items():
        name, kind, start = title.split(":")
        assert values.tobytes() == values_of(name, kind)[int(start) :][: len(values)].tobytes()


def test_the_numpy_example_in_the_docs_reads_any_parameter(checkpoint):
    text = (Path(__file__).parents[2] / "docs" / "reference" / "formats.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found: dict = {}
    exec(re.sub(r"runs/tiny/checkpoints/step-\d+", str(checkpoint), program), found)
    assert found["folder"] == str(checkpoint)
    for name, shape in SHAPES.items():
        assert found["read"](name).shape == shape
        assert found["read"](name, "ema").tobytes() == values_of(name, "ema").tobytes()


def test_a_checkpoint_has_its_files_nothing_else_and_no_pickle(checkpoint):
    assert sorted(path.name for path in checkpoint.iterdir()) == FILES
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step-00000001"]
    for path in checkpoint.iterdir():
        contents = path.read_bytes()
        assert contents[:1] == b"{" or contents[8:9] == b"{", path.name  # JSON or safetensors
    reader = CheckpointReader(checkpoint)
    assert [reader.has_kind(kind) for kind in (*KINDS, "exp_avg_sq")] == [True, True, True, False]


# --------------------------------------------------------------------------------------------------------------- damage


def test_every_changed_byte_is_found_or_was_never_read(checkpoint):
    """`verify_all` finds every one; a loader all but those of a header's block that holds no values."""
    choice = random.Random(0)
    for path in sorted(checkpoint.iterdir()):
        contents = path.read_bytes()
        harmless = 0
        for place in [0, len(contents) - 1, *(choice.randrange(len(contents)) for _ in range(150))]:
            damaged = bytearray(contents)
            damaged[place] ^= choice.randrange(1, 256)
            path.write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint):
                CheckpointReader(checkpoint).verify_all()
            try:
                read_everything(checkpoint)
                harmless += 1
            except DamagedCheckpoint as error:
                assert str(path) in str(error) or path.name == "manifest.json"
                assert "\n" not in str(error)
        assert harmless == 0 or path.name.startswith("rank-")
        path.write_bytes(contents)
    read_everything(checkpoint)
    CheckpointReader(checkpoint).verify_all()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "longer"])
def test_a_missing_cut_or_longer_file_is_damage_that_names_it(checkpoint, file, damage):
    path = checkpoint / file
    contents = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes({"empty": b"", "cut": contents[:-1], "longer": contents + b"}"}[damage])
    with pytest.raises(DamagedCheckpoint, match=str(path)):
        read_everything(checkpoint)


@pytest.mark.parametrize("manifest", ["[]", "[1]", "3", "null", "{}", '{"sha256": "x"}', "\x00", "{"])
def test_anything_but_a_manifest_is_damage(checkpoint, manifest):
    (checkpoint / "manifest.json").write_text(manifest)
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
        CheckpointReader(checkpoint)


def test_a_newer_format_is_a_wrong_request_and_not_damage(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["format"] = FORMAT + 1
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest}))
    with pytest.raises(UsageError, match=f"has format {FORMAT + 1}, written by a newer coatnet than this one"):
        CheckpointReader(checkpoint)


def test_a_missing_slice_is_damage_that_names_the_parameter(tmp_path):
    (rank,) = elements_of({"head.weight": [100]}, [0], 1)
    del rank["head.weight", "ema", 100]
    reader = CheckpointReader(write_ranks(tmp_path, [rank]))
    assert reader.read("head.weight", "ema", 0, 100).tobytes() == values_of("head.weight", "ema")[:100].tobytes()
    with pytest.raises(DamagedCheckpoint, match=r"head\.weight, ema: only 100 of 140 elements from 0 on"):
        reader.read("head.weight", "ema", 0, 140)


def test_a_partial_read_verifies_its_own_blocks_and_no_others(checkpoint):
    """So that a rank reads only what it needs of a large file."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    piece = next(s for s in manifest["slices"] if s["parameter"] == "head.weight" and s["count"] >= 100)
    name, kind, first = piece["parameter"], piece["kind"], piece["start"]
    path = checkpoint / piece["file"]
    contents = bytearray(path.read_bytes())
    bad = piece["offset"] + 4 * 50
    contents[bad] ^= 1
    path.write_bytes(contents)
    block = range(bad - bad % 64, bad - bad % 64 + 64)
    for element in range(piece["count"]):
        reader, offset = CheckpointReader(checkpoint), piece["offset"] + 4 * element
        if {offset, offset + 3} & set(block):
            with pytest.raises(DamagedCheckpoint, match=f"wrong checksum of the block at byte {block.start}"):
                reader.read(name, kind, first + element, 1)
        else:
            expected = values_of(name, kind)[first + element]
            assert reader.read(name, kind, first + element, 1).tobytes() == expected.tobytes()


# ------------------------------------------------------------------------------------------------ copied and live state


@pytest.mark.parametrize("chunk_bytes", [64, 192, 1 << 20])
def test_a_copy_and_chunks_of_the_live_state_give_the_same_file(tmp_path, monkeypatch, chunk_bytes):
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", chunk_bytes)
    (live,) = parts_of(elements_of({"head.weight": [100]}, [0], 1), 1)
    (copied,) = parts_of(elements_of({"head.weight": [100]}, [0], 1), 1)
    copied.snapshot.copy_to(torch.empty(copied.snapshot.bytes, dtype=torch.uint8))
    for name, part in (("live", live), ("copied", copied)):
        write_checkpoint(tmp_path / name, 0, 0, 1, part)
        read_everything(tmp_path / name / step_name(1))
    for file in FILES[:3]:
        assert (tmp_path / "live" / step_name(1) / file).read_bytes() == (
            tmp_path / "copied" / step_name(1) / file
        ).read_bytes()
    assert sum(chunk.nbytes for chunk in live.snapshot.chunks()) == live.snapshot.bytes


def test_a_copy_does_not_follow_later_changes_of_the_state(tmp_path):
    (elements,) = elements_of({}, [0], 1)
    (part,) = parts_of([elements], 1)
    part.snapshot.copy_to(torch.empty(part.snapshot.bytes, dtype=torch.uint8))
    for values in elements.values():
        values.zero_()
    write_checkpoint(tmp_path, 0, 0, 1, part)
    read_everything(tmp_path / step_name(1))


class Current(threading.local):
    """The device that is current in a thread."""

    def __init__(self):
        self.device = torch.device("cuda", 0)


class OnGpu3(torch.Tensor):
    """A tensor whose copies to the host arrive only when the stream of its device is waited for."""

    is_cuda, device, queued, current = True, torch.device("cuda", 3), [], Current()

    @classmethod
    def __torch_function__(cls, func, types, args: Any = (), kwargs=None):
        if func is torch.Tensor.copy_ and kwargs == {"non_blocking": True}:
            assert cls.current.device == cls.device  # else GPU 0 would get a context, too
            cls.queued.append((args[0], args[1].as_subclass(torch.Tensor)))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    @contextmanager
    def use(cls, device):
        cls.current.device, before = device, cls.current.device
        yield
        cls.current.device = before


class Stream:
    """Of a device, by default of the current one."""

    def __init__(self, device=None):
        self.device = device or OnGpu3.current.device

    def record_event(self):
        return self

    def synchronize(self):
        while self.device == OnGpu3.device and OnGpu3.queued:
            memory, source = OnGpu3.queued.pop(0)
            memory.copy_(source)


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_a_checkpoint_of_any_gpu_is_read_when_its_bytes_have_arrived(tmp_path, monkeypatch, chunk_bytes):
    use_small_blocks(monkeypatch)
    monkeypatch.setattr(snapshot, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "device", OnGpu3.use)
    (elements,) = elements_of({}, [0], 1)
    live, copied = (parts_of([{k: v.as_subclass(OnGpu3) for k, v in elements.items()}], 1)[0] for _ in range(2))
    copied.snapshot.copy_to(torch.empty(copied.snapshot.bytes, dtype=torch.uint8))
    for name, part in (("live", live), ("copied", copied)):
        write_checkpoint(tmp_path / name, 0, 0, 1, part)
        read_everything(tmp_path / name / step_name(1))


def test_host_memory_that_cannot_be_locked_is_used_unlocked_and_said(tmp_path, monkeypatch, capsys):
    (part,) = parts_of([{k: v.as_subclass(OnGpu3) for k, v in elements_of({}, [0], 1)[0].items()}], 1)
    of_library = {"cudaHostRegister": lambda *_: 2, "cudaGetErrorString": lambda _: "out of memory"}
    refusing = SimpleNamespace(**of_library, cudaError=SimpleNamespace(success=0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError))
    writer = CheckpointWriter(tmp_path / "checkpoints", 0, 2, 4, Checkpoint(), Events(tmp_path, 0, 2))
    memory = writer._memory_for(part.snapshot)
    assert memory is not None and writer._memory_for(part.snapshot) is memory
    (event,) = events(tmp_path, "memory_not_locked")
    assert (event["rank"], event["reason"]) == (2, "out of memory")
    assert capsys.readouterr().err.count("rank 2 cannot lock") == 1


def test_available_memory_counts_control_groups_of_both_versions(tmp_path):
    """Inactive pages of files count as free."""
    assert 0 < available_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = [
        ("2", "memory.max", "memory.current", "inactive_file"),
        ("1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ]
    for version, limit, usage, inactive in versions:
        group = tmp_path / version
        group.mkdir()
        assert available_in_group(group) is None
        (group / limit).write_text("1000\n")
        (group / usage).write_text("700\n")
        (group / "memory.stat").write_text(f"anon 5\n{inactive} 300\n")
        assert available_in_group(group) == 600
    (tmp_path / "2" / "memory.max").write_text("max\n")
    assert available_in_group(tmp_path / "2") is None


# ----------------------------------------------------------------------------------------------- what cannot be written


def failures(root: Path, of_rank: list[dict], step: int = 2) -> list[str]:
    """The errors of ranks that write at the same time, by rank; all must fail."""
    parts = parts_of(of_rank, step)
    with ThreadPoolExecutor(len(parts)) as pool:
        writing = [pool.submit(write_checkpoint, root, 0, rank, len(parts), part) for rank, part in enumerate(parts)]
        failed = [each.exception() for each in writing]
    assert all(isinstance(error, RunFailed) and "\n" not in str(error) for error in failed), failed
    return [str(error) for error in failed]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_without_inodes_and_one_without_room_are_told_apart(small_disk):
    subprocess.run(["mount", "-o", "remount,nr_inodes=3", small_disk], check=True)
    (message,) = failures(small_disk / "checkpoints", two_ranks()[:1])
    assert message.endswith(f"no inodes are left on the file system of {small_disk}/checkpoints; remove files")


def test_a_full_disk_is_one_line_leaves_nothing_half_written_and_can_be_resumed(small_disk):
    write_ranks(small_disk / "checkpoints", two_ranks(), 1)
    large = [{("head.weight", "weight", 0): torch.zeros(1 << 18)} for _ in range(2)]
    for message in failures(small_disk / "checkpoints", large):
        if "was aborted by rank 0" not in message:
            assert "step-00000002 cannot be written: No space left on device; it needs 0.0021 GB and" in message
            assert message.endswith("are free; make room")
    left = {path.relative_to(small_disk).parts[1] for path in small_disk.rglob("*") if path.is_file()}
    assert left == {"step-00000001"}
    remove_leftovers(small_disk / "checkpoints")  # as every start does
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    read_everything(write_ranks(small_disk / "checkpoints", two_ranks(), 2))


def test_rank_0_fails_at_once_with_the_error_of_a_rank_that_cannot_write(tmp_path):
    (tmp_path / ".step-00000002.attempt-0.0" / "rank-00001.safetensors").mkdir(parents=True)
    first, second = failures(tmp_path, two_ranks())
    assert second.endswith(f"step-00000002 cannot be written: Is a directory; fix that ({tmp_path})")
    assert first == f"rank 1: {second}"
    assert checkpoints(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    (message,) = failures(tmp_path / "checkpoints", two_ranks()[:1])
    assert f"{tmp_path}/checkpoints/step-00000002 cannot be written: " in message


# ---------------------------------------------------------------------------------------------------- names and pruning


def folders(root: Path, *steps: int) -> list[Path]:
    for step in steps:
        (root / step_name(step)).mkdir(parents=True)
    return [root / step_name(step) for step in steps]


def test_checkpoints_are_sorted_by_step_without_incomplete_ones(tmp_path):
    names = folders(tmp_path, 7, 99_999_999, 100_000_000, 2_000_000_000)
    for other in (".step-00000008.attempt-0", ".step-00000009.pruned", "step-9", "step-00000001.copy", "steps"):
        (tmp_path / other).mkdir()
    assert checkpoints(tmp_path) == names
    assert [step_of(folder) for folder in names] == [7, 99_999_999, 100_000_000, 2_000_000_000]
    assert checkpoints(tmp_path / "nowhere") == []


@given(st.sets(st.integers(1, 60)), st.integers(1, 60), st.integers(1, 4), st.none() | st.integers(1, 9))
def test_all_are_superseded_but_the_newest_later_ones_and_those_of_keep_every(steps, newest, last, every):
    """Later ones are damaged: a checkpoint just written, which the run resumes from, never goes for their sake."""
    gone = prunable(steps, newest, last, every)
    kept = steps - set(gone)
    forever = {step for step in steps if every is not None and step % every == 0}
    assert kept == forever | set(sorted(s for s in steps if s <= newest)[-last:]) | {s for s in steps if s > newest}


def test_pruning_spares_what_is_being_copied_and_keep_every(tmp_path):
    names = folders(tmp_path, 1, 2, 3, 4)
    prune(tmp_path, 1, 3, 4, spared={names[0]})
    assert sorted(tmp_path.iterdir()) == [names[0], names[2], names[3]]


def test_a_checkpoint_with_a_file_that_cannot_be_removed_stays_whole_until_it_can(checkpoint):
    folders(checkpoint.parent, 9)
    for immutable in ("state.json", "rank-00001.safetensors", "manifest.json"):
        changed = ["chattr", "+i", checkpoint / immutable]
        if subprocess.run(changed, capture_output=True).returncode:
            pytest.skip("needs the right to make a file immutable, and a file system that can")
        try:
            found = prune(checkpoint.parent, 1, None, 9)
        finally:
            subprocess.run(["chattr", "-i", checkpoint / immutable], check=True)
        assert found == {checkpoint: "Operation not permitted"}
        read_everything(checkpoint)
    for file in checkpoint.iterdir():
        file.chmod(0o400)  # of a file: its folder is what counts
    assert prune(checkpoint.parent, 1, None, 9) == {} and not checkpoint.exists()


def test_a_checkpoint_of_the_same_step_replaces_a_damaged_one(checkpoint):
    (checkpoint / "state.json").write_text("damaged")
    assert write_ranks(checkpoint.parent, two_ranks(), attempt=1) == checkpoint
    read_everything(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_leftovers_are_removed_and_checkpoints_kept(checkpoint):
    for name in (".step-00000008.attempt-0.1", ".step-00000001.replaced", ".step-00000009.pruned"):
        shutil.copytree(checkpoint, checkpoint.parent / name)
    strangers = [checkpoint.parent / name for name in (".step-00000001.swp", ".step-mine", "notes")]
    for stranger in strangers:
        stranger.mkdir()
    remove_leftovers(checkpoint.parent)
    assert sorted(checkpoint.parent.iterdir()) == sorted([checkpoint, *strangers])
    read_everything(checkpoint)


def test_a_path_is_a_checkpoint_or_a_run_of_which_the_newest_good_one_is_read(tmp_path, capsys):
    root = tmp_path / "checkpoints"
    older, newer = (write_ranks(root, two_ranks(), step) for step in (9, 10))
    assert latest_checkpoint(older).step == 9
    assert latest_checkpoint(tmp_path).folder == newer
    (newer / "state.json").write_bytes(b"[]")
    assert latest_checkpoint(tmp_path).folder == older
    assert "warning" in (warning := capsys.readouterr().err) and f"{newer}/state.json" in warning
    (older / "manifest.json").write_text("{}")
    with pytest.raises(RunFailed, match="none of step-00000009, step-00000010 is good"):
        latest_checkpoint(tmp_path)


def test_a_path_without_checkpoints_is_a_wrong_request(tmp_path):
    with pytest.raises(UsageError, match="is not a run"):
        latest_checkpoint(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        latest_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- kills


def write_forever(root: Path, rank: int, first: int, together: Any, begun: Any) -> None:
    """One of two ranks, which write the checkpoints of `first`, `first` + 1, ... as a run does."""
    for step in itertools.count(first):
        together.wait()
        write_checkpoint(root, 0, rank, 2, parts_of(two_ranks(), step)[rank])
        if rank == 0:
            prune(root, 2, None, step)
            begun.set()


def write_and_die(root: Path, last_operation: int) -> None:
    """Writes step 2 and prunes, and is killed before operation number `last_operation` on files."""
    operations = itertools.count(1)

    def count(event: str, _: object) -> None:
        on_files = event == "open" or event.startswith(("os.", "shutil."))
        if on_files and next(operations) == last_operation:
            os.kill(os.getpid(), signal.SIGKILL)

    ranks = parts_of(two_ranks(), 2)
    sys.addaudithook(count)
    for rank in (1, 0):
        write_checkpoint(root, 1, rank, 2, ranks[rank])
    prune(root, 1, None, 2)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_between_any_two_file_operations_leaves_complete_checkpoints(tmp_path, damaged):
    """Also while a damaged checkpoint of the same step is replaced; and there is always one to resume from."""
    for last_operation in itertools.count(1):
        root = tmp_path / str(last_operation)
        write_ranks(root, two_ranks())
        if damaged:
            (write_ranks(root, two_ranks(), step=2) / "state.json").write_text("damaged")
        process = forkserver.Process(target=write_and_die, args=(root, last_operation))
        process.start()
        process.join()
        found = checkpoints(root)
        good = [folder for folder in found if whole(folder)]
        assert good, last_operation
        assert good == found or (damaged and found[-1] not in good and len(good) == 1)
        if process.exitcode == 0:
            assert [step_of(folder) for folder in found] == [2] and last_operation > 20
            return
        assert process.exitcode == -signal.SIGKILL


def whole(folder: Path) -> bool:
    try:
        read_everything(folder)
    except DamagedCheckpoint:
        return False
    return True


def kill_while_writing(root: Path, kills: int, choice: random.Random) -> None:
    for _ in range(kills):
        together, begun = forkserver.Barrier(2), forkserver.Event()
        first = 1 + max(map(step_of, checkpoints(root)), default=0)
        shared = (first, together, begun)
        ranks = [forkserver.Process(target=write_forever, args=(root, rank, *shared)) for rank in (0, 1)]
        for process in ranks:
            process.start()
        assert begun.wait(300)
        time.sleep(0.1 * choice.random())
        for process in choice.sample(ranks, 2):
            process.kill()
            time.sleep(0.01 * choice.random())
        for process in ranks:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        found = checkpoints(root)
        assert 1 <= len(found) <= 3  # before pruning there is one more
        for folder in found:
            read_everything(folder)
        remove_leftovers(root)
        assert sorted(root.iterdir()) == found


def test_kills_at_any_moment_leave_complete_checkpoints(tmp_path):
    kill_while_writing(tmp_path, 5, random.Random(0))


@pytest.mark.torture
def test_many_kills_leave_complete_checkpoints(tmp_path):
    kill_while_writing(tmp_path, 50, random.Random(1))

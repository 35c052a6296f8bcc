"""Starting, watching and reading whole runs, for tests."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.packing.pack import pack
from data.shards.manifest import read_manifest, write_manifest
from pipeline.checkpoint.reader import CheckpointReader, checkpoints
from pipeline.distributed.launcher import COATNET, COMMANDS
from pipeline.doctor.environment import GRAY_JPEG
from tests import forked
from tests.forked import ROOT, Process

PATIENCE_SECONDS = 240


def command(*arguments: object) -> list[str]:
    """A command as a person starts it, in an interpreter of its own."""
    return [*COATNET, *map(str, arguments)]


def coatnet(*arguments: object, patience: float = PATIENCE_SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end."""
    return forked.run(COMMANDS, *arguments, timeout=patience)


def started(*arguments: object) -> Process:
    return forked.start(COMMANDS, *arguments)


def pack_digits(folder: Path) -> Path:
    """Unpacks and packs the digits of the demo, in shards of 200: FOLDER/train and FOLDER/val."""
    with tarfile.open(ROOT / "demo" / "digits.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for part in ("train", "val"):
        packed = coatnet("data", "pack", folder / "digits" / part, folder / part, "--samples-per-shard", 200)
        assert packed.returncode == 0, packed.stderr
    return folder


def pack_two(folder: Path) -> Path:
    """Packs two gray images of two classes, in a shard each: FOLDER/packed."""
    for name in ("cat", "dog"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "gray.jpg").write_bytes(GRAY_JPEG)
    sizes = {"samples_per_shard": 1, "bytes_per_shard": 1 << 20}
    source, packed = str(folder / "images"), folder / "packed"
    pack(source, str(packed), **sizes, seed=0, workers=1, overwrite=False, progress=lambda done, total: None)
    return packed


def as_format_1(packed: Path) -> bytes:
    """Gives packed images a manifest as older versions wrote it; returns its bytes."""
    manifest = read_manifest(str(packed))
    write_manifest(str(packed), manifest.classes, [replace(shard, table="", headers="") for shard in manifest.shards])
    return (packed / "manifest.json").read_bytes()


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file that may be being written, or whose writer was killed."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def curve(run: Path) -> list[tuple[object, ...]]:
    """What metrics.jsonl says of each step and evaluation, without times."""
    names = ("step", "samples", "epoch", "loss", "lr", "grad_norm", "top1", "top5", "eval_loss", "weights")
    return [tuple(row.get(name) for name in names) for row in rows(run / "metrics.jsonl")]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(run / "events.jsonl") if row["event"] == kind]


def last_state(run: Path) -> dict[str, bytes]:
    """Every weight, moment, average and buffer of a run's last checkpoint."""
    return state_of(checkpoints(run / "checkpoints")[-1])


def state_of(checkpoint: Path) -> dict[str, bytes]:
    reader = CheckpointReader(checkpoint)
    kinds = ("weight", "ema", "exp_avg", "exp_avg_sq")
    tensors = {f"{name} {kind}": values for kind in kinds for name, values in reader.tensors(kind)}
    return {name: values.tobytes() for name, values in (tensors | reader.buffers()).items()}


def consumed(run: Path) -> dict[int, list[tuple[int, int, str, int]]]:
    """For each step its (slot, epoch, key, checksum), of the highest attempt."""
    found = [row for file in (run / "samples").glob("rank-*.jsonl") for row in rows(file) if "step" in row]
    newest = {step: max(row["attempt"] for row in found if row["step"] == step) for step in {r["step"] for r in found}}
    steps: dict[int, list[tuple[int, int, str, int]]] = {}
    for row in found:
        if row["attempt"] == newest[row["step"]]:
            parts = zip(row["slots"], row["epochs"], row["keys"], row["checksums"], strict=True)
            steps.setdefault(row["step"], []).extend(parts)
    return {step: sorted(parts) for step, parts in steps.items()}


def packed_keys(packed: Path) -> set[str]:
    with_members = [line.split() for file in packed.glob("*.idx") for line in file.read_text().splitlines()[1:]]
    return {words[3].rpartition(".")[0] for words in with_members}


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def ranks_of(process: Process) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (caught,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def wait_until(condition: Callable[[], bool], process: Process | None = None, seconds_between: float = 0.02) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, process.stderr.read() if process and process.stderr else ""
        time.sleep(seconds_between)


def last_step(run: Path) -> int:
    return max((row["step"] for row in rows(run / "metrics.jsonl")), default=0)

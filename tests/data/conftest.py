"""A small packed set of real image files, and a tar by hand where pack would not make one."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data.packing.pack import pack
from data.shards.manifest import Manifest, Shard, read_manifest, write_manifest
from data.shards.sample_table import sample_table, table_bytes
from data.shards.tar_index import index_bytes, index_tar

SIDE = 24
"""The short side of every image: at this resolution a centred square is a slice of the image, not resampled."""
CLASSES = ("ant", "bee", "cat", "dog")


@dataclass(frozen=True)
class Original:
    """An image file of the set, and its label."""

    encoded: bytes
    label: int

    @property
    def centre(self) -> np.ndarray:
        """The centred square by Pillow, uint8 [SIDE, SIDE, 3]."""
        pixels = np.array(Image.open(io.BytesIO(self.encoded)).convert("RGB"))
        top, left = ((side - SIDE) // 2 for side in pixels.shape[:2])
        return pixels[top : top + SIDE, left : left + SIDE]


@dataclass(frozen=True)
class PackedSet:
    """Forty images of four classes in five shards; `originals` by key."""

    folder: Path
    manifest: Manifest
    originals: dict[str, Original]

    @property
    def keys(self) -> list[str]:
        """In the manifest's order."""
        tars = [Path(self.manifest.url_of(i)).read_bytes() for i in range(len(self.manifest.shards))]
        return [sample.key for tar in tars for sample in index_tar(tar)]


def encoded(number: int) -> tuple[str, bytes]:
    """An image unlike the others, and the suffix of its kind: wide, high or square, JPEG or PNG."""
    coarse = np.random.default_rng(number).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    size = [(SIDE, SIDE), (SIDE + number, SIDE), (SIDE, SIDE + number)][number % 3]
    kind, suffix = [("JPEG", "jpg"), ("PNG", "png")][number % 2]
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file := io.BytesIO(), kind)
    return suffix, file.getvalue()


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedSet:
    source, folder = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("shards")
    originals = {}
    for number in range(40):
        label = number % len(CLASSES)
        suffix, contents = encoded(number)
        place = source / CLASSES[label] / f"{number}.{suffix}"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(contents)
        originals[f"{CLASSES[label]}/{number}"] = Original(contents, label)
    request = {"samples_per_shard": 9, "bytes_per_shard": None, "seed": 0, "workers": 2, "overwrite": False}
    pack(str(source), str(folder), **request, progress=lambda done, total: None)
    return PackedSet(folder, read_manifest(str(folder)), originals)


Written = Callable[[Path, Sequence[dict[str, bytes]], int, int], Manifest]


@pytest.fixture(scope="session")
def by_hand() -> Written:
    """Writes samples (parts by extension) as a set of one shard, keys 0000, 0001, ...; the table has no sizes."""

    def write(folder: Path, samples: Sequence[dict[str, bytes]], classes: int, flags: int) -> Manifest:
        stream = io.BytesIO()
        with webdataset.TarWriter(stream, encoder=False, mtime=0) as tar:
            for number, parts in enumerate(samples):
                tar.write({"__key__": f"{number:04d}", **parts})
        contents = stream.getvalue()
        index = index_tar(contents)
        rows = sample_table(contents, index, [(0, 0)] * len(index), flags)
        folder.mkdir(exist_ok=True)
        (folder / "shard-000000.tar").write_bytes(contents)
        (folder / "shard-000000.npy").write_bytes(table_bytes(rows))
        (folder / "shard-000000.idx").write_bytes(index_bytes(index))
        shard = Shard("shard-000000.tar", len(index), len(contents))
        write_manifest(str(folder), [f"class {i}" for i in range(classes)], [shard])
        return read_manifest(str(folder))

    return write

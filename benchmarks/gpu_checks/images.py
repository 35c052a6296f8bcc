"""Packed images for the checks, and a decoder that stands in for DALI's where that is not installed."""

from __future__ import annotations

import importlib.util
import io
import sys
import tarfile
import types
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_checks import ROOT


def photos(folder: Path, count: int, width: int, height: int) -> str:
    """The URL of packed JPEGs of smooth noise, about as large as photos; a few different ones, repeated."""
    import numpy as np
    from PIL import Image

    drawn = np.random.default_rng(0)
    for number in range(min(count, 8)):
        small = Image.fromarray(drawn.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        small.resize((width, height), Image.Resampling.BICUBIC).save(file := io.BytesIO(), "JPEG", quality=85)
        for copy in range(number, count, 8):
            path = folder / "images" / f"{copy % 2}" / f"{copy}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    return packed(folder / "images", folder / "packed")


def digits(folder: Path) -> str:
    """The URL of the demo's handwritten digits, packed."""
    with tarfile.open(ROOT / "demo" / "digits.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return packed(folder / "digits" / "train", folder / "packed")


def packed(images: Path, url: Path) -> str:
    from data.packing.pack import pack

    request: dict[str, Any] = {"samples_per_shard": 200, "bytes_per_shard": None, "seed": 0, "workers": 2}
    pack(str(images), str(url), **request, overwrite=False, progress=lambda *_: None)
    return str(url)


class StubDecoder:
    """In place of data.decode.Decoder: pixels drawn by the image's bytes, the same ones at every start."""

    def __init__(self, *, resolution: int, device: str, source: Any, **_: Any) -> None:
        self._side, self._source = resolution, source
        self._device = "cuda" if device == "gpu" else "cpu"

    def __iter__(self) -> StubDecoder:
        return self

    def __next__(self) -> torch.Tensor:
        images, _ = self._source()
        pixels = torch.empty(len(images), self._side, self._side, 3, dtype=torch.uint8)
        for each, encoded in zip(pixels, images, strict=True):
            each.random_(0, 256, generator=torch.Generator().manual_seed(zlib.crc32(encoded)))
        return pixels.to(self._device)

    def close(self) -> None: ...


def _by_pillow(encoded: bytes) -> tuple[bytes, Any, Any]:
    """In place of data.codec.decode, for packing."""
    from PIL import Image

    from data.codec import EXTENSIONS, Picture

    image = Image.open(io.BytesIO(encoded))
    return encoded, Picture(EXTENSIONS[str(image.format).lower()], image.height, image.width), None


def decoder() -> str:
    """What decodes in this process, named: DALI, or else a stub, which is put in place."""
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        return "DALI"
    sys.modules["nvidia"] = mock.MagicMock()
    from data import codec
    from data.errors import DataError

    codec.decode = _by_pillow
    stub: Any = types.ModuleType("data.decode")
    stub.AHEAD, stub.Decoder, stub.Source, stub.DecodingFailed = 2, StubDecoder, Any, DataError
    sys.modules["data.decode"] = stub
    return "a stub, since DALI is not installed"

"""Writes demo/digits.tar.gz: the 1,797 handwritten digits of scikit-learn as PNG files in class folders, split once.

    pip install scikit-learn && python demo/make_digits.py

The same bytes each time with the same zlib: names sorted, times zero, owner root, a fixed permutation for the split.
The demo itself needs neither this script nor scikit-learn.
"""

import gzip
import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

ARCHIVE = Path(__file__).with_name("digits.tar.gz")
VALIDATION_SAMPLES = 360  # a fifth; 1,437 are left to train on


def png(pixels: np.ndarray) -> bytes:
    """A grayscale PNG of uint8 [height, width], without a time, a gamma or a programme's name in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def digit_files() -> dict[str, bytes]:
    """Every image by its name in the archive: digits/{train,val}/CLASS/INDEX.png."""
    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    validation = set(np.random.default_rng(0).permutation(len(images))[:VALIDATION_SAMPLES].tolist())
    return {
        f"digits/{'val' if index in validation else 'train'}/{label}/{index:04}.png": png(image)
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    }


def archive(files: dict[str, bytes]) -> bytes:
    """A gzipped ustar of the files in sorted order, with nothing in it of the machine or the time."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in sorted(files.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.uname = member.gname = "root"
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


if __name__ == "__main__":
    ARCHIVE.write_bytes(archive(digit_files()))

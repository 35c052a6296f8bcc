"""What packing takes as the images grow: memory and seconds of the listing, and reads from a server with latency.

    coatnet bench packing [--only listing|reading|speed] [--images PATH]

listing   class folders of a file system that exists in memory only, as many images as stated, listed and planned
          (`data pack --part 0/1`) in a process of its own; bytes an image are of its peak above a listing of 1,000
reading   a tar of 10,000 images behind a web server that waits before every answer, packed into shards of 1,000
speed     PATH (default: an ImageNet sample) and 150,000 small files on a disk, packed in turns
"""

import argparse
import io
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.spec import AbstractFileSystem
from PIL import Image

from benchmarks.machine import machine
from data.packing.pack import pack
from data.packing.parts import NotLast
from data.packing.work import parse_part
from tests.data.servers import http_server

LISTED = (75_000, 1_000_000, 5_000_000)
AT_MOST = (12_700_000, 300_000_000)
"""Images of ImageNet-21K and of JFT-300M, to which the figures are extended."""
IN_CLASS = 1_000
READ, SMALL_FILES, LATENCY = 10_000, 150_000, 0.02
SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"
NUMBERS: dict[str, Any] = {"bytes_per_shard": 2**28, "seed": 0, "workers": 2, "overwrite": False}


class GeneratedImages(AbstractFileSystem):
    """generated://N: N images in class folders of IN_CLASS, which cannot be read."""

    protocol = "generated"
    cachable = False

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        """Folders of the root, files of a folder."""
        total, _, folder = path.strip("/").partition("/")
        if not folder:
            classes = -(-int(total) // IN_CLASS)
            return [{"name": f"{total}/n{n:08d}", "size": 0, "type": "directory"} for n in range(classes)]
        first = int(folder[1:]) * IN_CLASS
        numbers = range(first, min(first + IN_CLASS, int(total)))
        size = 100_000
        return [{"name": f"{path}/{folder}_{n}.JPEG", "size": size + n % 9973, "type": "file"} for n in numbers]

    def isdir(self, path: str) -> bool:
        """Whether this is the root or a class."""
        return not path.endswith(".JPEG")

    def isfile(self, path: str) -> bool:
        """Whether this is an image."""
        return path.endswith(".JPEG")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("generated://").rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        """With the protocol."""
        return f"generated://{name}"


def list_generated(images: int) -> None:
    """Lists and plans, and prints seconds and the peak of resident bytes."""
    fsspec.register_implementation("generated", GeneratedImages)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        request: dict[str, Any] = {**NUMBERS, "samples_per_shard": 10_000, "progress": lambda done, total: None}
        with suppress(NotLast):
            pack(f"generated://{images}", folder, **request, part=parse_part("0/1"))
        seconds = time.perf_counter() - start
    print(seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def listing() -> None:
    """Seconds and bytes of listings of several lengths, and what longer ones would take by the last two."""
    rows = {}
    for images in (1_000, *LISTED):
        command = [sys.executable, "-P", "coatnet_main.py", "benchmarks.packing", "--list", str(images)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[images] = tuple(map(float, output.split()))
    base = rows[1_000][1]
    print(f"listing   {'images':>11} {'seconds':>9} {'MB above 1,000 images':>22} {'bytes an image':>15}")
    for images in LISTED:
        seconds, peak = rows[images]
        print(f"          {images:11,} {seconds:9.1f} {(peak - base) / 1e6:22.1f} {(peak - base) / images:15.1f}")
    (one, (s1, p1)), (other, (s2, p2)) = ((n, rows[n]) for n in LISTED[-2:])
    for images in AT_MOST:
        seconds = s2 + (images - other) * (s2 - s1) / (other - one)
        peak = p2 + (images - other) * (p2 - p1) / (other - one)
        print(f"          {images:11,} {seconds:9.0f} {(peak - base) / 1e6:22.1f}  by the last two, in a straight line")


def reading() -> None:
    """Seconds and requests of a pack from a server that waits before every answer."""
    with tempfile.TemporaryDirectory() as name, http_server(Path(name)) as server:
        folder = Path(name)
        with tarfile.open(folder / "images.tar", "w") as tar:
            for number in range(READ):
                contents = photograph(number, 96)
                member = tarfile.TarInfo(f"{number % 10}/{number}.jpg")
                member.size = len(contents)
                tar.addfile(member, io.BytesIO(contents))
        server.latency = LATENCY
        start = time.perf_counter()
        report = pack(
            f"{server.url}/images.tar",
            f"{name}/packed",
            **NUMBERS,
            samples_per_shard=1_000,
            progress=lambda done, total: None,
        )
        seconds = time.perf_counter() - start
        size = (folder / "images.tar").stat().st_size / 1e6
        print(f"reading   {report.shards} shards of {READ:,} images, {size:.0f} MB, {1e3 * LATENCY:.0f} ms an answer:")
        print(f"          {seconds:.1f} s, {len(server.requests):,} requests")


def photograph(number: int, side: int) -> bytes:
    """A JPEG, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((side, side)).save(stream, "JPEG")
    return stream.getvalue()


def speed(images: Path) -> None:
    """Images per second of packing an archive of photographs and a folder of many small files."""
    with tempfile.TemporaryDirectory() as name:
        small = Path(name) / "small"
        contents = [photograph(number, 32) for number in range(1_000)]
        for number in range(SMALL_FILES):
            file = small / f"{number % 100:03d}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(contents[number % len(contents)])
        for source, rounds in ((images, 3), (small, 1)):
            rates = []
            for turn in range(rounds):
                start = time.perf_counter()
                request: dict[str, Any] = {**NUMBERS, "samples_per_shard": 10_000, "progress": lambda *_: None}
                report = pack(str(source), f"{name}/packed-{source.name}-{turn}", **request)
                rates.append(report.samples / (time.perf_counter() - start))
            print(f"speed     {source.name}: {statistics.median(rates):,.0f} images/s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("listing", "reading", "speed"))
    parser.add_argument("--images", type=Path, default=SAMPLES / "imagenet-sample.tar", help="archive of photographs")
    parser.add_argument("--list", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list is not None:
        list_generated(options.list)
        return 0
    print(machine())
    for name, work in {"listing": listing, "reading": reading, "speed": lambda: speed(options.images)}.items():
        if options.only in (None, name):
            work()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Images per second of wall and of CPU time: our loader beside DALI's reader, webdataset and a folder with Pillow.

    coatnet bench data --images PATH --small PATH

On the CPU, also where there is a GPU. A PATH is what `coatnet data pack` takes; the defaults are an ImageNet sample, at
224, and CIFAR-10, at 32. Every contestant reads the same images without end, in a process of its own, and gives uint8
[n, height, width, 3]; they take turns, round by round, so that a busy machine slows all of them. Where processors are
shared only CPU time is sound: that of the contestant with its workers, without that of S3.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import nvidia.dali
import torch
import webdataset
from nvidia.dali import fn, pipeline_def
from nvidia.dali.auto_aug.rand_augment import rand_augment
from PIL.Image import Resampling
from torch.utils.data import DataLoader, RandomSampler
from webdataset.gopen import gopen_schemes

from benchmarks.machine import document, machine
from data.augment import Augmentation
from data.codec import EXTENSIONS
from data.loader import LoaderSpec, training_batches
from data.memory import DECODED_AT_ONCE
from data.order import Order
from data.packing.pack import pack
from data.shards.manifest import read_manifest

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "data"
PROCESSORS = len(os.sched_getaffinity(0))
IMAGES = ";".join(EXTENSIONS.values())
BATCH, WINDOW, SAMPLES_PER_SHARD, LAYERS, MAGNITUDE = 32, 32, 250, 2, 5
WARM_UP, LEAD, SECONDS = 6.0, 0.5, 3.0
OURS, READER, WEBDATASET = "ours", "DALI's reader", "webdataset, Pillow"
FOLDER, NORMALISED = "folder, Pillow", "  and normalised"
LEGEND = f"""\
{OURS:20} data.loader.training_batches, micro batches of {BATCH}, windows of {WINDOW}, shuffled, checksums compared
{READER:20} fn.readers.webdataset, in batches of {DECODED_AT_ONCE}, not shuffled: what DALI can do
{WEBDATASET:20} in a torch DataLoader with a worker a processor; torchvision's crop and flip; S3 by fsspec
{FOLDER:20} torchvision's ImageFolder, otherwise the same
{NORMALISED:20} with ToTensor and Normalize, as in most recipes, which the others leave to the device
work                 random resized crop, bilinear, and flip
RandAugment          {LAYERS} layers at magnitude {MAGNITUDE} of 10; the reader has DALI's own, Pillow timm's
CPU seconds          of the contestant and its workers; ratios are of medians, to the better of the two with Pillow
"""


@dataclass(frozen=True)
class Case:
    """What is asked of every contestant alike: tars below a URL, the same images in class folders, and the work."""

    name: str
    url: str
    tars: tuple[str, ...]
    folder: str
    resolution: int
    layers: int

    def contestants(self) -> list[str]:
        """DALI's reader and a folder are for a disk."""
        if "://" in self.url:
            return [OURS, WEBDATASET]
        return [name for name in CONTESTANTS if name != NORMALISED or not self.layers]


def ours(case: Case) -> Iterator[int]:
    """Sizes of our micro batches, as training has them."""
    manifest = read_manifest(case.url)
    order = Order(0, manifest.shards.samples, BATCH, WINDOW)
    drawn = Augmentation(crop="random_resized", flip=True, layers=case.layers, magnitude=float(MAGNITUDE))
    spec = LoaderSpec(0, 1, BATCH, case.resolution, torch.device("cpu"), PROCESSORS)
    with training_batches(manifest, order, drawn, spec, 0, 0, 10**9) as steps:
        yield from (len(batch.images) for batches in steps for batch in batches)


def dali_reader(case: Case) -> Iterator[int]:
    """Sizes of the batches of DALI's own graph for the same work."""

    @pipeline_def(
        batch_size=DECODED_AT_ONCE, num_threads=PROCESSORS, device_id=None, enable_conditionals=case.layers > 0
    )
    def graph() -> Any:
        tars = [f"{case.url}/{tar}" for tar in case.tars]
        indices = [f"{tar.removesuffix('.tar')}.idx" for tar in tars]
        encoded, label = fn.readers.webdataset(paths=tars, index_paths=indices, ext=[IMAGES, "cls"])
        image = fn.decoders.image_random_crop(encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3])
        image = fn.resize_crop_mirror(image, size=[case.resolution] * 2, mirror=fn.random.coin_flip())
        if case.layers:
            image = rand_augment(image, n=case.layers, m=3 * MAGNITUDE)
        return image, label

    pipeline = graph()
    while True:
        yield len(torch.from_dlpack(pipeline.run()[0].as_tensor()))


def webdataset_pillow(case: Case) -> Iterator[int]:
    """Sizes of the batches of the webdataset package."""
    gopen_schemes["s3"] = lambda url, mode, _: fsspec.open(url, mode).open()
    samples = webdataset.WebDataset([f"{case.url}/{tar}" for tar in case.tars], shardshuffle=False, resampled=True)
    return _loaded(samples.shuffle(256).decode("pil").to_tuple(IMAGES, "cls").map_tuple(_transform(case), int))


def folder_pillow(case: Case, normalised: bool = False) -> Iterator[int]:
    """Sizes of the batches of torchvision's ImageFolder."""
    transform = _transform(case, normalised)
    from torchvision.datasets import ImageFolder

    images = ImageFolder(case.folder, transform)
    return _loaded(images, sampler=RandomSampler(images, replacement=True, num_samples=10**12))


CONTESTANTS: dict[str, Callable[[Case], Iterator[int]]] = {
    OURS: ours,
    READER: dali_reader,
    WEBDATASET: webdataset_pillow,
    FOLDER: folder_pillow,
    NORMALISED: partial(folder_pillow, normalised=True),
}


def _transform(case: Case, normalised: bool = False) -> Callable[[Any], torch.Tensor]:
    from timm.data.auto_augment import rand_augment_transform
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    steps: list[Callable[[Any], Any]] = [RandomResizedCrop(case.resolution), RandomHorizontalFlip()]
    if case.layers:
        as_ours = {"translate_pct": 0.45, "img_mean": (128, 128, 128), "interpolation": Resampling.BILINEAR}
        steps.append(rand_augment_transform(f"rand-m{MAGNITUDE}-n{case.layers}-mstd0-inc1-p1.0", as_ours))
    to_tensor = (
        [ToTensor(), Normalize(3 * [0.5], 3 * [0.5])] if normalised else [lambda i: torch.from_numpy(np.array(i))]
    )
    return Compose([*steps, *to_tensor])


def _loaded(images: Any, **options: Any) -> Iterator[int]:
    workers = DataLoader(images, BATCH, num_workers=PROCESSORS, multiprocessing_context="fork", **options)
    yield from (len(batch) for batch, _ in workers)


def contend(link: Connection, contestant: str, case: Case) -> None:
    """A contestant's process: answers every message by one round, as images per second of wall and of CPU time."""
    warnings.simplefilter("ignore")  # of DALI and of webdataset
    sizes = CONTESTANTS[contestant](case)
    rates(sizes, WARM_UP)
    link.send("ready")
    while link.recv():
        rates(sizes, LEAD)  # what it has made ahead does not count
        link.send(rates(sizes, SECONDS))


def rates(sizes: Iterator[int], seconds: float) -> tuple[float, float]:
    """Images per second of wall and of CPU time, over as many images as take so long, in whole runs of ours."""
    start, before, images = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - start < seconds:
        until = images + DECODED_AT_ONCE
        while images < until:
            images += next(sizes)
    return images / (time.perf_counter() - start), images / (cpu_seconds() - before)


def cpu_seconds() -> float:
    """Of this process and of its workers."""
    stats = [Path(f"/proc/{worker.pid}/stat").read_text() for worker in multiprocessing.active_children()]
    ticks = sum(int(number) for stat in stats for number in stat.rpartition(")")[2].split()[11:13])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def serve_s3(link: Connection) -> None:
    """A process that is an S3 with one bucket; its first message is its URL."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    link.send("http://{}:{}".format(*server.get_host_and_port()))
    link.recv()


@contextmanager
def process_of(target: Callable[..., None], *arguments: Any) -> Iterator[tuple[Connection, Any]]:
    """The link to a process that runs `target(its end, *arguments)`, and what it sends first."""
    spawning = multiprocessing.get_context("spawn")
    link, its_end = spawning.Pipe()
    process = spawning.Process(target=target, args=(its_end, *arguments))  # no daemon: it may have workers
    process.start()
    its_end.close()
    try:
        yield link, link.recv()
        link.send(None)
        process.join(20)
    except (EOFError, ConnectionError):
        sys.exit(f"coatnet bench data: {arguments[0] if arguments else 'S3'} has died")
    finally:
        process.kill()


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant: images per second of wall and of CPU time, median and best of the rounds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in case.contestants()}
    with ExitStack() as running:
        links = {name: running.enter_context(process_of(contend, name, case))[0] for name in found}
        for _ in range(rounds):
            for name, link in links.items():
                link.send("go")
                found[name].append(link.recv())
    rows = []
    for name, rates_found in found.items():
        wall, cpu = zip(*rates_found, strict=True)
        of_wall = {"per_second": round(statistics.median(wall)), "best_per_second": round(max(wall))}
        of_cpu = {"per_cpu_second": round(statistics.median(cpu)), "best_per_cpu_second": round(max(cpu))}
        rows.append({"case": case.name, "contestant": name, **of_wall, **of_cpu})
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images per CPU second as multiples of DALI's reader's, where there is one, and of the better with Pillow."""
    rate = {row["contestant"]: row["per_cpu_second"] for row in rows}
    peers = {"of_dalis": rate.get(READER), "of_pillows": max(rate.get(WEBDATASET, 0), rate.get(FOLDER, 0))}
    return [
        row | {name: round(row["per_cpu_second"] / peer, 2) for name, peer in peers.items() if peer} for row in rows
    ]


def table_of(rows: list[dict[str, Any]]) -> str:
    """The rows as plain text, a group for each case."""
    lines = [f"{'':22} images/s    best   images/CPU s    best   of DALI's  of Pillow's"]
    for row in rows:
        if row["contestant"] == OURS:
            lines.append(f"\n{row['case']}")
        ratios = "".join(f"{row.get(name, ''):>12}" for name in ("of_dalis", "of_pillows"))
        lines.append(
            f"  {row['contestant']:20} {row['per_second']:8,} {row['best_per_second']:7,}"
            f" {row['per_cpu_second']:14,} {row['best_per_cpu_second']:7,}{ratios}"
        )
    return "\n".join(lines)


@contextmanager
def cases(images: dict[int, str]) -> Iterator[list[Case]]:
    """The cases of each path by its resolution, with the data packed on a disk and on S3, and unpacked."""
    access = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as place, process_of(serve_s3) as (_, endpoint):
        os.environ.update(access, AWS_ENDPOINT_URL=endpoint, AWS_EC2_METADATA_DISABLED="true")
        fsspec.filesystem("s3").mkdir("bench")
        found = []
        for resolution, path in images.items():
            folder = f"{place}/{resolution}"
            for url in (f"{folder}/packed", f"s3://bench/{resolution}"):
                packed(path, url)
            tars = tuple(shard.name for shard in read_manifest(f"{folder}/packed").shards)
            unpack([f"{folder}/packed/{tar}" for tar in tars], Path(f"{folder}/unpacked"))
            for where, url, layers in (
                ("disk", f"{folder}/packed", 0),
                ("disk, RandAugment", f"{folder}/packed", LAYERS),
                ("S3", f"s3://bench/{resolution}", 0),
            ):
                name = f"{Path(path).name} at {resolution}, {where}"
                found.append(Case(name, url, tars, f"{folder}/unpacked", resolution, layers))
        yield found


def packed(path: str, url: str) -> None:
    """Packs the images at a path into shards."""
    request = {"samples_per_shard": SAMPLES_PER_SHARD, "bytes_per_shard": None, "seed": 0, "workers": PROCESSORS}
    pack(path, url, **request, overwrite=False, progress=lambda *_: None)


def unpack(tars: list[str], folder: Path) -> None:
    """Writes the images of shards as files, in a folder for each class."""
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        of_class = folder / sample["cls"].decode()
        of_class.mkdir(parents=True, exist_ok=True)
        kind = next(part for part in sample if part in EXTENSIONS.values())
        (of_class / f"{sample['__key__'].replace('/', '_')}.{kind}").write_bytes(sample[kind])


def main() -> None:
    """Measures all cases, and prints the table or one JSON document."""
    parser = argparse.ArgumentParser("coatnet bench data", description=(__doc__ or "").partition("\n")[0])
    for option, resolution, name in (("--images", 224, "imagenet-sample.tar"), ("--small", 32, "cifar10-val.tar")):
        text = f"what is packed and read at {resolution}: folder, tar or zip of classes; default: {SAMPLES / name}"
        parser.add_argument(option, metavar="PATH", default=str(SAMPLES / name), help=text)
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    asked = parser.parse_args()
    for option in ("images", "small"):
        if not Path(getattr(asked, option)).exists():
            parser.error(f"{getattr(asked, option)} does not exist; --{option} PATH says where the images are")
    rows = []
    with cases({224: asked.images, 32: asked.small}) as all_cases:
        for case in all_cases:
            print(f"{case.name} ...", file=sys.stderr)
            rows += measure(case, asked.rounds)
    names = ("webdataset", "pillow", "torchvision", "timm", "s3fs")
    versions = {"DALI": nvidia.dali.__version__, **{name: version(name) for name in names}}
    if asked.json:
        return print(document(rows, rounds=asked.rounds, versions=versions))
    print(f"{machine()}, {', '.join(map(' '.join, versions.items()))}")
    print(f"median and best of {asked.rounds} rounds of {SECONDS:g} s or more each\n\n{LEGEND}\n{table_of(rows)}")


if __name__ == "__main__":
    main()

"""What packing takes trains to Pillow's pixels; what it does not is named; whatever a file is, nothing crashes.

Everything that decodes runs in a child process: bytes that end DALI end the child.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter, WebDataset

from data import codec
from data.augment import eval_params
from data.decode import Decoder
from data.order import SampleRange
from data.packing.index import index
from data.packing.pack import pack
from data.packing.resize import shrink
from data.reader import read_ranges
from data.shards.manifest import BadSample, read_manifest
from tests.data.image_files import HEIGHT, WIDTH, Named, Variant, converted, kept, left_out
from tests.forked import forkserver

SIDE, REST = min(HEIGHT, WIDTH), abs(HEIGHT - WIDTH)
Device = Literal["cpu", "gpu"]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
in_short_and_in_full = pytest.mark.parametrize(
    "everything", [pytest.param(False, id="short"), pytest.param(True, id="full", marks=pytest.mark.torture)]
)


@pytest.fixture(scope="module")
def child() -> Iterator[Executor]:
    """A process of its own: BrokenProcessPool is raised where it crashes."""
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        yield pool


def trained(images: Sequence[bytes], sizes: Sequence[tuple[int, int]], device: Device) -> list[NDArray[np.uint8]]:
    """Each image by training's decoder: the two squares of its ends, which are not resized, put together."""
    heights, widths = np.repeat(np.array(sizes), 2, axis=0).T
    start = [place for height, width in sizes for place in ((0, 0), (height - SIDE, width - SIDE))]
    params = replace(eval_params(1.0, heights, widths), crop_start=np.array(start, np.int32))
    answers = iter([([image for image in images for _ in range(2)], params)])
    decoder = Decoder(
        resolution=SIDE, batch_size=2 * len(images), layers=0, magnitude=0.0, device=device,
        device_id=0 if device == "gpu" else None, threads=2, source=lambda: next(answers),
    )  # fmt: skip
    ends = next(decoder).cpu().numpy()
    decoder.close()
    joined = []
    for first, last, (height, _) in zip(ends[::2], ends[1::2], sizes, strict=True):
        axis = 1 if height == SIDE else 0
        joined.append(np.concatenate([first, last.take(range(SIDE - REST, SIDE), axis)], axis))
    return joined


def packed(folder: Path, variants: dict[str, Variant]) -> tuple[dict[str, bytes], dict[str, str]]:
    """What pack makes of the files: the images in the shard and the reasons of those left out, by variant."""
    names = {f"{number:04d}": name for number, name in enumerate(variants)}
    (folder / "in" / "all").mkdir(parents=True)
    for number, name in names.items():
        (folder / "in" / "all" / f"{number}.png").write_bytes(variants[name].encoded)
    request = {"samples_per_shard": None, "bytes_per_shard": 2**30, "seed": 0, "workers": 2, "overwrite": False}
    report = pack(str(folder / "in"), str(folder / "out"), **request, progress=lambda done, total: None)
    images = {}
    for sample in WebDataset(str(folder / "out" / "shard-000000.tar"), shardshuffle=False):
        (kind,) = {*sample} & {*codec.EXTENSIONS.values()}
        images[names[sample["__key__"].rpartition("/")[2]]] = sample[kind]
    return images, {names[Path(each.key).stem]: each.reason for each in report.broken}


def listed(folder: Path, decode: bool) -> dict[str, str]:
    """The samples that indexing lists in `folder`, with their reasons."""
    request = {"decode": decode, "classes": None, "label_field": None, "workers": 1}
    report = index(str(folder), None, **request, progress=lambda done, total: None)
    return {each.key: each.reason for each in report.broken}


def read(folder: Path) -> list[tuple[str, str]]:
    """What training reads of the folder's shard: each key with its reason if it is broken."""
    manifest = read_manifest(str(folder))
    samples = read_ranges(manifest, [SampleRange(0, 0, manifest.samples)])
    return [(each.key, each.reason if isinstance(each, BadSample) else "") for each in samples]


def taken(encoded: bytes) -> tuple[str, bytes, NDArray[np.uint8] | None]:
    """Why packing leaves a file out, or what it makes of it, which verifies, and its pixels there."""
    try:
        image, picture, pixels = codec.decode(encoded)
    except codec.Undecodable as undecodable:
        return str(undecodable), b"", None
    assert codec.examine(image) == picture
    assert picture[1:] == pixels.shape[:2]
    return "", image, pixels


def table(*parts: Named) -> dict[str, Variant]:
    rows = [row for part in parts for row in part]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


@on_each_device
@in_short_and_in_full
def test_every_variant_trains_to_pillows_pixels(child, tmp_path, everything, device):
    as_they_are, made_png = table(kept(everything)), table(converted(everything))
    variants = {**as_they_are, **made_png}
    images, reasons = child.submit(packed, tmp_path, variants).result()
    assert not reasons
    assert {name for name, image in images.items() if image == variants[name].encoded} == {*as_they_are}
    assert all(images[name].startswith(b"\x89PNG") for name in made_png)
    sizes = [variants[name].pixels.shape[:2] for name in images]
    seen = child.submit(trained, list(images.values()), sizes, device).result()
    off = {name: abs(variants[name].pixels.astype(int) - pixels) for name, pixels in zip(images, seen, strict=True)}
    if device == "gpu":  # another codec for JPEG: a few levels off
        assert not {name: each.mean() for name, each in off.items() if each.mean() > 3}
    else:
        assert not {name: each.max() for name, each in off.items() if each.max() > variants[name].tolerance}


@pytest.mark.parametrize("decode", [False, True], ids=["headers", "decode"])
def test_indexing_refuses_what_training_does_not_decode_rightly(child, tmp_path, decode):
    """A shard of others is not rewritten, so what packing would convert is listed too, and read as broken."""
    good, refused = dict(islice(kept(False), 3)), {**table(converted(False)), **table(left_out())}
    names = {f"{number:04d}": name for number, name in enumerate([*good, *refused])}
    with TarWriter(str(tmp_path / "shard-000000.tar"), encoder=False) as tar:
        for key, name in names.items():
            tar.write({"__key__": key, "jpg": {**good, **refused}[name].encoded, "cls": b"0"})
    found = child.submit(listed, tmp_path, decode).result()
    broken = {key: reason for key, reason in child.submit(read, tmp_path).result() if reason}
    assert found == (broken if decode else {})
    assert {names[key] for key in broken} == {*refused}
    for key, reason in broken.items():
        variant = refused[names[key]]
        assert re.match(variant.reason or "training cannot decode a .*; `coatnet data pack` converts", reason)


def test_what_packing_leaves_out_is_named_for_what_it_is(child, tmp_path):
    variants = table(left_out())
    images, reasons = child.submit(packed, tmp_path, {**variants, "good": next(kept(False))[1]}).result()
    assert {*images} == {"good"}
    assert not {name: why for name, why in reasons.items() if not re.match(variants[name].reason, why)}


def test_an_image_made_smaller_may_be_of_any_variant_that_packs(child):
    for name, variant in table(converted(False), islice(kept(False), 3)).items():
        small, picture = child.submit(shrink, variant.encoded, 10, 95).result()
        assert (picture.kind, min(picture[1:])) == ("jpg", 10)
        seen = np.array(Image.open(BytesIO(small)).convert("RGB")).mean((0, 1))
        assert abs(seen - variant.pixels.mean((0, 1))).max() < 8, name
        assert (
            child.submit(shrink, variant.encoded, SIDE, 95).result()[0]
            == child.submit(taken, variant.encoded).result()[1]
        )


FILES = {name: file.encoded for name, file in table(kept(False), converted(False), left_out()).items() if file.encoded}
REASONS = (
    "cannot be decoded: truncated or damaged|its header is not that of|empty file|a TIFF with .* samples|"
    r"\d+ pixels|tiles of more|.* is not supported; convert it"
)


@given(st.data())
def test_a_damaged_file_trains_to_its_pixels_or_is_named(child, data):
    """The same in packing and training and each time, whatever bytes are changed or missing."""
    name = data.draw(st.sampled_from(sorted(FILES)))
    damaged = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, min(len(damaged), data.draw(st.sampled_from([64, 512, 2**20]))) - 1))
        damaged[place] = data.draw(st.sampled_from([0, 1, 255, damaged[place] ^ 1, damaged[place] ^ 128]))
    damaged = bytes(damaged[: data.draw(st.sampled_from([len(damaged), 3 * len(damaged) // 4, 20]))])
    reason, image, pixels = child.submit(taken, damaged).result()
    if pixels is None:
        assert re.match(REASONS, reason)
    elif sorted(pixels.shape[:2]) == [SIDE, SIDE + REST]:
        first, again = child.submit(trained, [image] * 2, [pixels.shape[:2]] * 2, "cpu").result()
        assert np.array_equal(first, again)
        assert abs(first.astype(int) - pixels).max() <= 1  # of 16 bits: they are rounded in two ways

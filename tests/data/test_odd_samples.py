"""The table of broken and odd samples (docs/howto/data.md): each is used rightly, or replaced and named with a reason.

Each sample has a class of its own, so that another's label would be seen. The loader runs in a child process: bytes
that end DALI end the child.
"""

import io
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from webdataset import TarWriter

from data.augment import Augmentation
from data.loader import LoaderSpec, evaluation_batches, training_batches
from data.order import Order
from data.packing.index import index
from data.packing.pack import pack
from data.shards.manifest import BadSample, read_manifest
from data.shards.tar_index import index_tar
from tests.forked import forkserver

SIDE = 24
DRAWN = np.random.default_rng(0)


def pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return DRAWN.integers(0, 256, (height, width, channels)).astype(np.uint8)


def file_of(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[274] = 6
    return file_of(Image.fromarray(pixels(SIDE, 40)), exif=exif)


SIXTEEN_BITS = (257 * DRAWN.integers(0, 256, (SIDE, SIDE))).astype(np.uint16)
GOOD = {
    "plain.jpg": file_of(Image.fromarray(pixels(SIDE, 30))),
    "progressive.jpg": file_of(Image.fromarray(pixels(SIDE, 31)), progressive=True),
    "cmyk.jpg": file_of(Image.fromarray(pixels(SIDE, SIDE, 4), mode="CMYK")),
    "grey.jpg": file_of(Image.fromarray(pixels(SIDE, 33)[:, :, 0])),
    "turned.jpg": turned(),
    "wide.jpg": file_of(Image.fromarray(pixels(SIDE, 20_000))),
    "point.png": file_of(Image.fromarray(pixels(1, 1)), "PNG"),
    "alpha.png": file_of(Image.fromarray(pixels(SIDE, SIDE, 4)), "PNG"),
    "palette.png": file_of(Image.fromarray(pixels(SIDE, SIDE)).convert("P"), "PNG"),
    "sixteen.png": file_of(Image.fromarray(SIXTEEN_BITS), "PNG"),
    "misnamed.jpg": file_of(Image.fromarray(pixels(SIDE, SIDE)), "PNG"),
    "webp.webp": file_of(Image.fromarray(pixels(SIDE, SIDE)), "WEBP", lossless=True),
}
WHOLE = file_of(Image.fromarray(pixels(90, 120)))
UNDECODABLE = {
    "html.jpg": (b"<!DOCTYPE html><title>404 Not Found</title>", "its header is not that of a supported image"),
    "truncated.jpg": (WHOLE[: len(WHOLE) // 2], "cannot be decoded: truncated or damaged"),
    "empty.jpg": (b"", "empty file"),
    "zeros.jpg": (bytes(5000), "its header is not that of a supported image"),
    "header.jpg": (WHOLE[:2] + b"\0" * 60 + WHOLE[62:], "its header|cannot be decoded"),
    "huge.png": (file_of(Image.new("1", (2**15, 2**14)), "PNG"), r"\d+ pixels; at most 268435456"),
}
DAMAGED = "damaged"
"""The key of a good sample in which a bit changes in its tar later on."""


def reference(encoded: bytes) -> np.ndarray:
    """The centred square by Pillow; of 16 bits, which Pillow cuts off, those of 8 that they are made from."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    seen = np.array(image.convert("RGB"))
    if encoded == GOOD["sixteen.png"]:
        seen = np.repeat((SIXTEEN_BITS // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if seen.shape[:2] == (1, 1):
        return np.broadcast_to(seen, (SIDE, SIDE, 3))
    top, left = ((side - SIDE) // 2 for side in seen.shape[:2])
    return seen[top : top + SIDE, left : left + SIDE]


def packed(folder: Path) -> tuple[dict[str, str], str]:
    """Each file in a class of its own; the classes whose only file does not decode have a good one beside it."""
    files = {**GOOD, **{name: encoded for name, (encoded, _) in UNDECODABLE.items()}, f"{DAMAGED}.jpg": WHOLE}
    for number, (name, encoded) in enumerate(files.items()):
        (folder / "images" / f"{number:02d}").mkdir(parents=True)
        (folder / "images" / f"{number:02d}" / name).write_bytes(encoded)
        if name in UNDECODABLE:
            (folder / "images" / f"{number:02d}" / "beside.jpg").write_bytes(file_of(Image.fromarray(pixels(24, 24))))
    sizes = {"samples_per_shard": None, "bytes_per_shard": 2**30, "seed": 0, "workers": 2, "overwrite": False}
    report = pack(str(folder / "images"), str(folder / "set"), **sizes, progress=lambda done, total: None)
    return {Path(each.key).stem: each.reason for each in report.broken}, str(folder / "set")


def indexed(folder: Path, decode: bool) -> tuple[dict[str, str], str]:
    """One tar of all kinds, also of those that no pack would make."""
    (folder / "set").mkdir(parents=True)
    files = {**GOOD, **{name: encoded for name, (encoded, _) in UNDECODABLE.items()}, f"{DAMAGED}.jpg": WHOLE}
    good = GOOD["plain.jpg"]
    with TarWriter(str(folder / "set" / "shard-000000.tar"), encoder=False) as tar:
        for label, (name, encoded) in enumerate(files.items()):
            key, _, suffix = name.partition(".")
            tar.write({"__key__": key, suffix: encoded, "cls": b"%d" % label})
        tar.write({"__key__": "beyond", "jpg": good, "cls": b"900"})
        tar.write({"__key__": "unlabelled", "jpg": good})
        tar.write({"__key__": "two", "jpg": good, "png": GOOD["alpha.png"], "cls": b"0"})
        tar.write({"__key__": "imageless", "txt": b"a cat", "cls": b"0"})
    (folder / "names").write_text("".join(f"{name}\n" for name in files))
    request = {"decode": decode, "classes": str(folder / "names"), "label_field": None, "workers": 1}
    report = index(str(folder / "set"), None, **request, progress=lambda done, total: None)
    return {each.key: each.reason for each in report.broken}, str(folder / "set")


@pytest.fixture(scope="module")
def child() -> Iterator[Executor]:
    """A process of its own: BrokenProcessPool is raised where it crashes."""
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
        yield pool


on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_every_device
def test_packing_leaves_out_what_does_not_decode_and_training_uses_the_rest(child, tmp_path, device):
    left_out, url = packed(tmp_path)
    assert_reasons(left_out, {Path(name).stem: reason for name, (_, reason) in UNDECODABLE.items()})
    assert_used_and_replaced(
        child, device, url, {}, lambda key: "the rest" if "beside" in key else key.partition("/")[2]
    )


@on_every_device
@pytest.mark.parametrize("decode", [False, True], ids=["headers", "decode"])
def test_indexing_lists_what_it_can_see_and_training_replaces_it_all(child, tmp_path, decode, device):
    listed, url = indexed(tmp_path, decode)
    by_headers = {
        "beyond": "its label is '900'; it must be 0 to 18",
        "unlabelled": r"has \['jpg'\], but no label",
        "two": r"has 2 images \(jpg, png\), but must have one",
        "imageless": r"has \['cls', 'txt'\], but no image",
    }
    by_decoding = {Path(name).stem: reason for name, (_, reason) in UNDECODABLE.items()}
    assert_reasons(listed, {**by_headers, **by_decoding} if decode else by_headers)
    assert_used_and_replaced(child, device, url, {**by_headers, **by_decoding}, lambda key: key)


def assert_reasons(found: dict[str, str], expected: dict[str, str]) -> None:
    assert set(found) == set(expected)
    assert all(re.match(reason, found[key]) for key, reason in expected.items()), found


def assert_used_and_replaced(
    child: Executor, device: str, url: str, broken: dict[str, str], name_of: Callable[[str], str]
) -> None:
    """Two epochs and an evaluation, before and after a bit changed in the header of one sample."""
    assert_outcomes(child, device, url, broken, name_of)
    tar = Path(url) / "shard-000000.tar"
    contents = bytearray(tar.read_bytes())
    (damaged,) = [each for each in index_tar(bytes(contents)) if each.key.endswith(DAMAGED)]
    contents[damaged.offset + 1] ^= 1
    tar.write_bytes(contents)
    damage = {damaged.key: "its bytes differ from those that were packed or indexed"}
    assert_outcomes(child, device, url, {**broken, **damage}, name_of)


def assert_outcomes(
    child: Executor, device: str, url: str, broken: dict[str, str], name_of: Callable[[str], str]
) -> None:
    trained, evaluated = child.submit(loaded, url, device).result()
    own = {name.partition(".")[0]: reference(encoded) for name, encoded in GOOD.items()}
    for seen, times in ((trained, 2), (evaluated, 1)):
        places = [place for place in seen if not isinstance(place, BadSample)]
        named = [each for each in seen if isinstance(each, BadSample)]
        assert_reasons({each.key: each.reason for each in named}, broken)
        assert len(named) == times * len(broken) and {each.shard for each in named} <= {"shard-000000.tar"}
        labels = {key: label for key, label, _ in places if key not in broken}
        for key, label, image in places:
            name = name_of(key)
            if key in broken:  # a whole other sample stands there, with its own label
                others = [found for other, _, found in places if labels.get(other) == label]
                assert any(np.array_equal(image, other) for other in others)
            elif name in own:
                difference = np.abs(own[name].astype(int) - image)
                # A GPU's codec spreads colours in another way, which on noise is more than a few levels.
                assert difference.max() <= (name == "cmyk") if device == "cpu" else difference.mean() < 25, key
        assert len(set(labels.values())) >= len(GOOD) and set(own) <= {name_of(key) for key in labels}


Place = tuple[str, int, np.ndarray]


def loaded(url: str, device: str) -> tuple[list[Place | BadSample], list[Place | BadSample]]:
    """Two epochs of training and one evaluation: key, label and pixels of each place, and what is said to be broken."""
    manifest = read_manifest(url)
    spec = LoaderSpec(0, 1, manifest.samples, SIDE, torch.device(device, 0), 1)
    order = Order(0, np.array([manifest.samples]), manifest.samples, 2)
    plain = Augmentation(crop="center", flip=False, layers=0, magnitude=0.0)
    with training_batches(manifest, order, plain, spec, 0, 0, 2) as steps:
        trained = [each for step in steps for batch in step for each in places_of(batch)]
    with evaluation_batches(manifest, 1.0, spec) as batches:
        return trained, [each for batch in batches for each in places_of(batch)]


def places_of(batch) -> Iterator[Place | BadSample]:
    yield from zip(batch.keys, batch.labels[:, 0].tolist(), batch.images.cpu().numpy(), strict=True)
    yield from batch.broken

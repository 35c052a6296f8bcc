"""`coatnet predict`: the most likely classes of image files, decoded and resized as in evaluation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.packing.archives import is_hidden
from data.packing.sources import SUFFIXES
from data.shards.tar_index import printable
from pipeline.checkpoint.pretrained import load_model, load_weights
from pipeline.config.schema import Config
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import torch

    from models.coatnet import CoAtNet


@dataclass(frozen=True)
class Image:
    """An image file's bytes and its size after EXIF orientation; `error` where it does not decode."""

    file: Path
    encoded: bytes
    height: int
    width: int
    error: str | None = None


def predict(
    source: str,
    images: Sequence[str],
    weights: str | None,
    resolution: int | None,
    crop: str | None,
    top: int,
    as_json: bool,
) -> int:
    """Prints the `top` most likely classes of each image; returns the exit status, 1 where one was left out."""
    files = image_files([Path(each) for each in images])
    reader, kind, config = load_weights(source, weights, resolution, crop)
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    network, names = load_model(reader, kind, config, device), reader.state()["classes"]
    left_out = 0
    for number, row in enumerate(predictions(network, config, names, files, top, device)):
        if "error" in row:
            left_out += 1
            print(f"left out: {row['file']}: {row['error']}", file=sys.stderr)
        if as_json:  # one list, printed as it grows
            print("[" if number == 0 else ",\n", json.dumps(row), sep="", end="")
        elif "error" not in row:
            classes = ", ".join(f"{each['class']} {100 * each['probability']:.1f} %" for each in row["predictions"])
            print(f"{row['file']}  {classes}", flush=True)
    if as_json:
        print("]")
    return 1 if left_out else 0


def image_files(paths: Sequence[Path]) -> list[Path]:
    """These files, and the images in these folders by their suffix; UsageError where a path has none."""
    try:
        return [file for path in paths for file in _images_at(path)]
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}; fix that, or leave it out") from None


def _images_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; pass images, or folders of images")
    inside = list(_images_in(path))
    if not inside:
        raise UsageError(f"{path} has no files with the suffix of an image: {' '.join(SUFFIXES)}")
    return inside


def _images_in(folder: Path) -> Iterator[Path]:
    """The images in a folder and its subfolders; as in packing, hidden files are skipped and links are followed.

    Except links to a parent folder, which would never end. A broken link is an image that cannot be read.
    """
    for each in sorted(folder.iterdir()):
        if is_hidden(each.name):
            continue
        if each.is_dir():
            if not (each.is_symlink() and each.resolve() in {around.resolve() for around in each.absolute().parents}):
                yield from _images_in(each)
        elif each.suffix.lower() in SUFFIXES and (each.is_file() or not each.exists()):
            yield each


def predictions(
    network: CoAtNet, config: Config, names: Sequence[str], files: Sequence[Path], top: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """For each file, in order, its row of --json; in memory are a micro batch of files and DALI's prefetched ones."""
    import torch

    from data import augment
    from data.decode import Decoder, Source
    from data.isolation import Inputs, decode_chunks
    from pipeline.training.model import normalize

    size = config.train.micro_batch
    parts = ([read(file) for file in files[first : first + size]] for first in range(0, len(files), size))

    def inputs(images: list[Image]) -> Inputs:
        good = [image for image in images if image.error is None]
        heights, widths = [image.height for image in good], [image.width for image in good]
        params = augment.eval_params(config.evaluate.crop_fraction, heights, widths)
        return [np.frombuffer(image.encoded, np.uint8) for image in good], params

    def make_decoder(source: Source, ahead: int) -> Decoder:
        return Decoder(
            resolution=config.model.resolution,
            batch_size=size,
            layers=0,
            magnitude=0.0,
            device="gpu" if device.type == "cuda" else "cpu",
            device_id=device.index,
            threads=len(os.sched_getaffinity(0)),
            source=source,
            ahead=ahead,
        )

    def without(images: list[Image], failures: dict[int, str]) -> list[Image]:
        good = [i for i, image in enumerate(images) if image.error is None]
        failed = {good[place]: f"does not decode: {reason}" for place, reason in failures.items()}
        return [replace(image, error=failed.get(i, image.error)) for i, image in enumerate(images)]

    sigmoid = config.train.loss == "sigmoid"
    for part, pixels in decode_chunks(parts, inputs, make_decoder, without):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            logits = network(normalize(pixels)).float() if len(pixels) else torch.zeros(0, len(names))
        best = (logits.sigmoid() if sigmoid else logits.softmax(1)).topk(min(top, len(names)), dim=1)
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        for image in part:
            pairs = zip(*next(rows), strict=True) if image.error is None else ()
            classes = [{"class": names[number], "probability": value} for value, number in pairs]
            error = {} if image.error is None else {"error": image.error}
            yield {"file": printable(str(image.file)), "predictions": classes, **error}


def read(file: Path) -> Image:
    """A file's bytes and size, or the reason why it does not decode."""
    from data.codec import Undecodable, decode

    try:
        encoded, picture, _ = decode(file.read_bytes())
    except OSError as error:
        return Image(file, b"", 0, 0, str(error.strerror))
    except Undecodable as error:
        return Image(file, b"", 0, 0, str(error))
    return Image(file, encoded, picture.height, picture.width)

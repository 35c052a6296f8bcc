"""`coatnet predict`: the likeliest classes of image files, read, resized and computed as evaluation does it."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.packing.archives import is_hidden
from data.packing.sources import SUFFIXES
from data.shards.tar_index import printable
from pipeline.checkpoint.pretrained import load_model, load_weights
from pipeline.config.schema import Config
from pipeline.errors import UsageError

if TYPE_CHECKING:
    import torch

    from data.augment import AugmentParams
    from models.coatnet import CoAtNet


@dataclass(frozen=True)
class Image:
    """An image file's bytes and upright size; of one that does not decode, why."""

    file: Path
    encoded: bytes
    height: int
    width: int
    error: str | None = None


@dataclass(frozen=True)
class Prediction:
    """A file's likeliest classes with their probabilities, 0 to 1, falling; of one that was left out, why."""

    file: str
    classes: list[tuple[str, float]]
    error: str | None = None


def predict(
    source: str,
    images: Sequence[str],
    weights: str | None,
    resolution: int | None,
    crop: str | None,
    most: int,
    as_json: bool,
) -> int:
    """Prints the `most` likeliest classes of each image; returns the exit status, 1 where one was left out."""
    files = image_files([Path(each) for each in images])
    reader, kind, config = load_weights(source, weights, resolution, crop)
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    network, names = load_model(reader, kind, config, device), reader.state()["classes"]
    left_out = 0
    for number, each in enumerate(predictions(network, config, names, files, most, device)):
        if each.error is not None:
            left_out += 1
            print(f"left out: {each.file}: {each.error}", file=sys.stderr)
        if as_json:  # a list, written as it grows
            print("[" if number == 0 else ",\n", json.dumps(_document(each)), sep="", end="")
        elif each.error is None:
            said = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in each.classes)
            print(f"{each.file}  {said}", flush=True)
    if as_json:
        print("]")
    return 1 if left_out else 0


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among these paths, and the images in the folders, by suffix, in order; UsageError where there are none.

    A file that is named is taken whatever its suffix is.
    """
    try:
        return [file for path in paths for file in _images_at(path)]
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}; fix that, or leave it out") from None


def _images_at(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} is no file and no folder; give images, or folders of images")
    inside = list(_images_in(path))
    if not inside:
        raise UsageError(f"{path} has no images; they are known by their suffixes: {' '.join(SUFFIXES)}")
    return inside


def _images_in(folder: Path) -> Iterator[Path]:
    """The images in a folder and in those below it; as in packing, hidden files are nobody's and links are followed.

    Not those to a folder around them, which have no end. One that leads nowhere is an image that cannot be read.
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
    network: CoAtNet, config: Config, names: Sequence[str], files: Sequence[Path], most: int, device: torch.device
) -> Iterator[Prediction]:
    """What the network makes of each file, in order; a micro batch of files is in memory at a time, and what DALI has
    under way."""
    import torch

    from data import augment
    from data.decode import Decoder
    from pipeline.training.model import normalize

    size, under_way = config.train.micro_batch, deque[list[Image]]()
    parts = iter([files[first : first + size] for first in range(0, len(files), size)])

    def source() -> tuple[list[np.ndarray], AugmentParams]:
        under_way.append([read(file) for file in next(parts)])
        good = [image for image in under_way[-1] if image.error is None]
        heights, widths = [image.height for image in good], [image.width for image in good]
        params = augment.eval_params(config.evaluate.crop_fraction, heights, widths)
        return [np.frombuffer(image.encoded, np.uint8) for image in good], params

    decoder = Decoder(
        resolution=config.model.resolution,
        batch_size=size,
        layers=0,
        magnitude=0.0,
        device="gpu" if device.type == "cuda" else "cpu",
        device_id=device.index,
        threads=len(os.sched_getaffinity(0)),
        source=source,
    )
    sigmoid = config.train.loss == "sigmoid"
    for pixels in decoder:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            logits = network(normalize(pixels)).float() if len(pixels) else torch.zeros(0, len(names))
        likeliest = (logits.sigmoid() if sigmoid else logits.softmax(1)).topk(min(most, len(names)), dim=1)
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        for image in under_way.popleft():
            values, numbers = next(rows) if image.error is None else ((), ())
            classes = [(names[number], value) for number, value in zip(numbers, values, strict=True)]
            yield Prediction(printable(str(image.file)), classes, image.error)


def read(file: Path) -> Image:
    """A file that decodes whole, with its size, or with the reason why it does not."""
    from data.codec import Undecodable, examine

    try:
        encoded = file.read_bytes()
        picture = examine(encoded)
    except OSError as error:
        return Image(file, b"", 0, 0, str(error.strerror))
    except Undecodable as error:
        return Image(file, b"", 0, 0, str(error))
    return Image(file, encoded, picture.height, picture.width)


def _document(prediction: Prediction) -> dict[str, object]:
    classes = [{"class": name, "probability": probability} for name, probability in prediction.classes]
    error = {} if prediction.error is None else {"error": prediction.error}
    return {"file": prediction.file, "predictions": classes, **error}

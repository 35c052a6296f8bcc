"""`coatnet predict`: the likeliest classes of ordinary image files, read, resized and computed as evaluation does it.

Next: trained.py.
"""

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

from data.parts import IMAGES
from pipeline.config import Config
from pipeline.errors import BadRequest
from pipeline.trained import opened, trained_network

if TYPE_CHECKING:
    import torch

    from data.augment import Recipe
    from models.coatnet import CoAtNet

SUFFIXES = tuple(f".{name}" for name in IMAGES)


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
    reader, kind, config = opened(source, weights, resolution, crop)
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    network, names = trained_network(reader, kind, config, device), reader.state()["classes"]
    found, left_out = [], 0
    for each in predictions(network, config, names, files, most, device):
        if each.error is not None:
            left_out += 1
            print(f"left out: {each.file}: {each.error}", file=sys.stderr)
        if as_json:
            found.append(_document(each))
        elif each.error is None:
            said = ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in each.classes)
            print(f"{each.file}  {said}", flush=True)
    if as_json:
        print(json.dumps(found))
    return 1 if left_out else 0


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files among these paths, and the images in the folders, by suffix, in order; BadRequest where there are none.

    A file that is named is taken whatever its suffix is; in folders hidden files are nobody's.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(each for each in path.rglob("*") if _is_image(each, path))
            if not inside:
                raise BadRequest(f"{path} has no images; they are known by their suffixes: {' '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise BadRequest(f"{path} is no file and no folder; give images, or folders of images")
    return found


def _is_image(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.suffix.lower() in SUFFIXES and file.is_file() and not hidden


def predictions(
    network: CoAtNet, config: Config, names: Sequence[str], files: Sequence[Path], most: int, device: torch.device
) -> Iterator[Prediction]:
    """What the network makes of each file, in order; a micro batch of files is in memory at a time, and what DALI has
    under way."""
    import torch

    from data import augment
    from data.decode import Decoder
    from pipeline.network import inputs

    size, under_way = config.train.micro_batch, deque[list[Image]]()
    parts = iter([files[first : first + size] for first in range(0, len(files), size)])

    def source() -> tuple[list[np.ndarray], Recipe]:
        under_way.append([read(file) for file in next(parts)])
        good = [image for image in under_way[-1] if image.error is None]
        heights, widths = [image.height for image in good], [image.width for image in good]
        recipe = augment.fixed(config.evaluate.crop_fraction, heights, widths)
        return [np.frombuffer(image.encoded, np.uint8) for image in good], recipe

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
            logits = network(inputs(pixels)).float() if len(pixels) else torch.zeros(0, len(names))
        likeliest = (logits.sigmoid() if sigmoid else logits.softmax(1)).topk(min(most, len(names)), dim=1)
        rows = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        for image in under_way.popleft():
            values, numbers = next(rows) if image.error is None else ((), ())
            classes = [(names[number], value) for number, value in zip(numbers, values, strict=True)]
            yield Prediction(str(image.file), classes, image.error)


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

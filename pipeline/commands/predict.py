"""`coatnet predict`: the most likely classes of image files, decoded and resized as in evaluation."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.packing.archives import is_hidden
from data.packing.sources import SUFFIXES, fault_of_name
from data.shards.tar_index import printable
from pipeline.checkpoint.pretrained import load_model, load_weights
from pipeline.commands.data import MAX_LISTED
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
    files, passed_over = image_files([Path(each.removeprefix("file://")) for each in images])
    for file, reason in passed_over[:MAX_LISTED]:
        print(f"skipped: {printable(str(file))}: {reason}", file=sys.stderr)
    if len(passed_over) > MAX_LISTED:
        print(f"and {len(passed_over) - MAX_LISTED} more files are skipped", file=sys.stderr)
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


def image_files(paths: Sequence[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """These files, and the images in these folders; and what in the folders is passed over, with the reason.

    UsageError where a path has no images.
    """
    files: list[Path] = []
    passed_over: list[tuple[Path, str]] = []
    try:
        for path in paths:
            if not path.exists():
                raise UsageError(f"{path} does not exist; pass images, or folders of images")
            found = [(path, None)] if path.is_file() else list(_walk(path))
            inside = [file for file, reason in found if reason is None]
            if not inside:
                raise UsageError(f"{path} has no image files ({' '.join(SUFFIXES)})")
            files += inside
            passed_over += [(file, reason) for file, reason in found if reason]
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}; fix that, or leave it out") from None
    return files, passed_over


def _walk(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """What lies in a folder and its subfolders, with the reason to pass it over; as in packing, links are followed.

    A broken link is an image that cannot be read.
    """
    for each in sorted(folder.iterdir()):
        if is_hidden(each.name):
            yield each, "hidden"
        elif each.is_dir():
            if each.is_symlink() and each.resolve() in {around.resolve() for around in each.absolute().parents}:
                yield each, "a link to a folder that contains it"
            else:
                yield from _walk(each)
        elif each.exists() and not each.is_file():
            yield each, "not a regular file"
        else:
            yield each, fault_of_name(each.name)


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
        return [image.encoded for image in good], params

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
        failed = {good[place]: f"cannot be decoded: {reason}" for place, reason in failures.items()}
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

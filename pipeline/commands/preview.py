"""`coatnet preview`: a contact sheet of training samples exactly as the model will see them, before it sees them.

They are what the first micro batches of an epoch have, read, decoded, augmented and mixed by what training uses. Left
of each is the centre of the same image as it is, and below what was drawn. Pixels of the sheet are the model's, each
as one or as a square of several; nothing is smoothed.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.augment import Augmentation, describe_params
from data.loader import Batch, LoaderSpec, batches_at
from data.order import Order
from data.shards.manifest import Manifest
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.plan import augmentation, training_set
from pipeline.training.mixup import mixup

LEAST_SIDE, SHEET_WIDTH, GAP, BETWEEN, LINE, LETTERS = 144, 2000, 12, 4, 15, 8
"""Pixels: least side of a picture, the sheet's width, between samples, between the two, a line; points of a letter."""


@dataclass(frozen=True)
class SheetItem:
    """A sample on the sheet: uint8 [side, side, 3] as it is and as the model sees it, and what stands below."""

    plain: np.ndarray
    seen: np.ndarray
    lines: list[str]


def preview(preset: str, out: str, overrides: list[str], samples: int, epoch: int) -> int:
    """Writes the sheet; returns the exit status."""
    config, path = read_config(preset, overrides), Path(out)
    if path.suffix.lower() != ".png" or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"{out} cannot be written; it must be a .png in a folder that is there and may be written to")
    shown = samples_shown(config, samples, epoch)
    title = f"{preset}: the first {len(shown)} samples of epoch {epoch}; left their centres, right what the model sees"
    png = sheet(shown, title)
    try:
        path.write_bytes(png)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    print(f"{out}: {len(shown)} samples of epoch {epoch} as the model sees them")
    return 0


def samples_shown(config: Config, samples: int, epoch: int) -> list[SheetItem]:
    """The first samples of an epoch, from its first whole micro batch on; fewer where the set has fewer."""
    manifest, order = training_set(config)
    samples, size = min(samples, order.samples), config.train.micro_batch
    first = -(-epoch * order.samples // size)
    positions = range(first * size, (first + -(-samples // size)) * size)
    drawn = augmentation(config.augment)
    plain = replace(drawn, crop="center", flip=False, layers=0)
    as_they_are = _batches(config, manifest, order, plain, positions)
    as_seen = _batches(config, manifest, order, drawn, positions)
    pairs = zip(as_they_are, as_seen, strict=True)
    return [shown for before, after in pairs for shown in _shown(config, manifest.classes, before, after)][:samples]


def _batches(config: Config, manifest: Manifest, order: Order, drawn: Augmentation, positions: range) -> list[Batch]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    threads = len(os.sched_getaffinity(0))
    spec = LoaderSpec(0, 1, config.train.micro_batch, config.model.resolution, device, threads)
    with batches_at(manifest, order, drawn, spec, config.run.seed, positions) as batches:
        return list(batches)


def _shown(config: Config, classes: tuple[str, ...], plain: Batch, seen: Batch) -> Iterator[SheetItem]:
    """The samples of a micro batch, mixed as training mixes them."""
    names = [", ".join(classes[label] for label in row if label >= 0) for row in seen.labels.tolist()]
    images, partners = seen.images, [""] * len(names)
    if alpha := config.augment.mixup:
        itself = torch.eye(len(names), device=images.device)  # as targets, so that who was mixed with whom comes out
        floats = images.permute(0, 3, 1, 2).float()
        floats, shares = mixup(floats, itself, alpha, config.run.seed, seen.positions)
        images = floats.permute(0, 2, 3, 1).round().byte()
        others = shares - shares.diagonal().diag()
        partners = [
            f"{100 * row.max().item():.0f} % of {names[int(row.argmax())]}" if row.any() else "" for row in others
        ]
    replaced = {broken.key for broken in seen.broken}
    for i, key in enumerate(seen.keys):
        drawn = describe_params(seen.params, i, seen.shapes[i], config.augment.randaugment.magnitude)
        lines = [names[i], *drawn]
        lines += [f"mixed with {partners[i]}"] * bool(partners[i]) + [f"stands in for {key}"] * (key in replaced)
        yield SheetItem(plain.images[i].cpu().numpy(), images[i].cpu().numpy(), lines)


def sheet(shown: list[SheetItem], title: str) -> bytes:
    """The sheet as a PNG; what does not fit under its picture is cut off with three dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    times = -(-LEAST_SIDE // len(shown[0].seen))
    side, font = times * len(shown[0].seen), FontProperties(size=LETTERS)
    width, height = 2 * side + BETWEEN + 2 * GAP, side + LINE * max(len(each.lines) for each in shown) + GAP
    columns = min(len(shown), max(1, SHEET_WIDTH // width))
    top, rows = 2 * LINE, -(-len(shown) // columns)
    pixels = np.full((top + rows * height, columns * width + GAP, 3), 255, np.uint8)
    figure = Figure((pixels.shape[1] / 100, pixels.shape[0] / 100), dpi=100)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def write(text: str, x: int, y: int, most: int) -> None:
        fitting = _fitting(text, lambda part: renderer.get_text_width_height_descent(part, font, False)[0] <= most)
        place = x / pixels.shape[1], 1 - y / pixels.shape[0]
        figure.text(*place, fitting, fontproperties=font, va="top", parse_math=False)

    write(title, GAP, LINE // 2, pixels.shape[1] - 2 * GAP)
    for number, each in enumerate(shown):
        x, y = GAP + number % columns * width, top + number // columns * height
        for picture, left in ((each.plain, x), (each.seen, x + side + BETWEEN)):
            pixels[y : y + side, left : left + side] = picture.repeat(times, 0).repeat(times, 1)
        for line, text in enumerate(each.lines):
            write(text, x, y + side + line * LINE + 2, 2 * side + BETWEEN)
    figure.figimage(pixels)
    figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def _fitting(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning as fits with three dots."""
    if fits(text):
        return text
    too_long = bisect_left(range(len(text)), True, key=lambda end: not fits(text[:end] + "..."))
    return text[: max(0, too_long - 1)] + "..."

"""`coatnet preview`: a contact sheet of training samples exactly as the model will see them.

They are the first micro batches of an epoch, read, decoded, augmented and mixed by the code of training. Left of each
is the centre crop of the same image, without augmentation, and below are the draws. Each pixel of the sheet is one of
the model's, or one of a square that repeats it.
"""

from __future__ import annotations

import io
import os
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.augment import NONE, Augmentation, describe_params
from data.loader import Batch, LoaderSpec, batches_at
from data.order import Order
from data.shards.manifest import Manifest
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.formatting import format_percent
from pipeline.plan import augmentation, training_set
from pipeline.training.mixup import drawn_partners, mixup

MIN_SIDE, SHEET_WIDTH, GAP, BETWEEN, LINE, FONT_POINTS = 144, 2000, 12, 4, 15, 8
"""In pixels: a picture's least side, the sheet's width, gaps between samples and between their pictures, a line."""


@dataclass(frozen=True)
class SheetItem:
    """A sample on the sheet: both pictures, uint8 [side, side, 3], and the lines of text below them."""

    original: np.ndarray
    augmented: np.ndarray
    lines: list[str]


def preview(preset: str, out: str, overrides: list[str], samples: int, epoch: int) -> int:
    """Writes the sheet; returns the exit status."""
    config, path = read_config(preset, overrides), Path(out)
    if path.suffix.lower() != ".png" or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UsageError(f"{out} cannot be written; it must be a .png in a writable folder")
    items = sheet_items(config, samples, epoch)
    title = (
        f"{preset}: the first {len(items)} samples of epoch {epoch}; left: centre crop, right: as the model sees them"
    )
    png = sheet(items, title)
    try:
        path.write_bytes(png)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from None
    print(f"{out}: {len(items)} samples of epoch {epoch} as the model sees them")
    return 0


def sheet_items(config: Config, samples: int, epoch: int) -> list[SheetItem]:
    """The first samples of an epoch, from its first whole micro batch on, at most all of the set."""
    manifest, order = training_set(config)
    samples, size = min(samples, order.samples), config.train.micro_batch
    first = -(-epoch * order.samples // size)
    return items_at(config, manifest, order, range(first, first + -(-samples // size)))[:samples]


def items_at(config: Config, manifest: Manifest, order: Order, micro_batches: Iterable[int]) -> list[SheetItem]:
    """The samples of these micro batches, whose numbers in the stream rise, in its order."""
    size, drawn = config.train.micro_batch, augmentation(config.augment)
    positions = [position for number in micro_batches for position in range(number * size, (number + 1) * size)]
    plain = replace(NONE, crop="center")
    pairs = zip(*(_batches(config, manifest, order, each, positions) for each in (plain, drawn)), strict=True)
    return [item for before, after in pairs for item in _items(config, manifest.classes, before, after)]


def _batches(
    config: Config, manifest: Manifest, order: Order, drawn: Augmentation, positions: Sequence[int]
) -> list[Batch]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    threads = len(os.sched_getaffinity(0))
    spec = LoaderSpec(0, 1, config.train.micro_batch, config.model.resolution, device, threads)
    with batches_at(manifest, order, drawn, spec, config.run.seed, positions) as batches:
        return list(batches)


def _items(config: Config, classes: tuple[str, ...], original: Batch, augmented: Batch) -> Iterator[SheetItem]:
    """The samples of a micro batch, mixed as in training."""
    names = [", ".join(classes[label] for label in row if label >= 0) for row in augmented.labels.tolist()]
    images, partners = augmented.images, [""] * len(names)
    if alpha := config.augment.mixup:
        drawn = alpha, config.run.seed, augmented.positions
        floats, no_targets = images.permute(0, 3, 1, 2).float(), torch.zeros(len(names), 1, device=images.device)
        images = mixup(floats, no_targets, *drawn)[0].permute(0, 2, 3, 1).round().byte()
        weight, others = drawn_partners(*drawn)
        share = format_percent(1 - weight)
        partners = [f"{share} of {names[other]}" if other != own else "" for own, other in enumerate(others)]
    replaced = {broken.key for broken in augmented.broken}
    for i, key in enumerate(augmented.keys):
        params = describe_params(augmented.params, i, augmented.shapes[i], config.augment.randaugment.magnitude)
        lines = [names[i], *params]
        lines += [f"mixed with {partners[i]}"] * bool(partners[i]) + [f"replaces {key}"] * (key in replaced)
        yield SheetItem(original.images[i].cpu().numpy(), images[i].cpu().numpy(), lines)


def sheet(items: list[SheetItem], title: str) -> bytes:
    """The sheet as a PNG; lines that are too long for their pictures are cut off with three dots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    warnings.filterwarnings("ignore", "Glyph .* missing")  # the sheet shows a box
    scale = -(-MIN_SIDE // len(items[0].augmented))
    side, font = scale * len(items[0].augmented), FontProperties(size=FONT_POINTS)
    width, height = 2 * side + BETWEEN + 2 * GAP, side + LINE * max(len(item.lines) for item in items) + GAP
    columns = min(len(items), max(1, SHEET_WIDTH // width))
    top, rows = 2 * LINE, -(-len(items) // columns)
    pixels = np.full((top + rows * height, columns * width + GAP, 3), 255, np.uint8)
    figure = Figure((pixels.shape[1] / 100, pixels.shape[0] / 100), dpi=100)
    renderer = FigureCanvasAgg(figure).get_renderer()

    def write(text: str, x: int, y: int, max_width: int) -> None:
        fitting = _truncate(
            text, lambda part: renderer.get_text_width_height_descent(part, font, False)[0] <= max_width
        )
        position = x / pixels.shape[1], 1 - y / pixels.shape[0]
        figure.text(*position, fitting, fontproperties=font, va="top", parse_math=False)

    write(title, GAP, LINE // 2, pixels.shape[1] - 2 * GAP)
    for number, item in enumerate(items):
        x, y = GAP + number % columns * width, top + number // columns * height
        for picture, left in ((item.original, x), (item.augmented, x + side + BETWEEN)):
            pixels[y : y + side, left : left + side] = picture.repeat(scale, 0).repeat(scale, 1)
        for line, text in enumerate(item.lines):
            write(text, x, y + side + line * LINE + 2, 2 * side + BETWEEN)
    figure.figimage(pixels)
    figure.savefig(file := io.BytesIO(), format="png")
    return file.getvalue()


def _truncate(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of it as fits with three dots after it."""
    if fits(text):
        return text
    too_long = bisect_left(range(len(text)), True, key=lambda end: not fits(text[:end] + "..."))
    return text[: max(0, too_long - 1)] + "..."

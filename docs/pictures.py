"""Draws the figures of docs/pictures as SVG: `.venv/bin/python docs/pictures.py`.

The order is that of data/order.py, and the memory of CoAtNet-7 that of `coatnet plan`. A figure has a ground of its
own, light or dark as the reader's system is, so it can be read on any page.
"""

from __future__ import annotations

import json
import subprocess
import sys
from html import escape
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import numpy as np  # noqa: E402

from data.order import Order  # noqa: E402

HUES = ("#8ab8f0", "#f3b982", "#93cf9f", "#d9a6e3")
"""Of what is told apart by colour; dark text can be read on each."""
STYLE = """
svg { --ink: #1f2328; --soft: #59636e; --line: #848d97; --box: #eef1f4; --ground: #ffffff }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #a3adb8; --line: #7d8590; --box: #2a313a; --ground: #16191d }
}
text { fill: var(--ink); font: 13px system-ui, sans-serif }
.soft { fill: var(--soft); font-size: 12px } .code { font: 12px ui-monospace, monospace } .bold { font-weight: 600 }
.on { fill: #111111; font-size: 11px } .mid { text-anchor: middle } .end { text-anchor: end }
.box { fill: var(--box); stroke: var(--line) } .edge { fill: none; stroke: var(--ink); stroke-width: 1.6 }
.arrow { fill: none; stroke: var(--line); stroke-width: 1.6; marker-end: url(#head) }
"""


class Figure:
    """An SVG that is added to; places and sizes are in pixels, from the upper left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str = "box", fill: str = "") -> None:
        look = f'fill="{fill}"' if fill else f'class="{kind}"'
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" {look}/>')

    def card(self, x: float, y: float, width: float, height: float, title: str, *lines: str) -> None:
        """A box with a title and lines below it; those with a dot or a slash are names of files."""
        self.box(x, y, width, height)
        self.text(x + width / 2, y + 21, title, "mid bold")
        for number, line in enumerate(lines):
            kind = "code" if any(sign in line for sign in "./") else "soft"
            self.text(x + width / 2, y + 40 + 17 * number, line, f"mid {kind}")

    def arrow(self, *points: tuple[float, float]) -> None:
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self._parts.append(f'<path d="M{path}" class="arrow"/>')

    def write(self, name: str, title: str) -> None:
        size = f"{self.width} {self.height}"
        head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        head += '<path d="M0 0 L8 4 L0 8 z" fill="context-stroke"/></marker>'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{self.width}" role="img">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<defs>{head}</defs>",
            f'<rect width="{self.width}" height="{self.height}" rx="8" style="fill: var(--ground)"/>',
            *self._parts,
            "</svg>\n",
        ]
        (DOCS / "pictures").mkdir(exist_ok=True)
        (DOCS / "pictures" / name).write_text("\n".join(lines))


def draw_order() -> None:
    """The samples of four shards, as data/order.py deals them to a global batch of four in windows of three."""
    order = Order(seed=3, shard_samples=np.array([8, 6, 9, 5]), global_batch=4, window=3)
    epoch, slots = order.epoch(0), order.global_batch
    rows = order.samples // slots
    firsts = order.shard_ends - order.shard_samples
    figure, side = Figure(760, 420), 24

    def sample(x: float, y: float, number: int) -> None:
        shard = int(np.searchsorted(order.shard_ends, number, side="right"))
        figure.box(x, y, side - 2, side - 2, fill=HUES[shard])
        figure.text(x + side / 2 - 1, y + 15, str(number), "on mid")

    lanes = {}
    windows = {slot: [] for slot in range(slots)}
    for slot in range(slots):
        lane: list[int] = []
        for row in range(rows):
            window = epoch.window_at(row * slots + slot)
            if window.first_row_of_lane == row:
                windows[slot].append((row, window.samples))
                lane += [
                    int(firsts[part.shard]) + part.first_row + k for part in window.ranges for k in range(part.rows)
                ]
        lanes[slot] = lane
    by_place = sorted(range(slots), key=lambda slot: int(epoch._start_of_slot[slot]))

    figure.text(20, 28, "Shards, as the manifest lists them", "bold")
    for number in range(order.samples):
        shard = int(np.searchsorted(order.shard_ends, number, side="right"))
        sample(20 + number * side + shard * 14, 40, number)
    figure.text(
        20,
        100,
        "1  Shards permuted, laid end to end, rotated;  2  cut into a lane for each slot of the global batch",
        "bold",
    )
    for place, slot in enumerate(by_place):
        left = 20 + place * rows * side
        for k, number in enumerate(lanes[slot]):
            sample(left + k * side, 112, number)
        figure.box(left - 1, 110, rows * side - 1, side + 2, "edge")
        figure.text(left + rows * side / 2, 156, f"lane {place}, dealt to slot {slot}", "mid soft")
    figure.text(20, 198, "3  Windows, staggered by slot", "bold")
    figure.text(412, 198, "4  Shuffled inside windows: as trained", "bold")
    for slot in range(slots):
        top = 234 + slot * (side + 12)
        for left in (84, 476):
            figure.text(left - 12, top + 15, f"slot {slot}", "end soft")
        for row in range(rows):
            sample(84 + row * side, top, lanes[slot][row])
            sample(476 + row * side, top, int(epoch.samples_at(row * slots + slot)))
        for left in (84, 476):
            for first, count in windows[slot]:
                figure.box(left + first * side - 2, top - 3, count * side + 1, side + 4, "edge")
    for row in range(rows):
        figure.text(476 + row * side + side / 2 - 1, 222, str(row), "mid soft")
    figure.text(464, 222, "step", "end soft")
    figure.text(
        20,
        396,
        "A column on the right is one global batch. The number of ranks is no part of it: they share a column out.",
        "soft",
    )
    figure.write("order.svg", "The order: shards, lanes, slots, windows")


def draw_walk() -> None:
    steps = [
        ("shard", "data/shards/", "bytes and checksums"),
        ("order", "data/order.py", "which sample, when"),
        ("read", "data/reader.py", "a window ahead"),
        ("draw", "data/augment.py", "crop, flip, RandAugment"),
        ("decode", "data/decode.py", "DALI: pixels"),
        ("batch", "data/loader.py", "a micro batch"),
        ("mix", "training/mixup.py", "normalised"),
        ("network", "models/coatnet.py", "logits"),
        ("loss", "training/losses.py", "one all-reduce"),
        ("gradient", "training/engine.py", "DeepSpeed ZeRO"),
        ("verdict", "loss_guard.py", "the same on all ranks"),
        ("checkpoint", "checkpoint/writer.py", "every so many steps"),
    ]
    figure, across, width, height = Figure(760, 330), 4, 166, 76
    for number, (title, file, what) in enumerate(steps):
        row, column = divmod(number, across)
        x, y = 20 + column * 186, 20 + row * 106
        figure.card(x, y, width, height, f"{number + 1}  {title}", file, what)
        if column + 1 < across:
            figure.arrow((x + width + 2, y + height / 2), (x + 185, y + height / 2))
        elif number + 1 < len(steps):
            figure.arrow((x + width / 2, y + height), (x + width / 2, y + 91), (101, y + 91), (101, y + 105))
    figure.write("walk.svg", "One image, from the shard to the gradient")


def draw_states() -> None:
    figure = Figure(760, 404)
    figure.card(20, 116, 120, 60, "submitted", "Slurm's queue")
    figure.card(200, 116, 130, 60, "starting", "attempt N")
    figure.card(440, 116, 130, 60, "training", "step by step")
    figure.card(660, 116, 80, 60, "done", "status 0")
    figure.card(130, 290, 110, 60, "refused", "status 2")
    figure.card(420, 290, 120, 60, "stopped", "status 3")
    figure.card(620, 290, 120, 60, "failed", "status 1")
    figure.card(440, 16, 130, 38, "rolling back")
    figure.arrow((140, 146), (198, 146))
    figure.arrow((330, 146), (438, 146))
    figure.text(384, 138, "newest good", "mid soft")
    figure.text(384, 164, "checkpoint", "mid soft")
    figure.arrow((570, 146), (658, 146))
    figure.text(612, 138, "last step", "mid soft")
    figure.arrow((540, 116), (540, 56))
    figure.text(550, 90, "three bad steps in a row", "soft")
    figure.arrow((470, 54), (470, 114))
    figure.text(460, 90, "skips them", "end soft")
    figure.arrow((216, 176), (216, 288))
    figure.text(206, 226, "a wrong key,", "end soft")
    figure.text(206, 242, "other data, a live run", "end soft")
    figure.arrow((490, 176), (490, 288))
    figure.text(498, 262, "asked to stop: saves", "soft")
    figure.arrow((550, 176), (550, 206), (690, 206), (690, 288))
    figure.text(562, 198, "crash, hang, memory", "soft")
    figure.arrow((420, 320), (300, 320), (300, 178))
    figure.arrow((680, 350), (680, 366), (270, 366), (270, 178))
    figure.text(380, 390, "the same command, or Slurm's requeue: attempt N + 1", "mid soft")
    figure.write("states.svg", "The states of a run and what moves it between them")


def draw_checkpoint() -> None:
    figure = Figure(760, 356)
    figure.text(20, 26, "All parameters, flattened and laid end to end; each rank owns a slice", "bold")
    names = ["stem.0.weight", "stages.0.0.expand.weight", "stages.2.0.table", "head.weight"]
    left = 20.0
    for name, width, hue in zip(names, (150, 210, 150, 210), HUES, strict=True):
        figure.text(left + width / 2, 52, name, "mid soft")
        figure.box(left, 62, width - 2, 22, fill=hue)
        left += width
    for rank in range(3):
        start, width = 20 + 240 * rank, 238
        middle = start + width / 2
        figure.box(start, 59, width, 28, "edge")
        figure.arrow((middle, 88), (middle, 112))
        figure.card(start + 8, 114, width - 16, 84, f"rank-0000{rank}.safetensors", "its part of each weight,",
                    "moment and average;", "blocks with a checksum each")  # fmt: skip
    figure.card(
        260, 248, 240, 88, "manifest.json", "name, kind: file, offset,", "start, count;", "checksums of all files"
    )
    figure.arrow((380, 248), (380, 200))
    figure.arrow((260, 268), (140, 268), (140, 200))
    figure.arrow((500, 268), (620, 268), (620, 200))
    figure.card(20, 282, 200, 54, "buffers.safetensors", "batch-norm statistics")
    figure.card(540, 282, 200, 54, "state.json", "place, configuration, ancestry")
    figure.write("checkpoint.svg", "A checkpoint's files")


def draw_memory() -> None:
    command = "plan configs/jft3b/coatnet7.yaml --gpus 128 --gpu h100 model.classes=30000"
    start = [sys.executable, "-P", "coatnet_main.py", "pipeline.cli", *command.split(), "--json"]
    planned = json.loads(subprocess.run(start, cwd=DOCS.parent, check=True, capture_output=True).stdout)
    components = {name: size for name, size in planned["memory_bytes"].items() if size >= 2**27 and name != "total"}
    bars = sorted(components.items(), key=lambda item: -item[1])
    within = {name: size for name, size in planned["activations_bytes"].items() if size >= 2**27}
    total, usable = planned["memory_bytes"]["total"], planned["usable_bytes"]
    figure, scale = Figure(760, 118 + 26 * (len(bars) + len(within))), 440 / max(components.values())
    figure.text(20, 28, f"CoAtNet-7 on 128 H100s: {total / 2**30:.1f} of {usable / 2**30:.0f} GiB on each", "bold")
    figure.text(20, 48, f"coatnet {command}", "soft")
    top = 66
    for name, size in bars:
        _bar(figure, top, name, size, scale, HUES[0], "")
        top += 26
        for part, bytes_of_part in within.items() if name == "activations" else ():
            _bar(figure, top, part, bytes_of_part, scale, HUES[1], "soft")
            top += 26
    figure.text(
        20,
        top + 26,
        "Orange: activations by part of the network. What is below 0.1 GiB is left out. Estimates.",
        "soft",
    )
    figure.write("memory.svg", "Memory of a rank of CoAtNet-7 by component")


def _bar(figure: Figure, top: int, name: str, size: int, scale: float, hue: str, kind: str) -> None:
    figure.text(176, top + 16, name, f"end {kind}")
    figure.box(186, top + 2, max(1.0, size * scale), 18, fill=hue)
    figure.text(194 + size * scale, top + 16, f"{size / 2**30:.1f} GiB", kind)


if __name__ == "__main__":
    for draw in (draw_order, draw_walk, draw_states, draw_checkpoint, draw_memory):
        draw()

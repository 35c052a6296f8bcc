"""Curves over steps as SVG, for a page in light or dark: what is no curve has the colour of the page's text."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
from matplotlib.figure import Figure

COLORS = ("#3b82d6", "#e07b1a", "#2a9d5c", "#b04fc9", "#c9a000", "#d64550", "#15a3b3", "#8a6d4b")
"""Which are seen on white and on black."""
MOST_POINTS = 1200
_INK = "#0a0b0c"
_STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.formatter.limits": (-4, 6), "axes.formatter.useoffset": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Values over steps; `dots` where each is one of few."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False


@dataclass(frozen=True)
class Marks:
    """What happened at steps: attempts that began again, rollbacks with what they skip, and steps not applied."""

    restarts: Sequence[int] = ()
    rollbacks: Sequence[tuple[int, int]] = ()
    skipped: Sequence[int] = field(default_factory=tuple)


def curves(title: str, found: Sequence[Curve], marks: Marks = Marks(), percent: bool = False) -> str:
    """The chart as an svg element, text as text, its legend below where there are several curves."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        legend_rows = -(-len(found) // 3) if len(found) > 1 else 0
        height, bottom = 2.4 + 0.25 * legend_rows, 0.3 + 0.25 * legend_rows  # inches
        figure = Figure(figsize=(6.0, height))
        axes = figure.add_axes((0.11, bottom / height, 0.87, 1.85 / height))
        for restart in marks.restarts:
            axes.axvline(restart, color=_INK, linewidth=0.8, linestyle=":", alpha=0.5)
        for first, last in marks.rollbacks:
            axes.axvspan(first - 0.5, last + 0.5, color="#d64550", alpha=0.25, linewidth=0)
        if marks.skipped:
            axes.plot(
                marks.skipped, [0.02] * len(marks.skipped), "|", color="#d64550", transform=axes.get_xaxis_transform()
            )
        for number, curve in enumerate(found):
            steps, values = _thinned(
                np.array(curve.steps, float), np.array(curve.values, float), MOST_POINTS // len(found)
            )
            shape = "o-" if curve.dots or len(steps) == 1 else "-"
            color = COLORS[number % len(COLORS)]
            width = 1.0 + 1.4 * (len(found) - 1 - number) / len(found)  # what a later curve covers is seen beside it
            axes.plot(steps, values, shape, color=color, linewidth=width, markersize=3.5, label=curve.label)
        if percent:
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        else:
            _scale([value for curve in found for value in curve.values], axes)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlim(left=0)
        axes.grid(color=_INK, alpha=0.12, linewidth=0.6)
        axes.set_title(title, loc="left", fontsize=10.5, parse_math=False)
        if len(found) > 1:
            for text in figure.legend(loc="lower left", ncols=3, frameon=False, fontsize=9).get_texts():
                text.set_parse_math(False)
        return _svg(figure, title)


def reliability(confidence: Sequence[float], accuracy: Sequence[float], share: Sequence[float]) -> str:
    """Accuracy over confidence, with the share of samples at each, beside the line on which a calibrated model is."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "reliability"}):
        figure = Figure(figsize=(6.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle=":")
        axes.bar(confidence, share, width=0.03, color=COLORS[1], alpha=0.4, label="share of samples")
        axes.plot(confidence, accuracy, "o-", color=COLORS[0], markersize=4, linewidth=1.2, label="accuracy")
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence")
        axes.legend(frameon=False, fontsize=9)
        return _svg(figure, "accuracy over confidence")


def confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """A matrix of true classes (rows) and predicted ones, shares of each row; counts [classes, classes]."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "confusion"}):
        side = 1.6 + 0.3 * len(classes)
        figure = Figure(figsize=(side, side), layout="constrained")
        axes = figure.add_subplot()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        for (row, column), share in np.ndenumerate(shares):
            if counts[row, column]:
                color = COLORS[0] if row == column else COLORS[5]
                axes.fill_between(
                    [column - 0.5, column + 0.5],
                    row - 0.5,
                    row + 0.5,
                    color=color,
                    alpha=0.15 + 0.7 * share,
                    linewidth=0,
                )
                axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7)
        names = [name if len(name) < 20 else f"{name[:18]}..." for name in classes]
        axes.set(xlim=(-0.5, len(classes) - 0.5), ylim=(len(classes) - 0.5, -0.5), xlabel="predicted", ylabel="true")
        for axis, rotation in ((axes.xaxis, 90), (axes.yaxis, 0)):
            axis.set_ticks(range(len(classes)), names, rotation=rotation, fontsize=8, parse_math=False)
        return _svg(figure, "confusion matrix")


def _scale(values: Sequence[float], axes: matplotlib.axes.Axes) -> None:
    """Logarithmic where positive values reach over two orders of magnitude."""
    known = [value for value in values if np.isfinite(value)]
    if known and min(known) > 0 and max(known) / min(known) > 100:
        axes.set_yscale("log")
    else:  # each tick with its power of ten, for which there is no room above
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.10g}")


def _thinned(steps: np.ndarray, values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points, the least and the greatest of each stretch among them."""
    if len(steps) <= most:
        return steps, values
    kept = []
    for part in np.array_split(np.arange(len(steps)), max(1, most // 2)):
        finite = np.where(np.isfinite(values[part]), values[part], 0.0)
        kept += sorted({part[finite.argmin()], part[finite.argmax()]})
    return steps[kept], values[kept]


def _svg(figure: Figure, label: str) -> str:
    warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text, in the reader's fonts
    figure.savefig(
        file := io.StringIO(),
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
    )
    text = file.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    return text.replace(_INK, "currentColor").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)

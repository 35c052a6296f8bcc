"""`coatnet models`: every size and variant as counted on its modules, beside what the paper prints."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from models.count import count
from models.variants import COSTS, FAMILY, VARIANTS, Cost, StridePlace, layout_of

PRETRAINED_AT = 224
_count = cache(count)
NOTES = """\

M parameters     with the bias tables of 224 x 224
G multiply-adds  of one image: convolutions and matrix products, exactly
with overhead    plus pointwise operations, by a model fitted to the paper's FLOPs of CoAtNet-0 to -4 (models/count.py):
                 a guess at how the authors counted; the second `paper` and `off` compare with this
stride           the MBConv convolution that has it; depthwise is the paper's dagger, which it does not print at
                 CoAtNet-6 and -7, though their figures fit better with it
coatnet_6        has 3072 channels in S4; with the printed 2048 it is coatnet_6_printed, whose {printed:,.0f}M
                 parameters are {low:.1f} % below the published {published:,.0f}M
coatnet_N_vM     the layouts of Table 7
c_c_t_t, ...     the five of Figure 1; the paper does not print their layouts, ours have about equal size and cost
"""


def models(as_json: bool) -> int:
    """Prints the rows; returns the exit status."""
    found = rows()
    if as_json:
        print(json.dumps(found))
        return 0
    console = Console(width=150, no_color=True, highlight=False, soft_wrap=True)
    console.print(_table(found))
    printed = next(row["parameters"] for row in found if row["model"] == "coatnet_6_printed")
    published = FAMILY["coatnet_6"].published_parameters
    low = 100 * (1 - printed / published)
    console.print(NOTES.format(printed=printed / 1e6, low=low, published=published / 1e6), end="")
    return 0


def rows() -> list[dict[str, Any]]:
    """One row for each row of the paper's Tables 4, 5 and 9, each size at 224, and each variant; published or None."""
    published = {(cost.model, cost.resolution, cost.stride): cost for cost in COSTS}
    order = [*FAMILY, *VARIANTS]
    keys = {*published, *((name, PRETRAINED_AT, layout_of(name).stride) for name in order)}
    return [_row(*key, published.get(key)) for key in sorted(keys, key=lambda key: (order.index(key[0]), *key[1:]))]


def _row(model: str, resolution: int, stride: StridePlace, cost: Cost | None) -> dict[str, Any]:
    counted = _count(model, resolution, stride)
    return {
        "model": model,
        "resolution": resolution,
        "stride": stride,
        "parameters": _count(model, PRETRAINED_AT, layout_of(model).stride).parameters,
        "multiply_adds": counted.multiply_adds,
        "multiply_adds_with_overhead": counted.multiply_adds_with_overhead,
        "published_parameters": FAMILY[model].published_parameters if model in FAMILY else None,
        "published_flops": cost.published_flops if cost else None,
        "source": cost.table if cost else None,
    }


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("model", "size", "stride"):
        table.add_column(name)
    for name in ("M parameters", "paper", "off", "G multiply-adds", "with overhead", "paper", "off", "of"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for row in found:
        table.add_row(
            row["model"],
            str(row["resolution"]),
            row["stride"],
            f"{row['parameters'] / 1e6:,.2f}",
            *_compared(row["parameters"], row["published_parameters"], 1e6),
            f"{row['multiply_adds'] / 1e9:,.2f}",
            f"{row['multiply_adds_with_overhead'] / 1e9:,.2f}",
            *_compared(row["multiply_adds_with_overhead"], row["published_flops"], 1e9),
            row["source"] or "",
        )
    return table


def _compared(counted: float, published: float | None, unit: float) -> tuple[str, str]:
    """A published figure in units, and the relative difference of ours."""
    if published is None:
        return "", ""
    return f"{published / unit:,.5g}", f"{100 * (counted / published - 1):+.1f} %"

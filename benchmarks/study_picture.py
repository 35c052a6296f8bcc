"""A study's top-1 as a picture: a panel for each stage, a point for each variant and seed, seeds joined by lines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.study import Plan, Record, Training
from benchmarks.study_table import SHOWN, figure


def draw(
    plan: Plan, trainings: Mapping[tuple[str, str, int], Training], records: Mapping[str, Record], out: Path
) -> None:
    """Writes the picture; what diverged is left out."""
    stages, variants = list(plan.study.stages), list(plan.study.variants)
    picture = Figure(figsize=(4 * len(stages), 3.2), dpi=150, layout="constrained")
    panels = picture.subplots(1, len(stages), squeeze=False)[0]
    for panel, stage in zip(panels, stages, strict=True):
        of_seed = {
            seed: [figure(records[trainings[variant, stage, seed].id], "top1") for variant in variants]
            for seed in plan.seeds
        }
        for seed, values in of_seed.items():
            heights = [float("nan") if value is None else value for value in values]
            panel.plot(variants, heights, marker="o", markersize=4, linewidth=0.6, label=f"seed {seed}")
        for place, column in enumerate(zip(*of_seed.values(), strict=True)):
            if known := [value for value in column if value is not None]:
                panel.hlines(statistics.fmean(known), place - 0.25, place + 0.25, color="black", linewidth=1.5)
        panel.set_title(stage, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(SHOWN["top1"], fontsize=8)
    panels[-1].legend(fontsize=7, frameon=False)
    picture.suptitle(plan.study.title, fontsize=10)
    picture.savefig(out)

"""The ancestry of a run as `coatnet status` tells it: which augmentation its ancestors and it were trained under.

Next: logs.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.ancestry import switched_on

WITH_STRENGTH = ("RandAugment", "mixup")


def noted_ancestors(run: Path) -> list[Any] | None:
    """What a fine-tuning has noted of its source (finetune.py); [] of a run that has no source."""
    try:
        return json.loads((run / "source.json").read_bytes())["ancestry"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError):  # damaged
        return None


def entries_of(
    ancestors: Sequence[dict[str, Any]], config: Mapping[str, Any], steps: int | None, new_augmentations: list[str]
) -> list[dict[str, Any]]:
    """The entries of the ancestors and of the run, as pipeline/ancestry.py makes them; [] where one can't be read."""
    try:
        entries = [*ancestors, _entry(config, steps, new_augmentations)]
        in_words(entries)
    except (LookupError, TypeError, ValueError):  # half-written, or another version's
        return []
    return entries


def _entry(config: Mapping[str, Any], steps: int | None, new_augmentations: list[str]) -> dict[str, Any]:
    return {
        "run": config["run"]["dir"],
        "train": config["data"]["train"],
        "steps": steps,
        "resolution": config["model"]["resolution"],
        "augment": config["augment"],
        "stochastic_depth": config["train"]["stochastic_depth"],
        "new_augmentations": new_augmentations,
    }


def in_words(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What a run's weights were trained under: a line for each ancestor and for the run, or one without ancestors."""
    if not entries:
        return []
    *ancestors, own = entries
    if not ancestors:
        return [f"  augmentation: {_trained_under(own)}"]
    newest = f"{own['run']} ({_square(own)}): {_trained_under(own)}"
    return ["  ancestry, oldest first:", *(f"    {each}" for each in [*map(_ancestor, ancestors), newest])]


def _ancestor(entry: Mapping[str, Any]) -> str:
    if entry["augment"] is None:
        return f"{entry['run']}: unknown how it was trained"
    return f"{entry['run']} ({_square(entry)}, {entry['steps']:,} steps): {_trained_under(entry)}"


def _trained_under(entry: Mapping[str, Any]) -> str:
    """The augmentations that were on, with their strength where they have one, and stochastic depth."""
    on = {name: setting.partition("=")[2] for name, setting in switched_on(entry["augment"]).items()}
    said = [f"{name} {value}" if name in WITH_STRENGTH else name for name, value in on.items()]
    depth, new = entry["stochastic_depth"], " and ".join(entry.get("new_augmentations", []))
    facts = [f"stochastic depth {depth}" if depth else "", f"{new} allowed though new" if new else ""]
    return "; ".join([", ".join(said) or "no augmentation", *filter(None, facts)])


def _square(entry: Mapping[str, Any]) -> str:
    return f"{entry['resolution']} x {entry['resolution']}"

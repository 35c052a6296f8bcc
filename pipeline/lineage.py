"""Which augmentation made these weights, and the rule "weak, not off" that follows from the paper (section 4.1).

An augmentation that pretraining had switched off hurts when fine-tuning switches it on; at a small strength in
pretraining it helps. So each checkpoint carries the augmentation of its own run and of all its ancestors, oldest
first, and fine-tuning is refused one that no ancestor saw, unless `augment.allow_new` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UsageError
from pipeline.run.small_files import DamagedFile, read_object, warn_damaged

if TYPE_CHECKING:
    from pipeline.config.schema import Config

WITH_STRENGTH = ("RandAugment", "mixup")


def lineage_entry(config: Config, steps: int, ancestors: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint records of the run that made it."""
    allowed = check_new_augmentations(config, ancestors) if ancestors else []
    return _entry(config.model_dump(mode="json"), steps, allowed)


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


def unknown_lineage(source: str) -> dict[str, Any]:
    """The entry of weights whose training is unknown."""
    return {"run": source, "augment": None, "stochastic_depth": None}


def _unknown_runs(ancestors: list[dict[str, Any]]) -> list[str]:
    return [ancestor["run"] for ancestor in ancestors if ancestor["augment"] is None]


def active_augmentations(augment: dict[str, Any]) -> dict[str, str]:
    """The augmentations that are on, each with the override that switches it on."""
    randaugment = augment["randaugment"]
    settings = {
        "random crop": (augment["crop"] == "random_resized", f"augment.crop={augment['crop']}"),
        "flip": (augment["flip"], "augment.flip=true"),
        "RandAugment": (
            randaugment["layers"] > 0,  # at magnitude 0 too: three operations have no strength
            f"augment.randaugment={{layers: {randaugment['layers']}, magnitude: {randaugment['magnitude']}}}",
        ),
        "mixup": (augment.get("mixup", 0) > 0, f"augment.mixup={augment.get('mixup', 0)}"),  # newer than some runs
    }
    return {name: setting for name, (is_on, setting) in settings.items() if is_on}


def new_augmentations(augment: dict[str, Any], ancestors: list[dict[str, Any]]) -> dict[str, str]:
    """The augmentations that are on here and were off in every ancestor; none where an ancestor is unknown."""
    if _unknown_runs(ancestors):
        return {}
    seen = {name for ancestor in ancestors for name in active_augmentations(ancestor["augment"])}
    return {name: setting for name, setting in active_augmentations(augment).items() if name not in seen}


def check_new_augmentations(config: Config, ancestors: list[dict[str, Any]]) -> list[str]:
    """Names of new augmentations that are allowed here; UsageError where they are not."""
    new = new_augmentations(config.augment.model_dump(mode="json"), ancestors)
    if new and not config.augment.allow_new:
        raise UsageError(
            f"{' and '.join(new)} ({', '.join(new.values())}) is on here and was off in every ancestor"
            f" ({', '.join(ancestor['run'] for ancestor in ancestors)}), which hurts:"
            " leave it off, pretrain with it at a weak setting, or set augment.allow_new=true, which is recorded"
        )
    return list(new)


def lineage_warning(config: Config, ancestors: list[dict[str, Any]]) -> str | None:
    """What is worth a warning and not refused: an unknown ancestor, or stochastic depth that no ancestor had."""
    if unknown := _unknown_runs(ancestors):
        return (
            f"how {' and '.join(unknown)} was trained is unknown, so an augmentation that is on here may have been off"
            " there, which would hurt"
        )
    if config.train.stochastic_depth and not any(ancestor["stochastic_depth"] for ancestor in ancestors):
        return f"train.stochastic_depth={config.train.stochastic_depth} here, but 0 in every ancestor"
    return None


def noted_ancestors(run: Path) -> list[Any] | None:
    """The ancestors in RUN/source.json; [] of a run without a source, None where the file is damaged."""
    try:
        return read_object(run / "source.json", ancestry=list)["ancestry"]
    except FileNotFoundError:
        return []
    except DamagedFile as error:
        warn_damaged(run / "source.json", error, "the run's ancestry is not shown")
        return None


def lineage_of_run(
    ancestors: Sequence[dict[str, Any]], config: Mapping[str, Any], steps: int | None, new_augmentations: list[str]
) -> list[dict[str, Any]]:
    """The entries of the ancestors and of the run; [] where one can't be read: half-written, or another version's."""
    try:
        entries = [*ancestors, _entry(config, steps, new_augmentations)]
        format_lineage(entries)
    except (LookupError, TypeError, ValueError):
        return []
    return entries


def format_lineage(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What a run's weights were trained under: a line for each ancestor and for the run, or one without ancestors."""
    if not entries:
        return []
    *ancestors, own = entries
    if not ancestors:
        return [f"  augmentation: {_trained_under(own)}"]
    newest = f"{own['run']} ({_square(own)}): {_trained_under(own)}"
    return ["  ancestry, oldest first:", *(f"    {each}" for each in [*map(_format_ancestor, ancestors), newest])]


def _format_ancestor(entry: Mapping[str, Any]) -> str:
    if entry["augment"] is None:
        return f"{entry['run']}: how it was trained is unknown"
    return f"{entry['run']} ({_square(entry)}, {entry['steps']:,} steps): {_trained_under(entry)}"


def _trained_under(entry: Mapping[str, Any]) -> str:
    """The augmentations that were on, with their strength where they have one, and stochastic depth."""
    values = {name: setting.partition("=")[2] for name, setting in active_augmentations(entry["augment"]).items()}
    names = [f"{name} {value}" if name in WITH_STRENGTH else name for name, value in values.items()]
    depth, new = entry["stochastic_depth"], " and ".join(entry.get("new_augmentations", []))
    facts = [f"stochastic depth {depth}" if depth else "", f"{new} allowed although new" if new else ""]
    return "; ".join([", ".join(names) or "no augmentation", *filter(None, facts)])


def _square(entry: Mapping[str, Any]) -> str:
    return f"{entry['resolution']} x {entry['resolution']}"

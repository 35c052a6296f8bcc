"""Which augmentation made these weights, and the rule "weak, not off" that follows from the paper (section 4.1).

An augmentation that pretraining had switched off hurts when fine-tuning switches it on; at a small strength in
pretraining it helps. So each checkpoint carries the augmentation of its own run and of all its ancestors, oldest
first, and fine-tuning is refused one that no ancestor saw, unless `augment.allow_new` says otherwise.

Next: finetune.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.errors import BadRequest

if TYPE_CHECKING:
    from pipeline.config import Config


def entry(config: Config, steps: int, ancestors: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of the run that made it."""
    return {
        "run": config.run.dir,
        "train": config.data.train,
        "steps": steps,
        "resolution": config.model.resolution,
        "augment": config.augment.model_dump(mode="json"),
        "stochastic_depth": config.train.stochastic_depth,
        "new_augmentations": check(config, ancestors) if ancestors else [],
    }


def unknown(source: str) -> dict[str, Any]:
    """The entry of weights of which nobody knows how they were made."""
    return {"run": source, "augment": None, "stochastic_depth": None}


def unknown_ancestors(ancestors: list[dict[str, Any]]) -> list[str]:
    return [ancestor["run"] for ancestor in ancestors if ancestor["augment"] is None]


def switched_on(augment: dict[str, Any]) -> dict[str, str]:
    """The augmentations that are on, and the setting that has each on, as a person would write it."""
    randaugment = augment["randaugment"]
    settings = {
        "random crop": (augment["crop"] == "random_resized", f"augment.crop={augment['crop']}"),
        "flip": (augment["flip"], "augment.flip=true"),
        "RandAugment": (
            randaugment["layers"] > 0,  # at magnitude 0 too: three operations have no strength
            f"augment.randaugment={{layers: {randaugment['layers']}, magnitude: {randaugment['magnitude']}}}",
        ),
        "mixup": (augment.get("mixup", 0) > 0, f"augment.mixup={augment.get('mixup', 0)}"),  # younger than some runs
    }
    return {name: setting for name, (is_on, setting) in settings.items() if is_on}


def new_augmentations(augment: dict[str, Any], ancestors: list[dict[str, Any]]) -> dict[str, str]:
    """The augmentations that are on here and were off in every ancestor; on in any of them counts as seen.

    None where one of them is unknown: it may have seen anything.
    """
    if unknown_ancestors(ancestors):
        return {}
    seen = {name for ancestor in ancestors for name in switched_on(ancestor["augment"])}
    return {name: setting for name, setting in switched_on(augment).items() if name not in seen}


def check(config: Config, ancestors: list[dict[str, Any]]) -> list[str]:
    """Names of new augmentations that are allowed here; BadRequest where they are not."""
    new = new_augmentations(config.augment.model_dump(mode="json"), ancestors)
    if new and not config.augment.allow_new:
        raise BadRequest(
            f"{' and '.join(new)} ({', '.join(new.values())}) is on here and was off in every ancestor"
            f" ({', '.join(ancestor['run'] for ancestor in ancestors)}), which hurts:"
            " leave it off, pretrain with it at a weak setting, or set augment.allow_new=true, which is recorded"
        )
    return list(new)


def warning(config: Config, ancestors: list[dict[str, Any]]) -> str | None:
    """A line about what is not refused: an ancestry that cannot be checked, or stochastic depth that is new."""
    if unknown := unknown_ancestors(ancestors):
        return (
            f"how {' and '.join(unknown)} was trained is unknown, so it cannot be checked whether an augmentation that"
            " is on here was off there, which would hurt"
        )
    return stochastic_depth_warning(config, ancestors)


def stochastic_depth_warning(config: Config, ancestors: list[dict[str, Any]]) -> str | None:
    """A line about stochastic depth that no ancestor had; it is not refused."""
    if config.train.stochastic_depth and not any(ancestor["stochastic_depth"] for ancestor in ancestors):
        return f"train.stochastic_depth={config.train.stochastic_depth} here, and 0 in every ancestor"
    return None

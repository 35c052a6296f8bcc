"""Laws of "weak, not off": what is on here and was off in every ancestor is refused, nothing else."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.parsing import validate
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.lineage import (
    active_augmentations,
    check_new_augmentations,
    lineage_entry,
    lineage_warning,
    new_augmentations,
)

NAMES = ("random crop", "flip", "RandAugment", "mixup")


def config(on: set[str], allow_new: bool = False, stochastic_depth: float = 0.0, run: str = "runs/here") -> Config:
    """A configuration with only these augmentations on, at weak settings."""
    return validate(
        {
            "run": {"dir": run},
            "data": {"train": "somewhere"},
            "model": {"name": "coatnet_0"},
            "train": {"steps": 1, "stochastic_depth": stochastic_depth},
            "augment": {
                "crop": "random_resized" if "random crop" in on else "center",
                "flip": "flip" in on,
                "randaugment": {"layers": int("RandAugment" in on), "magnitude": 0.1},
                "mixup": 0.1 * ("mixup" in on),
                "allow_new": allow_new,
            },
        },
        "test",
    )


augmentations = st.sets(st.sampled_from(NAMES))


@given(augmentations, st.lists(augmentations, min_size=1, max_size=3))
def test_exactly_what_is_on_here_and_was_off_in_every_ancestor_is_refused(here, seen):
    ancestors = [lineage_entry(config(on, run=f"runs/{i}"), 10, []) for i, on in enumerate(seen)]
    new = here - set().union(*seen)
    assert set(check_new_augmentations(config(here, allow_new=True), ancestors)) == new
    if not new:
        assert check_new_augmentations(config(here), ancestors) == []
        return
    with pytest.raises(UsageError) as refused:
        check_new_augmentations(config(here), ancestors)
    message = str(refused.value)
    assert "\n" not in message and "augment.allow_new=true" in message
    assert {name for name in NAMES if re.search(rf"\b{name}\b", message)} == new
    assert all(f"runs/{i}" in message for i in range(len(seen)))


@pytest.mark.parametrize("here", [0.0, 0.5, 20.0])
@pytest.mark.parametrize("before", [0.0, 0.5, 20.0])
def test_strength_does_not_matter_only_whether_it_was_on(here, before):
    """Also at magnitude 0, where three of the operations have full strength."""
    weak = config({"RandAugment"}).augment.model_dump(mode="json")
    strong = {**weak, "randaugment": {"layers": 2, "magnitude": here}}
    ancestor = {"augment": {**weak, "randaugment": {"layers": 1, "magnitude": before}}}
    assert new_augmentations(strong, [ancestor]) == {}
    off = {"augment": {**weak, "randaugment": {"layers": 0, "magnitude": before}}}
    assert new_augmentations(strong, [off]) == {"RandAugment": f"augment.randaugment={{layers: 2, magnitude: {here}}}"}


def test_an_ancestor_older_than_mixup_had_none():
    older = config(set(NAMES)).augment.model_dump(mode="json")
    del older["mixup"]
    assert new_augmentations(config({"mixup"}).augment.model_dump(mode="json"), [{"augment": older}]) == {
        "mixup": "augment.mixup=0.1"
    }


def test_an_entry_has_what_the_weights_were_trained_with():
    made = lineage_entry(config({"flip"}, stochastic_depth=0.2, run="runs/a"), 77, [])
    assert (made["run"], made["steps"], made["resolution"], made["stochastic_depth"]) == ("runs/a", 77, 224, 0.2)
    assert active_augmentations(made["augment"]) == {"flip": "augment.flip=true"}
    assert made["new_augmentations"] == []
    later = lineage_entry(config({"flip", "RandAugment"}, allow_new=True), 5, [made])
    assert later["new_augmentations"] == ["RandAugment"]


def test_stochastic_depth_that_no_ancestor_had_is_warned_about_and_never_refused():
    without, having = lineage_entry(config(set()), 1, []), lineage_entry(config(set(), stochastic_depth=0.1), 1, [])
    here = config(set(), stochastic_depth=0.3)
    assert check_new_augmentations(here, [without]) == []
    assert "train.stochastic_depth=0.3" in (lineage_warning(here, [without]) or "")
    assert lineage_warning(here, [having, without]) is None
    assert lineage_warning(config(set()), [without]) is None

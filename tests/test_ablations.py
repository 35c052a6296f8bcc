"""The ablations on CIFAR-10: a short form on the digits, what the studies compare, and how they judge."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablations import ORDER, Bench, train_again
from benchmarks.study import STUDIES, Images, Plan, Study, Training, read_study
from benchmarks.study_picture import draw
from benchmarks.study_table import table, verdict
from pipeline.commands.finetune import finetune
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.training.model import count_model
from tests.pipeline.runs import ROOT, coatnet, events

SHORT = Study.model_validate({
    "title": "Weak, not off",
    "paper_says": "It hurts.",
    "base": "configs/tiny.yaml",
    "variants": {"off": {"augment.randaugment.layers": 0}, "weak": {}},
    "stages": {
        "before": {},
        "tuned": {
            "after": "before",
            "keys": {"augment.randaugment.layers": 2, "augment.allow_new": True, "model.resolution": 40},
        },
    },
    "comparisons": [{"claim": "it hurts", "plus": ["off, tuned"], "minus": ["weak, tuned"], "paper": "below 0"}],
})  # fmt: skip
STEPS = {"train.steps": 1, "optim.warmup_steps": 0}


def nothing_to_do(*command: str) -> subprocess.CompletedProcess[str]:
    raise AssertionError(command)


def multiply_adds(config: Config) -> int:
    return count_model(config.model, config.train, 10).multiply_adds


@pytest.fixture
def images(digits: Path) -> Images:
    return Images({1: digits / "train", 10: digits / "val"}, digits / "val")


def test_a_study_is_trained_once_told_in_a_table_and_repeated_to_the_bit(images: Images, tmp_path: Path) -> None:
    plan = Plan("short", SHORT, images, range(1), rates=(1e-3,), more=STEPS)
    bench = Bench(tmp_path, coatnet)
    trainings = bench.complete(plan)
    done = Bench(tmp_path, nothing_to_do)
    assert done.complete(plan) == trainings and done.records.keys() == bench.records.keys()
    draw(plan, trainings, done.records, tmp_path / "short.png")
    told = "\n".join(table(plan, trainings, done.records, {}))
    assert "6 trainings" in told and "(off, tuned - weak, tuned, top-1)" in told and "undecided" in told
    again = trainings["weak", "before", 0]
    assert train_again(bench, [plan], [again.id])
    bench.records[again.id] |= {"losses": "others"}
    assert not train_again(bench, [plan], [again.id])

    before, tuned = (bench.train(trainings["off", stage, 0]) for stage in ("before", "tuned"))
    assert events(tuned, "training_started")[0]["new_augmentations"] == ["RandAugment"]

    def third(*more: str, source: Path = tuned) -> int:
        on = [f"data.train={images.train[1]}", f"run.dir={tmp_path}/third", *more]
        return finetune(str(ROOT / "configs/tiny_finetune.yaml"), on, str(source), None, 1, check=True)

    assert third() == 0  # RandAugment was allowed there, so it counts as seen
    with pytest.raises(UsageError, match=rf"flip \(augment.flip=true\) is on here .* \({before}, {tuned}\)"):
        third("augment.flip=true")
    with pytest.raises(UsageError, match=r"RandAugment \(augment.randaugment={layers: 1, magnitude: 1.0}\) is on here"):
        third(source=before)
    assert third("augment.allow_new=true", source=before) == 0


def test_variants_differ_in_what_their_study_says_at_nearly_equal_cost(images: Images) -> None:
    plans = {name: Plan(name, read_study(STUDIES / f"{name}.yaml"), images, [0]) for name in ORDER}
    bases = set()
    for plan in plans.values():
        sweep, variants = plan.sweep(), plan.study.variants
        base = next(variant for variant, keys in variants.items() if not keys)
        for (variant, stage), rates in sweep.items():
            compared = sweep[base, stage][2e-3], rates[2e-3]
            keys, others = (each.decisive_keys for each in compared)
            differing = {key for key in keys | others if keys.get(key) != others.get(key)}
            said = tuple(variants[variant])
            assert bool(said) == bool(differing) and all(key.startswith(said) for key in differing)
            cost, others_cost = (multiply_adds(each.config) for each in compared)
            assert abs(others_cost / cost - 1) < (0.16 if variant == "ViT" else 0.08)
            bases.add(compared[0].id)
    assert len(bases) == 2  # all studies have one base, on all images or a tenth


def test_a_trainings_identity_is_what_its_figures_depend_on(images: Images) -> None:
    first = Training("a", "configs/tiny.yaml", {}, 1, 0, images)
    elsewhere = Images(images.train, images.train[1])
    others: list[dict[str, Any]] = [
        {"seed": 1},
        {"images": elsewhere},
        {"source": first},
        {"keys": {"optim.learning_rate": 1.0}},
    ]
    assert len({replace(first, **each).id for each in [{}, *others]}) == 5
    same: list[dict[str, Any]] = [{"name": "b"}, {"keys": {"checkpoint.every": 7}}, {"keys": {"model.norm": "batch"}}]
    assert {replace(first, **each).id for each in same} == {first.id}


def test_a_verdict_takes_seeds_that_agree_beyond_their_spread() -> None:
    assert verdict([-0.9, -1.1], "below 0") == "agrees with the paper in every seed"
    assert verdict([-0.9, -1.1], "above 0") == "disagrees with the paper in every seed"
    assert verdict([2.0, 2.0, 2.0, -0.1], "above 0") == "agrees with the paper in 3 of 4 seeds"
    assert verdict([0.1, 2.0, 0.1], "above 0").startswith("undecided")
    assert verdict([0.1, -0.1], "about 0").startswith("agrees") and verdict([1.0, 1.1], "about 0").startswith("dis")
    assert verdict([1.0, None], "above 0").startswith("undecided") and verdict([1.0], "above 0").startswith("undecided")

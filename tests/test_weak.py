"""The experiment on "weak, not off": its short form on the digits, and the whole of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.weak_augmentation import Recipe, agreement, chain, cifar10, measure, table
from pipeline.commands.finetune import finetune
from pipeline.config.parsing import read_config
from pipeline.errors import UsageError
from pipeline.lineage import check_new_augmentations, lineage_entry
from tests.pipeline.runs import ROOT, coatnet, events

CIFAR10 = ROOT.parent / "shared" / "data"


def test_the_short_form_is_measured_and_records_what_was_allowed(digits: Path, tmp_path: Path) -> None:
    steps = ("train.steps=1", "log.samples=false")
    recipe = Recipe(digits, "configs/tiny.yaml", "configs/tiny_finetune.yaml", 32, 40, steps, steps, ("off",), 1)
    found = measure(recipe, tmp_path, workers=2, start=coatnet)
    assert len(found) == 2 + 2 and all(0 <= top1 <= 1 for top1 in found.values())
    assert [line.count("|") for line in table(recipe, found)][:3] == [5, 5, 5]
    tuned = tmp_path / "runs" / "finetune-off-on-0"
    assert events(tuned, "training_started")[0]["new_augmentations"] == ["RandAugment"]

    def third(*more: str, source: Path = tuned) -> int:
        on = [f"data.train={digits}/train", f"run.dir={tmp_path}/third", *more]
        return finetune(str(ROOT / "configs/tiny_finetune.yaml"), on, str(source), None, 1, check=True)

    assert third() == 0  # RandAugment was allowed there, so it counts as seen
    both = rf"flip \(augment.flip=true\) is on here .* \({tmp_path}/runs/pretrain-off-0, {tuned}\)"
    with pytest.raises(UsageError, match=both):
        third("augment.flip=true")
    with pytest.raises(UsageError, match=r"RandAugment \(augment.randaugment={layers: 1, magnitude: 1.0}\) is on here"):
        third(source=tmp_path / "runs" / "pretrain-off-0")
    assert third("augment.allow_new=true", source=tmp_path / "runs" / "pretrain-off-0") == 0


def test_compared_runs_differ_in_one_thing_and_only_off_to_on_is_new() -> None:
    chains = {arm: chain(Recipe(Path("data"), control=True), Path("runs"), arm, 1) for arm in ("off", "weak", "strong")}
    configs = {
        run.name: read_config(str(ROOT / run.command[1]), [word for word in run.command[2:] if "=" in word])
        for made in chains.values()
        for run in made
    }
    same = {"augment": None, "run": None}
    for stage in ("pretrain", "finetune"):
        of_stage = [config.model_copy(update=same) for name, config in configs.items() if name.startswith(stage)]
        assert all(config == of_stage[0] for config in of_stage)
    for name, config in configs.items():
        if name.startswith("finetune"):
            first = lineage_entry(configs[f"pretrain-{name.split('-')[1]}-1"], 1, [])
            assert check_new_augmentations(config, [first]) == (["RandAugment"] if name == "finetune-off-on-1" else [])


def test_a_verdict_takes_agreement_of_all_seeds() -> None:
    assert agreement([-0.1, -2.0], -1).startswith("agrees") and agreement([0.1, 2.0], -1).startswith("disagrees")
    assert agreement([-0.1, 2.0], 1).startswith("undecided") and agreement([0.0], 1).startswith("undecided")


@pytest.mark.torture
def test_in_the_whole_experiment_fine_tuning_improves_on_pretraining(tmp_path: Path) -> None:
    if not (CIFAR10 / "cifar10-train.tar").exists():
        pytest.skip(f"{CIFAR10} has no cifar10-train.tar")
    out = Path(os.environ.get("COATNET_WEAK", tmp_path))  # a folder in which an interrupted night is resumed
    recipe = cifar10(CIFAR10 / "cifar10-train.tar", CIFAR10 / "cifar10-val.tar", out, tenth=False, control=True)
    found = measure(recipe, out, len(os.sched_getaffinity(0)))
    print(*table(recipe, found), sep="\n")
    for arm in recipe.arms:
        for seed in range(recipe.seeds):
            assert found[f"finetune-{arm}-same-{seed}", "ema", 48] > found[f"pretrain-{arm}-{seed}", "ema", 32]

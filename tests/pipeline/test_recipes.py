"""The presets of the paper's recipes say what its Table 10 says, but where their head names the literal line instead.

The table is transcribed here once more, from arXiv 2106.04803v2; a preset is read back against it.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pipeline.commands.finetune import finetune
from pipeline.commands.pretrain import pretrain
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config
from pipeline.lineage import check_new_augmentations, lineage_entry, lineage_warning
from tests.pipeline.runs import coatnet

CONFIGS = Path(__file__).parents[2] / "configs"
FOLDERS = ("imagenet1k", "imagenet21k", "jft300m", "jft3b")
OWN = {"imagenet1k/coatnet0_1gpu.yaml"}
"""No recipe of the paper's."""
PRESETS = sorted(
    {f"{path.parent.name}/{path.name}" for folder in FOLDERS for path in (CONFIGS / folder).iterdir()} - OWN
)
PRETRAINING = [preset for preset in PRESETS if not re.search(r"_(224|384|512)\.yaml$", preset)]
FINETUNING = sorted(set(PRESETS) - set(PRETRAINING))

Cell = dict[str, Any]
ALL: Cell = {"clip": 1.0, "batch": 4096, "mixup": 0.0, "center_crop": True, "ema": None, "final_rate": 1e-5}
TUNED: Cell = {
    "clip": 1.0, "center_crop": False, "loss": "softmax", "smoothing": 0.1, "epochs": 30, "rate": 5e-5,
    "final_rate": 5e-5, "warmup": 0, "decay": "none", "weight_decay": 1e-8, "ema": 0.9999, "mixup": 0.0,
}  # fmt: skip
ON_1K: Cell = {"loss": "softmax", "smoothing": 0.1, "epochs": 300, "decay": "cosine", "weight_decay": 0.05}
ON_21K: Cell = {"loss": "sigmoid", "smoothing": 1e-4, "epochs": 90, "decay": "linear", "weight_decay": 0.01}
# Five epochs of warm-up over 12.7 million images.
ON_21K |= {"rate": 1e-3, "warmup": 15500}
DEPTH = {"imagenet1k": (0.2, 0.3, 0.5, 0.7), "imagenet21k": (None, None, 0.3, 0.5, 0.7)}
JFT_DEPTH, JFT_TUNED, JFT_RATE = {3: 0.0, 4: 0.1, 5: 0.0}, {3: 0.1, 4: 0.3, 5: 0.2}, {3: 1e-3, 4: 5e-4, 5: 5e-4}
TOP_1 = {  # Tables 4 and 5; CoAtNet-4 from JFT at 384 in the paper's first version
    "imagenet1k/coatnet0": {224: 81.6, 384: 83.9},
    "imagenet1k/coatnet1": {224: 83.3, 384: 85.1},
    "imagenet1k/coatnet2": {224: 84.1, 384: 85.7, 512: 85.9},
    "imagenet1k/coatnet3": {224: 84.5, 384: 85.8, 512: 86.0},
    "imagenet21k/coatnet2": {224: 87.1, 384: 87.1, 512: 87.3},
    "imagenet21k/coatnet3": {224: 87.6, 384: 87.6, 512: 87.9},
    "imagenet21k/coatnet4": {384: 87.9, 512: 88.1},
    "imagenet21k/coatnet4_ra": {384: 88.3, 512: 88.4},
    "imagenet21k/coatnet4_ra_e150": {384: 88.4, 512: 88.56},
    "jft300m/coatnet3": {384: 88.52, 512: 88.81},
    "jft300m/coatnet4": {384: 88.91, 512: 89.11},
    "jft300m/coatnet5": {512: 89.77},
    "jft3b/coatnet6": {512: 90.45},
    "jft3b/coatnet7": {512: 90.88},
}


def table_10(preset: str) -> Cell | None:
    """The column of Table 10 for a preset; None where the paper has none."""
    folder, size, kind = re.fullmatch(r"(\w+)/coatnet(\d)(?:_([a-z]\w*?))?(?:_\d{3})?\.yaml", preset).groups()  # type: ignore[union-attr]
    number, tuned = int(size), preset in FINETUNING
    if folder == "jft3b":
        return None
    if folder == "jft300m":
        weak = {"randaugment": (2, 5.0)}
        if tuned:
            return {**TUNED, **weak, "batch": 512, "depth": JFT_TUNED[number]}
        on_jft = {"epochs": 14, "rate": JFT_RATE[number], "warmup": 20000, "depth": JFT_DEPTH[number]}
        return {**ALL, **ON_21K, **weak, **on_jft}
    depth: Cell = {"depth": DEPTH[folder][number]}
    if folder == "imagenet1k":
        strong = {"mixup": 0.8, "randaugment": (2, 20.0 if tuned and number == 3 else 15.0), **depth}
        return {**TUNED, **strong, "batch": 512} if tuned else {**ALL, **ON_1K, **strong, "rate": 1e-3, "warmup": 10000}
    depth["randaugment"] = (2, 5.0) if kind else None
    epochs = {"epochs": 150} if kind == "ra_e150" else {}
    return {**TUNED, **depth, "batch": 1024} if tuned else {**ALL, **ON_21K, **depth, **epochs}


def read_back(config: Config) -> Cell:
    """What a configuration has in the places of Table 10."""
    augment, train, optim = config.augment, config.train, config.optim
    randaugment = (augment.randaugment.layers, augment.randaugment.magnitude)
    cropped = {augment.crop == "random_resized", config.evaluate.crop_fraction is not None}
    return {
        "depth": train.stochastic_depth, "center_crop": cropped.pop() if len(cropped) == 1 else cropped,
        "randaugment": randaugment if randaugment[0] else None, "mixup": augment.mixup, "loss": train.loss,
        "smoothing": train.label_smoothing, "epochs": train.epochs, "batch": train.global_batch,
        "rate": optim.learning_rate, "final_rate": optim.final_learning_rate, "warmup": optim.warmup_steps,
        "decay": optim.decay, "weight_decay": optim.weight_decay, "clip": optim.grad_clip_norm, "ema": train.ema,
    }  # fmt: skip


def head_of(preset: str) -> str:
    lines = (CONFIGS / preset).read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def config_of(preset: str, *overrides: str) -> Config:
    return read_config(str(CONFIGS / preset), list(overrides))


def source_of(preset: str) -> str:
    """The preset of the run that the head's own command starts from."""
    run = re.search(r"--from runs/(\S+)", head_of(preset))
    assert run is not None
    return f"{run[1]}.yaml"


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if table_10(preset) is not None])
def test_a_preset_with_the_literal_line_of_its_head_is_the_column_of_table_10(preset: str) -> None:
    literal = [word for line in re.findall(r"literal: (.*)", head_of(preset)) for word in shlex.split(line)]
    assert read_back(config_of(preset, *literal)) == table_10(preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_where_a_preset_differs_from_the_table_it_is_weak_and_not_off(preset: str) -> None:
    found, wanted = read_back(config_of(preset)), table_10(preset)
    differing = {} if wanted is None else {name: found[name] for name in wanted if found[name] != wanted[name]}
    assert differing.keys() <= {"randaugment", "depth"}
    assert differing.get("randaugment", (2, 1.0)) == (2, 1.0) and differing.get("depth", 0.02) == 0.02
    assert bool(differing) == ("Weak, not off" in head_of(preset))
    assert (wanted is None) == ("Our choice, all of it" in head_of(preset))


@pytest.mark.parametrize("preset", FINETUNING)
def test_fine_tuning_uses_only_augmentations_that_pretraining_had(preset: str) -> None:
    here, before = config_of(preset), config_of(source_of(preset))
    ancestors = [lineage_entry(before, 1, [])]
    assert check_new_augmentations(here, ancestors) == [] and lineage_warning(here, ancestors) is None
    same = {"resolution": 0, "classes": None}
    assert here.model.model_copy(update=same) == before.model.model_copy(update=same)
    assert f"{here.model.resolution}.yaml" == preset.rpartition("_")[2] and before.model.resolution == 224


@pytest.mark.parametrize("preset", PRESETS)
def test_the_head_says_what_the_paper_reached_what_is_our_reading_and_the_command(preset: str) -> None:
    head, tuned = head_of(preset), preset in FINETUNING
    words = " ".join(head.replace("#", " ").split())
    folder, _, name = preset.removesuffix(".yaml").partition("/")
    base, _, side = name.rpartition("_") if tuned else (name, "", "224")
    reached = TOP_1[f"{folder}/{base}"]
    if tuned or folder == "imagenet1k":
        said = reached.get(int(side))
        if said is None or (tuned and folder == "imagenet1k" and side == "224"):
            assert "The paper has no CoAtNet" in words or "Not in the paper" in words
        else:
            assert f"{said} %" in words
    else:
        assert all(f"{figure} % at {size}" in words for size, figure in reached.items())
    assert "Our reading" in words or "Our choice" in words
    command = f"coatnet {'finetune' if tuned else 'pretrain'} configs/{preset}" + " --from runs/" * tuned
    assert f"#     {command}" in head
    assert bool(re.search(r"coatnet[4-7]", preset)) == ("#     coatnet plan " in head or "as in coatnet4.yaml" in words)


@pytest.mark.torture
@pytest.mark.parametrize("preset", [preset for preset in PRESETS if "coatnet plan" in head_of(preset)])
def test_the_head_of_a_large_preset_has_the_figures_of_its_command(preset: str) -> None:
    head = " ".join(head_of(preset).replace("#", " ").split())
    (command,) = re.findall(r"#     coatnet (plan .*)", head_of(preset))
    for gpu, said in (
        ("h100", r"(\S+ GiB) on a GPU of 80 .*; (\S+ m?s) a step"),
        ("h200", r"(\S+ GiB) .*H100s, (\S+ m?s) on"),
    ):
        printed = coatnet(*command.replace("h100", gpu).split()).stdout
        found = re.search(r"memory +(\S+ GiB) of \S+ GiB: fits.*step +(\S+ m?s),", printed, re.DOTALL)
        assert found is not None and [found.groups()] == re.findall(said, head)


def test_each_size_of_the_paper_has_its_presets_at_each_resolution() -> None:
    sizes = {"imagenet1k": "0123", "imagenet21k": "234", "jft300m": "345", "jft3b": "67"}
    for folder, numbers in sizes.items():
        for number in numbers:
            assert f"{folder}/coatnet{number}.yaml" in PRETRAINING
            assert all(f"{folder}/coatnet{number}_{side}.yaml" in FINETUNING for side in (224, 384, 512))
    assert {"imagenet21k/coatnet4_ra.yaml", "imagenet21k/coatnet4_ra_e150.yaml"} <= set(PRETRAINING)


@pytest.mark.parametrize("preset", ["imagenet21k/coatnet2_384.yaml", "jft300m/coatnet3_512.yaml"])
def test_check_passes_without_data_and_tells_of_what_the_literal_setting_entails(
    preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = CONFIGS / source_of(preset)
    assert pretrain(str(source), [], 1, check=True) == 0
    assert finetune(str(CONFIGS / preset), [], None, None, 1, check=True) == 0
    assert finetune(str(CONFIGS / preset), [], str(source), None, 1, check=True) == 0
    assert "warning" not in capsys.readouterr().err

"""Every preset is a configuration that can be trained, and the commands that the ablations' guide gives are right."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.parsing import read_config
from pipeline.config.schema import Config, Model, Train
from pipeline.errors import UsageError
from pipeline.lineage import check_new_augmentations, lineage_entry
from pipeline.plan import training_set
from pipeline.training.model import count_model

ROOT = Path(__file__).parents[2]
PRESETS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
GUIDE = (ROOT / "configs/ablations/README.md").read_text()
COMMANDS = sorted(set(re.findall(r"`coatnet (?:pretrain|finetune) ([^`]+)`", GUIDE)))


@cache
def preset_of(preset: str) -> Config:
    return read_config(str(ROOT / preset), [])


def parameters(preset: str, overrides: list[str] | None = None) -> tuple[Config, int]:
    config = read_config(str(ROOT / preset), overrides or [])
    return config, counted(config.model, config.train.activation_checkpointing)


@cache
def counted(model: Model, activation_checkpointing: Any) -> int:
    """Parameters of a network, which two presets of the same one need not build twice."""
    train = Train.model_construct(batch_norm_group=None, activation_checkpointing=activation_checkpointing)
    return count_model(model, train, model.classes or 1000).parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_good_and_its_run_folder_its_own(preset: str) -> None:
    assert parameters(preset)[1] > 0
    assert preset_of(preset).run.dir not in {preset_of(other).run.dir for other in PRESETS if other != preset}


def test_the_guide_uses_every_preset_of_the_ablations() -> None:
    used = {command.split()[0] for command in COMMANDS}
    assert {preset for preset in PRESETS if "ablations/" in preset} <= used


STATED = [each for each in PRESETS if {preset_of(each).model.classes, preset_of(each).data.train_samples} != {None}]


@pytest.mark.parametrize("preset", STATED)
def test_a_preset_that_states_other_data_is_refused_with_the_words_that_help(preset: str, digits: Path) -> None:
    own = [f"data.train={digits}/train"]
    with pytest.raises(UsageError, match=f"data.train={digits}/train has 10") as refused:
        training_set(read_config(str(ROOT / preset), own))
    assert "\n" not in str(refused.value)
    config = read_config(str(ROOT / preset), [*own, *re.findall(r"\S+=null", str(refused.value))])
    assert len(training_set(config)[0].classes) == 10
    assert (config.model.classes, config.data.train_samples) == (None, None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_is_good(command: str) -> None:
    preset, *rest = command.split()
    parameters(preset, [word for word in rest if "=" in word])


def test_fine_tuning_starts_from_runs_that_the_guide_makes_with_the_same_network() -> None:
    made: dict[str, Config] = {}
    sources: dict[str, str] = {}
    for command in COMMANDS:
        preset, *rest = command.split()
        config, _ = parameters(preset, [word for word in rest if "=" in word])
        made[config.run.dir] = config
        if "--from" in rest:
            sources[config.run.dir] = rest[rest.index("--from") + 1]
    pairs = [(made[run], made[source]) for run, source in sources.items()]
    assert len(pairs) == 6
    for finetuned, pretrained in pairs:
        assert finetuned.model.resolution == 384 and pretrained.model.resolution == 224
        assert finetuned.model.model_copy(update={"resolution": 224, "classes": None}) == pretrained.model.model_copy(
            update={"classes": None}
        )
        assert check_new_augmentations(finetuned, [lineage_entry(pretrained, 1, [])]) == []  # not refused as new


def test_the_guide_s_counts_are_those_of_the_layouts() -> None:
    from models.count import count

    for layout, name in {"C-C-C-C": "c_c_c_c", "C-C-C-T": "c_c_c_t", "C-T-T-T": "c_t_t_t", "ViT": "vit_rel"}.items():
        counted = count(name)
        row = f"{counted.parameters / 1e6:.2f} | {counted.multiply_adds / 1e9:.2f} |"
        assert any(line.startswith(f"| {layout} |") and line.endswith(row) for line in GUIDE.splitlines()), row
    jft = next(line for line in GUIDE.splitlines() if "capacity (JFT)" in line)
    overrides = [word for word in re.findall(r"[\w.]+=[^\s`]+", jft) if not word.startswith("run.dir")]
    assert parameters("configs/ablations/vit_rel.yaml", overrides)[0].train.epochs == 3

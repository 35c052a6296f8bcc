"""What fine-tuning keeps of its source: classifier rows by class name, bias tables for another grid, all else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoint.pretrained import convert_weights, describe_classifier, map_classes
from pipeline.checkpoint.weights import WeightsFile
from pipeline.commands.finetune import describe_start, finetune, pin_source, source_of
from pipeline.config.parsing import read_config
from pipeline.errors import UsageError
from pipeline.plan import make_plan
from pipeline.training.model import build_model, init_weights
from tests.pipeline.networks import export_network, tiny
from tests.pipeline.runs import ROOT

names = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)
TINY = str(ROOT / "configs" / "tiny_finetune.yaml")


@given(names, names, st.sampled_from(["auto", "keep", "new", "map"]))
def test_a_class_keeps_the_row_of_its_name_or_has_a_new_one(here: list[str], there: list[str], how: Any) -> None:
    same, common = set(here) == set(there), set(here) & set(there)
    if (how == "keep" and not same) or (how == "map" and not common):
        with pytest.raises(UsageError, match=f"model.classifier={how}"):
            map_classes(how, here, there, "runs/a")
        return
    rows = map_classes(how, here, there, "runs/a")
    taken = how in ("keep", "map") or (how == "auto" and same)
    assert [None if row is None else there[row] for row in rows] == [
        name if taken and name in common else None for name in here
    ]
    kept = sum(row is not None for row in rows)
    assert ("a new classifier" in describe_classifier(rows, there)) == (kept == 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the tiny network for the digits, pretrained with RandAugment at a weak strength."""
    return export_network(tmp_path_factory.mktemp("source") / "tiny.safetensors", *tiny(10), list("0123456789")).folder


def test_weights_are_kept_over_two_resolutions_with_tables_and_rows_converted(source: Path, tmp_path: Path) -> None:
    reader, new = WeightsFile(source), init_weights(8)
    for side, classes in ((48, ["7", "other", "2"]), (64, ["2", "7", "newest"])):
        config = read_config(TINY, [f"model.resolution={side}"])
        rows = map_classes("map", classes, reader.state()["classes"], "")
        values, _ = convert_weights(reader, "ema", rows, new)
        network = build_model(config.model, config.train, len(classes), torch.device("cpu"), values)
        for name, found in network.named_parameters():
            own = torch.from_numpy(reader.tensor(name, "ema"))
            if name.startswith("head.classifier"):
                fresh = new(name, found.shape)
                expected = [fresh[place] if row is None else own[row] for place, row in enumerate(rows)]
                assert torch.equal(found, torch.stack(expected))
            elif name.endswith("bias_table"):
                grid: Any = network.get_submodule(name.rpartition(".")[0]).grid
                size = [2 * length - 1 for length in grid]
                assert own.shape != found.shape
                expected = torch.nn.functional.interpolate(own[None], size, mode="bilinear", align_corners=False)[0]
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
            else:
                assert torch.equal(found, own)
        reader = export_network(
            tmp_path / f"{side}.safetensors", network, config, classes
        )  # the next begins from this one


def begin(source: Path, digits: Path, run: Path, *more: str) -> str:
    """The first line of a fine-tuning on the digits; UsageError where it cannot begin."""
    config = read_config(TINY, [f"data.train={digits}/train", f"data.val={digits}/val", f"run.dir={run}", *more])
    return describe_start(config, make_plan(config, "finetune", 1, 1), source_of(run, source, None))


def test_the_first_line_describes_how_the_weights_are_converted(source: Path, digits: Path, tmp_path: Path) -> None:
    kept = "its moving average, bias tables resized from 32 x 32 to 40 x 40; the classifier of its 10 classes is kept"
    assert begin(source, digits, tmp_path / "run") == f"from {source} at step 9: {kept}"
    same = begin(source, digits, tmp_path / "run", "model.resolution=32", "model.classifier=new")
    assert "32 x 32 as before; a new classifier for 10 classes" in same
    ten, eleven = list("9876543210"), [f"digit {number}" for number in range(11)]
    turned = export_network(tmp_path / "turned.safetensors", *tiny(10), ten).folder
    assert "the classifier of its 10 classes is kept" in begin(turned, digits, tmp_path / "run")
    others = export_network(tmp_path / "others.safetensors", *tiny(11), eleven).folder
    assert "a new classifier for 10 classes (the source has 11)" in begin(others, digits, tmp_path / "run")
    for how, reason in {"keep": "10 here, 11 there, '0' only here", "map": "none of the 10 classes"}.items():
        with pytest.raises(UsageError, match=rf"model.classifier={how}, .*{reason}.* ?model.classifier=") as refused:
            begin(others, digits, tmp_path / "run", f"model.classifier={how}")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["model.name=coatnet_0", "model.resolution=64"],
            r"a different network than this configuration; set 'model.stem=.*' 'model.stages=",
        ),
        (["model.resolution=44"], r"both sides must be multiples of 8, .*: the nearest is 48 x 48"),
        (["augment.flip=true"], r"flip \(augment.flip=true\) is on here and was off in every ancestor \(runs/tiny\)"),
    ],
)
def test_an_impossible_start_is_refused_in_one_line_without_data(
    source: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    for begins_from in (source, ROOT / "configs" / "tiny.yaml"):  # a file, or the preset of a run to come
        with pytest.raises(UsageError, match=message) as refused:
            finetune(TINY, [f"run.dir={tmp_path}/run", *more], str(begins_from), None, 1, check=True)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("begins_from", "message"), [(None, "needs --from RUN; only --check"), (TINY, f"pretrain with {TINY} first; ")]
)
def test_without_weights_nothing_begins(tmp_path: Path, begins_from: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        finetune(TINY, [f"run.dir={tmp_path}/run"], begins_from, None, 1, check=False)


def test_a_run_keeps_its_source_and_which_of_its_weights(source: Path, tmp_path: Path) -> None:
    found = source_of(tmp_path, source, None)
    pin_source(tmp_path, found)
    assert source_of(tmp_path, source, "ema") == source_of(tmp_path, source, None) == found and found.weights == "ema"
    with pytest.raises(UsageError, match="with --weights ema, but now it is model"):
        source_of(tmp_path, source, "model")
    with pytest.raises(UsageError, match=r"has only the moving average"):
        source_of(tmp_path / "other", source, "model")

"""Weights are exported as a file or a timm folder, and come back to the bit, with their ancestry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint import weights
from pipeline.checkpoint.reader import CheckpointReader, checkpoints
from pipeline.checkpoint.weights import WeightsFile, latest_checkpoint
from pipeline.commands.export import export, import_from_timm
from pipeline.commands.finetune import finetune
from pipeline.config.parsing import validate
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from pipeline.lineage import unknown_lineage
from pipeline.training.model import build_model, init_weights
from tests.peers import peer
from tests.pipeline.networks import export_network
from tests.pipeline.runs import ROOT, coatnet, contents, events

TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of the tiny configuration."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    data = [f"data.train={digits}/val", "data.val=null", "log.samples=false"]
    done = coatnet("pretrain", TINY, *data, f"run.dir={run}", "train.steps=2")
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tiny.safetensors"
    done = coatnet("export", run, out)
    assert done.returncode == 0, done.stderr
    assert "a custom CoAtNet, moving average of step 2, 0.2" in done.stdout
    return out


def test_a_file_has_the_weights_of_the_run_by_name_and_what_made_them(run: Path, exported: Path) -> None:
    reader, found = latest_checkpoint(run), load_file(exported)
    expected = dict(reader.tensors("ema")) | {
        name[4:]: values for name, values in reader.buffers().items() if name.startswith("ema:")
    }
    assert {name: values.tobytes() for name, values in found.items()} == {n: v.tobytes() for n, v in expected.items()}
    metadata, state = WeightsFile(exported).state(), reader.state()
    kept = ("step", "classes", "train_fingerprint", "config", "ancestry")
    assert {name: metadata[name] for name in kept} == {name: state[name] for name in kept}
    assert metadata["weights"] == "ema"


def test_weights_without_their_average_are_exported_on_request(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "down.safetensors"
    assert export(str(run), str(out), None, "model", overwrite=False) == 0
    expected = dict(latest_checkpoint(run).tensors("weight"))
    assert all(np.array_equal(values, expected[name]) for name, values in WeightsFile(out).tensors("weight"))
    with pytest.raises(UsageError, match=r"has no moving average; use --weights model"):
        export(str(out), str(tmp_path / "again.safetensors"), None, "ema", overwrite=False)


def test_a_file_is_evaluated_to_the_metrics_of_its_run(run: Path, exported: Path, digits: Path) -> None:
    outputs = [coatnet("evaluate", source, "--data", digits / "val", "--json") for source in (run, exported)]
    metrics = [json.loads(output.stdout) for output in outputs]
    assert metrics[0] == metrics[1] and metrics[0]["samples"] == 360 and metrics[0]["weights"] == "ema"


def finetuning(digits: Path, run: Path, *more: str) -> list[str]:
    length = ["train.steps=1", "optim.warmup_steps=0"]
    return [f"data.train={digits}/val", "data.val=null", f"run.dir={run}", *length, "log.samples=false", *more]


def test_finetuning_begins_from_a_file_and_continues_its_ancestry(
    run: Path, exported: Path, digits: Path, tmp_path: Path
) -> None:
    preset = ROOT / "configs" / "tiny_finetune.yaml"
    done = coatnet("finetune", preset, "--from", exported, *finetuning(digits, tmp_path / "run"))
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    reader = CheckpointReader(checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert [entry["run"] for entry in reader.state()["ancestry"]] == [str(run), str(tmp_path / "run")]
    with pytest.raises(UsageError, match=r"flip .* was off in every ancestor"):
        finetune(TINY, finetuning(digits, tmp_path / "other", "augment.flip=true"), str(exported), None, 1, check=True)


def test_finetuning_weights_of_unknown_ancestry_is_warned_about_and_recorded(
    exported: Path, digits: Path, tmp_path: Path
) -> None:
    unknown = tmp_path / "unknown.safetensors"
    weights.write(unknown, load_file(exported), {**WeightsFile(exported).state(), "ancestry": None})
    done = coatnet("finetune", TINY, "--from", unknown, *finetuning(digits, tmp_path / "run", "augment.flip=true"))
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert f"how {unknown} was trained is unknown" in warning
    lineage = latest_checkpoint(tmp_path / "run").state()["ancestry"]
    assert lineage[0] == unknown_lineage(str(unknown)) and len(lineage) == 2
    assert events(tmp_path / "run", "training_started")[0]["new_augmentations"] == []


@pytest.mark.parametrize(
    "key",
    [
        "model.pool=average",
        "model.stride=depthwise",
        "model.layer_norm_eps=1e-3",
        "model.stages=[{kind: mbconv, blocks: 1, width: 8}]",
    ],
)
def test_weights_are_not_finetuned_as_another_function(exported: Path, digits: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=key.partition("=")[0]):
        finetune(TINY, finetuning(digits, tmp_path / "run", key), str(exported), None, 1, check=True)


@pytest.mark.parametrize(
    ("key", "on_gpu", "refusal"),
    [
        ("model.attention=flex", False, r"model\.attention is 'flex'"),
        ("model.attention=flex", True, "no compiler no-such-cc on this machine.* variable CC"),
        ("train.compile=true", True, "no compiler no-such-cc on this machine"),
        ("train.compile=true", False, "no compiler no-such-cxx on this machine"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_before_the_run_has_a_folder(
    exported: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, on_gpu: bool, refusal: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setenv("CC", "no-such-cc")
    monkeypatch.setenv("CXX", "no-such-cxx")
    with pytest.raises(UsageError, match=refusal):
        finetune(TINY, finetuning(digits, tmp_path / "run", key), str(exported), None, 1, check=False)
    assert not (tmp_path / "run").exists()


def test_keys_that_an_older_configuration_lacks_have_their_defaults(
    exported: Path, digits: Path, tmp_path: Path
) -> None:
    metadata = WeightsFile(exported).state()
    for key in ("pool", "norm", "relative_attention", "attention", "batch_norm_eps", "layer_norm_eps"):
        del metadata["config"]["model"][key]
    weights.write(tmp_path / "older.safetensors", load_file(exported), metadata)
    assert finetune(TINY, finetuning(digits, tmp_path), str(tmp_path / "older.safetensors"), None, 1, check=True) == 0


def test_an_existing_target_is_replaced_only_on_request_and_only_an_export(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(exported.read_bytes())
    with pytest.raises(UsageError, match=r"out.safetensors exists; choose another name, or pass --overwrite"):
        export(str(run), str(out), None, None, overwrite=False)
    assert export(str(run), str(out), None, "model", overwrite=True) == 0
    assert WeightsFile(out).has_kind("weight") and [path.name for path in tmp_path.iterdir()] == [out.name]
    other, before = tmp_path / "other.safetensors", contents(run)
    save_file({"weight": np.zeros(3, np.float32)}, other)
    for layout, place in ((None, out.with_suffix("")), ("timm", run), (None, other)):
        with pytest.raises(UsageError, match=r"ends in .safetensors|was not written by this command"):
            export(str(run), str(place), layout, None, overwrite=True)
    assert contents(run) == before and [*load_file(other)] == ["weight"]


@pytest.mark.parametrize("folder", ["a file", "/proc"])
def test_a_folder_that_cannot_be_written_is_a_wrong_request(exported: Path, tmp_path: Path, folder: str) -> None:
    (tmp_path / "a file").touch()
    out = tmp_path / folder / "out.safetensors"
    with pytest.raises(UsageError, match=f"{out} cannot be written: .*; choose a writable folder"):
        export(str(exported), str(out), None, None, overwrite=False)


def test_a_network_that_timm_lacks_is_refused_with_the_reason(run: Path, tmp_path: Path) -> None:
    refused = coatnet("export", run, tmp_path / "out", "--layout", "timm")
    assert refused.returncode == 2 and "model.name is null; timm only has coatnet_0" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-5], "is not a complete safetensors file"),
        (lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:], "has a wrong checksum"),
        (lambda content: b"not a file of ours", "is not a complete safetensors file"),
    ],
)
def test_a_damaged_file_is_refused(exported: Path, tmp_path: Path, damage: Any, message: str) -> None:
    out = tmp_path / "damaged.safetensors"
    out.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(UsageError, match=message):
        export(str(out), str(tmp_path / "again.safetensors"), None, None, overwrite=False)
    assert list(tmp_path.iterdir()) == [out]


def test_a_safetensors_file_of_another_program_is_refused(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UsageError, match="was not made by this version of coatnet export or import"):
        WeightsFile(tmp_path / "foreign.safetensors")


# --------------------------------------------------------------------------------------------------- timm's folder


@pytest.fixture(scope="module")
def coatnet_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a CoAtNet-0 for 32 x 32 images."""
    model = {"name": "coatnet_0", "resolution": 32, "batch_norm_eps": 1e-2, "stride": "expand", "head_size": 32}
    tree = {"data": {"train": "somewhere"}, "train": {"steps": 1}, "model": model, "evaluate": {"crop_fraction": None}}
    config, classes = validate(tree, "test"), ["cat", "dog", "newt"]
    network = build_model(config.model, config.train, len(classes), torch.device("cpu"), init_weights(0))
    return export_network(
        tmp_path_factory.mktemp("coatnet_0") / "coatnet_0.safetensors", network, config, classes
    ).folder


def network_of(file: Path) -> tuple[torch.nn.Module, Config]:
    reader = WeightsFile(file)
    config = validate(reader.state()["config"], "test")
    network = build_model(
        config.model, config.train, len(reader.state()["classes"]), torch.device("cpu"), init_weights(1)
    )
    network.load_state_dict({name: torch.from_numpy(values) for name, values in load_file(file).items()})
    return network.eval(), config


def test_timm_opens_the_folder_and_importing_it_gives_the_same_file(coatnet_0: Path, tmp_path: Path) -> None:
    timm = peer("timm")
    assert export(str(coatnet_0), str(tmp_path / "timm"), "timm", None, overwrite=False) == 0
    assert len({path.stat().st_mode for path in (tmp_path / "timm").iterdir()}) == 1
    theirs = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    images, (ours, _) = torch.randn(2, 3, 32, 32), network_of(coatnet_0)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=0, atol=1e-5)
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["input_size"], data["interpolation"]) == ((3, 32, 32), "bilinear")
    assert (data["crop_pct"], data["crop_mode"], data["mean"]) == (1.0, "squash", [0.485, 0.456, 0.406])
    assert list(theirs.pretrained_cfg["label_names"]) == ["cat", "dog", "newt"]
    assert import_from_timm(str(tmp_path / "timm"), str(tmp_path / "back.safetensors"), overwrite=False) == 0
    assert WeightsFile(tmp_path / "back.safetensors").state() == WeightsFile(coatnet_0).state()
    assert export(str(coatnet_0), str(tmp_path / "timm"), "timm", None, overwrite=True) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "timm"]


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_that_timm_saved_is_imported_as_of_unknown_ancestry(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], safe: bool
) -> None:
    timm = peer("timm")
    theirs = timm.create_model("coatnet_0_224", num_classes=4, img_size=32, drop_path_rate=0.1).eval()
    timm.models.save_for_hf(theirs, tmp_path / "timm", safe_serialization=safe)
    done = import_from_timm(str(tmp_path / "timm"), str(tmp_path / "ours.safetensors"), overwrite=False)
    output = capsys.readouterr()
    assert done == 0 and "weights of unknown ancestry, 24.2" in output.out and "mean [0.5, 0.5, 0.5]" in output.err
    state = WeightsFile(tmp_path / "ours.safetensors").state()
    assert state["ancestry"] is None and state["classes"] == ["0", "1", "2", "3"]
    images, (ours, config) = torch.randn(2, 3, 32, 32), network_of(tmp_path / "ours.safetensors")
    assert (config.model.pool, config.model.stride, config.model.resolution) == ("average", "depthwise", 32)
    assert config.evaluate.crop_fraction == theirs.pretrained_cfg["crop_pct"]
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "coatnet_0_rw_224"}, "coatnet_0_rw_224 is not one of the paper's networks"),
        ({"num_classes": 3}, "config.json: 'architecture'"),
        ({"architecture": "coatnet_0_224"}, "is absent in the weights; .* save the folder again with timm"),
        ({"architecture": "coatnet_0_224", "model_args": {"img_size": [32, 64]}}, "is absent in the weights"),
        ([], "is not a timm folder: .*save_for_hf.* writes one"),
    ],
)
def test_a_folder_that_cannot_be_imported_is_refused_in_one_line(config: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"head.fc.weight": np.zeros((1000, 768), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=message) as refused:
        import_from_timm(str(tmp_path), str(tmp_path / "out.safetensors"), overwrite=False)
    assert "\n" not in str(refused.value) and not (tmp_path / "out.safetensors").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "coatnet_0_224"}))
    torch.save({"head.fc.weight": Path("a class that is not torch's")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"pytorch_model.bin cannot be read"):
        import_from_timm(str(tmp_path), str(tmp_path / "out.safetensors"), overwrite=False)

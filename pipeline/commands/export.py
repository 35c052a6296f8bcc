"""`coatnet export` and `coatnet import`: weights as one file, or as a folder for timm, and back.

Their ancestry goes with them, also through timm's folder; where it is unknown, the file has null for it.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from data.storage.durable import publish
from pipeline.checkpoint import weights as weights_file
from pipeline.checkpoint.weights import KEY, all_tensors, open_weights, provenance, select_weights
from pipeline.config.parsing import validate
from pipeline.errors import RunFailed, UsageError

if TYPE_CHECKING:
    from torch import Tensor


TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth")
"""timm's names for weights, in order of preference; of the last two, which are pickles, only tensors are read."""
TIMM_FOLDER = {"config.json", "model.safetensors"}
SAVE_FOLDER = "timm.models.save_for_hf(network, FOLDER)"


def export(source: str, out: str, layout: str | None, weights: str | None, overwrite: bool) -> int:
    """Writes a run's or checkpoint's weights as one file, or as timm's folder; returns the exit status."""
    if layout not in (None, "timm"):
        raise UsageError(f"--layout is {layout}; it must be timm or left out")
    reader, target = open_weights(Path(source)), Path(out)
    kind = select_weights(reader, weights)
    _check_place(target, overwrite, as_folder=layout == "timm")
    metadata, tensors = provenance(reader, kind), all_tensors(reader, kind)
    if layout == "timm":
        theirs, config = _as_timm(metadata, tensors)
        size = _put(target, lambda hidden: _write_timm(hidden, theirs, config))
    else:
        size = _put(target, lambda hidden: weights_file.write(hidden, tensors, metadata))
    print(_summary(target, metadata, tensors, size))
    return 0


def import_from_timm(source: str, out: str, overwrite: bool) -> int:
    """Writes the network of a timm folder as an exported file; returns the exit status."""
    from models.convert import from_timm

    folder, target = Path(source), Path(out)
    _check_place(target, overwrite, as_folder=False)
    config = _read_config(folder)
    inputs, exported = config["pretrained_cfg"], config.get(KEY) or {}
    arguments = {"num_classes": config["num_classes"], "img_size": inputs.get("input_size", (3, 224, 224))[1:]}
    arguments |= config.get("model_args", {})
    state = _read_state(folder)
    try:
        model, ours = from_timm(config["architecture"], state, arguments)
    except ValueError as error:
        misfit = " in the weights;" in str(error)  # tensors' names or shapes are not those of config.json's network
        raise UsageError(f"{folder}: {error}" + f"; save the folder again with {SAVE_FOLDER}" * misfit) from None
    _warn_of_other_scaling(folder, inputs)
    tensors = {name: values.numpy() for name, values in ours.items()}
    metadata = {
        "format": weights_file.FORMAT,
        "weights": exported.get("weights", "model"),
        "step": exported.get("step", 0),
        "classes": _class_names(config, model.pop("classes")),
        "train_fingerprint": exported.get("train_fingerprint"),
        "config": _our_config(folder, model, exported, inputs),
        "ancestry": exported.get("ancestry"),
    }
    size = _put(target, lambda hidden: weights_file.write(hidden, tensors, metadata))
    print(_summary(target, metadata, tensors, size))
    return 0


def _as_timm(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights under timm's names, and timm's config.json; UsageError where timm has no such network."""
    import torch

    from models.convert import to_timm
    from pipeline.training.model import DEVIATION, MEAN, meta_model

    config, classes = validate(metadata["config"], "the configuration of these weights"), metadata["classes"]
    model = meta_model(config.model, config.train, len(classes))
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()}, assign=True)
    try:
        theirs, arguments = to_timm(model, config.model.name or "null")
    except ValueError as error:
        raise UsageError(f"model.{error}; export it without --layout timm") from None
    inputs = {
        "input_size": [3, *model.resolution],
        "fixed_input_size": True,
        "interpolation": "bilinear",
        "crop_pct": config.evaluate.crop_fraction or 1.0,
        "crop_mode": "center" if config.evaluate.crop_fraction else "squash",
        "mean": [round(value / 255, 6) for value in MEAN],
        "std": [round(value / 255, 6) for value in DEVIATION],
        "num_classes": len(classes),
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
    }
    return theirs, {
        "architecture": f"{config.model.name}_224",
        "num_classes": len(classes),
        "label_names": classes,
        "model_args": arguments,
        "pretrained_cfg": inputs,
        KEY: metadata,
    }


def _write_timm(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_config(folder: Path) -> dict[str, Any]:
    """timm's config.json, also of the older kind with a single flat section."""
    try:
        config = json.loads((folder / "config.json").read_text())
        inputs = config.setdefault("pretrained_cfg", dict(config))
        config.setdefault("num_classes", inputs.get("num_classes", 1000))
        config["architecture"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{folder} is not a timm folder: config.json: {reason}; {SAVE_FOLDER} writes one") from None
    return config


def _read_state(folder: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    file = next((folder / name for name in TIMM_WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise UsageError(
            f"{folder} is not a timm folder: it has none of {', '.join(TIMM_WEIGHTS)}; {SAVE_FOLDER} writes one"
        )
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({str(error).splitlines()[0]}); download or save it again") from None
    if not isinstance(state, dict) or not all(isinstance(values, torch.Tensor) for values in state.values()):
        raise UsageError(f"{file} is not a state_dict of tensors; save network.state_dict()")
    return state


def _our_config(
    folder: Path, model: dict[str, Any], exported: dict[str, Any], inputs: dict[str, Any]
) -> dict[str, Any]:
    """A configuration for these weights: that of an earlier export, or the defaults, with timm's model."""
    crop = {"crop_fraction": inputs["crop_pct"]} if "crop_pct" in inputs else {}
    crop = {"crop_fraction": None} if inputs.get("crop_mode") == "squash" else crop
    tree = exported.get("config") or {"data": {"train": "unknown"}, "train": {"steps": 1}, "evaluate": crop}
    layout, resolution = model.pop("layout"), model["resolution"]
    height, width = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    if height != width:
        raise UsageError(f"{folder}: img_size is {[height, width]}; only square images are supported")
    model = {**tree.get("model", {}), **model, "name": layout, "resolution": height}
    return validate({**tree, "model": model}, str(folder)).model_dump(mode="json")


def _class_names(config: dict[str, Any], classes: int) -> list[str]:
    """timm's label names, or numbers where there are none."""
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or []
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names, key=int)]
    return list(names) if len(names) == classes else [str(number) for number in range(classes)]


def _warn_of_other_scaling(folder: Path, inputs: dict[str, Any]) -> None:
    from pipeline.training.model import DEVIATION, MEAN

    for name, ours in (("mean", MEAN), ("std", DEVIATION)):
        theirs = inputs.get(name)
        if theirs and any(abs(255 * value - own) > 1e-3 for value, own in zip(theirs, ours, strict=True)):
            print(
                f"warning: {folder}: it was trained on pixels normalized with {name} {list(theirs)}, but here it is"
                f" {[round(own / 255, 3) for own in ours]}: fine-tune before you evaluate",
                file=sys.stderr,
            )
            return


def _check_place(target: Path, overwrite: bool, as_folder: bool) -> None:
    """UsageError where the target has a wrong name, or exists and must not be replaced."""
    if not as_folder and target.suffix != ".safetensors":
        raise UsageError(f"{target} is not a file name that ends in .safetensors; choose one that is")
    if not os.path.exists(target):  # False also without permission
        return
    if not overwrite:
        raise UsageError(f"{target} exists; choose another name, or pass --overwrite")
    if target.is_dir() != as_folder or not _is_export(target):
        raise UsageError(f"{target} was not written by this command, so it is not replaced; choose another name")


def _is_export(target: Path) -> bool:
    if target.is_dir():
        return {path.name for path in target.iterdir()} <= TIMM_FOLDER
    try:
        weights_file.WeightsFile(target)
    except UsageError:
        return False
    return True


def _put(target: Path, write: Callable[[Path], None]) -> int:
    """Writes under a hidden name beside the target and renames; returns the bytes."""
    hidden = target.with_name(f".{target.name}.partial")
    _refuse_unwritable(target, hidden)
    try:
        write(hidden)
        _let_others_read(hidden)
        publish(hidden, target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error).partition(" at path ")[0]  # which is safetensors' own hidden file
        raise RunFailed(f"{target} could not be written: {reason}") from None
    finally:
        _remove(hidden)
    return sum(path.stat().st_size for path in _files(target))


def _refuse_unwritable(target: Path, hidden: Path) -> None:
    """Creates the target's folder; UsageError where it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(hidden)
        hidden.touch()
        hidden.unlink()
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; choose a writable folder") from None


def _let_others_read(place: Path) -> None:
    """Gives files the usual permissions; safetensors gives them to the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in _files(place):
        path.chmod(0o666 & ~umask)


def _files(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else [place]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _summary(target: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray], size: int) -> str:
    parameters = sum(v.size for name, v in tensors.items() if not name.endswith(weights_file.STATISTICS))
    name = metadata["config"]["model"]["name"] or "a custom CoAtNet"
    weights = "moving average" if metadata["weights"] == "ema" else "weights"
    origin = f"of step {metadata['step']}" if metadata["ancestry"] else "of unknown ancestry"
    return f"{target}: {name}, {weights} {origin}, {parameters / 1e6:.2f}M parameters, {size / 1e6:.1f} MB"

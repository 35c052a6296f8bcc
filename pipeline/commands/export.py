"""`coatnet export` and `coatnet import`: a network as one file, or as a folder that timm opens, and back.

What is written has its name when it is whole. An ancestry goes with the weights, also through timm's folder; where
nobody knows it, the file says so.
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
"""What timm calls its weights, best first; the others are pickles, of which only tensors are read."""
TIMM_FOLDER = {"config.json", "model.safetensors"}
NEEDED = "timm.models.save_for_hf(network, FOLDER) writes one"


def export(source: str, out: str, layout: str | None, weights: str | None, overwrite: bool) -> int:
    """Writes a run's or checkpoint's weights as one file, or as timm's folder; returns the exit status."""
    if layout not in (None, "timm"):
        raise UsageError(f"--layout is {layout}; the only one beside coatnet's own is timm")
    reader, target = open_weights(Path(source)), Path(out)
    kind = select_weights(reader, weights)
    _check_place(target, overwrite, as_folder=layout == "timm")
    said, tensors = provenance(reader, kind), all_tensors(reader, kind)
    if layout == "timm":
        theirs, config = _as_timm(said, tensors)
        size = _put(target, lambda hidden: _write_timm(hidden, theirs, config))
    else:
        size = _put(target, lambda hidden: weights_file.write(hidden, tensors, said))
    print(_sentence(target, said, tensors, size))
    return 0


def import_from_timm(source: str, out: str, overwrite: bool) -> int:
    """Writes the network of timm's folder as one file of ours; returns the exit status."""
    from models.convert import from_timm

    folder, target = Path(source), Path(out)
    _check_place(target, overwrite, as_folder=False)
    config = _read_config(folder)
    data, noted = config["pretrained_cfg"], config.get(KEY) or {}
    arguments = {"num_classes": config["num_classes"], "img_size": data.get("input_size", (3, 224, 224))[1:]}
    arguments |= config.get("model_args", {})
    state = _read_state(folder)
    try:
        made, ours = from_timm(config["architecture"], state, arguments)
    except ValueError as error:
        raise UsageError(f"{folder}: {error}{_advice(error)}") from None
    _warn_of_other_inputs(folder, data)
    tensors = {name: values.numpy() for name, values in ours.items()}
    said = {
        "format": weights_file.FORMAT,
        "weights": noted.get("weights", "model"),
        "step": noted.get("step", 0),
        "classes": _class_names(config, made.pop("classes")),
        "train_fingerprint": noted.get("train_fingerprint"),
        "config": _our_config(folder, made, noted, data),
        "ancestry": noted.get("ancestry"),
    }
    size = _put(target, lambda hidden: weights_file.write(hidden, tensors, said))
    print(_sentence(target, said, tensors, size))
    return 0


def _advice(error: ValueError) -> str:
    """What to do where names or shapes of tensors are not those of the network in config.json."""
    misfit = " in the weights;" in str(error)
    return "; save the folder again by timm.models.save_for_hf(network, FOLDER)" if misfit else ""


def _as_timm(said: dict[str, Any], tensors: dict[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights under timm's names, and timm's config.json; UsageError where timm has no such network."""
    import torch

    from models.convert import to_timm
    from pipeline.training.model import DEVIATION, MEAN, meta_model

    config, classes = validate(said["config"], "the configuration of these weights"), said["classes"]
    model = meta_model(config.model, config.train, len(classes))
    model.load_state_dict({name: torch.from_numpy(values) for name, values in tensors.items()}, assign=True)
    try:
        theirs, arguments = to_timm(model, config.model.name or "null")
    except ValueError as error:
        raise UsageError(f"model.{error}; export it without --layout timm") from None
    data = {
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
        "pretrained_cfg": data,
        KEY: said,
    }


def _write_timm(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _read_config(folder: Path) -> dict[str, Any]:
    """timm's config.json, also where it is of the older kind that is one flat section."""
    try:
        config = json.loads((folder / "config.json").read_text())
        data = config.setdefault("pretrained_cfg", dict(config))
        config.setdefault("num_classes", data.get("num_classes", 1000))
        config["architecture"]
    except OSError as error:
        raise UsageError(f"{folder} is no folder of timm's: config.json: {error.strerror}; {NEEDED}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} is no folder of timm's: config.json: {error}; {NEEDED}") from None
    return config


def _read_state(folder: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    file = next((folder / name for name in TIMM_WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise UsageError(f"{folder} is no folder of timm's: it has none of {', '.join(TIMM_WEIGHTS)}; {NEEDED}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise UsageError(f"{file} cannot be read ({str(error).splitlines()[0]}); fetch or save it again") from None
    if not isinstance(state, dict) or not all(isinstance(values, torch.Tensor) for values in state.values()):
        raise UsageError(
            f"{file} is no state of a network: names and tensors, and nothing else; save network.state_dict()"
        )
    return state


def _our_config(folder: Path, made: dict[str, Any], noted: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """A configuration for these weights: the one that an export noted, or the defaults; the model as timm's is."""
    crop = {"crop_fraction": data["crop_pct"]} if "crop_pct" in data else {}
    crop = {"crop_fraction": None} if data.get("crop_mode") == "squash" else crop
    tree = noted.get("config") or {"data": {"train": "unknown"}, "train": {"steps": 1}, "evaluate": crop}
    sides = made["resolution"] if isinstance(made["resolution"], tuple) else (made["resolution"],) * 2
    if sides[0] != sides[1]:
        raise UsageError(f"{folder}: img_size is {list(sides)}; a configuration has square images only")
    model = {**made, "name": made["layout"], "resolution": sides[0]}
    del model["layout"]
    return validate({**tree, "model": {**tree.get("model", {}), **model}}, str(folder)).model_dump(mode="json")


def _class_names(config: dict[str, Any], classes: int) -> list[str]:
    """timm's label names; numbers where there are none."""
    names = config.get("label_names") or config["pretrained_cfg"].get("label_names") or []
    if isinstance(names, dict):
        names = [names[number] for number in sorted(names, key=int)]
    return list(names) if len(names) == classes else [str(number) for number in range(classes)]


def _warn_of_other_inputs(folder: Path, data: dict[str, Any]) -> None:
    from pipeline.training.model import DEVIATION, MEAN

    for name, ours in (("mean", MEAN), ("std", DEVIATION)):
        theirs = data.get(name)
        if theirs and any(abs(255 * value - own) > 1e-3 for value, own in zip(theirs, ours, strict=True)):
            print(
                f"warning: {folder}: its pixels were scaled by {name} {list(theirs)}, here they are by"
                f" {[round(own / 255, 3) for own in ours]}: fine-tune before you evaluate",
                file=sys.stderr,
            )
            return


def _check_place(target: Path, overwrite: bool, as_folder: bool) -> None:
    """UsageError where something stands in the way that may not be replaced."""
    if not as_folder and target.suffix != ".safetensors":
        raise UsageError(f"{target} is to be one file; give it a name that ends in .safetensors")
    if not os.path.exists(target):  # False also where one may not look
        return
    if not overwrite:
        raise UsageError(f"{target} is there already; choose another name, or --overwrite")
    like_ours = target.is_dir() and {path.name for path in target.iterdir()} <= TIMM_FOLDER
    if target.is_dir() != as_folder or (as_folder and not like_ours):
        raise UsageError(f"{target} is nothing that this command wrote, so it is not replaced; choose another name")


def _put(target: Path, write: Callable[[Path], None]) -> int:
    """Writes under a hidden name beside the target and renames; returns the bytes."""
    hidden = target.with_name(f".{target.name}.partial")
    _refuse_unwritable(target, hidden)
    try:
        write(hidden)
        _let_others_read(hidden)
        publish(hidden, target)
    except (OSError, safetensors.SafetensorError) as error:
        _remove(hidden)
        reason = str(error).partition(" at path ")[0]  # which is safetensors' own hidden file
        raise RunFailed(f"{target} could not be written: {reason}") from None
    return sum(path.stat().st_size for path in _files(target))


def _refuse_unwritable(target: Path, hidden: Path) -> None:
    """UsageError where nothing can be written beside the target; its folder is made if need be."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(hidden)
        hidden.touch()
        hidden.unlink()
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}; choose a folder that can be") from None


def _let_others_read(place: Path) -> None:
    """Gives files the rights that new ones have; safetensors writes its own for their owner alone."""
    withheld = os.umask(0)
    os.umask(withheld)
    for path in _files(place):
        path.chmod(0o666 & ~withheld)


def _files(place: Path) -> list[Path]:
    return list(place.iterdir()) if place.is_dir() else [place]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sentence(target: Path, said: dict[str, Any], tensors: dict[str, np.ndarray], size: int) -> str:
    parameters = sum(v.size for name, v in tensors.items() if not name.endswith(weights_file.STATISTICS))
    name = said["config"]["model"]["name"] or "a spelled-out CoAtNet"
    weights = "moving average" if said["weights"] == "ema" else "weights"
    origin = f"of step {said['step']}" if said["ancestry"] else "of unknown ancestry"
    return f"{target}: {name}, {weights} {origin}, {parameters / 1e6:.2f}M parameters, {size / 1e6:.1f} MB"

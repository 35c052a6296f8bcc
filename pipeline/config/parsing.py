"""From YAML files and `section.key=value` to one checked configuration, and what changed against a run's own.

Order, later wins: documented defaults, the file named by `base:` (and its base), the preset, overrides from left to
right. Setting one of train.epochs and train.steps in a later layer clears the other in the earlier ones; so do
model.name and model.stages. In keys that are paths `~` and $VARIABLES are expanded, but in data.cache.dir, where each
node does that.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from data.paths import expand
from pipeline.config.core_yaml import YamlError, read_typed, read_yaml, write_yaml
from pipeline.config.schema import Config, Section, Slurm, describe_type, documented_keys, item_type, section_type
from pipeline.errors import UsageError

CLEARS = {
    ("train", "epochs"): ("steps",),
    ("train", "steps"): ("epochs",),
    ("model", "name"): ("stem", "stages", "head_size"),
    ("model", "stages"): ("name",),
}
"""A key that is set in a later layer -> keys of its section that it removes from the earlier ones."""
REMOVED = {"slurm.constraint": "slurm.sbatch=[--constraint=...]"}
"""A key that there was -> what takes its place. A request that sets it is refused; what an older run kept is read."""


def read_config(path: str, overrides: list[str]) -> Config:
    """The configuration of a preset file with overrides; UsageError names the key and what would be allowed."""
    path = expand(path, "CONFIG")
    layers = [*_file_layers(Path(path)), *(_parse_override(text) for text in overrides)]
    merged: dict[str, Any] = {}
    for layer, origin in layers:
        _check_keys(layer, Config, "", origin)
        _clear(merged, layer)
        _merge(merged, layer)
    return validate(_with_paths_expanded(merged, path, overrides), path, overrides)


def validate(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Config:
    """The typed configuration of a plain tree; all that is wrong with it in one UsageError, a line each.

    A line begins with the last of the overrides whose key it names, or else with the origin.
    """
    tree = {**{name: {} for name in Config.model_fields}, **tree}  # so that keys are missing, not sections
    for section, _, name in (full.partition(".") for full in REMOVED):
        if isinstance(tree[section], dict):
            tree[section] = {key: value for key, value in tree[section].items() if key != name}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_explained(error.errors(), tree, origin, overrides)) from None


def read_slurm(overrides: Sequence[str]) -> Slurm:
    """The slurm section by overrides alone, where no run is configured."""
    tree: dict[str, Any] = {"slurm": {}}
    for layer, origin in map(_parse_override, overrides):
        _check_keys(layer, Config, "", origin)
        _merge(tree, layer)
    try:
        return Slurm.model_validate(tree["slurm"])
    except ValidationError as error:
        errors = [{**each, "loc": ("slurm", *each["loc"])} for each in error.errors()]
        raise UsageError(_explained(errors, tree, "slurm", overrides)) from None


def _explained(errors: Sequence[Any], tree: dict[str, Any], origin: str, overrides: Sequence[str]) -> str:
    """A line for each of pydantic's errors: a value that may be of several types has one for each."""
    messages = dict.fromkeys(_message(each, tree) for each in errors)
    return "\n".join(f"{_override_with(message, overrides) or origin}: {message}" for message in messages)


def _with_paths_expanded(tree: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The tree with its paths as data.paths.expand has them; all that cannot be expanded in one UsageError."""
    lines: list[str] = []
    for name in (name for name, facts in documented_keys().items() if facts["expanded"]):
        section, _, leaf = name.rpartition(".")
        parent = _get(tree, section.split("."))
        if isinstance(parent, dict) and isinstance(parent.get(leaf), str):
            try:
                parent[leaf] = expand(parent[leaf], name)
            except UsageError as error:
                lines.append(f"{_override_with(str(error), overrides) or origin}: {error}")
    if lines:
        raise UsageError("\n".join(lines))
    return tree


def _override_with(message: str, overrides: Sequence[str]) -> str | None:
    """The last override whose key a message names."""
    keys = {text: re.escape(text.partition("=")[0]) for text in overrides}
    return next((_shown(text) for text in reversed(overrides) if re.search(rf"\b{keys[text]}\b", message)), None)


def _shown(override: str) -> str:
    """An override in one line."""
    return override.replace("\n", "\\n")


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML; reading it again gives an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def read_resolved(path: Path) -> Config:
    """A run's own config.yaml."""
    return validate(_with_paths_expanded(_load(path), str(path)), str(path))


def changes(old: Config, new: Config) -> dict[str, tuple[str, Any, Any]]:
    """Keys that differ: full name -> (what resuming with another value does, old value, new value)."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return {
        name: (facts["change"], _get(before, name.split(".")), _get(after, name.split(".")))
        for name, facts in documented_keys().items()
        if _get(before, name.split(".")) != _get(after, name.split("."))
    }


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[dict[str, Any], str]]:
    if path.resolve() in map(Path.resolve, seen):
        raise UsageError(f"{path}: base leads back to itself: {' -> '.join(map(str, [*seen, path]))}")
    tree = _load(path, f"{seen[-1]}: base: " if seen else "")
    base = tree.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: base is {_as_json(base)}; it must be the name of a YAML file beside this one")
    below = _file_layers(path.parent / expand(base, f"{path}: base"), (*seen, path)) if base is not None else []
    return [*below, (tree, str(path))]


def _load(path: Path, named_by: str = "") -> dict[str, Any]:
    """The sections of a YAML file, unchecked; UsageError where it is missing (with `named_by`) or holds none."""
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"), _takes_text)
    except FileNotFoundError as error:
        raise UsageError(f"{named_by}{path}: {error.strerror}{_similar_file(path)}") from None
    except OSError as error:
        raise UsageError(f"{named_by}{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}: line {line}: not UTF-8; save the file in that encoding") from None
    except YamlError as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        content = "is empty" if tree is None else f"holds {'a list' if isinstance(tree, list) else 'a single value'}"
        raise UsageError(f"{path}: {content}; a preset is a mapping of sections, as in configs/tiny.yaml")
    return tree


def _similar_file(missing: Path) -> str:
    presets = {path.name: path for path in (*Path("configs").rglob("*.yaml"), *missing.parent.glob("*.yaml"))}
    near = difflib.get_close_matches(missing.name, presets, 1, 0.7)
    return f"; did you mean {presets[near[0]]}?" if near else ""


def _takes_text(name: str) -> bool:
    return name == "base" or documented_keys().get(name, {}).get("text", False)


def _parse_override(text: str) -> tuple[dict[str, Any], str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{text}: an override has the form section.key=value")
    facts = documented_keys().get(name)
    try:
        is_text = facts is not None and facts["text"] and not facts["list"]
        leaf: Any = read_typed(value) if is_text else read_yaml(value, _takes_text, name)
    except YamlError as error:
        raise UsageError(f"{_shown(text)}: {error.problem}") from None
    for part in reversed(name.split(".")):
        leaf = {part: leaf}
    return leaf, _shown(text)


def _check_keys(tree: dict[str, Any], section: type[Section], prefix: str, origin: str) -> None:
    for name, value in tree.items():
        full = f"{prefix}{name}"
        if name not in section.model_fields:
            if full in REMOVED and value is None:  # as the config.yaml of an older run has it
                continue
            instead = f"was removed; set {REMOVED[full]} instead" if full in REMOVED else None
            raise UsageError(f"{origin}: {full}: {instead or 'unknown' + _suggestion(full, section, prefix)}")
        annotation = section.model_fields[name].annotation
        inner = section_type(annotation)
        if isinstance(value, dict) and inner is not None:
            _check_keys(value, inner, full + ".", origin)
        elif inner is not None and (value is not None or type(None) not in get_args(annotation)):
            raise UsageError(
                f"{origin}: {full} is {_as_json(value)}; it is a section with {', '.join(inner.model_fields)}"
            )
        elif isinstance(value, dict):
            raise UsageError(f"{origin}: {full} is {_as_json(value)}; it must be {describe_type(section, name)}")


def _suggestion(full: str, section: type[Section], prefix: str) -> str:
    known, leaf = list(documented_keys()), full.removeprefix(prefix)
    near = [prefix + name for name in difflib.get_close_matches(leaf, section.model_fields, 1, 0.7)]
    near += [name for name in known if name.split(".")[-1] == leaf]
    near += difflib.get_close_matches(full, known, 1, 0.8)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {prefix.rstrip('.') or 'the configuration'} has {', '.join(section.model_fields)}"


def _clear(below: dict[str, Any], above: dict[str, Any]) -> None:
    """Removes from the earlier layers what a key that this layer sets excludes."""
    for (section, name), excluded in CLEARS.items():
        if above.get(section, {}).get(name) is not None:
            for other in set(excluded) - set(above[section]):
                below.get(section, {}).pop(other, None)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _merge(below[name], value)
        else:
            below[name] = value


def _message(error: Any, tree: dict[str, Any]) -> str:
    """An error of pydantic in a line: the key's full name, its value, and what it may be."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    section, name, path, rest = Config, "", [], list(error["loc"])
    inner: type[Section] | None = Config
    while rest and inner is not None:
        section, name = inner, rest.pop(0)
        path.append(name)
        if name not in section.model_fields:
            prefix = "".join(f"{part}." for part in path[:-1])
            return f"{prefix}{name}: unknown{_suggestion(prefix + name, section, prefix)}"
        annotation = section.model_fields[name].annotation
        inner = section_type(annotation) or item_type(annotation)
        if rest and item_type(annotation):
            path.append(rest.pop(0))
    full = ".".join(map(str, path))
    if error["type"] == "missing" and not rest:  # with a rest it is an item of a list that is too short
        return f"{full}: must be given" + ("" if any(isinstance(part, int) for part in path) else f" ({full}=...)")
    is_item = isinstance(path[-1], int) and inner is not None
    what = f"a section with {', '.join(inner.model_fields)}" if is_item else describe_type(section, name)
    return f"{full} is {_as_json(_get(tree, path))}; it must be {what}"


def _as_json(value: Any) -> str:
    """A value as it could be written in YAML."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _get(tree: Any, path: list[Any]) -> Any:
    for part in path:
        if isinstance(tree, list) and isinstance(part, int):
            tree = tree[part]
        else:
            tree = tree.get(part) if isinstance(tree, dict) else None
    return tree

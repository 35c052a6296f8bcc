"""The parts of the reference pages that the code can write: Markdown of commands, keys and presets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from pipeline.commands.keys import Row, key_rows
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config, describe_type, documented_keys, item_type
from slurm.cli import app

ROOT = Path(__file__).parent.parent


def commands() -> str:
    """Every command with its help, usage, arguments and options."""
    return "\n".join(_commands(typer.main.get_command(app), "coatnet"))


def _commands(command: Any, name: str) -> Iterator[str]:
    context = typer.Context(command, info_name=name)
    options = [_option(*record) for each in command.params if (record := each.get_help_record(context))]
    if within := getattr(command, "commands", {}):
        for each in within:
            yield from _commands(within[each], f"{name} {each}")
        return
    usage = [re.sub(r"^\{(.*?)(\.\.\.)?\}(\.\.\.)?$|^\[(\[.*\]\.\.\.)\]\.\.\.$", r"\1\2\4", each)
             for each in command.collect_usage_pieces(context)]  # fmt: skip
    yield f"## {name}\n\n{command.help}\n\n```\n{name} {' '.join([*usage[1:], usage[0]])}\n```\n"
    if options:
        yield table(["argument, option", "meaning"], options)
    if command.epilog:
        label, _, example = command.epilog.partition(": ")
        yield f"\n{label}:\n\n```\n{example}\n```\n"


def _option(name: str, meaning: str) -> tuple[str, str]:
    name = re.sub(r" <(int|float) range>", " N", name)
    return f"`{re.sub(r' <[^>]*>', '', name)}`", meaning


def keys() -> str:
    """Every configuration key, a table for each section; keys of the items of a list after the list."""
    parts = []
    for section, rows in groupby(key_rows(), lambda row: row.name.partition(".")[0]):
        cells = [cell for row in rows for cell in _key(row)]
        parts += [f"## {section}\n", table(["key", "default", "meaning", "may change"], cells), ""]
    return "\n".join(parts)


def _key(row: Row) -> Iterator[tuple[str, ...]]:
    section, name = documented_keys()[row.name]["section"], row.name.rpartition(".")[2]
    yield f"`{row.name}`", f"`{row.default}`", f"{row.meaning} ({describe_type(section, name)})", row.on_resuming
    if item := item_type(section.model_fields[name].annotation):
        for inner, info in item.model_fields.items():
            default = "(required)" if info.is_required() else json.dumps(info.default)
            meaning = f"{info.description} ({describe_type(item, inner)})"
            yield f"`{row.name}[].{inner}`", f"`{default}`", meaning, row.on_resuming


def presets() -> str:
    """Every preset of configs/, a table for each folder."""
    parts = []
    for folder, files in groupby(sorted((ROOT / "configs").rglob("*.yaml"), key=_folder_first), lambda f: f.parent):
        headings = ["preset", "network", "pixels", "length", "batch", "learning rate", "RandAugment", "mixup",
                    "stochastic depth"]  # fmt: skip
        parts += [f"## {folder.relative_to(ROOT)}\n", table(headings, map(_preset, files)), ""]
    return "\n".join(parts)


def _folder_first(file: Path) -> tuple[str, str]:
    return str(file.parent), file.name


def _preset(file: Path) -> tuple[str, ...]:
    config: Config = read_config(str(file), [])
    drawn, train = config.augment.randaugment, config.train
    return (
        f"`{file.name}`",
        config.model.name or "its own",
        str(config.model.resolution),
        f"{train.epochs:g} epochs" if train.epochs else f"{train.steps:,} steps",
        f"{train.global_batch:,}",
        f"{config.optim.learning_rate:g}, {config.optim.decay}",
        f"{drawn.layers} x {drawn.magnitude:g}" if drawn.layers else "off",
        f"{config.augment.mixup:g}" if config.augment.mixup else "off",
        f"{train.stochastic_depth:g}",
    )


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; a bar within a cell stays one."""
    lines = [list(headings)]
    lines += [["---"] * len(lines[0]), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

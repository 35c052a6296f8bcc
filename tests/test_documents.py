"""The command blocks of README, quickstart and how-to pages run in order, each page in a folder of its own.

Blocks of `sh` are commands; of `console` too, each behind `$ ` and above what it prints; of `python` programs; of
`yaml`, where they begin with `# NAME`, files. Before one that cannot run here stands `<!-- skip: next "why" -->`.
How-to pages begin with the folder that the quickstart leaves.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
import typer
from PIL import Image
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from slurm.cli import app
from tests import forked
from tests.forked import ROOT
from tests.pipeline.runs import PATIENCE_SECONDS

QUICKSTART, README = ROOT / "docs" / "quickstart.md", ROOT / "README.md"
HOWTO = sorted((ROOT / "docs" / "howto").glob("*.md"))
TRAINED = {"pretrain", "finetune", "evaluate", "predict", "replay", "status", "logs"}
"""Commands of whose output the figures are not compared."""
SHORT = ["train.epochs=null", "optim.warmup_steps=1"]
SMALL = [*SHORT, "train.steps=2", "train.global_batch=4", "train.micro_batch=2", "train.precision=fp32"]
NETWORK = [
    "model.name=null", "model.stem={blocks: 1, width: 16}", "model.stages=[{kind: transformer, blocks: 1, width: 32}]",
]  # fmt: skip

Form = Callable[[list[str]], list[str]]


def long_form(words: list[str]) -> list[str]:
    """What is put behind a command's words: configs/photos.yaml is for a GPU."""
    return SMALL if words[:2] == ["pretrain", "configs/photos.yaml"] else []


def short_form(words: list[str]) -> list[str]:
    """Everything that trains does few steps, and configs/photos.yaml with a small network."""
    if words[0] not in ("pretrain", "finetune") or "--check" in words:
        return []
    if long_form(words):
        return [*SMALL, *NETWORK]
    resumes = any(word.startswith("train.epochs=") for word in words)  # an example of a longer run
    return [*SHORT, f"train.steps={5 if resumes else 3}"]


def run_page(page: Path, folder: Path, form: Form) -> None:
    parsers = [CodeBlockParser("sh", partial(_run_block, folder, form))]
    parsers += [CodeBlockParser("console", partial(_run_session, folder, form))]
    parsers += [CodeBlockParser("yaml", partial(_write_file, folder)), PythonCodeBlockParser(), SkipParser()]
    for example in Document.parse(str(page), *parsers).examples():
        try:
            example.evaluate()
        except SkipTest as skipped:
            assert skipped.args[0], "a block that is not run says why"


def _run_block(folder: Path, form: Form, example: Example) -> None:
    for command in example.parsed.replace("\\\n", "").splitlines():
        _run(folder, form, command)


def _run_session(folder: Path, form: Form, example: Example) -> None:
    for part in re.split(r"^\$ ", example.parsed.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        _run(folder, form, command, shown)


def _write_file(folder: Path, example: Example) -> None:
    if name := re.match(r"# (\S+)\n", example.parsed):
        (folder / name[1]).write_text(example.parsed)


def _run(folder: Path, form: Form, command: str, shown: str = "") -> None:
    """Runs a line; it must succeed, or fail where an error is shown, and print what is shown, `...` for anything."""
    words = shlex.split(command, comments=True)
    if words[:1] != ["coatnet"]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=os.environ | {"PATH": path},
            capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
    else:
        into = folder / words.pop() if words[-2:-1] == [">"] and words.pop(-2) else None
        words += form(words[1:])
        done = forked.run("slurm.cli", *words[1:], timeout=PATIENCE_SECONDS, cwd=folder)
        if into is not None:
            into.write_text(done.stdout)
    refused = shown.startswith("coatnet: ")
    assert (done.returncode != 0) == refused, f"$ {command}\n{done.stdout}{done.stderr}"
    printed, figures = done.stdout + done.stderr, re.compile(r"\d[\d.,]*(e[+-]\d+)?")
    if TRAINED & set(words[1:2]) and "--check" not in words:
        printed, shown = (figures.sub("0", text) for text in (printed, shown))
    alike = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not shown or alike, f"$ {command}\nprints\n{printed}\nand the page has\n{shown}"


def _lacking(words: list[str]) -> list[str]:
    """Of a command's words those that name no command or option; a benchmark has options of its own."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            return words[:1]
        command, words = command.commands[words[0]], words[1:]
    known = {"-h", "--help"}.union(*(parameter.opts for parameter in command.params))
    options = [] if command.name in ("bench", app.info.name) else [word for word in words if word.startswith("-")]
    return [option for option in options if option.partition("=")[0] not in known]


def make_folder(folder: Path) -> Path:
    """What a reader has: the repository's demo and presets, and photos/CLASS/*.jpg."""
    folder.mkdir(exist_ok=True)
    for shared in ("configs", "demo"):
        (folder / shared).symlink_to(ROOT / shared)
    for number in range(24):
        image = folder / "photos" / ("cat" if number % 2 else "dog") / f"{number:02}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(15 * number).convert("RGB").resize((80, 60)).save(image)
    return folder


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("quickstart"))
    run_page(QUICKSTART, folder, short_form)
    return folder


def test_every_command_of_the_readme_does_what_is_shown(tmp_path: Path) -> None:
    run_page(README, make_folder(tmp_path), short_form)


@pytest.mark.parametrize("page", HOWTO, ids=lambda page: page.stem)
def test_every_command_of_a_how_to_page_does_what_is_shown(
    page: Path, after_quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(after_quickstart, tmp_path / "folder", symlinks=True)
    monkeypatch.chdir(folder)  # where its Python is run
    run_page(page, folder, short_form)


@pytest.mark.torture
def test_every_command_does_what_is_shown_at_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page(README, make_folder(tmp_path / "readme"), long_form)
    run_page(QUICKSTART, after_quickstart := make_folder(tmp_path / "quickstart"), long_form)
    for page in HOWTO:
        monkeypatch.chdir(folder := shutil.copytree(after_quickstart, tmp_path / page.stem, symlinks=True))
        run_page(page, folder, long_form)


def test_every_command_that_any_page_shows_exists_with_its_options() -> None:
    pages = [README, *(path for folder in ("configs", "docs", "models") for path in (ROOT / folder).rglob("*.md"))]
    lacking, shown = {}, re.compile(r"`coatnet ([^`]+)`|^(?:\$ )?coatnet ((?:.*\\\n)*.*)", re.MULTILINE)
    for page in pages:
        for command in map("".join, shown.findall(page.read_text())):
            words = command.replace("\\\n", "").partition("#")[0].split()
            lacking |= {f"{page.name}: coatnet {command}": found for found in [_lacking(words)] if found}
    assert lacking == {}


@pytest.mark.parametrize("page", [README, QUICKSTART, *HOWTO], ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_run_or_is_text(page: Path) -> None:
    kinds = re.findall(r"^```(.*)\n(?:.*\n)*?```$", page.read_text(), re.MULTILINE)
    assert set(kinds) <= {"sh", "console", "python", "yaml", "text"}


def test_every_message_of_troubleshooting_is_one_that_the_program_prints() -> None:
    code = [path for package in ("data", "models", "pipeline", "slurm") for path in (ROOT / package).rglob("*.py")]
    texts = "".join(re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in [*code, ROOT / "Makefile"])
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    entries = "".join(re.findall(r"^- ((?:`[^`]+`(?:, )?)+)", page, re.MULTILINE))
    messages = re.findall(r"`([^`]+)`", entries)
    parts = [part.strip(" ,") for message in messages for part in message.split("...")]
    assert len(messages) > 30 and [part for part in parts if part not in texts] == []

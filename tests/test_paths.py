"""What people type as a path: `~` and variables are the folders that they name, in every key and on every command."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import typer
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data.paths import expand
from data.shards.manifest import Manifest, with_cache
from data.shards.shard_list import Shard, Shards
from data.storage.remote import DEFAULT
from pipeline.config.parsing import changes, read_config, read_resolved, to_yaml
from pipeline.config.schema import Config
from pipeline.errors import UsageError
from slurm.cli import app

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
LENGTH = ["train.epochs=null", "train.steps=1"]

VARIABLES = {"SCRATCH": "/scratch/me", "Run_2": "a b", "EMPTY": "", "PRICE": "5$EMPTY"}
NAMES = st.text(st.characters(exclude_characters="$~\0:", exclude_categories=["Cs"]), max_size=8)
PARTS = st.one_of(
    NAMES.map(lambda name: ("/" + name, "/" + name)),
    st.sampled_from(list(VARIABLES)).map(lambda name: (f"${{{name}}}", VARIABLES[name])),
    st.sampled_from(list(VARIABLES)).map(lambda name: (f"${name}/", VARIABLES[name] + "/")),
    st.just(("/$5", "/$5")),
)


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder, variables, and an empty folder to work in."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (VARIABLES | {"HOME": str(home), "IN_HOME": "~/in"}).items():
            patch.setenv(name, value)
        patch.delenv("UNSET", raising=False)
        patch.chdir(tmp_path_factory.mktemp("work"))
        yield home


@given(st.booleans(), st.lists(PARTS, min_size=1, max_size=4))
def test_a_path_is_its_parts_with_each_variable_replaced_once(in_home: bool, parts: list[tuple[str, str]]) -> None:
    typed, meant = map("".join, zip(*parts, strict=True))
    home = ("~/", os.environ["HOME"] + "/") if in_home else ("", "")
    assert expand(home[0] + typed, "KEY") == home[1] + meant


def test_a_variable_may_itself_begin_in_the_home_folder(environment: Path) -> None:
    assert expand("$IN_HOME/x", "KEY") == f"{environment}/in/x"


@given(st.sampled_from(["s3", "http", "gs", "file", "simplecache::s3"]), st.text(max_size=20))
def test_a_url_stays_as_it_is(scheme: str, rest: str) -> None:
    assert expand(f"{scheme}://{rest}", "KEY") == f"{scheme}://{rest}"


@pytest.mark.parametrize("path", ["$UNSET", "a/${UNSET}/b", "~/$UNSET.x", "$SCRATCH/${UNSET}", "${UNSET:-/tmp}"])
def test_a_variable_that_is_not_set_is_an_error_that_names_it_and_the_key(path: str) -> None:
    with pytest.raises(UsageError, match=r"KEY is .*UNSET.*, but the environment variable UNSET.* is not set"):
        expand(path, "KEY")


def test_the_home_of_an_unknown_user_is_an_error() -> None:
    with pytest.raises(UsageError, match="KEY is ~nobody-of-that-name/x, but there is no user nobody-of-that-name"):
        expand("~nobody-of-that-name/x", "KEY")
    assert expand("./~nobody-of-that-name/x", "KEY") == "./~nobody-of-that-name/x"


@pytest.mark.parametrize("name", ["price$UNSET.jpg", "price$SCRATCH.jpg", "${UNSET}", "~backup.jpg"])
def test_a_file_that_exists_as_it_is_written_is_that_file(name: str) -> None:
    Path(name).touch()
    assert expand(name, "KEY") == name


def test_a_folder_named_as_the_home_folder_is_written_is_not_taken_for_it(environment: Path) -> None:
    Path("~/runs").mkdir(parents=True)
    assert expand("~/runs", "KEY") == f"{environment}/runs"


# ------------------------------------------------------------------------------------------------- in a configuration

PATHS = {"run.dir", "data.train", "data.val", "checkpoint.mirror"}


def resolved(**values: str) -> Config:
    required = {"data.train": "x", **values}
    return read_config(str(TINY), [*LENGTH, *(f"{name}={value}" for name, value in required.items())])


@pytest.mark.parametrize("typed", ["~/x", "$HOME/x", "${HOME}/x"])
@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_typed_path_and_the_whole_one_are_the_same_configuration(
    name: str, typed: str, environment: Path, tmp_path: Path
) -> None:
    one, other = resolved(**{name: typed}), resolved(**{name: f"{environment}/x"})
    assert to_yaml(one) == to_yaml(other) and f"{environment}/x" in to_yaml(one)
    preset, older = tmp_path / "preset.yaml", tmp_path / "config.yaml"
    section, _, leaf = name.partition(".")
    tree = yaml.safe_load(to_yaml(other))
    tree[section][leaf] = typed
    for path in (preset, older):  # older: of a run that was started when its paths were written as they were typed
        path.write_text(yaml.safe_dump(tree))
    assert changes(read_config(str(preset), []), other) == changes(read_resolved(older), other) == {}


def test_what_each_node_or_a_shell_expands_is_written_as_it_was_typed() -> None:
    typed = {"data.cache.dir": "$TMPDIR/~", "slurm.setup": "[export A=$B/~]", "data.train": "s3://a/$b?x=~"}
    config = resolved(**typed)
    assert (config.data.cache.dir, config.slurm.setup) == ("$TMPDIR/~", ("export A=$B/~",))
    assert config.data.train == typed["data.train"]


def test_a_variable_that_is_not_set_is_named_with_its_key_and_where_it_stands(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"base: {TINY}\ncheckpoint: {{mirror: $UNSET/mirror}}")
    with pytest.raises(UsageError) as error:
        read_config(str(preset), ["run.dir=$UNSET/x", "data.train=x"])
    of_run, of_mirror = str(error.value).splitlines()
    assert of_run.startswith("run.dir=$UNSET/x: run.dir is") and "UNSET is not set" in of_run
    assert of_mirror.startswith(f"{preset}: checkpoint.mirror is") and "UNSET is not set" in of_mirror


def test_a_base_may_lie_in_the_home_folder(environment: Path, tmp_path: Path) -> None:
    (environment / "base.yaml").write_text(TINY.read_text().replace("run: {", "run: {seed: 5, "))
    (tmp_path / "top.yaml").write_text("base: ~/base.yaml")
    assert read_config(str(tmp_path / "top.yaml"), ["data.train=x"]).run.seed == 5


def test_a_caches_variable_that_is_not_set_is_an_error_where_the_cache_is_used() -> None:
    manifest = Manifest("http://127.0.0.1:9/", ("a",), Shards.of([Shard("a.tar", 1, 1)]))
    with pytest.raises(UsageError, match=r"data\.cache\.dir is \$UNSET/x, but the environment variable UNSET"):
        with_cache(manifest, DEFAULT, "$UNSET/x", None)


# ------------------------------------------------------------------------------------------------ on the command line

NO_PATHS = {
    "overrides", "part", "then", "weights", "layout", "crop", "label_field", "cluster", "name", "arguments", "gpu",
}  # fmt: skip
"""Parameters of text that are no paths; overrides and `then` are read as configurations."""


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        yield from commands(command, (*words, name)) if inner else [((*words, name), command)]


def typed_paths() -> Iterator[tuple[str, list[str], str]]:
    """Of every parameter that is a path: a name, a command line with an unset variable for it, what errors call it."""
    for words, command in commands(typer.main.get_command(app)):
        hints = get_type_hints(command.callback)
        for path in command.params:
            if path.name not in NO_PATHS and any(kind in str(hints[path.name]) for kind in ("str", "Path")):
                line = list(words)
                for each in (each for each in command.params if each is path or each.required):
                    value = "$UNSET/x" if each is path else "1"
                    line.append(f"{each.opts[0]}={value}" if each.opts[0].startswith("-") else value)
                shown = path.opts[0] if path.opts[0].startswith("-") else path.metavar.strip("[.]")
                yield f"{' '.join(words)} {shown}", line, shown


@pytest.mark.parametrize(("line", "shown"), [pytest.param(*rest, id=name) for name, *rest in typed_paths()])
def test_every_path_of_every_command_is_expanded(line: list[str], shown: str) -> None:
    error = CliRunner().invoke(app, line).exception
    assert isinstance(error, UsageError)
    assert str(error) == f"{shown} is $UNSET/x, but the environment variable UNSET is not set"

"""Which way the code depends, what is never imported for a quick answer, and that no generator has state."""

import ast
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("data", "models", "pipeline", "slurm")
OTHERS_OF = {
    "data": {"models", "pipeline", "slurm"},
    "models": {"data", "pipeline", "slurm"},
    "pipeline": {"slurm"},
    "slurm": {"data", "models"},
}
"""The folders of ours that a folder's modules may not import."""
NEEDED_BY_MODELS = {"torch", *sys.stdlib_module_names}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module of a file, wherever the statement stands, with the dots before it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_folder_has_modules_to_look_at():
    assert {folder: bool(modules(folder)) for folder in FOLDERS} == dict.fromkeys(FOLDERS, True)
    assert len(modules("data")) > 8 and len(modules("models")) > 5 and len(modules("pipeline")) > 15


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_none_that_it_may_not_know(folder):
    found = {(path.name, name) for path in modules(folder) for name, dots in imports(path) if not dots}
    assert {(file, name) for file, name in found if top(name) in OTHERS_OF[folder]} == set()


# ------------------------------------------------------------------------------------------------------------- rooms

ROOMS = {
    "data/storage": set(),
    "data/shards": {"data/storage"},
    "data/packing": {"data/shards", "data/storage"},
    "pipeline/config": set(),
    "pipeline/distributed": set(),
    "pipeline/run": {"pipeline/distributed"},
    "pipeline/watchdog": {"pipeline/distributed", "pipeline/run"},
    "pipeline/training": {"pipeline/config", "pipeline/distributed", "pipeline/run"},
    "pipeline/checkpoint": {"pipeline/config", "pipeline/distributed", "pipeline/run", "pipeline/training"},
    "pipeline/doctor": {"pipeline/config", "pipeline/distributed", "pipeline/run", "pipeline/training"},
}
ROOMS["pipeline/memory"] = ROOMS["pipeline/checkpoint"] | {"pipeline/checkpoint"}
ROOMS["pipeline/costs"] = ROOMS["pipeline/memory"] | {"pipeline/memory"}
ROOMS["pipeline/monitoring"] = ROOMS["pipeline/costs"] | {"pipeline/costs"}
ROOMS["pipeline/report"] = ROOMS["pipeline/monitoring"] | {"pipeline/monitoring"}
ROOMS["pipeline/commands"] = ROOMS["pipeline/report"] | {
    "pipeline/report",
    "pipeline/watchdog",
    "pipeline/doctor",
}
"""The rooms of its own package that a room may know, beside the files outside of any."""


def graph() -> dict[str, set[str]]:
    """For each module of ours those that it imports, wherever the statement stands."""
    paths = {name_of(path): path for folder in FOLDERS for path in modules(folder)}
    return {name: {each for each in imported(path) if each in paths} - {name} for name, path in paths.items()}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """The full names of what a file imports, and of what a module that it imports may have by that name."""
    package = name_of(path).split(".") if path.stem == "__init__" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """The names from which a way leads back to them."""
    reached = {name: set(others) for name, others in arrows.items()}
    for _ in arrows:
        reached = {name: others.union(*(reached[each] for each in others)) for name, others in reached.items()}
    return {name for name, others in reached.items() if name in others}


def test_no_imports_run_in_a_circle() -> None:
    assert circles(graph()) == set()


def test_a_circle_would_be_noticed() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"b", "c"}


def room(name: str) -> str:
    """The folder of a module, where it has one within its package."""
    path = ROOT / name.replace(".", "/")
    folder = path if path.is_dir() else path.parent
    return str(folder.relative_to(ROOT))


def test_every_room_knows_only_the_rooms_below_it() -> None:
    found = {
        (room(name), room(other)) for name, others in graph().items() for other in others if top(name) == top(other)
    }
    assert {(one, other) for one, other in found if one in ROOMS and other in ROOMS and one != other} <= {
        (one, other) for one, others in ROOMS.items() for other in others
    }
    assert {one for one, _ in found if "/" in one} <= set(ROOMS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_module_imports_tests_benchmarks_or_demo(folder):
    found = {(path.name, name) for path in modules(folder) for name, _ in imports(path)}
    assert {(file, name) for file, name in found if top(name) in ("tests", "benchmarks", "demo", "conftest")} == set()


def test_models_need_torch_alone_and_refer_to_each_other_relatively():
    for path in modules("models"):
        for name, dots in imports(path):
            assert dots == 1 or (dots == 0 and top(name) in NEEDED_BY_MODELS), f"{path.name} imports {'.' * dots}{name}"


def test_models_copied_out_work_alone_and_are_imported_fast(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "vendor" / "coatnet", ignore=shutil.ignore_patterns("__pycache__"))
    program = """
        import sys
        import time
        import torch
        before = time.process_time()
        from vendor.coatnet import coatnet
        seconds = time.process_time() - before
        print(coatnet("coatnet_0", classes=3, resolution=64)(torch.zeros(2, 3, 64, 64)).shape)
        print(sorted({"data", "models", "pipeline", "slurm"} & set(sys.modules)), seconds < 1)
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("torch.Size([2, 3])\n[] True\n", 0), done.stderr


def test_outside_of_models_modules_refer_to_each_other_by_their_full_names():
    for folder in ("data", "pipeline", "slurm"):
        assert [path.name for path in modules(folder) if any(dots for _, dots in imports(path))] == []


# ----------------------------------------------------------------------------------------- heavy imports, quick answers

HEAVY = {"torch", "deepspeed", "nvidia", "webdataset", "matplotlib", "safetensors.torch"}


def imported_by(program: str, *arguments: str) -> set[str]:
    """The heavy modules that a program of ours has imported at its end."""
    at_end = """
        import atexit, sys
        atexit.register(lambda: print(*sys.modules, file=open(sys.argv.pop(), "w")))
    """
    report = arguments[-1]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(at_end) + textwrap.dedent(program), *arguments], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return HEAVY & set(Path(report).read_text().split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["pretrain", "--help"], ["report", "--help"], ["data", "pack", "--help"], ["keys"]]
)
def test_help_imports_nothing_heavy(tmp_path, arguments):
    program = """
        import sys
        report = sys.argv[-1]
        sys.argv = ["coatnet", *sys.argv[1:-1]]
        from pipeline.cli import app
        try:
            app()
        finally:
            sys.argv.append(report)
    """
    assert imported_by(program, *arguments, str(tmp_path / "modules")) == set()


def test_a_heavy_import_would_be_noticed(tmp_path):
    assert imported_by("import webdataset", str(tmp_path / "modules")) >= {"webdataset"}


@pytest.mark.parametrize(
    "module",
    ["pipeline.plan", "pipeline.checkpoint.reader", "pipeline.config.parsing", "pipeline.distributed.launcher"],
)
def test_what_answers_a_wrong_request_imports_no_torch(tmp_path, module):
    assert "torch" not in imported_by(f"import {module}", str(tmp_path / "modules"))


# ----------------------------------------------------------------------------------------------- no generator has state

RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
    "normal", "manual_seed", "seed", "initial_seed", "Generator", "default_generator", "get_rng_state", "set_rng_state",
    "dropout", "Dropout", "alpha_dropout", "rrelu",
}  # fmt: skip
"""Names in torch and torch.nn that draw, or belong to a generator."""
IN_PLACE = {
    "normal_", "uniform_", "bernoulli_", "random_", "exponential_", "cauchy_", "log_normal_", "geometric_",
    "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "orthogonal_",
}  # fmt: skip
MODULES = {"random", "secrets", "numpy.random", "torch.random", "uuid"}
ALLOWED = {("models/init.py", "torch.randn")}
"""A network that somebody borrows without saying how to draw; training passes draws by (seed, parameter's name)."""


def draws_of(path: Path) -> Iterator[str]:
    """Whatever in a file draws random numbers from a generator that has a state."""
    for name, _ in imports(path):
        if name in MODULES:
            yield name
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if node.attr in IN_PLACE or (owner in ("np", "numpy") and node.attr == "random"):
                yield f"{owner}.{node.attr}"
            if owner in ("torch", "F", "nn", "torch.cuda", "fn", "fn.random") and (
                node.attr in RANDOM or "random" in owner
            ):
                yield f"{owner}.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and top(node.module or "") in ("torch", "numpy"):
            yield from (alias.name for alias in node.names if alias.name in RANDOM | {"random"})


def test_nothing_draws_from_a_generator_that_has_a_state():
    """Resuming, ranks and recomputation see the same numbers because there is no state that could differ."""
    found = {
        (str(path.relative_to(ROOT)), drawn)
        for folder in ("data", "models", "pipeline")
        for path in modules(folder)
        for drawn in draws_of(path)
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "line",
    [
        "import random", "from random import shuffle", "import numpy.random", "np.random.default_rng(0)",
        "numpy.random.rand()", "from numpy import random", "torch.randn(3)", "torch.manual_seed(0)",
        "torch.Generator()", "x.uniform_(0, 1)", "nn.init.trunc_normal_(w)", "F.dropout(x)", "nn.Dropout(0.1)",
        "fn.random.uniform(range=r)", "from torch import randperm", "torch.cuda.manual_seed(1)",
    ],
)  # fmt: skip
def test_drawing_would_be_noticed(tmp_path, line):
    (tmp_path / "module.py").write_text(f"def f():\n    {line}\n")
    assert list(draws_of(tmp_path / "module.py"))

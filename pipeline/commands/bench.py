"""`coatnet bench`: lists the programs of benchmarks/, or runs one by name as `python -m` would."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from pipeline.errors import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def benchmarks() -> dict[str, str]:
    """The name of every benchmark, and the first line of its docstring."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.py"))}
    first_lines = {name: (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0] for name, text in texts.items()}
    return {name: line for name, line in first_lines.items() if '\nif __name__ == "__main__":\n' in texts[name]}


def bench(name: str | None, arguments: list[str]) -> None:
    """Runs a benchmark in this process with these arguments; without a name, lists all."""
    if name is None:
        for each, line in benchmarks().items():
            print(f"{each:10} {line}")
        return
    if name not in benchmarks():
        raise UsageError(f"benchmark {name!r} does not exist; choose from {', '.join(benchmarks())}")
    sys.argv[1:] = arguments
    sys.path.insert(0, str(FOLDER.parent))  # some use tests/, which is not installed
    # As __main__, since the processes that a benchmark starts look there for its functions.
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)

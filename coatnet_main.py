"""The entry of `coatnet` and of every process that it starts: our packages are found, whatever folder one stands in.

Names such as models and data are other projects' too, and come from the current folder or PYTHONPATH where they are
first on Python's path. This file's name is nobody else's, and once it is imported ours are looked up beside it.

    python -P coatnet_main.py MODULE [ARGUMENT]...    # as python -m MODULE; -P: without the current folder on the path
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

PACKAGES = ("benchmarks", "data", "models", "pipeline", "slurm", "tests")
ROOT = str(Path(__file__).resolve().parent)


class OwnPackages:
    """A finder: with ROOT first on sys.path, where it is site-packages, it could hide modules of Python's own."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


sys.meta_path.insert(0, OwnPackages)


def main() -> None:
    """The console script."""
    from pipeline.distributed.signals import install_handlers

    install_handlers()  # first of all: until then a signal ends this process without a word
    from slurm.cli import main

    main()


if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0].endswith(".cli"):
        from pipeline.distributed.signals import install_handlers

        install_handlers()
    import runpy

    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

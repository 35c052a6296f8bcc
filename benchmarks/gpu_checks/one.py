"""One check in this process: `MODULE.FUNCTION DEVICE FOLDER [ARGUMENT]...`; its rows go to FOLDER/rows.jsonl."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_checks import NotHere, Place, not_installed

ROWS, ABSENT = "rows.jsonl", "not here"


def main() -> None:
    function, device, folder, *more = sys.argv[1:]
    module, _, name = function.rpartition(".")
    with (Path(folder) / ROWS).open("w", buffering=1) as rows:
        try:
            check = getattr(importlib.import_module(module), name)
            for row in check(Place(device, Path(folder)), *more):
                rows.write(json.dumps(row) + "\n")
        except NotHere as error:
            rows.write(json.dumps({ABSENT: str(error)}) + "\n")
        except ModuleNotFoundError as error:
            if (absent := not_installed(error)) is None:
                raise
            rows.write(json.dumps({ABSENT: absent}) + "\n")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # what threads of DALI and NCCL do at an interpreter's end is no figure

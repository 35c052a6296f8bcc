"""The main job on real images, end to end, in a few minutes on two cores: `make demo`.

Every step is a command that a person could type; it is echoed before it runs. All output goes to demo/out.

    unpack, pack -> pretrain on two ranks, never interrupted -> the same, killed with SIGKILL, resumed on one rank
    -> count the samples, compare the losses -> fine-tune at a higher resolution -> evaluate -> report
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo/out")
DATA = f"data.train={OUT}/train data.val={OUT}/val"
WHOLE, KILLED, FINE = OUT / "uninterrupted", OUT / "interrupted", OUT / "finetuned"
KILL_AT_STEP = 170


def start(command: str, **how: Any) -> subprocess.Popen[str]:
    """Echoes a command and starts it."""
    print(f"\n$ {command}", flush=True)
    words = shlex.split(command)
    program = {"coatnet": [sys.executable, "-m", "pipeline.cli"], "python": [sys.executable]}.get(words[0], [words[0]])
    return subprocess.Popen([*program, *words[1:]], text=True, **how)


def run(command: str) -> list[str]:
    """Runs a command to its end and returns the lines it printed; the demo ends with it if it fails."""
    process, lines = start(command, stdout=subprocess.PIPE), []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    if status := process.wait():
        sys.exit(f"the demo ends here: status {status}")
    return lines


def steps_done(run_folder: Path) -> int:
    """The last logged step of a run that may be writing at this moment."""
    metrics = run_folder / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    return max((json.loads(row)["step"] for row in rows if row.endswith("\n")), default=0)


def run_and_kill(command: str, run_folder: Path, step: int) -> None:
    """Runs a training command and kills it with SIGKILL once it has done a step; its ranks die with it."""
    process = start(command)
    while steps_done(run_folder) < step:
        if process.poll() is not None:
            sys.exit("the demo ends here: the run ended before it could be killed")
        time.sleep(0.05)
    print(f"\n$ kill -9 {process.pid}", flush=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    began = time.monotonic()
    os.chdir(ROOT)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()

    run(f"tar -xzf demo/digits.tar.gz -C {OUT}")
    run(f"coatnet data pack {OUT}/digits/train {OUT}/train")
    run(f"coatnet data pack {OUT}/digits/val {OUT}/val")

    pretrain = f"coatnet pretrain configs/tiny.yaml {DATA}"
    run(f"{pretrain} --procs 2 run.dir={WHOLE}")
    run_and_kill(f"{pretrain} --procs 2 run.dir={KILLED}", KILLED, KILL_AT_STEP)
    run(f"{pretrain} --procs 1 run.dir={KILLED}")

    counted = run(f"python demo/audit.py {KILLED} {OUT}/train")
    compared = run(f"python demo/curves.py {WHOLE} {KILLED} {OUT}/curves.png")

    run(f"coatnet finetune configs/tiny_finetune.yaml --from {KILLED} --procs 2 {DATA} run.dir={FINE}")
    pretrained = run(f"coatnet evaluate {KILLED} --data {OUT}/val")
    finetuned = run(f"coatnet evaluate {FINE} --data {OUT}/val --procs 2")
    neighbour = run(f"python demo/neighbour.py {OUT}/digits/train {OUT}/digits/val")

    reported = run(f"coatnet report {KILLED} --data {OUT}/val")

    print(f"\nDone in {time.monotonic() - began:.0f} seconds:")
    for line in [*pretrained, *finetuned, *neighbour, *counted, *compared, *reported]:
        print(f"  {line}")
    print(f"  packed images: {OUT}/train, {OUT}/val; runs (config, metrics, events, samples, checkpoints):")
    print(f"  {WHOLE}, {KILLED}, {FINE}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("the demo ends here: stopped by Ctrl-C; `make demo` begins again")

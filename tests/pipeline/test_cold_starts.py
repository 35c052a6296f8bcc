"""Each command once as a person starts it: the console script, or `python -m`, in a new interpreter.

The other tests start commands as forks of a process that has imported everything (tests/forked.py), which would hide an
import that a command lacks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.checkpoint.reader import checkpoints
from tests.pipeline.runs import PATIENCE_SECONDS, ROOT, last_step

SCRIPT = Path(sys.executable).parent / "coatnet"
TORTURE = pytest.mark.torture
RUN = """{script} pretrain configs/tiny.yaml --procs 2 run.dir={run} train.steps=1 checkpoint.mirror={top}/mirror"""


def cold(line: str, places: dict[str, object]) -> subprocess.CompletedProcess[str]:
    words = [word.format(script=SCRIPT, python=sys.executable, **places) for word in line.split()]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


@pytest.fixture(scope="module")
def places(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The digits, and a run of two ranks that the console script did."""
    top = tmp_path_factory.mktemp("cold")
    found: dict[str, object] = {"digits": digits, "top": top, "run": top / "run", "image": "{image}"}
    done = cold(f"{RUN} data.train={{digits}}/train data.val={{digits}}/val", found)
    assert done.returncode == 0, done.stderr
    assert last_step(top / "run") == 1 and checkpoints(top / "run" / "checkpoints")
    found["image"] = next((digits / "digits" / "val" / "7").iterdir())
    return found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{script} --help", "preview"),
        ("{python} -m pipeline.cli --version", "coatnet 0."),
        ("{script} keys", "optim.learning_rate"),
        pytest.param("{script} models", "coatnet_7", marks=TORTURE),
        pytest.param("{script} bench fault_injection --help", "--faults", marks=TORTURE),
        ("{script} pretrain configs/tiny.yaml --check", "valid:"),
        ("{python} -m pipeline.cli evaluate {run} --data {digits}/val --json", '"top1"'),
        pytest.param("{script} predict {run} {image}", "%", marks=TORTURE),
        pytest.param("{script} preview configs/tiny.yaml {top}/sheet.png data.train={digits}/train", "sheet.png",
                     marks=TORTURE),
        ("{script} export {run} {top}/exported.safetensors", "exported.safetensors"),
        pytest.param("{script} finetune configs/tiny_finetune.yaml --from {run} run.dir={top}/tuned"
                     " data.train={digits}/train data.val=null train.steps=1", "done: 1 steps", marks=TORTURE),
        ("{script} data pack {digits}/digits/val {top}/packed", "360 samples"),
        ("{script} data index {digits}/val --out {top}/indexed", "360 samples"),
        pytest.param("{script} data verify {digits}/val", "360 samples", marks=TORTURE),
        ("{script} status {run}", "done"),
        ("{script} logs {run}", "done: 1 steps"),
        ("{script} submit pretrain configs/tiny.yaml --dry-run run.dir={top}/job data.train={digits}/train"
         " data.val=null", "slurm.job"),
    ],
)  # fmt: skip
def test_a_command_starts_in_an_interpreter_of_its_own(places: dict[str, object], line: str, says: str) -> None:
    done = cold(line, places)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout + done.stderr


def test_commands_without_a_job_or_a_folder_are_refused_without_a_traceback(
    places: dict[str, object],
) -> None:
    for line in ("{script} cancel {run}", "{script} import {run} {top}/imported.safetensors", "{script} nonsense"):
        done = cold(line, places)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr


NOT_FOR_TRAINING = {
    "boto3", "google.cloud.storage", "onnx", "setuptools", "sympy", "torch._dynamo", "torch._inductor", "torch.onnx",
    "torch.fx.experimental.symbolic_shapes", "torchvision", "triton", "wandb",
}  # fmt: skip
"""Seconds of CPU in every rank: compilers, and what is there for somebody else."""


def test_a_training_imports_no_compiler_and_no_client_that_it_does_not_use(
    places: dict[str, object], tmp_path: Path
) -> None:
    """A whole one, of a rank of another launcher's, with evaluation and checkpoint."""
    program = "import atexit, sys; report = sys.argv.pop(1); atexit.register(lambda: open(report, 'w').write("
    program += "' '.join(sys.modules))); from pipeline.cli import main; main()"
    data = [f"data.train={places['digits']}/train", f"data.val={places['digits']}/val"]
    words = ["pretrain", "configs/tiny.yaml", *data, f"run.dir={tmp_path}/run", "train.steps=2"]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "modules"), *words], cwd=ROOT, env={**os.environ, **rank},
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    imported = set((tmp_path / "modules").read_text().split())
    assert {"torch", "deepspeed", "nvidia.dali.fn", "tensorboardX.record_writer"} <= imported
    assert imported & NOT_FOR_TRAINING == set()

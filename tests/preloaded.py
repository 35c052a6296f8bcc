"""Imports for the tests' fork server (forked.py), which does nothing else: a fork of it is as good as a new process."""

import gc
import os
from importlib import import_module

from pipeline.commands.pretrain import import_training
from pipeline.distributed.preload import preload

_before = dict(os.environ)
assert preload(import_training), "the fork server has threads, a process group, or CUDA's driver"
COMMANDS = [
    "pipeline.commands.export",
    "pipeline.commands.finetune",
    "pipeline.memory.oom",
    "pipeline.commands.predict",
    "pipeline.commands.preview",
    "pipeline.report.page",
]
COMMANDS += ["pipeline.commands.pretrain", "pipeline.commands.evaluate", "slurm.cli", "data.packing.pack"]
STAGE_3 = ["deepspeed.runtime.zero.stage3", "torch._dynamo", "torch.onnx"]
TESTS = ["tests.pipeline.batch_runs", "tests.pipeline.peaks", "tests.pipeline.hang_injection"]
TESTS += ["tests.pipeline.test_checkpoint", "tests.data.test_schedules", "tests.models.test_norm_across_ranks"]
for module in COMMANDS + STAGE_3 + TESTS:
    import_module(module)
set_by_imports = {name: value for name, value in os.environ.items() if _before.get(name) != value}
gc.freeze()  # a collection would write into every page, and copy it

"""Training by the real loop and engine: waits, kill and resume, checkpoints, guards, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_checks import ROOT, NotHere, Place, Row, attempt
from benchmarks.gpu_checks.images import decoder, digits, photos
from benchmarks.gpu_checks.networks import kernels_of
from benchmarks.gpu_checks.rank import be_the_only_rank

TINY, COATNET_0 = str(ROOT / "configs" / "tiny.yaml"), str(ROOT / "configs" / "imagenet1k" / "coatnet0_1gpu.yaml")
PROFILED, WARNED, REFUSED, AFTER = 4, 5, 6, 7
"""Steps of the check of waits, from 0."""


def tiny(place: Place, url: str, run: Path, *more: str) -> list[str]:
    """The arguments of a training of configs/tiny.yaml; a CPU is ten times slower in bf16."""
    how = ["precision=fp32", "global_batch=16", "micro_batch=8"] if place.small else ["precision=bf16"]
    data = [f"data.train={url}", "data.val=null", f"run.dir={run}", "log.every=1"]
    return [TINY, *data, *(f"train.{each}" for each in how), *more]


# ------------------------------------------------------------------------------------------------------------- waits


def waits_of_a_step(place: Place) -> Iterator[Row]:
    """A step of the real loop: its kernels, its waits for the device, its memory beside the model's."""
    decoded_by = be_the_only_rank()
    from pipeline.config.parsing import read_config
    from pipeline.memory.activations import estimates
    from pipeline.plan import make_plan
    from pipeline.train import train

    url = photos(place.folder, 64 if place.small else 512, 500, 375)
    settings = [f"data.train={url}", "data.val=null", f"run.dir={place.folder / 'run'}", "log.every=1"]
    settings += ["train.epochs=null", f"train.steps={AFTER + 1}", "optim.warmup_steps=4"]
    settings += ["model.classes=null", "data.train_samples=null"]
    batch, preset = (8, TINY) if place.small else (64, COATNET_0)
    config = read_config(preset, [*settings, f"train.global_batch={2 * batch}", f"train.micro_batch={batch}"])
    watch = Watch(place.device)
    if not place.small:
        torch.cuda.reset_peak_memory_stats()
    problem = attempt({}, lambda: train(config, make_plan(config, "pretrain", 1, 1), [], forward=watch) or {})
    yield {"images by": decoded_by, "seconds of a step": watch.seconds, "kernels": watch.kernels}
    if place.small:
        if problem:
            yield problem
        yield {"said": f"{watch.seconds:.3f} s a step; only a GPU can show what waits for it"}
        return
    torch.cuda.set_sync_debug_mode("default")
    yield from ({"call of the runtime": name, "times in a step": count} for name, count in watch.calls.items())
    yield from ({"waits at": where, "times in a step": count} for where, count in watch.waits.most_common())
    predicted = estimates(config, 2, "cuda")((config.train, config.zero, 1))[0].total
    yield {"peak MiB": torch.cuda.max_memory_allocated() / 2**20, "model's MiB": predicted / 2**20}
    passed = "error" not in problem
    yield {"outside of DeepSpeed's step, waits": "raised no error" if passed else "raised an error", **problem}
    ours = sum(count for where, count in watch.waits.items() if "/deepspeed/" not in where)
    yield {
        "said": f"{watch.waits.total()} waits in a step, {ours} of them not DeepSpeed's; {watch.seconds:.3f} s a step"
    }


class Watch:
    """The loop's forward pass, which profiles one step, counts the waits of the next, and refuses those of a third."""

    def __init__(self, device: str) -> None:
        self._device, self._step, self._began = device, -1, 0.0
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        self._profile = profile(activities=kinds)
        self._warnings: Any = None
        self._caught: list[warnings.WarningMessage] = []
        self.seconds, self.kernels = 0.0, list[Row]()
        self.calls, self.waits = dict[str, int](), Counter[str]()

    def __call__(self, engine: Any, batch: Any, config: Any, *more: Any) -> torch.Tensor:
        from pipeline.train import micro_batch_loss

        step = int(batch.positions[0]) // config.train.global_batch
        if step != self._step:
            self._step = step
            self._begin(step, engine)
        return micro_batch_loss(engine, batch, config, *more)

    def _begin(self, step: int, engine: Any) -> None:
        now = time.perf_counter()
        if step == PROFILED - 1:
            self._began = now
        if step == PROFILED:
            self.seconds = now - self._began
            self._profile.start()
        if step == WARNED:
            self._profile.stop()
            self.kernels = kernels_of(self._profile, self._device)
            names = [each for each in self._profile.key_averages() if "ynchronize" in each.key or "Memcpy" in each.key]
            self.calls = {each.key: each.count for each in names}
        if self._device == "cpu":
            return
        if step == WARNED:
            self._warnings = warnings.catch_warnings(record=True)
            self._caught = self._warnings.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if step == REFUSED:
            self._warnings.__exit__(None, None, None)
            found = [each for each in self._caught if "synchronizing" in str(each.message)]
            self.waits = Counter(f"{each.filename}:{each.lineno}" for each in found)
            engine.optimizer.step = _with_waits(engine.optimizer.step)
            torch.cuda.set_sync_debug_mode("error")
        if step == AFTER:
            torch.cuda.set_sync_debug_mode("default")


def _with_waits(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, in which waits for the device are no error."""

    def call(*given: Any, **named: Any) -> Any:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*given, **named)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return call


# ---------------------------------------------------------------------------------------- kills, checkpoints, guards


def in_a_rank(job: dict[str, Any], share: float = 1.0) -> subprocess.CompletedProcess[str]:
    """A training in a process of its own, which may take this share of the GPU's memory."""
    command = [sys.executable, "-P", str(ROOT / "coatnet_main.py"), "benchmarks.gpu_checks.rank"]
    return subprocess.run([*command, json.dumps(job), str(share)], capture_output=True, text=True)


def kill_and_resume(place: Place, deterministic: str = "false") -> Iterator[Row]:
    """Losses of a run that is killed before its 25th step and resumes, beside those of one that is not."""
    decoded_by, url = decoder(), digits(place.folder)
    import numpy as np

    from tests.pipeline.runs import curve, events

    whole, killed = place.folder / "whole", place.folder / "killed"
    settings = ["train.steps=30", "checkpoint.every=10", f"train.deterministic={deterministic}"]
    jobs = {"whole": (whole, 0), "killed": (killed, 25), "resumed": (killed, 0)}
    for name, (run, kill) in jobs.items():
        began = time.perf_counter()
        job = {"arguments": tiny(place, url, run, *settings), **({"faults": {"kill": kill}} if kill else {})}
        done = in_a_rank(job)
        row = {"run": name, "seconds": time.perf_counter() - began, "status": done.returncode}
        if done.returncode not in ((-9,) if kill else (0,)):
            row["error"] = (done.stderr.strip().splitlines() or ["no error message"])[-1]
        yield row
        if "error" in row:
            return
    losses = [np.array([each[3] for each in curve(run)], float) for run in (whole, killed)]
    off = float(np.abs(losses[1] / losses[0] - 1).max())
    step = events(killed, "training_resumed")[-1]["step"]
    if off > (0.0 if deterministic == "true" else 0.05):  # else cuDNN's backward adds up in no fixed order
        yield {"error": f"losses differ by {off:.2f} of their size"}
    said = f"resumed from step {step}; losses of all {len(losses[0])} steps within {off:.1e} of the undisturbed run's"
    yield {"said": f"{said}; images by {decoded_by}"}


def checkpoint_beside_live_state(place: Place) -> Iterator[Row]:
    """What checkpoints hold, beside the live state, which was copied, waiting for the device, before."""
    decoded_by = be_the_only_rank()
    from pipeline.checkpoint.reader import CheckpointReader, step_name
    from pipeline.checkpoint.writer import CheckpointWriter
    from pipeline.training.zero import owned_slices
    from tests.pipeline.batch_runs import do

    live: dict[int, dict[tuple[str, str], torch.Tensor]] = {}
    save = CheckpointWriter.save

    def copied(writer: CheckpointWriter, engine: Any, average: Any, state: Any) -> None:
        if not place.small:
            torch.cuda.synchronize()
        parts = owned_slices(engine, average is not None)
        live[state["step"]] = {(p.name, kind): value.clone().cpu() for p in parts for kind, value in p.values.items()}
        save(writer, engine, average, state)

    run = place.folder / "run"
    settings = ["train.steps=20", "checkpoint.every=5", "checkpoint.keep_last=4"]
    with mock.patch.object(CheckpointWriter, "save", copied):
        do({"arguments": tiny(place, digits(place.folder), run, *settings)})
    differing = 0
    for step, tensors in live.items():
        reader = CheckpointReader(run / "checkpoints" / step_name(step))
        reader.verify_all()
        other = [
            f"{name} {kind}" for (name, kind), value in tensors.items()
            if not torch.equal(torch.from_numpy(reader.tensor(name, kind)).flatten(), value)
        ]  # fmt: skip
        differing += len(other)
        row: Row = {"checkpoint of step": step, "tensors": len(tensors), "that differ": len(other)}
        yield row | ({"error": f"{other[0]} differs"} if other else {})
    yield {"said": f"{differing} tensors differ from the live state in {len(live)} checkpoints; images by {decoded_by}"}


def guards(place: Place) -> Iterator[Row]:
    """At each ZeRO stage: an infinite gradient is not applied, three high losses are rolled back and skipped."""
    decoded_by, url = be_the_only_rank(), digits(place.folder)
    from tests.pipeline.batch_runs import do
    from tests.pipeline.runs import events, rows

    right = 0
    for stage in (1, 2, 3):
        run = place.folder / f"stage-{stage}"
        settings = ["train.steps=28", "checkpoint.every=10", f"zero.stage={stage}"]
        faults = {"inf": [3], "spikes": [22, 23, 24]}

        def disturbed(settings: list[str] = settings, run: Path = run, faults: Any = faults) -> Row:
            do({"arguments": tiny(place, url, run, *settings), "faults": faults})
            return {
                "not applied": str([each["step"] for each in events(run, "step_skipped")]),
                "rolled back": str([(each["to"], each["first"], each["last"]) for each in events(run, "rollback")]),
                "last steps": str([each["step"] for each in rows(run / "metrics.jsonl")][-5:]),
            }  # fmt: skip

        row = attempt({"stage": stage}, disturbed)
        wanted = {
            "not applied": "[3, 22, 23, 24]",
            "rolled back": "[(20, 22, 24)]",
            "last steps": "[21, 25, 26, 27, 28]",
        }
        right += row == {"stage": stage, **wanted}
        yield row if row == {"stage": stage, **wanted} else {"error": "differs from the CPU", **row}
    yield {"said": f"{right} of 3 stages the same as on the CPU; images by {decoded_by}"}


# ------------------------------------------------------------------------------------------------------------ memory


def advice_when_memory_runs_out(place: Place) -> Iterator[Row]:
    """A run that may take 2 GiB of the GPU and needs more is told what fits; that runs."""
    decoded_by, url, run = decoder(), digits(place.folder), place.folder / "full"
    from tests.pipeline.runs import events

    share = (2 << 30) / torch.cuda.get_device_properties(0).total_memory
    settings = ["train.global_batch=2048", "train.steps=2"]
    failed = in_a_rank({"arguments": tiny(place, url, run, *settings, "train.micro_batch=2048")}, share)
    yield {"train.micro_batch": 2048, "status": failed.returncode, "it says": failed.stderr.strip().splitlines()[-4:]}
    found = {
        key: value for event in events(run, "out_of_memory") for way in event["fits"] for key, value in way.items()
    }
    if "train.micro_batch" not in found:
        raise RuntimeError("the run that filled the memory was not told a micro batch that would fit")
    fitting = f"train.micro_batch={found['train.micro_batch']}"
    done = in_a_rank({"arguments": tiny(place, url, place.folder / "fits", *settings, fitting)}, share)
    row = {"train.micro_batch": found["train.micro_batch"], "status": done.returncode}
    yield row | ({"error": f"{fitting} did not run"} if done.returncode else {})
    yield {"said": f"advised {fitting}; images by {decoded_by}"}


def large_network(place: Place, size: str) -> Iterator[Row]:
    """Steps of a network on the engine, at the largest micro batch that the memory model finds room for."""
    from data.memory import available_bytes
    from pipeline.config.schema import Config
    from pipeline.memory.activations import estimates
    from pipeline.memory.suggest import fits
    from pipeline.training.engine import build_engine, set_schedule, start_process_group
    from pipeline.training.losses import loss_fn
    from pipeline.training.model import build_model, initial_value

    be_the_only_rank()
    name, side = ("coatnet_0", 64) if place.small else (size, 224)
    usable = available_bytes() // 2 if place.small else torch.cuda.mem_get_info()[0]
    for micro_batch, recomputed in ((32, "none"), (8, "none"), (32, "all"), (8, "all"), (1, "all")):
        train = {
            "steps": 1,
            "global_batch": micro_batch,
            "micro_batch": micro_batch,
            "activation_checkpointing": recomputed,
        }
        precision = {"precision": "fp32" if place.small else "bf16"}
        sections = {"data": {"train": "none"}, "model": {"name": name, "resolution": side}, "train": train | precision}
        config = Config.model_validate(sections)
        predicted = estimates(config, 1000, place.device)((config.train, config.zero, 1))[0].total
        if fits(predicted, usable):
            break
    else:
        raise NotHere(f"{name} needs {predicted / 2**30:.1f} GiB by the memory model; {usable / 2**30:.1f} are free")
    device = start_process_group()
    on_device: Any = lambda _, shape: torch.randn(shape, device=device)  # noqa: E731
    model = build_model(config.model, config.train, 1000, device, lambda n, shape: initial_value(n, shape, on_device))
    engine = build_engine(model, config.train, config.optim, config.zero)
    set_schedule(engine, 1e-4, 0.999)
    images = torch.randn(micro_batch, 3, side, side, device=device)
    labels = torch.arange(micro_batch, device=device)[:, None]
    times, losses = [], []
    for _ in range(2 if place.small else 5):
        began = time.perf_counter()
        loss = loss_fn(engine(images), labels, config.train.loss, config.train.label_smoothing)
        engine.backward(loss)
        engine.step()
        losses.append(round(float(loss.detach()), 4))
        times.append(time.perf_counter() - began)
    peak = None if place.small else torch.cuda.max_memory_allocated() / 2**30
    seconds = min(times)
    yield {
        "network": name, "micro batch": micro_batch, "recomputed": recomputed, "seconds of a step": seconds,
        "images/s": micro_batch / seconds, "peak GiB": peak, "model's GiB": predicted / 2**30, "losses": str(losses),
    }  # fmt: skip
    stands_in = f", in place of {size} on a CPU" if place.small else ""
    yield {"said": f"{name}{stands_in}: {micro_batch / seconds:,.1f} images/s in micro batches of {micro_batch}"}

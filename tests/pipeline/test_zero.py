"""Laws of sharding: the stage and the number of ranks change where numbers lie, and not what is trained.

All of it is real: real ranks, the real training loop, the digits of the demo. Adam's epsilon is 1e-3, since a smaller
one makes steps of the size of the learning rate out of rounding noise; pooling averages, since a maximum jumps from one
place to another where rounding says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import LoaderSpec, training_batches
from models.coatnet import CoAtNet, stochastic_depth_rates
from models.init import decay_exempt
from models.norm import apply_statistics, pop_statistics
from pipeline.checkpoint.reader import CheckpointReader, step_name
from pipeline.checkpoint.weights import latest_checkpoint
from pipeline.config.parsing import read_config
from pipeline.plan import augmentation, make_plan
from pipeline.training.ema import ema_decay
from pipeline.training.losses import loss_fn
from pipeline.training.model import build_model, drop_path_mask, init_weights, normalize
from pipeline.training.optimizer import learning_rate
from tests import forked
from tests.pipeline.batch_runs import on_ranks
from tests.pipeline.runs import ROOT, command, last_state, rows

STAGES = (1, 2, 3)
WHERE = ("host", "device")
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def runs(digits: Path) -> Path:
    """A folder for runs, beside the data; another one each time that a worker comes back to this file."""
    return Path(tempfile.mkdtemp(prefix="runs-", dir=digits))


def job(folder: Path, name: str, *more: object) -> dict[str, Any]:
    """A training in fp32 into folder/name, of four micro batches a step."""
    data = [f"data.train={folder.parent}/train", f"run.dir={folder}/{name}", "run.seed=3"]
    batches = ["train.global_batch=48", "train.micro_batch=12", "train.precision=fp32", "optim.eps=1e-3"]
    rate = [
        "optim.learning_rate=1e-3",
        "optim.warmup_steps=4",
        "optim.decay=none",
        "model.pool=average",
        "train.activation_checkpointing=[2]",
    ]
    saving = ["checkpoint.every=4", "checkpoint.keep_last=100", "evaluate.every=null", "data.val=null"]
    size = ["model.resolution=16"]  # the laws are about layers and ranks, not about pixels
    return {"arguments": list(map(str, ["configs/tiny.yaml", *data, *batches, *rate, *saving, *size, *more]))}


def going_on(folder: Path, name: str, source: str, step: int, *more: object) -> dict[str, Any]:
    """The same from a copy of what a run had when it had saved a step."""
    return {**job(folder, name, *more), "source": str(folder / source), "step": step}


def resaved(folder: Path, name: str, source: str, step: int, *more: object) -> dict[str, Any]:
    """Loading such a copy, evaluating and saving it again into folder/name/again."""
    made = going_on(folder, name, source, step, f"data.val={folder.parent}/val", "train.steps=100", *more)
    return {**made, "resave": str(folder / name / "again")}


def steps_of(folder: Path, name: str, first: int = 1, last: int = 10**9) -> list[dict[str, Any]]:
    return [row for row in rows(folder / name / "metrics.jsonl") if first <= row["step"] <= last]


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest relative differences of two curves: of losses, of gradient norms."""
    assert [row["step"] for row in one] == [row["step"] for row in other] and one
    return tuple(  # pyrefly: ignore
        max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(one, other, strict=True))
        for key in ("loss", "grad_norm")
    )


# ------------------------------------------------------------------------------------ beside a plain loop of PyTorch


def plain_loop(arguments: list[str]) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The training as anybody would write it: one process, torch's AdamW, no engine. Its curve and its average."""
    config = read_config(arguments[0], arguments[1:])
    plan = make_plan(config, "pretrain", 1, 1)
    cpu, seed = torch.device("cpu"), config.run.seed
    model: CoAtNet = build_model(config.model, config.train, 10, cpu, init_weights(seed))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decay_exempt(n, p.shape) == exempt], "weight_decay": decay}
        for exempt, decay in ((False, config.optim.weight_decay), (True, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    average = {name: parameter.detach().clone() for name, parameter in named}
    share = LoaderSpec(0, 1, config.train.micro_batch, config.model.resolution, cpu, 1)
    rates, curve = stochastic_depth_rates(model, config.train.stochastic_depth), []
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16")
    with training_batches(plan.train, plan.order, augmentation(config.augment), share, seed, 0, plan.steps) as steps:
        for step, micro_batches in enumerate(steps):
            total = 0.0
            for batch in micro_batches:
                with autocast:
                    logits = model(normalize(batch.images), drop_path_mask(seed, batch.positions, rates, cpu))
                loss = loss_fn(logits, batch.labels, "softmax", config.train.label_smoothing) / len(micro_batches)
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config.optim, step, plan.steps)
            optimizer.step()
            optimizer.zero_grad()
            apply_statistics(model, pop_statistics(model))
            for name, parameter in named:
                average[name].lerp_(parameter.detach(), 1 - ema_decay(config.train.ema or 0, step))
            curve.append({"step": step + 1, "loss": total, "grad_norm": float(norm)})
    return curve, average


# Of ranks that trained at all stages. Three leave two of six passes without a micro batch.
LONG = [pytest.param(ranks, marks=pytest.mark.torture) for ranks in (1, 2)]
GROUP = "train.batch_norm_group=24"


@pytest.fixture(scope="module")
def wide(runs: Path) -> Path:
    """Where the runs are: four ranks at stage 3, loaded again from step 4; batch-norm groups that lie on two each."""
    trained = job(runs, "wide", "train.steps=14", "zero.stage=3")
    grouped = [job(runs, f"grouped-{stage}", "train.steps=4", GROUP, f"zero.stage={stage}") for stage in STAGES]
    on_ranks(4, [trained, resaved(runs, "wide-loaded", "wide", 4, "zero.stage=3"), *grouped], runs)
    return runs


@pytest.fixture(scope="module", params=[3, *LONG], ids=lambda ranks: f"{ranks} ranks")
def narrow(request: pytest.FixtureRequest, wide: Path) -> int:
    """A number of ranks that trained from the start at each stage, once more from the second step, and with passes
    without a micro batch full of NaN."""
    ranks, jobs = request.param, []
    for stage in STAGES:
        at = f"zero.stage={stage}"
        name, how = f"fp32-{stage}-{ranks}", ("train.steps=4", at)
        jobs.append(job(wide, name, *how, "checkpoint.every=2"))
        jobs.append(going_on(wide, f"again-{name}", name, 2, *how))
        jobs.append({**job(wide, f"poisoned-{stage}-{ranks}", "train.steps=4", at), "poison_padding": True})
    on_ranks(ranks, jobs, wide)
    return ranks


def resume_on(wide: Path, ranks: int, stage: int) -> None:
    """Trains from what four ranks had saved at stage 3, once."""
    name, at = f"narrow-{stage}-{ranks}", f"zero.stage={stage}"
    if not (wide / name).exists():
        trained = going_on(wide, name, "wide", 4, "train.steps=18", at)
        loaded, again = (f"{kind}-{stage}-{ranks}" for kind in ("loaded", "narrow-loaded"))
        on_ranks(ranks, [resaved(wide, loaded, "wide", 4, at), trained, resaved(wide, again, name, 8, at)], wide)


@pytest.fixture(scope="module")
def back(wide: Path, narrow: int) -> Path:
    """Four ranks at stage 3 again, from what others had saved at another stage after step 8."""
    source, at = f"narrow-{stage_back(narrow)}-{narrow}", "zero.stage=3"
    resume_on(wide, narrow, stage_back(narrow))
    loaded = resaved(wide, f"back-loaded-{narrow}", source, 8, at)
    on_ranks(4, [loaded, going_on(wide, f"back-{narrow}", source, 8, "train.steps=18", at)], wide)
    return wide


def stage_back(ranks: int) -> int:
    """The stage that so many ranks save at what four then load."""
    return 2 if ranks == 2 else 1


def check_agrees(folder: Path, name: str, curve: list[dict[str, Any]], average: dict[str, torch.Tensor]) -> None:
    """Losses within 1e-5, gradient norms within 1e-3, the average's values within 1e-6 (where it was saved)."""
    losses, norms = differences(steps_of(folder, name, 1, len(curve)), curve)
    assert losses < 1e-5 and norms < 1e-3, (name, losses, norms)
    for parameter, values in CheckpointReader(folder / name / "checkpoints" / step_name(4)).tensors("ema"):
        assert np.abs(values - average[parameter].numpy()).max() < 1e-6, (name, parameter)


Curve = tuple[list[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def plain(runs: Path) -> Curve:
    return plain_loop(job(runs, "plain", "train.steps=4")["arguments"])


def test_every_stage_on_any_number_of_ranks_is_the_plain_loop_of_one_process(
    wide: Path, narrow: int, plain: Curve
) -> None:
    for stage in STAGES:
        check_agrees(wide, f"fp32-{stage}-{narrow}", *plain)


def test_resuming_at_the_same_world_size_and_stage_is_the_same_to_the_bit(wide: Path, narrow: int) -> None:
    for stage in STAGES:
        check_bit_equal(wide / f"again-fp32-{stage}-{narrow}", wide / f"fp32-{stage}-{narrow}")


def test_passes_without_a_micro_batch_count_for_nothing_whatever_they_compute(wide: Path, narrow: int) -> None:
    """Not in the loss, the gradient, its norm, or batch norm's statistics."""
    for stage in STAGES:
        check_bit_equal(wide / f"poisoned-{stage}-{narrow}", wide / f"fp32-{stage}-{narrow}")


def test_batch_norm_groups_across_ranks_are_those_of_larger_micro_batches(wide: Path) -> None:
    larger = job(wide, "plain", "train.steps=4", "train.micro_batch=24")["arguments"]
    for stage in STAGES:
        check_agrees(wide, f"grouped-{stage}", *plain_loop(larger))


def check_bit_equal(run: Path, whole: Path) -> None:
    """All steps that the run did, and all that it saved last."""
    names, done = ("step", "loss", "lr", "grad_norm"), rows(run / "metrics.jsonl")
    expected = [row for row in rows(whole / "metrics.jsonl") if row["step"] >= done[0]["step"]]
    assert [[row[name] for name in names] for row in done] == [[row[name] for name in names] for row in expected], run
    assert last_state(run) == last_state(whole), run


# ------------------------------------------------------------------ from any world size and stage to any other and back


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.torture), 2])
def test_what_four_ranks_saved_at_stage_3_resumes_on_any_others(wide: Path, narrow: int, stage: int) -> None:
    resume_on(wide, narrow, stage)
    check_loaded(wide, "wide", 4, f"loaded-{stage}-{narrow}", "wide-loaded")
    check_ten_steps(wide, f"narrow-{stage}-{narrow}", "wide", 4)


@pytest.mark.torture
def test_and_what_others_saved_resumes_on_four_ranks_at_stage_3(back: Path, narrow: int) -> None:
    source = f"narrow-{stage_back(narrow)}-{narrow}"
    check_loaded(back, source, 8, f"back-loaded-{narrow}", f"narrow-loaded-{stage_back(narrow)}-{narrow}")
    check_ten_steps(back, f"back-{narrow}", source, 8)


def check_loaded(folder: Path, source: str, step: int, loaded: str, alike: str) -> None:
    """Every weight, moment, average and buffer to the bit; evaluation's losses of both weights to 1e-6."""
    saved = tensors(CheckpointReader(folder / source / "checkpoints" / step_name(step)))
    assert tensors(latest_checkpoint(folder / loaded / "again")) == saved
    losses, others = (json.loads((folder / run / "again" / "losses.json").read_text()) for run in (loaded, alike))
    assert losses.keys() == others.keys() == {"model", "ema"} and losses["model"] != losses["ema"]
    for kind, loss in losses.items():
        assert loss == pytest.approx(others[kind], rel=1e-6), kind


def check_ten_steps(folder: Path, changed: str, same: str, after: int) -> None:
    """Losses and gradient norms of ten steps, and the batch-norm statistics that they leave."""
    losses, norms = differences(*(steps_of(folder, run, after + 1, after + 10) for run in (changed, same)))
    assert losses < 1e-5 and norms < 1e-3, (losses, norms)
    saved = [CheckpointReader(folder / run / "checkpoints" / step_name(after + 8)).buffers() for run in (changed, same)]
    for name, values in saved[0].items():
        np.testing.assert_allclose(values, saved[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def tensors(reader: CheckpointReader) -> dict[str, bytes]:
    values = {f"{name} {kind}": part.tobytes() for kind in KINDS for name, part in reader.tensors(kind)}
    return values | {name: part.tobytes() for name, part in reader.buffers().items()}


# ---------------------------------------------------------------------------------------------- other ways of stepping


@pytest.mark.torture
def test_bf16_is_the_plain_loop_within_its_own_rounding_and_resumes_to_the_bit(runs: Path) -> None:
    """bf16 has 8 bits: within 1e-2 of the losses, 5e-2 of the gradient norms."""
    jobs = []
    for stage in STAGES:
        name, how = f"bf16-{stage}", ("train.steps=4", f"zero.stage={stage}", "train.precision=bf16")
        jobs += [job(runs, name, *how, "checkpoint.every=2"), going_on(runs, f"again-{name}", name, 2, *how)]
    on_ranks(3, jobs, runs)
    curve, _ = plain_loop(job(runs, "plain", "train.steps=4", "train.precision=bf16")["arguments"])
    for stage in STAGES:
        losses, norms = differences(steps_of(runs, f"bf16-{stage}"), curve)
        assert losses < 1e-2 and norms < 5e-2, (stage, losses, norms)
        check_bit_equal(runs / f"again-bf16-{stage}", runs / f"bf16-{stage}")


@pytest.mark.torture
def test_four_ranks_at_every_stage_offloaded_and_compiled_are_the_plain_loop(runs: Path, plain: Curve) -> None:
    """Optimizer states in the host's memory change no bit."""
    folder = runs
    jobs: dict[int, list[dict[str, Any]]] = {4: [], 3: [], 1: []}
    for stage in STAGES:
        length = ("train.steps=4", f"zero.stage={stage}")
        jobs[4].append(job(folder, f"four-{stage}", *length))
        jobs[1] += [job(folder, f"{where}-{stage}", *length, f"zero.offload={where == 'host'}") for where in WHERE]
        jobs[3].append(job(folder, f"compiled-{stage}", *length, "train.compile=true"))
    for ranks, of_ranks in jobs.items():
        on_ranks(ranks, of_ranks, folder)
    for stage in STAGES:
        check_agrees(folder, f"four-{stage}", *plain)
        check_agrees(folder, f"host-{stage}", *plain)
        assert last_state(folder / f"host-{stage}") == last_state(folder / f"device-{stage}")
        check_agrees(folder, f"compiled-{stage}", *plain)


# ------------------------------------------------------------------------------------------------------ a large network


@pytest.mark.torture
def test_688_million_parameters_train_on_two_cpu_ranks_and_resume_on_one(digits: Path) -> None:
    """CoAtNet-5 at 224 under stage 3, in a machine of 24 GiB: three copies of its state would not fit."""
    forked.end_server()
    run, name = digits / "large", ["model.name=coatnet_5", "model.resolution=224"]
    layout = ["model.stem=null", "model.stages=null", "model.head_size=null"]
    batches = ["train.global_batch=2", "train.micro_batch=1", "train.ema=null", "data.shuffle_window=4"]
    data = [f"data.train={digits}/train", "data.val=null", f"run.dir={run}"]
    how = ["zero.stage=3", "train.activation_checkpointing=all", "checkpoint.keep_last=1", "train.precision=fp32"]
    for ranks, steps in ((2, 1), (1, 2)):
        request = command(
            "pretrain", "configs/tiny.yaml", "--procs", ranks, *data, *name, *layout, *batches, *how,
            f"train.steps={steps}",
        )  # fmt: skip
        done = subprocess.run(request, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert sum(np.prod(shape) for shape in latest_checkpoint(run).shapes.values()) > 680e6
    assert [row["step"] for row in rows(run / "metrics.jsonl") if np.isfinite(row["loss"])] == [1, 2]
    shutil.rmtree(run)

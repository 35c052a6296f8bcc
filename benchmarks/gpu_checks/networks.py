"""Networks and their layers, in torch alone: right values, kernels, images a second, memory."""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import attention
from benchmarks.gpu_checks import Place, Row, attempt
from benchmarks.machine import timer
from models import coatnet
from models.attention import BACKENDS, fastest
from models.count import count
from models.variants import FAMILY

WRONG = 0.5
"""A gradient that is off by more than this share of its norm is no rounding."""
KERNELS = 20
TOKENS = (49, 196, 576)
BATCH = 128
PASSES = ("forward ms", "of input ms", "of weight ms")


# ------------------------------------------------------------------------------------------------- logits, gradients


def values_beside_the_cpu(place: Place) -> Iterator[Row]:
    """Logits and all gradients of coatnet_0, beside those of the CPU in fp64. Some, as of keys' biases, are zero."""
    torch.manual_seed(0)
    batch, side = (2, 64) if place.small else (4, 224)
    network, images = coatnet("coatnet_0", resolution=side), torch.randn(batch, 3, side, side)
    truth = _values(network, images, "cpu", torch.float64)
    whole = torch.cat([each.flatten() for each in truth.values()]).norm()
    true = {name: value for name, value in truth.items() if value.norm() > 1e-6 * whole}
    zero = len(truth) - len(true)
    yield {"network": "coatnet_0", "images": batch, "side": side, "gradients": len(true) - 1, "that are zero": zero}
    kinds = [("cpu", torch.float32, False), (place.device, torch.float32, False), (place.device, torch.bfloat16, False)]
    if not place.small:
        kinds.insert(2, (place.device, torch.float32, True))
    worst = {}
    for device, dtype, tf32 in dict.fromkeys(kinds):
        torch.backends.cudnn.allow_tf32 = tf32
        found = _values(network, images, device, dtype)
        off = {name: float((found[name] - value).norm() / value.norm()) for name, value in true.items()}
        logits = off.pop("logits")
        name = max(off, key=lambda name: off[name])
        kind = f"{str(dtype).removeprefix('torch.')}{' by TF32' * tf32}"
        worst[f"{device} {kind}"] = off[name]
        row: Row = {"device": device, "type": kind, "logits off by": logits}
        row |= {"gradients, median": statistics.median(off.values()), "worst": off[name], "which is": name}
        yield row | ({"error": f"{name} is wrong"} if off[name] > WRONG else {})
    yield {"said": "worst gradient off by " + ", ".join(f"{share:.1e} ({kind})" for kind, share in worst.items())}


def _values(network: nn.Module, images: Tensor, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    model = copy.deepcopy(network).to(device, wide).train()
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(images.to(device, wide))
    F.cross_entropy(logits, torch.arange(len(images), device=device)).backward()
    found = {"logits": logits, **{name: each.grad for name, each in model.named_parameters() if each.grad is not None}}
    return {name: value.detach().cpu().double() for name, value in found.items()}


# ----------------------------------------------------------------------------------------------------------- kernels


def longest(work: Callable[[], object], device: str) -> list[Row]:
    """The kernels of a piece of work (on a CPU: operators) that take longest."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=kinds) as profiled:
        work()
        if device == "cuda":
            torch.cuda.synchronize()
    return kernels_of(profiled, device)


def kernels_of(profiled: profile, device: str) -> list[Row]:
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    found: list[tuple[float, Any]] = [
        (getattr(each, time) / 1e3, each)
        for each in profiled.key_averages()
        if each.device_type.name == device.upper() and not each.is_user_annotation
    ]
    of_all = sum(ms for ms, _ in found) or 1.0
    return [
        {"share": round(ms / of_all, 4), "ms": round(ms, 3), "calls": each.count, "name": each.key[:160]}
        for ms, each in sorted(found, key=lambda pair: -pair[0])[:KERNELS]
    ]


def attention_kernels(place: Place) -> Iterator[Row]:
    """Which implementation torch took for attention with a bias that needs a gradient, forward and backward."""
    ran = set()
    for tokens, dtype in product(TOKENS, (torch.float32,) if place.small else (torch.bfloat16, torch.float32)):
        case = attention.Case(shape_of(tokens), dtype, True)
        backend = fastest(place.device, dtype, tokens, True)
        work = attention.work(case, "sdpa", place.device)
        work()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            work()
        names = {
            each.key.removeprefix("aten::") for each in profiled.key_averages() if "_scaled_dot_product_" in each.key
        }
        kernels = [each["name"] for each in longest(work, place.device)[:3]]
        ran |= names
        yield {
            "tokens": tokens, "type": str(dtype).removeprefix("torch."), "auto takes": backend,
            "sdpa calls": " ".join(sorted(names)) or "none: plain products", "longest": kernels,
        }  # fmt: skip
    yield {"said": f"sdpa ran {', '.join(sorted(ran)) or 'plain products'}"}


def shape_of(tokens: int) -> attention.Shape:
    return next(shape for shape in attention.SHAPES if prod(shape.grid) == tokens)


def attention_backends(place: Place) -> Iterator[Row]:
    """Milliseconds of every backend, and whether the rule of models/attention.py takes the fastest."""
    types = (torch.float32,) if place.small else (torch.bfloat16, torch.float32)
    right, cases = 0, 0
    for gradient, tokens, dtype in product((True, False), TOKENS, types):
        case = attention.Case(shape_of(tokens), dtype, gradient)
        row: Row = {"tokens": tokens, "heads": f"{case.shape.heads} x {case.shape.head_size}"}
        row |= {"type": str(dtype).removeprefix("torch."), "gradient": gradient}
        times: dict[str, float] = {}
        for backend in [name for name in BACKENDS if name != "flex" or not place.small]:
            work = attention.work(case, backend, place.device)
            found = attempt({}, lambda work=work: {"ms": _milliseconds(work, place)})
            times[backend] = found.get("ms", float("inf"))
            row[f"{backend} ms"] = found.get("ms", found.get("error"))
        best, chosen = min(times, key=lambda name: times[name]), fastest(place.device, dtype, tokens, gradient)
        right, cases = right + (best == chosen), cases + 1
        yield row | {"fastest": best, "auto takes": chosen}
    yield {"said": f"auto takes the fastest backend in {right} of {cases} cases"}


def _milliseconds(work: Callable[[], object], place: Place) -> float:
    seconds = timer(work, place.device)
    return 1e3 * min(seconds() for _ in range(1 if place.small else 2))


def depthwise_convolutions(place: Place) -> Iterator[Row]:
    """Forward and both backwards in bf16 at the shapes of the family's MBConvs at 224, in milliseconds."""
    stages = {  # width within the block, side
        (4 * stage.width, 112 >> number): None
        for size in FAMILY.values()
        for number, stage in enumerate(size.layout.stages, 1)
        if stage.kind == "mbconv"
    }
    batch, most = (1, 1) if place.small else (64, len(stages))
    faster = []
    for width, side in list(stages)[:most]:
        times = {}
        for channels_last, chosen in product((True, False), (False, True)):
            torch.backends.cudnn.benchmark = chosen
            kind = torch.channels_last if channels_last else torch.contiguous_format
            row: Row = {"channels": width, "side": side, "batch": batch}
            row |= {"layout": "channels-last" if channels_last else "contiguous", "cudnn.benchmark": chosen}
            found = attempt(row, lambda w=width, s=side, k=kind: _depthwise(w, s, batch, k, place))
            times[channels_last, chosen] = sum(found.get(name, float("inf")) for name in PASSES)
            yield found
        faster.append(times[True, False] / min(times.values()))
    yield {"said": f"as in training (channels-last, no benchmark) at worst {max(faster):.2f} times the fastest way"}


def _depthwise(width: int, side: int, batch: int, layout: torch.memory_format, place: Place) -> Row:
    def maps() -> Tensor:
        shape = (batch, width, side, side)
        return torch.randn(shape, dtype=torch.bfloat16, device=place.device).contiguous(memory_format=layout)

    x, gradient = maps(), maps()
    weight = torch.randn(width, 1, 3, 3, dtype=torch.bfloat16, device=place.device).contiguous(memory_format=layout)

    def backward(*wanted: bool) -> Callable[[], object]:
        where = ([1, 1], [1, 1], [1, 1], False, [0, 0], width, [*wanted, False])
        return lambda: torch.ops.aten.convolution_backward(gradient, x, weight, None, *where)

    forward = _milliseconds(lambda: F.conv2d(x, weight, padding=1, groups=width), place)
    row = {"forward ms": forward, "of input ms": _milliseconds(backward(True, False), place)}
    row["of weight ms"] = _milliseconds(backward(False, True), place)
    return row | {"forward GB/s": 2 * x.nbytes / forward / 1e6}


# ------------------------------------------------------------------------------------------------------------- speed


def speed(place: Place, size: str) -> Iterator[Row]:
    """Images per second of forward with backward, memory beside the model's, and the longest kernels."""
    from benchmarks.model import OURS, TIMM_CHANNELS_LAST, Case

    batch, side, precision = (2, 64, "fp32") if place.small else (BATCH, 224, "bf16")
    case = Case(size, batch, side, "training", precision, place.device)
    rates = {}
    turns = [(OURS, False), (TIMM_CHANNELS_LAST, False), (OURS, True), (TIMM_CHANNELS_LAST, True)]
    for contestant, compiled in turns[:2] if place.small else turns:
        name = f"{contestant}{', compiled' * compiled}"
        turn = replace(case, compiled=compiled)
        row = attempt({"network": name}, lambda c=contestant, turn=turn: _rate(c, turn))
        if "images/s" in row:
            case = replace(case, batch=row["batch"])  # of all the same, the largest that fits ours
            rates[name] = row["images/s"]
        if contestant == OURS and "images/s" in row:
            row = attempt(row, lambda c=case: {"model's MiB": _predicted_mib(c)})
        yield row
    if place.small:
        yield {"not here": "compiled networks: compiling one takes minutes on a CPU"}
    yield {"said": "; ".join(f"{name}: {rate:,.0f}" for name, rate in rates.items()) + " images/s"}


def _rate(contestant: str, case: Any) -> Row:
    try:
        return _rate_of_batch(contestant, case)
    except torch.OutOfMemoryError:
        if case.batch == 1:
            raise
    return _rate(contestant, replace(case, batch=case.batch // 2))  # here nothing holds the memory of the failed one


def _rate_of_batch(contestant: str, case: Any) -> Row:
    from benchmarks.model import work

    cuda = case.device == "cuda"
    torch.compiler.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    piece = work(contestant, case)
    seconds = timer(piece, case.device)
    rate = case.batch / min(seconds() for _ in range(3 if cuda else 1))
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    operations = 6 * count(case.size, case.resolution).multiply_adds * rate / 1e12
    row: Row = {
        "batch": case.batch,
        "side": case.resolution,
        "precision": case.precision,
        "images/s": rate,
        "TFLOP/s": operations,
        "peak MiB": peak,
    }
    return row | {"kernels": longest(piece, case.device)}


def _predicted_mib(case: Any) -> float:
    from pipeline.config.schema import Augment, Model, Train
    from pipeline.memory.activations import count_activations

    one = {"steps": 1, "global_batch": case.batch, "micro_batch": case.batch, "stochastic_depth": 0.0}
    train, network = Train(**one, precision=case.precision), Model(name=case.size, resolution=case.resolution)
    alive = count_activations(network, train, Augment(), 1000, case.device, gradients_stay=True)
    return (4 * count(case.size, case.resolution).parameters + sum(alive.peak.values())) / 2**20

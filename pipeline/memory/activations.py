"""What the forward and backward of a micro batch keep alive, counted on the network itself without its memory.

The network that training builds runs forward and backward on fake tensors, which have shapes, types and storages, but
no contents. What an operation allocates is counted until it is freed, by the part of the network that allocated it. So
casts of autocast, recomputation and attention's backend need no formula, and every copy in models/ shows. Only what a
kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from data.memory import decoder_gpu_bytes
from data.order import accumulation_steps
from models.coatnet import CoAtNet, stochastic_depth_rates
from pipeline.config.batch_size import micro_batches_of, ranks_of_group
from pipeline.config.schema import Augment, Config, Model, Train
from pipeline.distributed.environment import cpus_per_rank
from pipeline.memory.estimate import Activations, Memory, Settings, memory_of
from pipeline.training.losses import loss_fn
from pipeline.training.model import count_model, meta_model

GRADIENTS = "gradients"


def estimates(config: Config, classes: int, device: str) -> Callable[[Settings], tuple[Memory, Activations]]:
    """A function that estimates a rank's memory under any settings, on a device of this type ("cpu", "cuda")."""
    parameters = count_model(config.model, config.train, classes).parameters
    resolution, on_gpu = config.model.resolution, device == "cuda"
    pipelines = 2 if config.data.val else 1  # training's is kept during an evaluation
    decoding = pipelines * decoder_gpu_bytes(resolution, cpus_per_rank()) if on_gpu else 0

    @cache
    def counted(train: Train, gradients_stay: bool) -> Activations:
        return count_activations(config.model, train, config.augment, classes, device, gradients_stay)

    def estimate(settings: Settings) -> tuple[Memory, Activations]:
        train, zero, world_size = settings
        one_pass = accumulation_steps(micro_batches_of(train), world_size) == 1
        activations = counted(train, one_pass and zero.stage == 1 and not zero.offload)
        return memory_of(parameters, activations, settings, resolution, on_gpu, decoding), activations

    return estimate


def count_activations(
    model: Model, train: Train, augment: Augment, classes: int, device: str, gradients_stay: bool
) -> Activations:
    """What a micro batch of `train` keeps alive on a device of this type ("cpu", "cuda").

    `gradients_stay`: each weight's gradient stays where the backward made it, and counts, as at ZeRO stage 1 in a
    step of one accumulation step; else the engine takes it at once. The parts of `peak`: input, stem, stage 1 ...,
    head, loss. Attention's flex is counted as sdpa, whose memory is the same but for the bias; and batch norm over
    several ranks as over one.
    """
    if ranks_of_group(train) > 1:
        train = train.model_copy(update={"batch_norm_group": None})
    if model.attention == "flex":
        model = model.model_copy(update={"attention": "sdpa"})
    network = meta_model(model, train, classes)
    with FakeTensorMode(), torch.device(device):
        _allocate(network)
        tracker = ActivationTracker()
        tracker.exclude(network)
        tracker.track_parts(network)
        for parameter in network.parameters():
            parameter.register_post_accumulate_grad_hook(tracker.keep_gradient if gradients_stay else _free_gradient)
        n = train.micro_batch  # from here on as in train.py
        with tracker:
            images = torch.empty(n, 3, model.resolution, model.resolution, memory_format=torch.channels_last)
            targets = torch.zeros(n, classes) if augment.mixup else torch.zeros(n, 1, dtype=torch.int64)
            drops_paths = any(stochastic_depth_rates(network, train.stochastic_depth))
            factors = torch.ones(n, network.branches) if drops_paths else None
            with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bf16"):
                logits = network(images, factors)
            tracker.part = "loss"
            loss = loss_fn(logits, targets, train.loss, train.label_smoothing)
            kept = sum(tracker.bytes.values())
            loss.backward()
        return Activations(dict(tracker.peak), kept)


def _allocate(network: nn.Module) -> None:
    """Gives the weights of a network on the meta device (fake) memory."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            made = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
            module.register_parameter(name, nn.Parameter(made))
        for name, buffer in list(module.named_buffers(recurse=False)):
            persistent = name not in module._non_persistent_buffers_set
            made = torch.zeros(buffer.shape, dtype=buffer.dtype)
            module.register_buffer(name, made, persistent=persistent)


def _free_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class ActivationTracker(TorchDispatchMode):
    """Bytes of all storages that were allocated inside and are alive, by part of the network; and of their peak.

    `part` is the one whose operations are running.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "input"
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._known: dict[int, tuple[Any, str, int]] = {}

    def exclude(self, network: nn.Module) -> None:
        """Weights and statistics do not count."""
        for tensor in (*network.parameters(), *network.buffers()):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = (storage, "", 0)

    def track_parts(self, network: CoAtNet) -> None:
        """Has `part` follow the network's forward, recomputation and backward."""
        parts = {"stem": [network.stem], "head": [network.head]}
        parts |= {f"stage {number}": list(stage.children()) for number, stage in enumerate(network.stages, 1)}
        for part, modules in parts.items():
            for module in modules:
                module.register_forward_pre_hook(lambda *_, part=part: self._enter(part))
                module.register_forward_hook(lambda _, __, output, part=part: self._await_backward(output, part))

    def keep_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        reference, part, size = self._known[id(storage)]
        self._known[id(storage)] = (reference, GRADIENTS, size)
        self.bytes[part] -= size
        self.bytes[GRADIENTS] += size

    def _enter(self, part: str) -> None:
        self.part = part

    def _await_backward(self, output: torch.Tensor, part: str) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: self._enter(part))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for output in tree_iter(outputs):
            if isinstance(output, torch.Tensor) and output.device.type != "meta":
                self._add(output.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the same object for as long as the storage lives
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, lambda _: self._remove(key)), self.part, size)
        self.bytes[self.part] += size
        if self.bytes.total() > self.peak.total():
            self.peak = self.bytes.copy()

    def _remove(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.bytes[part] -= size

"""What the forward and backward of a micro batch keep alive, counted on the network itself without its memory.

The network that training builds runs forward and backward on fake tensors, which have shapes, types and storages, but
no contents. What an operation allocates is counted until it is freed, by the part of the network that allocated it. So
casts of autocast, recomputation and attention's backend need no formula, and every copy in models/ shows. Only what a
kernel takes for itself while it runs is not seen. The work of the operations is counted by the way.

The fake tensors are a CPU's even where a GPU's memory is asked for, since a torch that was built without CUDA has no
others: what CUDA does otherwise is done to them (`like_cuda`), so that any machine gives the same figures.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import chain
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from data.memory import decoder_gpu_bytes
from data.order import accumulation_steps
from models.coatnet import CoAtNet, stochastic_depth_rates
from pipeline.config.batch_size import micro_batches_of, ranks_of_group
from pipeline.config.schema import Augment, Config, Model, Train
from pipeline.distributed.environment import cpus_per_rank
from pipeline.memory.estimate import Activations, Memory, Settings, Work, fill_a_bucket, memory_of, most_gathered
from pipeline.training.engine import STAY_GATHERED, zero3_leaves
from pipeline.training.losses import loss_fn
from pipeline.training.model import count_model, meta_model

GRADIENTS, GATHERED = "gradients", "gathered weights"
DISTINCT_BLOCKS = 4
"""Of a stage: the first, the second, one that stands for all between, and the last. At the ends of those between is
most alive: where the last begins its backward, or, if gradients stay, where the first does."""

Repeated = dict[nn.Module, tuple[int, nn.Module]]
"""Blocks that stand for several: for how many, and the block that follows."""


def estimates(
    config: Config, classes: int, device: str, threads: int | None = None
) -> Callable[[Settings], tuple[Memory, Activations]]:
    """A function that estimates a rank's memory under any settings, on a device of this type ("cpu", "cuda").

    `threads` decode for a rank; None: as many as here.
    """
    parameters = count_model(config.model, config.train, classes).parameters
    resolution, on_gpu = config.model.resolution, device == "cuda"
    pipelines = 2 if config.data.val else 1  # training's is kept during an evaluation
    decoding = pipelines * decoder_gpu_bytes(resolution, threads or cpus_per_rank()) if on_gpu else 0

    @cache
    def counted(train: Train, gradients_stay: bool, gathered: int | None) -> Activations:
        return count_activations(config.model, train, config.augment, classes, device, gradients_stay, gathered)

    def estimate(settings: Settings) -> tuple[Memory, Activations]:
        train, zero, world_size = settings
        one_pass = accumulation_steps(micro_batches_of(train), world_size) == 1
        gradients_stay = (one_pass if zero.stage == 1 else not fill_a_bucket(parameters)) and not zero.offload
        activations = counted(train, gradients_stay, most_gathered(zero.stage, world_size))
        return memory_of(parameters, activations, settings, resolution, on_gpu, decoding), activations

    return estimate


def count_activations(
    model: Model,
    train: Train,
    augment: Augment,
    classes: int,
    device: str,
    gradients_stay: bool,
    gathered: int | None = None,
) -> Activations:
    """What a micro batch of `train` keeps alive on a device of this type ("cpu", "cuda").

    `gradients_stay`: each weight's gradient stays where the backward made it, and counts, as at ZeRO stage 1 in a
    step of one accumulation step, or where no bucket fills; else the engine takes it at once, or at ZeRO-3 a block's
    after its backward. `gathered`: bytes of weights that ZeRO-3 keeps whole at the most, each until its gradient is
    made. The parts of `peak`: input, stem, stage 1 ..., head, loss. Attention's flex is counted as sdpa, whose memory
    is the same but for the bias; and batch norm over several ranks as over one.
    """
    if ranks_of_group(train) > 1:
        train = train.model_copy(update={"batch_norm_group": None})
    if model.attention == "flex" or (model.attention == "auto" and device == "cuda"):
        model = model.model_copy(update={"attention": "sdpa"})
    network = meta_model(model, train, classes)
    drops_paths = any(stochastic_depth_rates(network, train.stochastic_depth))
    repeated = _shorten(network)
    with FakeTensorMode(), like_cuda() if device == "cuda" else nullcontext():
        _allocate(network)
        tracker = ActivationTracker()
        tracker.exclude(network)
        tracker.track_parts(network, repeated)
        of_leaves = set() if gathered is None or gradients_stay else tracker.let_go_of_leaves(network)
        for parameter in set(network.parameters()) - of_leaves:
            parameter.register_post_accumulate_grad_hook(tracker.keep_gradient if gradients_stay else tracker.let_go)
        tracker.gather(network, gathered or 0)
        n = train.micro_batch  # from here on as in train.py
        with tracker:
            images = torch.empty(n, 3, model.resolution, model.resolution, memory_format=torch.channels_last)
            targets = torch.zeros(n, classes) if augment.mixup else torch.zeros(n, 1, dtype=torch.int64)
            factors = torch.ones(n, network.branches) if drops_paths else None
            with torch.autocast("cpu", torch.bfloat16, enabled=train.precision == "bf16"):
                logits = network(images, factors)
            tracker.part = "loss"
            loss = loss_fn(logits, targets, train.loss, train.label_smoothing)
            kept = tracker.bytes.total() - tracker.bytes[GATHERED]
            loss.backward()
        peak = dict(tracker.peak)
        return Activations(peak, kept, tracker.work, peak.pop(GATHERED))


def _shorten(network: CoAtNet) -> Repeated:
    """Leaves no stage more than DISTINCT_BLOCKS, of which those after the first are alike."""
    repeated: Repeated = {}
    for number, stage in enumerate(network.stages):
        blocks = list(stage.children())
        if len(blocks) > DISTINCT_BLOCKS:
            network.stages[number] = nn.ModuleList([*blocks[:3], blocks[-1]])
            repeated[blocks[2]] = (len(blocks) - DISTINCT_BLOCKS + 1, blocks[-1])
    network.branches = sum(block.branches for block in network.blocks())
    return repeated


@contextmanager
def like_cuda() -> Iterator[None]:
    """Inside, a CPU's tensors have the attention that CUDA would give them: its memory-efficient SDPA takes a bias that
    needs a gradient."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None) -> torch.Tensor:
        if attn_mask is not None:  # whose rows the kernel wants in multiples of 8
            tokens = k.shape[-2]
            attn_mask = F.pad(attn_mask, (0, -tokens % 8))[..., :tokens].expand(len(q), -1, -1, -1)
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


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


class ActivationTracker(TorchDispatchMode):
    """Bytes of all storages that were allocated inside and are alive, by part of the network; and of their peak.

    `part` is the one whose operations are running, and `repeats` how many blocks their block stands for; `work` is what
    they did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.repeats = "input", 1
        self.bytes: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.work = Work(0, 0, 0)
        self._known: dict[int, tuple[Any, str, int]] = {}
        self._of_block: list[tuple[int, Any]] = []
        self._times: dict[torch.Tensor, int] = {}
        self._needed = self._most = 0

    def exclude(self, network: nn.Module) -> None:
        """Weights and statistics do not count."""
        for tensor in (*network.parameters(), *network.buffers()):
            storage = tensor.untyped_storage()
            self._known[id(storage)] = (storage, "", 0)

    def track_parts(self, network: CoAtNet, repeated: Repeated) -> None:
        """Has `part` and `repeats` follow the network's forward, recomputation and backward."""
        parts: dict[str, list[nn.Module]] = {"stem": [network.stem], "head": [network.head]}
        parts |= {f"stage {number}": list(stage.children()) for number, stage in enumerate(network.stages, 1)}
        for part, modules in parts.items():
            for module in modules:
                enter = partial(self._enter, part, repeated.get(module, (1,))[0])
                module.register_forward_pre_hook(lambda *_, enter=enter: enter())
                module.register_forward_hook(lambda _, __, output, enter=enter: self._await_backward(output, enter))
        for block, (times, following) in repeated.items():
            self._times |= dict.fromkeys(block.parameters(), times)
            self._repeat_kept(times, following)

    def keep_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if self._known[key][1] != GRADIENTS:  # as it is for the second of query, key and value, which share one
            self._replace(key, GRADIENTS, self._times.get(parameter, 1))
        self._let_weight_go(parameter)

    def gather(self, network: nn.Module, most: int) -> None:
        """Weights count whole until their gradients are made, as far as so many bytes are kept."""
        self._most, self._needed = most, sum(self._times.get(each, 1) * each.nbytes for each in network.parameters())
        self.bytes[GATHERED] = min(self._needed, most)

    def let_go_of_leaves(self, network: CoAtNet) -> set[nn.Parameter]:
        """The weights whose gradients the engine takes after the backward of the block that they are in."""
        of_leaves = {leaf: list(leaf.parameters()) for leaf in zero3_leaves(network)}
        for leaf, weights in of_leaves.items():
            leaf.register_full_backward_hook(partial(self._let_go_of_all, weights))
        return set(chain(*of_leaves.values()))

    def let_go(self, parameter: torch.Tensor) -> None:
        """The engine has taken a weight's gradient."""
        parameter.grad = None
        self._let_weight_go(parameter)

    def _let_weight_go(self, parameter: torch.Tensor) -> None:
        """What has its gradient is needed no more; small weights stay."""
        self._needed -= self._times.get(parameter, 1) * parameter.nbytes * (parameter.numel() > STAY_GATHERED)
        self.bytes[GATHERED] = min(self._needed, self._most)

    def _let_go_of_all(self, weights: list[nn.Parameter], *_: Any) -> None:
        for weight in weights:
            self.let_go(weight)

    def _enter(self, part: str, repeats: int) -> None:
        self.part, self.repeats = part, repeats
        if repeats > 1:
            self._of_block.clear()

    def _await_backward(self, output: torch.Tensor, enter: Callable[[], None]) -> None:
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda _: enter())

    def _repeat_kept(self, times: int, following: nn.Module) -> None:
        """What a block's forward keeps counts so often, once the following one has let go of its output; a backward,
        which may compute it again, has one at a time."""

        def repeat(*_: Any) -> None:
            for key, reference in self._of_block:
                if key in self._known and self._known[key][0] is reference:
                    self._replace(key, self._known[key][1], times)
            once.remove()

        once = following.register_forward_hook(repeat)

    def _replace(self, key: int, part: str, times: int) -> None:
        reference, before, size = self._known[key]
        self._known[key] = (reference, part, times * size)
        self.bytes[before] -= size
        self.bytes[part] += times * size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        made = [each for each in tree_iter(outputs) if isinstance(each, torch.Tensor) and each.device.type != "meta"]
        computes = func._schema.is_mutable or any(id(each.untyped_storage()) not in self._known for each in made)
        for output in made:
            self._add(output.untyped_storage())
        if computes:  # else it is a view
            self.work += self.repeats * work_of(func, args, kwargs or {}, outputs)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)  # the same object for as long as the storage lives
        if key in self._known:
            return
        size = storage.nbytes()
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._known[key] = (reference, self.part, size)
        if self.repeats > 1:
            self._of_block.append((key, reference))
        self.bytes[self.part] += size
        if self.repeats == 1 and self.bytes.total() > self.peak.total():
            self.peak = self.bytes.copy()

    def _remove(self, key: int) -> None:
        _, part, size = self._known.pop(key)
        self.bytes[part] -= size


def work_of(func: Any, args: Any, kwargs: Any, outputs: Any) -> Work:
    """The work of one operation of torch; a convolution by channel is bound by memory, and no product of matrices."""
    tensors = [each for each in tree_iter((args, kwargs, outputs)) if isinstance(each, torch.Tensor)]
    moved = sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in tensors)
    flops = flop_registry.get(func.overloadpacket)
    groups = {"aten::convolution": 8, "aten::convolution_backward": 9}.get(func.name())
    by_channel = groups is not None and args[groups] > 1
    operations = 0 if flops is None or by_channel else flops(*args, **kwargs, out_val=outputs)
    return Work(operations, moved, 1)

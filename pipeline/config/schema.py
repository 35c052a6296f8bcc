"""The configuration: every key with its type, default, limits, meaning, and whether a run that resumes may change it.

A configuration is frozen once read. Functions take the section they need, never the tree. How YAML files and
`section.key=value` become one of these is in parsing.py.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipeline.config.batch_size import divisors, fitting_micro_batches, ranks_of_group, suggest

Change = Literal["immutable", "tracked", "mutable"]
"""What resuming with another value does: it is refused (the key defines the run), recorded in events.jsonl, or used."""


def key(default: Any, meaning: str, change: Change = "immutable", *, expanded: bool = False, **limits: Any) -> Any:
    """A documented key of a section; `limits` are pydantic's (ge, le, gt, lt, min_length, ...).

    `expanded`: a path, in which `~` and variables are replaced where the configuration is read (data/paths.py).
    """
    extra: dict[str, Any] = {"change": change, "expanded": expanded}
    return Field(default, description=meaning, json_schema_extra=extra, validate_default=False, **limits)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        values = value if isinstance(value, list | tuple) else [value]
        if bool not in (annotation, *get_args(annotation)) and any(isinstance(each, bool) for each in values):
            raise PydanticCustomError("boolean", "neither true nor false is allowed")
        return value


class Run(Section):
    dir: str = key("runs/default", "folder of this run, on a POSIX file system", "mutable", expanded=True, min_length=1)
    seed: int = key(0, "seed of every random draw, 0 to 2**48 - 1", ge=0, lt=2**48)
    hang_timeout: float = key(
        1800,
        "seconds without progress, or without a rank's heartbeat, before the ranks dump their stacks and end",
        "mutable",
        ge=1,
    )


class Cache(Section):
    dir: str | None = key(
        None, "folder on each node's disk that caches remote data, with that node's $VARIABLES; null: none", "mutable"
    )
    max_bytes: int | None = key(
        None, "size limit in bytes, least recently used data goes first; null: until the disk is full", "mutable", ge=1
    )


class Data(Section):
    train: str = key(
        ...,
        "packed training set: a folder or any fsspec URL that holds manifest.json; it may lie elsewhere on resume",
        "tracked",
        expanded=True,
        min_length=1,
    )
    val: str | None = key(None, "packed evaluation set; null: no evaluation during training", "mutable", expanded=True)
    shuffle_window: int = key(32, "neighbouring samples of a lane that are read and shuffled together", ge=1)
    train_samples: int | None = key(None, "samples the training set must have; null: whatever the manifest says", ge=1)
    max_bad_fraction: float = key(
        0.001, "share of an epoch that may be broken and replaced before the run stops", "mutable", ge=0, le=1
    )
    cache: Cache = key(Cache(), "the node's cache of remote data")


class Stem(Section):
    blocks: int = key(2, "convolutions", ge=1)
    width: int = key(64, "channels", ge=1)
    stride: int = key(2, "stride of the first convolution: 1 or 2, or a patch's side", ge=1)
    kernel: int = key(3, "kernel size of the first convolution; if equal to its stride: patches, as in ViT", ge=1)


class Stage(Section):
    kind: Literal["mbconv", "transformer"] = key(..., "block of this stage: mbconv or transformer")
    blocks: int = key(..., "blocks of this stage", ge=1)
    width: int = key(..., "channels of this stage", ge=1)
    stride: Literal[1, 2] = key(2, "stride of the first block: 1 or 2")


class Model(Section):
    name: str | None = key(
        None, "coatnet_0 to coatnet_7, or a variant (coatnet models); null: stem and stages are given"
    )
    stem: Stem | None = key(None, "stem, if name is null")
    stages: tuple[Stage, ...] | None = key(None, "stages in order, if name is null")
    head_size: int | None = key(None, "channels per attention head; null: the family's (32 if stages are given)", ge=1)
    stride: Literal["expand", "depthwise"] | None = key(
        None, "where MBConv puts its stride: expand (paper's Eq. 5) or depthwise; null: the layout's"
    )
    pool: Literal["max", "average"] = key("max", "pooling of down-sampling: max (the paper's) or average")
    norm: Literal["batch", "layer"] = key("batch", "normalisation of stem and MBConv: batch or layer")
    relative_attention: Literal["pre_softmax", "post_softmax", "none"] = key(
        "pre_softmax", "where the relative bias is added: pre_softmax (the paper's), post_softmax or none"
    )
    attention: Literal["auto", "reference", "sdpa", "flex"] = key(
        "auto", "how attention is computed; auto: the fastest as measured (models/attention.py)", "mutable"
    )
    batch_norm_momentum: float = key(0.01, "weight of each new batch in batch norm's running statistics", gt=0, le=1)
    batch_norm_eps: float = key(1e-3, "batch norm's epsilon", gt=0)
    layer_norm_eps: float = key(1e-5, "layer norm's epsilon", gt=0)
    resolution: int = key(224, "image height and width in pixels", ge=1)
    classes: int | None = key(None, "classes the training set must have; null: whatever the manifest says", ge=1)
    classifier: Literal["auto", "keep", "new", "map"] = key(
        "auto",
        "last layer in fine-tuning: keep (the classes must be the source's), new, map (by class name, the others new);"
        " auto: keep if the classes are the source's, otherwise new",
    )

    @model_validator(mode="after")
    def _named_or_given_by_stages(self) -> Model:
        if self.name is None and (self.stem is None or not self.stages):
            raise ValueError("model.name is null, so model.stem and model.stages must be given")
        if self.name is not None and (self.stem is not None or self.stages is not None):
            raise ValueError(
                f"model.name is {self.name} and model.stem or model.stages is also given; set model.name=null"
            )
        return self


class RandAugment(Section):
    layers: int = key(2, "operations applied to each image; 0 switches RandAugment off", ge=0, le=8)
    magnitude: float = key(5.0, "strength on RandAugment's scale of 10; 0.5 to 2 is weak", ge=0, le=20)


class Augment(Section):
    crop: Literal["random_resized", "center", "none"] = key(
        "random_resized", "random_resized, center (the largest centred square), or none (the whole image, squeezed)"
    )
    crop_area: tuple[float, float] = key(
        (0.08, 1.0), "smallest and largest share of the image's area that a random crop takes"
    )
    flip: bool = key(True, "mirror half of the images; off for digits and letters")
    randaugment: RandAugment = key(RandAugment(), "RandAugment")
    mixup: float = key(0.0, "alpha of mixup, whose strength is Beta(alpha, alpha); 0 switches mixup off", ge=0)
    allow_new: bool = key(False, "allow fine-tuning with an augmentation that no ancestor was trained with", "mutable")

    @model_validator(mode="after")
    def _area_is_a_range(self) -> Augment:
        smallest, largest = self.crop_area
        if not 0 < smallest <= largest <= 1:
            raise ValueError(f"augment.crop_area is [{smallest}, {largest}]; it must be 0 < smallest <= largest <= 1")
        return self


class Train(Section):
    epochs: float | None = key(None, "length in passes over the training set; this or train.steps", "tracked", gt=0)
    steps: int | None = key(None, "length in optimizer steps; this or train.epochs", "tracked", ge=1)
    global_batch: int = key(4096, "samples per optimizer step on all ranks together", ge=1)
    micro_batch: int = key(64, "samples per forward pass on one rank", ge=1)
    batch_norm_group: int | None = key(
        None, "consecutive samples that share batch statistics, on one rank or on several; null: a micro batch", ge=2
    )
    precision: Literal["fp32", "bf16"] = key("bf16", "fp32, or bf16 (autocast with fp32 weights)", "mutable")
    activation_checkpointing: Literal["none", "all"] | tuple[int, ...] = key(
        "none", "stages whose activations the backward pass recomputes: none, all, or a list like [1, 2]", "mutable"
    )
    compile: bool = key(
        False,
        "fuse the operations of each block by torch.compile, once for equal blocks; takes minutes at each start; needs"
        " a compiler and Python.h",
        "mutable",
    )
    deterministic: bool = key(
        False,
        "on GPUs, the same bits in every run; an operation without a fixed order is an error; slower",
        "mutable",
    )
    loss: Literal["softmax", "sigmoid"] = key("softmax", "softmax, or sigmoid: a binary decision for each class")
    label_smoothing: float = key(
        0.1, "share of the target that is uniform over the classes (sigmoid: 1/2 for each; set 0.0001)", ge=0, lt=1
    )
    stochastic_depth: float = key(0.1, "drop rate of the last residual branch; rises linearly with depth", ge=0, lt=1)
    ema: float | None = key(0.9999, "decay of the moving average of all weights, warmed up; null: none", gt=0, lt=1)

    @model_validator(mode="after")
    def _batches_divide(self) -> Train:
        if (self.epochs is None) == (self.steps is None):
            both = "neither is" if self.epochs is None else "both are"
            raise ValueError(f"exactly one of train.epochs and train.steps must be set; {both}")
        group = self.batch_norm_group or self.micro_batch
        micro_batches = ("train.micro_batch", fitting_micro_batches(self, self.global_batch), self.micro_batch)
        if self.global_batch % self.micro_batch:
            unit = math.lcm(self.micro_batch, group)
            below = self.global_batch // unit * unit
            splits = self.micro_batch % group == 0 or group % self.micro_batch == 0
            batches = [batch for batch in (below, below + unit) if batch and splits]
            raise ValueError(
                f"train.global_batch={self.global_batch} is not a multiple of train.micro_batch={self.micro_batch};"
                f" {suggest(micro_batches, ('train.global_batch', batches, self.global_batch))}"
            )
        if self.micro_batch % group and group % self.micro_batch:
            groups = ("train.batch_norm_group", divisors(self.micro_batch)[1:], group)
            raise ValueError(
                f"train.micro_batch={self.micro_batch} and train.batch_norm_group={group}: one must divide the"
                f" other; {suggest(groups, micro_batches)}"
            )
        if self.global_batch % group:
            fitting = [each for each in divisors(self.global_batch)[1:] if each % self.micro_batch == 0]
            raise ValueError(
                f"train.global_batch={self.global_batch} is not a multiple of train.batch_norm_group={group};"
                f" {suggest(('train.batch_norm_group', fitting, group))}"
            )
        return self


class Optim(Section):
    learning_rate: float = key(1e-3, "peak learning rate", "tracked", gt=0)
    final_learning_rate: float = key(1e-5, "learning rate at the last step", "tracked", ge=0)
    warmup_steps: int = key(10000, "steps of linear warm-up from 0 to the peak", "tracked", ge=0)
    decay: Literal["cosine", "linear", "none"] = key("cosine", "how the rate falls after warm-up", "tracked")
    weight_decay: float = key(0.05, "AdamW's decoupled decay; biases, norms and bias tables are exempt", ge=0)
    grad_clip_norm: float = key(1.0, "maximum global gradient norm; 0: no clipping", ge=0)
    betas: tuple[float, float] = key((0.9, 0.999), "decay rates of AdamW's two moments")
    eps: float = key(1e-8, "AdamW's epsilon", gt=0)

    @model_validator(mode="after")
    def _betas_are_rates(self) -> Optim:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas is {list(self.betas)}; both must be at least 0 and below 1")
        return self


class Zero(Section):
    stage: Literal[1, 2, 3] = key(
        1,
        "DeepSpeed ZeRO stage: 1 shards optimizer states and EMA over the ranks, 2 also gradients, 3 also weights",
        "mutable",
    )
    offload: bool = key(False, "keep optimizer states and EMA in host memory, and run the optimizer there", "mutable")


class Evaluate(Section):
    every: int | None = key(1000, "steps between evaluations during training; null: only at the end", "mutable", ge=1)
    weights: Literal["model", "ema"] = key("ema", "weights to evaluate; model if there is no EMA", "mutable")
    crop_fraction: float | None = key(
        0.875,
        "evaluation's centre crop, as a share of the short side; null: no crop, the whole image is squeezed",
        "mutable",
        gt=0,
        le=1,
    )


class Checkpoint(Section):
    every: int = key(1000, "steps between checkpoints; the last step always has one", "mutable", ge=1)
    keep_last: int = key(3, "how many of the newest checkpoints are kept", "mutable", ge=1)
    keep_every: int | None = key(
        None, "checkpoints at multiples of this many steps are never removed; null: none", "mutable", ge=1
    )
    mirror: str | None = key(
        None,
        "folder or fsspec URL, used by this run only, where checkpoints are copied; null: none",
        "mutable",
        expanded=True,
        min_length=1,
    )


class Log(Section):
    every: int = key(10, "steps between lines of metrics.jsonl", "mutable", ge=1)
    samples: bool | Literal["pixels"] = key(
        False, "record in samples/ what every rank consumed; pixels: with checksums of the augmented pixels", "mutable"
    )
    wandb: str | None = key(
        None, "Weights & Biases project that receives the rows of metrics.jsonl; null: none", "mutable", min_length=1
    )
    profile: str | None = key(
        None, "first and last step, such as 100-105, that rank 0 traces with the profiler; null: none", "mutable"
    )

    @field_validator("profile", mode="before")
    @classmethod
    def _profile_is_a_range(cls, value: Any) -> Any:
        if value is not None and profiled_steps(value) is None:
            raise ValueError(
                f"log.profile is {json.dumps(value)}; it must be a first and a last step (from 1), as 100-105, or null"
            )
        return value


class Slurm(Section):
    nodes: int = key(1, "nodes of the job", "mutable", ge=1)
    min_nodes: int | None = key(None, "fewest nodes that the job may start on; null: all", "mutable", ge=1)
    gpus_per_node: int | None = key(None, "GPUs of each node; null: none", "mutable", ge=1)
    tasks_per_node: int | None = key(None, "ranks on each node; null: one for each GPU, or 1", "mutable", ge=1)
    cpus_per_task: int | None = key(None, "CPUs of each rank; null: the cluster's default", "mutable", ge=1)
    memory: str | None = key(None, "memory of each node, such as 200G; null: the cluster's default", "mutable")
    time: str = key("1-00:00:00", "time limit of one start: days-hours:minutes:seconds, or minutes", "mutable")
    partition: str | None = key(None, "partition; null: the cluster's default", "mutable")
    account: str | None = key(None, "account; null: the user's default", "mutable")
    qos: str | None = key(None, "quality of service; null: the default", "mutable")
    exclude: str | None = key(None, "nodes to exclude", "mutable")
    sbatch: tuple[str, ...] = key((), "further options of sbatch, such as [--reservation=ours]", "mutable")
    setup: tuple[str, ...] = key((), "shell lines before the ranks start: module loads, environments", "mutable")
    command_prefix: str | None = key(None, "words before each rank's command, such as a container's exec", "mutable")
    srun_args: tuple[str, ...] = key((), "further options of srun", "mutable")
    signal_seconds: int = key(
        300, "seconds before the time limit at which the ranks are asked to save and stop", "mutable", ge=1
    )
    max_restarts: int = key(20, "failures (crash, killed rank, hang) after which the job ends", "mutable", ge=0)
    backoff: float = key(
        60, "seconds before a restart after a failure; doubled while there is no progress", "mutable", ge=0
    )
    requeue: Literal["scontrol", "array"] | None = key(
        None,
        "how a job restarts: scontrol requeue, or the next array element; null: as the partition allows",
        "mutable",
    )

    @field_validator("time", mode="before")
    @classmethod
    def _time_is_a_duration(cls, value: Any) -> Any:
        time = str(value) if type(value) is int else value  # minutes, as checkpoints of older runs have them
        if isinstance(time, str) and parse_duration(time) is None and time.upper() not in ("UNLIMITED", "INFINITE"):
            raise ValueError(
                f"slurm.time is {json.dumps(time)}; it must be minutes, minutes:seconds, hours:minutes:seconds,"
                " days-hours[:minutes[:seconds]], or UNLIMITED"
            )
        return time

    @model_validator(mode="after")
    def _options_are_options(self) -> Slurm:
        if wrong := [option for option in self.sbatch if not option.startswith("--")]:
            raise ValueError(f"slurm.sbatch has {wrong[0]!r}; options begin with --, such as --reservation=ours")
        return self

    @model_validator(mode="after")
    def _fewer_nodes_are_fewer(self) -> Slurm:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"slurm.min_nodes is {self.min_nodes}, more than slurm.nodes, {self.nodes}; lower it")
        return self


class Config(Section):
    run: Run = Run()
    data: Data
    model: Model
    augment: Augment = Augment()
    train: Train
    optim: Optim = Optim()
    zero: Zero = Zero()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _has_a_fixed_order(self) -> Config:
        if self.train.deterministic and self.model.attention == "flex":
            raise ValueError(
                "train.deterministic is true and model.attention is flex, which adds up the bias's gradient in no fixed"
                " order; set model.attention=auto, or train.deterministic=false"
            )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Config:
        if self.train.compile and ranks_of_group(self.train) > 1:
            raise ValueError(
                "train.compile is true and train.batch_norm_group spans several ranks, which communicate inside"
                " blocks; set train.batch_norm_group to a micro batch or less, or train.compile=false"
            )
        return self


def profiled_steps(profile: object) -> range | None:
    """The steps of log.profile, counted as in metrics.jsonl; None where it names none."""
    found = re.fullmatch(r"([1-9]\d*)-(\d+)", profile) if isinstance(profile, str) else None
    return range(int(found[1]), int(found[2]) + 1) or None if found else None


def parse_duration(time: str) -> int | None:
    """Seconds of a time of Slurm: minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]].

    None where it is not a number, as UNLIMITED.
    """
    found = re.fullmatch(r"(?:([0-9]+)-)?([0-9]+)(?::([0-9]+))?(?::([0-9]+))?", time.strip())
    if found is None:
        return None
    days, *clock = found.groups()
    parts = [int(part) for part in clock if part is not None]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


@cache
def documented_keys() -> dict[str, dict[str, Any]]:
    """Every key by its full name, in order: `section`, `meaning`, `default`, `change`, `expanded`, `text`, `list`.

    The last two say whether it takes text, and a list. Lists of sections count as one key.
    """
    found: dict[str, dict[str, Any]] = {}

    def visit(section: type[Section], prefix: str) -> None:
        for name, info in section.model_fields.items():
            inner = section_type(info.annotation)
            if inner is not None:
                visit(inner, f"{prefix}{name}.")
            else:
                extra = info.json_schema_extra
                assert isinstance(extra, dict)
                kinds = {
                    "text": str in (info.annotation, *get_args(info.annotation)),
                    "list": get_origin(info.annotation) is tuple,
                }
                facts = {"section": section, "meaning": info.description, "default": info.default}
                found[prefix + name] = {**facts, **kinds, **extra}

    visit(Config, "")
    return found


def section_type(annotation: Any) -> type[Section] | None:
    """The section that a key of this type holds, if it holds one."""
    return None if get_origin(annotation) is tuple else _section_within(annotation)


def item_type(annotation: Any) -> type[Section] | None:
    """The section that each item of a list has, where a key of this type holds a list of sections."""
    lists = [each for each in (annotation, *get_args(annotation)) if get_origin(each) is tuple]
    return _section_within(lists[0]) if lists else None


def _section_within(annotation: Any) -> type[Section] | None:
    candidates = get_args(annotation) or (annotation,)
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, Section)), None)


def describe_type(section: type[Section], name: str) -> str:
    """What a key of a section may be: `a whole number at least 1, or null`."""
    return _describe(section.model_json_schema()["properties"][name])


def _describe(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return ", or ".join(map(_describe, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} numbers"
    kinds = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "null": "null"}
    kinds |= {"string": "text, not empty" if schema.get("minLength") else "text"}
    items = {"integer": "whole numbers", "string": "strings"}.get(schema.get("items", {}).get("type"), "sections")
    kinds |= {"array": f"a list of {items}"}
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    stated = [f"{word} {schema[limit]}" for limit, word in limits.items() if limit in schema]
    return f"{kinds.get(schema.get('type', ''), 'a section')} {' and '.join(stated)}".strip()

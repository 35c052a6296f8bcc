"""What a study compares, and the trainings that this takes: benchmarks/studies/*.yaml as data.

A study trains variants of one preset (keys that it sets) in stages: a share of the training set, or a fine-tuning of
an earlier stage. The learning rate of a variant is the best of RATES in a sweep with a seed of its own, in every stage
that begins from initial weights. A training's identity is what it computes, whichever study asks for it: the keys that
differ from the defaults and matter, the images, the seed, and what it begins from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from data.shards.manifest import read_manifest
from pipeline.config.core_yaml import read_yaml
from pipeline.config.parsing import read_config
from pipeline.config.schema import Config, documented_keys

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "benchmarks" / "studies"
RATES = (2e-3, 6e-3, 1.8e-2)
SWEEP_SEED = 100
"""None of those that are reported."""
_DECIDE = ("train.precision", "evaluate.crop_fraction", "evaluate.weights")
"""Keys that a run may change when it resumes, and that figures depend on."""

Record = dict[str, Any]
Case = tuple[str, str]
"""A variant and a stage."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Stage(_Part):
    """One training of every variant: on 1/share of the training set, `after` another stage if it tunes that one's.

    `paper` has what the paper prints beside it: columns, and in each a figure by variant.
    """

    share: int = 1
    after: str | None = None
    keys: dict[str, Any] = {}
    paper: dict[str, dict[str, str]] = {}


class Comparison(_Part):
    """A sum of figures, of the same seed, and its sign in the paper; a figure is "variant, stage"."""

    claim: str
    figure: Literal["top1", "train_loss", "eval_loss", "gap"] = "top1"
    plus: list[str]
    minus: list[str]
    paper: Literal["above 0", "below 0", "about 0", "says nothing"]


class Study(_Part):
    """A file of benchmarks/studies. With `speed` variants are timed."""

    title: str
    paper_says: str
    base: str = "configs/ablations/cifar10.yaml"
    variants: dict[str, dict[str, Any]]
    stages: dict[str, Stage]
    speed: bool = False
    comparisons: list[Comparison]


def read_study(path: Path) -> Study:
    """ValueError where the file, or what it names, isn't as described."""
    study = Study.model_validate(read_yaml(path.read_text(encoding="utf-8")))
    known = {f"{variant}, {stage}" for variant, stage in product(study.variants, study.stages)}
    named = {each for comparison in study.comparisons for each in (*comparison.plus, *comparison.minus)}
    if named - known:
        raise ValueError(
            f"{path}: {', '.join(sorted(named - known))}: not a variant and stage; choose from {sorted(known)}"
        )
    return study


@dataclass(frozen=True)
class Images:
    """Packed CIFAR-10, or what stands for it: training sets by their share, and the set to evaluate on."""

    train: Mapping[int, Path]
    val: Path
    _known: dict[Path, str] = field(default_factory=dict)

    def fingerprint(self, packed: Path) -> str:
        if packed not in self._known:
            found = read_manifest(str(packed)).fingerprint
            assert found is not None, f"{packed} was packed by an older version"
            self._known[packed] = found
        return self._known[packed]


@dataclass(frozen=True)
class Training:
    """One run: the preset, the keys set in it, on which images, with which seed, from which other's weights."""

    name: str
    preset: str
    keys: Mapping[str, Any]
    share: int
    seed: int
    images: Images
    source: Training | None = None

    @cached_property
    def overrides(self) -> list[str]:
        """What goes behind the preset on the command line, but for the folder."""
        keys = {**self.keys, "run.seed": self.seed}
        keys |= {"data.train": str(self.images.train[self.share]), "data.val": str(self.images.val)}
        return [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in keys.items()]

    @cached_property
    def config(self) -> Config:
        return read_config(str(ROOT / self.preset), self.overrides)

    @cached_property
    def decisive_keys(self) -> dict[str, Any]:
        """Keys that figures depend on and that differ from the defaults: a new key changes no identity."""
        found = {}
        for name, facts in documented_keys().items():
            value = _get(self.config.model_dump(mode="json"), name)
            decides = facts["change"] != "mutable" or name in _DECIDE
            default = list(facts["default"]) if isinstance(facts["default"], tuple) else facts["default"]
            if decides and value != default and name not in ("data.train", "run.seed"):
                found[name] = value
        return found

    @cached_property
    def id(self) -> str:
        sets = [self.images.fingerprint(packed) for packed in (self.images.train[self.share], self.images.val)]
        content = [self.decisive_keys, self.seed, sets, self.source and self.source.id]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Plan:
    """The trainings of a study; `more` are keys that all of them have, for a short form."""

    name: str
    study: Study
    images: Images
    seeds: Sequence[int]
    rates: Sequence[float] = RATES
    more: Mapping[str, Any] = field(default_factory=dict)

    def sweep(self) -> dict[Case, dict[float, Training]]:
        """The sweep of each variant, in each stage that begins from initial weights."""
        first = [name for name, stage in self.study.stages.items() if stage.after is None]
        return {
            (variant, stage): {rate: self._training(variant, stage, SWEEP_SEED, rate) for rate in self.rates}
            for stage, variant in product(first, self.study.variants)
        }

    def swept(self) -> list[Training]:
        """All trainings of the sweeps."""
        return [each for rates in self.sweep().values() for each in rates.values()]

    def chosen(self, records: Mapping[str, Record]) -> dict[Case, float]:
        """The rate of the best top-1 of each sweep; of equal ones the lowest."""
        return {
            case: max(rates, key=lambda rate: (records[rates[rate].id]["top1"] or 0.0, -rate))
            for case, rates in self.sweep().items()
        }

    def trainings(self, records: Mapping[str, Record]) -> dict[tuple[str, str, int], Training]:
        """Those that are reported, by variant, stage and seed, in the order in which they are best done."""
        rates = self.chosen(records)
        return {
            (variant, stage, seed): self._training(variant, stage, seed, rates[variant, self._first(stage)])
            for seed, stage, variant in product(self.seeds, self.study.stages, self.study.variants)
        }

    def on_record(self, records: Mapping[str, Record]) -> list[Training]:
        """All trainings of the study that have a record; of those that are reported none before all sweeps are."""
        swept = self.swept()
        reported = self.trainings(records).values() if all(each.id in records for each in swept) else ()
        return [each for each in (*swept, *reported) if each.id in records]

    def _training(self, variant: str, stage: str, seed: int, rate: float) -> Training:
        facts = self.study.stages[stage]
        keys = {"optim.learning_rate": rate, **self.study.variants[variant], **facts.keys, **self.more}
        source = None if facts.after is None else self._training(variant, facts.after, seed, rate)
        name = "-".join((self.name, variant, stage, f"{rate:g}", str(seed))).replace(" ", "_")
        return Training(name, self.study.base, keys, facts.share, seed, self.images, source)

    def _first(self, stage: str) -> str:
        """The stage whose initial weights a stage's trainings have come from."""
        after = self.study.stages[stage].after
        return stage if after is None else self._first(after)


def _get(tree: Any, name: str) -> Any:
    for part in name.split("."):
        tree = None if tree is None else tree[part]
    return tree

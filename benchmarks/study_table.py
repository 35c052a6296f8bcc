"""A study's table in Markdown: what was measured beside the paper's figures, and what follows, by fixed rules."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from benchmarks.machine import machine
from benchmarks.study import Comparison, Plan, Record, Training

SHOWN = {"top1": "top-1, %", "train_loss": "training loss", "eval_loss": "evaluation loss", "gap": "gap of the losses"}
DIGITS = {"top1": 1}
"""Of other figures 3."""
Trainings = Mapping[tuple[str, str, int], Training]


def table(
    plan: Plan, trainings: Trainings, records: Mapping[str, Record], speeds: Mapping[str, float]
) -> Iterator[str]:
    """All figures by variant and seed, the comparisons, the sweeps, and what made the records.

    `speeds` are images per second, where they were measured.
    """
    study = plan.study
    found = {case: records[training.id] for case, training in trainings.items()}
    rates = plan.chosen(records)
    yield f"# {study.title}\n"
    yield f"`coatnet bench ablations --train TAR --val TAR --out OUT --study {plan.name} --seeds {len(plan.seeds)}`\n"
    yield f"The paper: {study.paper_says.strip()}\n"
    if plan.more:
        yield f"A short form, which says nothing about the paper: {plan.more}.\n"
    for stage, facts in study.stages.items():
        printed = [f"the paper's {title}" for title in facts.paper]
        sizes = ["k parameters", "M multiply-adds", *["images/s"] * bool(speeds)]
        rows = [["variant", *sizes, "rate", *SHOWN.values(), *printed]]
        for variant in study.variants:
            seeds = [found[variant, stage, seed] for seed in plan.seeds]
            sizes = [f"{seeds[0]['parameters'] / 1e3:.0f}", f"{seeds[0]['multiply_adds'] / 1e6:.1f}"]
            sizes += [f"{speeds[variant]:.0f}"] if speeds else []
            rate = f"{seeds[0]['keys'].get('optim.learning_rate', 1e-3):g}"
            figures = [_by_seed([figure(row, name) for row in seeds], DIGITS.get(name, 3)) for name in SHOWN]
            papers = [column.get(variant, "") for column in facts.paper.values()]
            rows.append([variant, *sizes, rate, *figures, *papers])
        yield f"**{stage}**: mean ± standard deviation over seeds {', '.join(map(str, plan.seeds))}, and each\n"
        yield from _markdown(rows)
    if speeds:
        yield f"images/s: forward and backward on one core, the variants in turns; {machine()}.\n"
    for comparison in study.comparisons:
        differences = [_sum(comparison, found, seed) for seed in plan.seeds]
        yield f"- {_in_words(comparison, differences)}"
    yield "\nThe sweep of learning rates, top-1 in %, with a seed of its own:\n"
    sweep = plan.sweep()
    rows = [["variant", "stage", *(f"{rate:g}" for rate in plan.rates)]]
    for variant, stage in sweep:
        cells = [(rate, figure(records[each.id], "top1")) for rate, each in sweep[variant, stage].items()]
        rows.append(
            [variant, stage, *(_chosen(_number(top1, 1), rate == rates[variant, stage]) for rate, top1 in cells)]
        )
    yield from _markdown(rows)
    yield from _foot([*found.values(), *(records[each.id] for each in plan.swept())])


def figure(record: Record, name: str) -> float | None:
    """A figure as it is shown, top-1 in percent; None where the training diverged."""
    if None in (record["top1"], record["eval_loss"], record["train_loss"]):
        return None
    figures = {**record, "top1": 100 * record["top1"], "gap": record["eval_loss"] - record["train_loss"]}
    return figures[name]


def verdict(differences: Sequence[float | None], paper: str) -> str:
    """What differences, one for each seed, say of the paper's sign; their spread is the standard deviation."""
    if paper == "says nothing":
        return "the paper says nothing of it"
    known = [each for each in differences if each is not None]
    if len(known) < max(2, len(differences)):
        return "undecided: fewer than two seeds, or one that diverged"
    mean, spread = statistics.fmean(known), statistics.stdev(known)
    if paper == "about 0" and abs(mean) > spread:
        return "disagrees with the paper, where they are about equal"
    if paper == "about 0":
        return "agrees with the paper: about equal, the spread is larger than the difference"
    if abs(mean) <= spread:
        return "undecided: the spread is larger than the difference"
    sign = 1 if paper == "above 0" else -1
    agreeing = sum(sign * each > 0 for each in known)
    word, count = ("agrees", agreeing) if sign * mean > 0 else ("disagrees", len(known) - agreeing)
    return f"{word} with the paper in {'every seed' if count == len(known) else f'{count} of {len(known)} seeds'}"


def _sum(comparison: Comparison, found: Mapping[tuple[str, str, int], Record], seed: int) -> float | None:
    """The comparison's figures of a seed, added and subtracted; None where one of its trainings diverged."""
    signs = [(1, each) for each in comparison.plus] + [(-1, each) for each in comparison.minus]
    terms = []
    for sign, each in signs:
        variant, _, stage = each.rpartition(", ")
        terms.append((sign, figure(found[variant, stage, seed], comparison.figure)))
    return None if any(value is None for _, value in terms) else sum(sign * (value or 0.0) for sign, value in terms)


def _in_words(comparison: Comparison, differences: Sequence[float | None]) -> str:
    known = [each for each in differences if each is not None]
    digits, unit = DIGITS.get(comparison.figure, 3), "points" if comparison.figure == "top1" else "of loss"
    by_seed = ", ".join("diverged" if each is None else _signed(each, digits) for each in differences)
    mean = _signed(statistics.fmean(known), digits) if known else "none"
    what = f"{' + '.join(comparison.plus)} - {' - '.join(comparison.minus)}, {SHOWN[comparison.figure].rstrip(', %')}"
    judged = verdict(differences, comparison.paper)
    return f"{comparison.claim} ({what}): {mean} {unit} ({by_seed} by seed); **{judged}**."


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # + 0.0: no -0.0


def _by_seed(values: Sequence[float | None], digits: int) -> str:
    known = [each for each in values if each is not None]
    spread = f" ± {_number(statistics.stdev(known), digits)}" if len(known) > 1 else ""
    mean = _number(statistics.fmean(known) if known else None, digits)
    return f"{mean}{spread} ({', '.join(_number(each, digits) for each in values)})"


def _number(value: float | None, digits: int) -> str:
    return "diverged" if value is None else f"{value:.{digits}f}"


def _chosen(text: str, is_chosen: bool) -> str:
    return f"**{text}**" if is_chosen else text


def _markdown(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    head, *body = rows
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    yield from (f"| {' | '.join(row)} |" for row in body)
    yield ""


def _foot(records: Iterable[Record]) -> Iterator[str]:
    """Hours, and by which code and on which machines the records were made."""
    distinct = {row["id"]: row for row in records}.values()
    hours = sum(row["hours"] for row in distinct)
    yield f"{len(distinct)} trainings, {hours:.1f} hours of steps, some shared with other studies. Made by:\n"
    for (code, made_on), count in Counter((row["code"], row["machine"]) for row in distinct).most_common():
        yield f"- {count}: code {code}, {made_on}"
    for row in distinct:
        if row["skipped_steps"]:
            yield f"\n{row['name']}: {row['skipped_steps']} steps were not applied, since their loss was bad."

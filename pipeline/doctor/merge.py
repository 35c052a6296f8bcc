"""The findings of many ranks as those of one allocation, so that a hundred hosts are read like one. Pure.

What all say alike is one line; what they say differently is grouped by what was said, the odd ones with their hosts;
figures are said from the least to the most. The state is the worst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.doctor.findings import Check, State

SEVERITY: tuple[State, ...] = ("ok", "note", "missing", "broken")
ALIKE = {"Python", "torch", "DeepSpeed", "DALI", "nvImageCodec", "packages"}
"""What must be the same on all nodes: ranks of other versions compute other things, or do not understand each other."""
SAME_ENVIRONMENT = "make the environment the same on all nodes (slurm.setup, slurm.command_prefix)"
MOST_GROUPS = 4
MOST_NAMES = 4


@dataclass(frozen=True)
class Report:
    """What one rank found, and on which host."""

    host: str
    findings: tuple[Check, ...]


@dataclass(frozen=True)
class HostCheck:
    """One finding, and the host where it was found."""

    host: str
    finding: Check


def merge(reports: Sequence[Report]) -> list[Check]:
    """One finding for each thing that was looked at, in the order in which they were first looked at."""
    hosts = {report.host for report in reports}
    by_what: dict[str, list[HostCheck]] = {}
    for report in reports:
        for finding in report.findings:
            by_what.setdefault(finding.what, []).append(HostCheck(report.host, finding))
    return [_merged(what, said, len(hosts)) for what, said in by_what.items()]


def abbreviate(names: Iterable[object]) -> str:
    """Names one after the other, without repetition; of many the first ones, and how many more there are."""
    distinct = list(dict.fromkeys(map(str, names)))
    if len(distinct) <= MOST_NAMES:
        return ", ".join(distinct)
    return f"{', '.join(distinct[: MOST_NAMES - 1])} and {len(distinct) - MOST_NAMES + 1} more"


def _merged(what: str, said: list[HostCheck], hosts: int) -> Check:
    by_detail: dict[str, list[HostCheck]] = {}
    for each in said:
        by_detail.setdefault(each.finding.detail, []).append(each)
    groups = sorted(by_detail.values(), key=lambda group: (-max(map(_severity, group)), -len(group)))
    shown, more = groups[:MOST_GROUPS], len(groups) - MOST_GROUPS
    texts = [_names(group, hosts) + _text(group) for group in shown] + ([f"and {more} more"] if more > 0 else [])
    advice = [each.finding.advice for group in shown for each in group if each.finding.advice]
    worst = max(map(_severity, said))
    if what in ALIKE and len(groups) > 1:
        worst, advice = SEVERITY.index("broken"), [*advice, SAME_ENVIRONMENT]
    return Check(what, SEVERITY[worst], "; ".join(texts), "; ".join(dict.fromkeys(advice)))


def _severity(said: HostCheck) -> int:
    return SEVERITY.index(said.finding.state)


def _names(group: list[HostCheck], hosts: int) -> str:
    """Where it was found, as the beginning of a line; nothing where there is but one host."""
    named = {each.host for each in group}
    if hosts == 1:
        return ""
    return f"on all {hosts} hosts: " if len(named) == hosts else f"{abbreviate(each.host for each in group)}: "


def _text(group: list[HostCheck]) -> str:
    """What all of a group said, with figures from the least to the most and whose they are."""
    names = dict.fromkeys(figure.what for each in group for figure in each.finding.figures)
    return "; ".join(filter(None, [group[0].finding.detail, ", ".join(_spread(name, group) for name in names)]))


def _spread(name: str, group: list[HostCheck]) -> str:
    measured = [(figure, each.host) for each in group for figure in each.finding.figures if figure.what == name]
    least, where_least = min(measured, key=lambda each: each[0].value)
    most, where_most = max(measured, key=lambda each: each[0].value)
    if str(least) == str(most):
        return str(least)
    return f"{name} {least.amount} ({where_least}) to {most.amount} ({where_most})"

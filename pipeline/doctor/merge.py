"""The checks of many ranks as those of one allocation, so that a hundred hosts are read like one. Pure.

Equal checks are one line; where hosts differ, the worst comes first, with its hosts. The state is the worst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.doctor.checks import SEVERITY, Check

ALIKE = {"Python", "torch", "DeepSpeed", "DALI", "nvImageCodec", "packages"}
"""What must be the same on all nodes: other versions compute other things, or do not understand each other."""
SAME_ENVIRONMENT = "make the environment the same on all nodes (slurm.setup, slurm.command_prefix)"
MOST_GROUPS = 4
MOST_NAMES = 4


@dataclass(frozen=True)
class Report:
    """The checks of one rank, and its host."""

    host: str
    checks: tuple[Check, ...]


def merge(reports: Sequence[Report]) -> list[Check]:
    """One check for each thing that was tried, in the order of the first reports."""
    hosts = {report.host for report in reports}
    by_what: dict[str, list[tuple[str, Check]]] = {}
    for report in reports:
        for check in report.checks:
            by_what.setdefault(check.what, []).append((report.host, check))
    return [_merge(what, found, len(hosts)) for what, found in by_what.items()]


def abbreviate(names: Iterable[object]) -> str:
    """Distinct names as a list; of many the first ones, and how many more there are."""
    distinct = list(dict.fromkeys(map(str, names)))
    if len(distinct) <= MOST_NAMES:
        return ", ".join(distinct)
    return f"{', '.join(distinct[: MOST_NAMES - 1])} and {len(distinct) - MOST_NAMES + 1} more"


def _merge(what: str, found: list[tuple[str, Check]], hosts: int) -> Check:
    equal: dict[tuple[str, str, str], tuple[Check, list[str]]] = {}
    for host, check in found:
        equal.setdefault((check.state, check.detail, check.advice), (check, []))[1].append(host)
    groups = sorted(equal.values(), key=lambda group: (-SEVERITY.index(group[0].state), -len(group[1])))
    texts = [_text(check, names, hosts) for check, names in groups[:MOST_GROUPS]]
    if len(groups) > MOST_GROUPS:
        texts.append(f"and {len(groups) - MOST_GROUPS} more")
    state, advice = groups[0][0].state, [check.advice for check, _ in groups[:MOST_GROUPS] if check.advice]
    if what in ALIKE and len({check.detail for check, _ in groups}) > 1:
        state, advice = "broken", [*advice, SAME_ENVIRONMENT]
    return Check(what, state, "; ".join(texts), "; ".join(dict.fromkeys(advice)))


def _text(check: Check, names: list[str], hosts: int) -> str:
    """What equal checks say, after the hosts that say so; figures are those of the first."""
    if hosts == 1:
        return str(check)
    where = f"on all {hosts} hosts" if len(set(names)) == hosts else abbreviate(names)
    whose = f" (measured on {names[0]})" if check.figures and len(set(names)) > 1 else ""
    return f"{where}: {check}{whose}"

"""What the doctor finds: one thing that was tried, with its state, its advice and its figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

State = Literal["ok", "missing", "note", "broken"]


@dataclass(frozen=True)
class Measurement:
    """What was measured, and differs a little each time and from machine to machine."""

    what: str
    value: float
    unit: str

    @property
    def amount(self) -> str:
        """The value as it is read, with its unit."""
        return f"{self.value:{',.0f' if abs(self.value) >= 100 else '.3g'}} {self.unit}"

    def __str__(self) -> str:
        return f"{self.what} {self.amount}"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `missing` and `broken` keep the training from working; a `note` does not."""

    what: str
    state: State
    detail: str
    advice: str = ""
    figures: tuple[Measurement, ...] = ()

    def __str__(self) -> str:
        return "; ".join(filter(None, [self.detail, ", ".join(map(str, self.figures))]))


def exit_status(findings: list[Check]) -> int:
    """0 where everything needed is there and works, else 1."""
    return int(any(finding.state in ("missing", "broken") for finding in findings))


def rows(findings: list[Check]) -> list[tuple[str, str, str, str]]:
    """(mark, what, detail, advice) for a table, what needs doing first."""
    marks = {"broken": "BROKEN", "missing": "MISSING", "note": "note", "ok": "ok"}
    order = list(marks)
    worst_first = sorted(findings, key=lambda finding: order.index(finding.state))
    return [(marks[each.state], each.what, str(each), each.advice) for each in worst_first]


def checks_of(found: list[dict[str, Any]]) -> list[Check]:
    """Findings that went through JSON as asdict makes them."""
    return [
        replace(Check(**each), figures=tuple(Measurement(**figure) for figure in each["figures"])) for each in found
    ]

"""A check of the doctor: what was tried, how that ended, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

State = Literal["ok", "note", "missing", "broken"]
SEVERITY: tuple[State, ...] = ("ok", "note", "missing", "broken")


@dataclass(frozen=True)
class Check:
    """One thing that was tried. `missing` and `broken` keep the training from working; a `note` does not."""

    what: str
    state: State
    detail: str
    advice: str = ""
    figures: dict[str, str] = field(default_factory=dict)
    """What was measured, with its unit: it differs a little each time, so it is not part of the detail."""

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value}" for name, value in self.figures.items())
        return "; ".join(filter(None, [self.detail, figures]))


def exit_status(checks: list[Check]) -> int:
    """0 where everything needed is there and works, else 1."""
    return int(any(check.state in ("missing", "broken") for check in checks))


def render(checks: list[Check]) -> str:
    """The checks as text, the worst first; advice is a line of its own."""
    lines = []
    for check in sorted(checks, key=lambda check: -SEVERITY.index(check.state)):
        mark = check.state.upper() if exit_status([check]) else check.state
        lines.append(f"{mark:8}{check.what:14}{check}".rstrip())
        if check.advice:
            lines.append(f"{'':22}-> {check.advice}")
    return "\n".join(lines)

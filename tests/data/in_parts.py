"""Parts of some work as machines may come by them: in any order, two at once, killed somewhere, and run twice."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from hypothesis import strategies as st

from data.packing.index import Report
from data.packing.parts import NotLast
from data.packing.work import Part

Rounds = list[list[tuple[Part, int | None]]]
"""One or two parts at once, each with the number of its shards after which it is killed."""


class Killed(Exception):
    """Raised in the middle of a part."""


@st.composite
def rounds(draw: st.DrawFn) -> Rounds:
    """One, three or eight parts, and the plan alone; in the end all are run again, since some were killed."""
    of = draw(st.sampled_from([1, 3, 8]))
    parts = draw(st.permutations([Part(number, of) for number in range(of + 1)]))
    parts = [*parts, *draw(st.lists(st.sampled_from(parts), max_size=2))]
    runs = [(part, draw(st.none() | st.integers(0, 3))) for part in parts]
    at_once = draw(st.integers(1, 2))
    again: Rounds = [[(Part(number, of), None)] for number in range(1, of + 1)]
    return [runs[begin : begin + at_once] for begin in range(0, len(runs), at_once)] + again


def run_in_parts(run: Callable[..., Report], plan: Rounds) -> list[Report]:
    """The reports of those parts that had one; what else they raise is raised."""

    def attempt(one: tuple[Part, int | None]) -> Report | None:
        part, killed_at = one

        def progress(done: int, total: int) -> None:
            if done == killed_at:
                raise Killed

        options: dict[str, Any] = {"part": part, "progress": progress}
        try:
            return run(**options)
        except (NotLast, Killed):
            return None

    with ThreadPoolExecutor(2) as pool:
        return [report for each in plan for report in pool.map(attempt, each) if report]

"""How often to save where nodes fail, and what part of the time then makes progress (Daly 2006, FGCS 22, 303-312).

Failures come at random, on average every `between_failures` seconds of the whole job; a save stops the training for
`stall` seconds; a failure costs `restart` seconds beside the work since the last save. Seconds throughout.
"""

from __future__ import annotations

import math

MOST = 10
"""Failures within an interval, past which the training never ends."""


def best_interval(stall: float, between_failures: float) -> float:
    """Seconds of training between saves that lose the least time (Daly, Eq. 37; its first term is Young's, 1974)."""
    if stall >= 2 * between_failures:
        return between_failures
    ratio = stall / (2 * between_failures)
    return math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def goodput(interval: float, stall: float, restart: float, between_failures: float) -> float:
    """The share of the time in which steps are done that are not lost, 0 to 1 (Daly, Eq. 20)."""
    if restart + interval + stall > MOST * between_failures:
        return 0.0
    wall = between_failures * math.exp(restart / between_failures) * math.expm1((interval + stall) / between_failures)
    return interval / wall

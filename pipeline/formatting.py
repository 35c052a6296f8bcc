"""Quantities as text: durations, numbers, percentages, sizes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
PREFIXES = ("", "k", "M", "G", "T", "P")


def format_duration(seconds: float) -> str:
    """In the largest unit and the next: 2 d 3 h, 4 min 10 s, 12 s."""
    whole = round(seconds)
    first = next((n for n, (_, length) in enumerate(UNITS) if whole >= length), len(UNITS) - 1)
    parts = []
    for unit, length in UNITS[first : first + 2]:
        count, whole = divmod(whole, length)
        parts.append(f"{count:,} {unit}")
    return " ".join(parts)


def format_seconds(seconds: float) -> str:
    """With three digits where they are few: 12.3 ms, 1.25 s, 4 min 10 s."""
    if seconds >= 60:
        return format_duration(seconds)
    return f"{format_number(seconds)} s" if seconds >= 1 else f"{format_number(1000 * seconds)} ms"


def format_number(value: float) -> str:
    """With three digits, or whole: 0.0523, 5.12, 690, 3,410."""
    return f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:#.3g}"


def format_lr(value: float) -> str:
    """A learning rate: 1.2e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def format_percent(share: float, digits: int = 0) -> str:
    """Of a share from 0 to 1: 41 %."""
    return f"{100 * share:.{digits}f} %"


def format_si(value: float, unit: str = "") -> str:
    """With a thousand's prefix: 382 k, 4.21 G, and with the unit B 1.53 MB."""
    power = 0
    while abs(value) >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{format_number(value) if power else format(value, '.0f')} {PREFIXES[power]}{unit}".rstrip()


def format_ranges(numbers: Iterable[int]) -> list[str]:
    """Numbers with consecutive ones as ranges: 1, 4-6."""
    distinct = set(numbers)
    firsts = sorted(number for number in distinct if number - 1 not in distinct)
    lasts = sorted(number for number in distinct if number + 1 not in distinct)
    return [f"{first}-{last}" if last > first else f"{first}" for first, last in zip(firsts, lasts, strict=True)]


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """With the noun's form for the number: 1 pass, 2 passes."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"

"""Where the marks of a plot lie: pure geometry, which the templates draw as SVG.

Each plot is made twice, wide and narrow, because text inside a scaled picture becomes too small
to read on a phone; the style sheet shows one of them. Lengths are in SVG user units, which are CSS
pixels at the plot's own width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from tidings_client.progress import size_text

from .pages_facts import Step

WIDE = 900
NARROW = 300
_LEFT = 62  # for the labels of sizes
_RIGHT = 14
_TOP = 12
_BOTTOM = 26  # for the dates
_PER_MARK = 12  # least distance of two steps, so that marks do not touch
_PER_DATE = 84  # of two dates
_BAR = 26  # most


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the grid at height *y*, and what it stands for."""

    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Date:
    """A date below the marks, centred at *x*."""

    x: float
    text: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A step: its *x*, the heights of its values, and all of it in words."""

    x: float
    full: float
    update: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar that stands on the base line."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True, slots=True)
class Frame:
    """What all plots have."""

    name: str  #: "wide" or "narrow"
    width: float
    height: float
    left: float
    right: float
    base: float
    lines: tuple[Line, ...]
    dates: tuple[Date, ...]


@dataclass(frozen=True, slots=True)
class UpdatePlot:
    """Updates against whole files, on a logarithmic axis."""

    frame: Frame
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class ChurnPlot:
    """Bytes of each publish's pack. *left_out* is the oldest one where it dwarfs the others."""

    frame: Frame
    bars: tuple[Bar, ...]
    left_out: Step | None


def update_plots(steps: Sequence[Step]) -> tuple[UpdatePlot, ...]:
    """Wide and narrow; nothing where no step is known."""
    known = [step for step in steps if step.full]
    return tuple(_update_plot(known, name, width) for name, width in _SIZES) if known else ()


def churn_plots(steps: Sequence[Step]) -> tuple[ChurnPlot, ...]:
    """Wide and narrow; nothing where there is one snapshot alone."""
    left_out = None
    shown = list(steps)
    if len(shown) > 1 and shown[0].pack_bytes > 3 * max(step.pack_bytes for step in shown[1:]):
        left_out = shown.pop(0)
    if len(steps) < 2:
        return ()
    return tuple(_churn_plot(shown, left_out, name, width) for name, width in _SIZES)


_SIZES = (("wide", WIDE), ("narrow", NARROW))


def _update_plot(steps: Sequence[Step], name: str, width: int) -> UpdatePlot:
    height = 260.0
    steps = _latest(steps, width)
    values = [value for step in steps for value in (step.full, step.update) if value]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    base = height - _BOTTOM

    def place(value: int | None) -> float:
        at = math.log10(value) if value else low  # no byte at all lies on the base line
        return round(base - (at - low) / (high - low) * (base - _TOP), 1)

    lines = tuple(Line(place(10**power), round_size(10**power)) for power in range(low, high + 1))
    xs = _places(len(steps), width)
    marks = tuple(
        Mark(x, place(step.full), place(step.update), _told(step))
        for x, step in zip(xs, steps, strict=True)
    )
    return UpdatePlot(_frame(name, width, height, lines, xs, steps), marks)


def _told(step: Step) -> str:
    sizes = f"{size_text(step.update or 0)} instead of {size_text(step.full or 0)}"
    return f"Snapshot {step.serial}, {day(step.time)}: {sizes}"


def _churn_plot(steps: Sequence[Step], left_out: Step | None, name: str, width: int) -> ChurnPlot:
    height = 190.0
    steps = _latest(steps, width)
    top, ticks = scale(max(step.pack_bytes for step in steps))
    base = height - _BOTTOM

    def place(value: float) -> float:
        return round(base - value / top * (base - _TOP), 1)

    xs = _places(len(steps), width)
    room = (width - _LEFT - _RIGHT) / len(steps)
    wide = round(min(_BAR, room * 0.7), 1)
    bars = tuple(
        Bar(
            round(x - wide / 2, 1),
            place(step.pack_bytes),
            wide,
            round(base - place(step.pack_bytes), 1),
            f"Snapshot {step.serial}, {day(step.time)}: {size_text(step.pack_bytes)}",
        )
        for x, step in zip(xs, steps, strict=True)
    )
    lines = tuple(Line(place(tick), round_size(tick)) for tick in ticks)
    return ChurnPlot(_frame(name, width, height, lines, xs, steps), bars, left_out)


def _frame(
    name: str,
    width: int,
    height: float,
    lines: tuple[Line, ...],
    xs: Sequence[float],
    steps: Sequence[Step],
) -> Frame:
    dates = tuple(_dates(xs, [step.time for step in steps], width))
    return Frame(name, width, height, _LEFT, width - _RIGHT, height - _BOTTOM, lines, dates)


def _latest(steps: Sequence[Step], width: int) -> Sequence[Step]:
    """As many as have room."""
    return steps[-((width - _LEFT - _RIGHT) // _PER_MARK) :]


def _places(count: int, width: int) -> list[float]:
    room = (width - _LEFT - _RIGHT) / count
    return [round(_LEFT + room * (number + 0.5), 1) for number in range(count)]


def _dates(xs: Sequence[float], times: Sequence[int], width: int) -> list[Date]:
    """Dates with room between them, the last one always; a day is written once."""
    found: list[Date] = []
    half = _PER_DATE / 2 - 8
    for x, time in sorted(zip(xs, times, strict=True), reverse=True):
        text = day(time)
        at = min(max(x, half), width - half)
        if not found or (found[-1].x - at >= _PER_DATE and found[-1].text != text):
            found.append(Date(round(at, 1), text))
    return found


def scale(most: int) -> tuple[int, list[int]]:
    """A round end of an axis from 0, not below *most*, and the values at its 3 to 6 lines."""
    most = max(most, 1)
    power = 10 ** math.floor(math.log10(most))
    step = next(
        (s for s in _steps(power) if most <= 5 * s),
        power * 2,
    )
    count = math.ceil(most / step)
    return count * step, [step * number for number in range(count + 1)]


def _steps(power: int) -> list[int]:
    return [max(1, power // 5), max(1, power // 2), power, power * 2]


def round_size(value: int) -> str:
    """A round number of bytes: ``10 KB``, not ``10.0 KB``."""
    return size_text(value).replace(".0 ", " ")


def day(time: int) -> str:
    """``2026-07-01``, in UTC; "unknown" for what no calendar has."""
    return _calendar(time, lambda at: at.strftime("%Y-%m-%d"))


def minute(time: int) -> str:
    """``2026-07-01 06:00 UTC``."""
    return _calendar(time, lambda at: at.strftime("%Y-%m-%d %H:%M UTC"))


def machine(time: int) -> str:
    """``2026-07-01T06:00:00Z``."""
    return _calendar(time, lambda at: at.strftime("%Y-%m-%dT%H:%M:%SZ"))


def _calendar(time: int, write: Callable[[datetime], str]) -> str:
    try:
        return write(datetime.fromtimestamp(time, UTC))
    except (ValueError, OverflowError, OSError):
        return "unknown"  # a time of a head is any integer

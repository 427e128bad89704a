"""Charts as SVG inside a page: the style sheet of the page colours them, so that they follow its theme, and text
stays text.

Lines have the classes c0, c1 ... of their colour; a dashed one is a floor. Sizes are in units of the drawing, which
is scaled to the width that there is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from smalllm.reporting.markup import Markup, element, joined

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 40
COLOURS = 6
MOST_POINTS = 500
EARLY = 0.04
"""Share of the axis, at its beginning, whose values need not be in sight: the first loss is so high that it would
flatten the rest."""
SMOOTHING = 0.02


@dataclass(frozen=True)
class Line:
    """A curve. ``marked`` draws its points with their values; ``noisy`` draws it faint, with its running mean."""

    name: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]
    marked: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Scale:
    """Numbers to places: ``low`` is at ``start``, ``high`` at ``end``; by their logarithms if ``logarithmic``."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            math.log(max(one, 1e-300)) if self.logarithmic else one for one in (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on it, about so many."""
        return (
            log_ticks(self.low, self.high)
            if self.logarithmic and self.high > 4 * self.low
            else ticks(self.low, self.high, most)
        )


def curves(
    title: str, lines: Sequence[Line], below: str, floor: float | None = None, logarithmic: bool = False
) -> Markup:
    """A chart of lines over one axis, named ``below``; a dashed floor where one is given. ``logarithmic`` holds where
    all values are above 0. Empty when there is nothing to draw."""
    lines = [line for line in lines if line.x]
    if not lines:
        return Markup("")
    x, y = _scales(lines, floor, logarithmic)
    drawing = element(
        "svg", _grid(x, y, below), *(_line(line, x, y) for line in lines),
        _floor(floor, y) if floor is not None else "", *(_marks(line, x, y) for line in lines),
        viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title,
    )  # fmt: skip
    return element("figure", element("figcaption", title), drawing, class_="chart")


def _scales(lines: Sequence[Line], floor: float | None, logarithmic: bool) -> tuple[Scale, Scale]:
    left, right = min(min(line.x) for line in lines), max(max(line.x) for line in lines)
    left = 0.0 if left < right / 4 else left
    right = right if right > left else left + 1
    late = left + EARLY * (right - left)
    points = [point for line in lines for point in zip(line.x, line.y, [line.marked] * len(line.x), strict=True)]
    seen = [value for place, value, marked in points if marked or place >= late] or [line.y[-1] for line in lines]
    seen += [floor] if floor is not None else []
    below, above = LEFT, WIDTH - RIGHT
    return Scale(left, right, below, above), _upright(min(seen), max(seen), logarithmic)


def _upright(low: float, high: float, logarithmic: bool) -> Scale:
    """The scale of values from low to high, with some room around them; from 0 where low is not far from it."""
    if logarithmic and low > 0:
        room = max((high / low) ** 0.06, 1.005)
        return Scale(low / room, high * room, HEIGHT - BOTTOM, TOP, True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = 0.0 if low >= 0 and low < 0.25 * high else low - room
    return Scale(low, high + room, HEIGHT - BOTTOM, TOP)


def _grid(x: Scale, y: Scale, below: str) -> Markup:
    rows = [
        joined((
            element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick)),
            element("text", short(tick), class_="tick end", x=LEFT - 7, y=y(tick) + 4),
        ))
        for tick in y.ticks(5)
    ]  # fmt: skip
    columns = [
        element("text", short(tick), class_="tick middle", x=x(tick), y=HEIGHT - BOTTOM + 17) for tick in x.ticks(6)
    ]
    name = element("text", below, class_="axis end", x=WIDTH - RIGHT, y=HEIGHT - 5)
    return joined((*rows, *columns, name))


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    thin = element(
        "polyline",
        class_=f"line c{line.colour % COLOURS}{' faint' if line.noisy else ''}",
        points=_points(line.x, line.y, x, y),
    )
    if not line.noisy:
        return thin
    smooth = running_mean(line.y, max(1, round(SMOOTHING * len(line.y))))
    return joined(
        (thin, element("polyline", class_=f"line c{line.colour % COLOURS}", points=_points(line.x, smooth, x, y)))
    )


def _points(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    """Those in sight; what is above the drawing is cut off at its edge."""
    stride = -(-len(xs) // MOST_POINTS)
    chosen = [*range(0, len(xs), stride)]
    chosen += [len(xs) - 1] if chosen[-1] != len(xs) - 1 else []
    return " ".join(f"{x(xs[i]):.1f},{max(TOP / 2, y(ys[i])):.1f}" for i in chosen if math.isfinite(ys[i]))


def _marks(line: Line, x: Scale, y: Scale) -> Markup:
    if not line.marked:
        return Markup("")
    inside = [(one, value) for one, value in zip(line.x, line.y, strict=True) if y(value) >= TOP / 2]
    marks = []
    for one, value in inside:
        told = element("title", f"{line.name}: {value:.4f} at {short(one)}")
        marks.append(element("circle", told, class_=f"mark c{line.colour % COLOURS}", cx=x(one), cy=y(value), r=3.0))
    return joined(marks)


def _floor(value: float, y: Scale) -> Markup:
    return joined((
        element("line", class_="floor", x1=LEFT, x2=WIDTH - RIGHT, y1=y(value), y2=y(value)),
        element("text", f"floor {value:.3f}", class_="tick halo", x=LEFT + 4, y=y(value) - 5),
    ))  # fmt: skip


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each.

    >>> running_mean([2.0, 4.0, 6.0], 2)
    [2.0, 3.0, 5.0]
    """
    windows = (values[max(0, place + 1 - width) : place + 1] for place in range(len(values)))
    return [sum(window) / len(window) for window in windows]


# ── intervals ──


def whisker(
    value: float, interval: tuple[float, float], span: tuple[float, float], colour: int, floor: float | None = None
) -> Markup:
    """A point with its interval on a line that spans ``span``, for a cell of a table."""
    place = Scale(*span, 6, 154)
    return element(
        "svg", element("line", class_="grid", x1=0, x2=160, y1=9, y2=9),
        element("line", class_="floor", x1=place(floor), x2=place(floor), y1=0, y2=18) if floor is not None else "",
        element("line", class_=f"whisker c{colour % COLOURS}", x1=place(interval[0]), x2=place(interval[1]), y1=9, y2=9),
        element("circle", class_=f"mark c{colour % COLOURS}", cx=place(value), cy=9, r=4),
        viewBox="0 0 160 18", class_="whiskers", aria_hidden="true",
    )  # fmt: skip


def difference(value: float, interval: tuple[float, float], strict: tuple[float, float]) -> Markup:
    """A difference with both of its intervals, and where no difference is."""
    edges = [value, *interval, *strict, 0.0]
    room = 0.08 * (max(edges) - min(edges)) or 1e-4
    x = Scale(min(edges) - room, max(edges) + room, 12, WIDTH - 12)
    marks = [
        element("text", short(tick), class_="tick middle", x=x(tick), y=66)
        for tick in ticks(x.low, x.high, 6) if 24 < x(tick) < WIDTH - 24
    ]  # fmt: skip
    return element(
        "svg", element("line", class_="grid", x1=12, x2=WIDTH - 12, y1=50, y2=50),
        element("line", class_="zero", x1=x(0.0), x2=x(0.0), y1=8, y2=50),
        element("line", class_="whisker thin c0", x1=x(strict[0]), x2=x(strict[1]), y1=29, y2=29),
        element("line", class_="whisker c0", x1=x(interval[0]), x2=x(interval[1]), y1=29, y2=29),
        element("circle", class_="mark c0", cx=x(value), cy=29, r=6), *marks,
        viewBox=f"0 0 {WIDTH} 72", role="img", class_="difference",
        aria_label=f"difference {value:+.4f}, 95 % interval {interval[0]:+.4f} to {interval[1]:+.4f} bits per byte",
    )  # fmt: skip


# ── numbers ──


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many.

    >>> ticks(0.0, 1.0, 5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    >>> ticks(0.13, 0.41, 6)
    [0.15, 0.2, 0.25, 0.3, 0.35, 0.4]
    """
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        nice * power
        for nice in (1, 2, 2.5, 5, 10, 20)
        if math.floor(high / (nice * power)) - math.ceil(low / (nice * power)) < most
    )
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from low to high.

    >>> log_ticks(0.17, 3.0)
    [0.2, 0.5, 1.0, 2.0]
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    return [tick for tick in found if low <= tick <= high]


def short(number: float) -> str:
    """A number for an axis.

    >>> [short(number) for number in (0, 0.025, 1500, 20000, 2.5e6, 0.00015)]
    ['0', '0.025', '1.5k', '20k', '2.5M', '1.5e-4']
    """
    size = abs(number)
    if size >= 1e9:
        return f"{number / 1e9:g}B"
    if size >= 1e6:
        return f"{number / 1e6:g}M"
    if size >= 1e3:
        return f"{number / 1e3:g}k"
    if 0 < size < 1e-3:
        digits, _, power = f"{number:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{number:.6g}"

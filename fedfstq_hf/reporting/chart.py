"""Axes of the page's charts: a range, linear or logarithmic, and round values to mark on it."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`; `text_of` writes a mark."""

    label: str
    low: float
    high: float
    log: bool
    text_of: Callable[[float], str]
    fixed_marks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Where `value` stands, 0 at `low` and 1 at `high`."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """At most eight round values within the range, or those that were fixed."""
        if self.fixed_marks:
            return list(self.fixed_marks)
        return _log_marks(self.low, self.high) if self.log else _linear_marks(self.low, self.high)


def make_axis(
    label: str,
    values: Iterable[float],
    *,
    log: bool = False,
    zero: bool = False,
    text_of: Callable[[float], str] = lambda value: f"{value:g}",
) -> Axis:
    """An axis around `values` with a little room; `zero` begins a linear one at 0. Log axes take values above 0."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.04, 1.1)
        return Axis(label, low / room, high * room, True, text_of)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, 0.0 if zero else low - room, high + room, False, text_of)


def _linear_marks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        marks = [factor * 10.0**k for k in decades for factor in factors if low <= factor * 10.0**k <= high]
        if len(marks) < 2:
            return _linear_marks(low, high)
        if len(marks) <= 7:
            return marks
    return marks[:: math.ceil(len(marks) / 7)]


WIDTH, HEIGHT = 560, 350
_LEFT, _RIGHT, _TOP, _BOTTOM = 74, 14, 14, 46
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")
_MARKERS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "M-3.6-3.6h7.2v7.2h-7.2z",
    "M0-4.6L4.4 3.4H-4.4z",
    "M0-5L4.4 0 0 5-4.4 0z",
    "M0 4.6L4.4-3.4H-4.4z",
    "M-4.4-1.5h2.9v-2.9h3v2.9h2.9v3h-2.9v2.9h-3v-2.9h-2.9z",
    "M-5-2.4h10v4.8h-10z",
    "M-2.4-5h4.8v10h-4.8z",
)
NUM_COLORS = len(_MARKERS)

Point = tuple[float, float, float]
"""x, y and the spread of y (0 with one seed)."""


@dataclass(frozen=True)
class Series:
    """A line; `style` counts from 0 and fixes color, marker and dash."""

    label: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    `levels` are horizontal lines named at their left end, `ends` others named at their right end; `alt` says in words
    what the chart shows.
    """

    key: str
    title: str
    alt: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    levels: Sequence[tuple[float, str]] = ()
    ends: Sequence[tuple[float, str]] = ()


def draw(chart: Chart) -> str:
    """The chart as one `<svg>` element."""
    names = {"aria-labelledby": f"{chart.key}-title {chart.key}-desc", "role": "img", "class": "chart"}
    root = ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", **names})
    _text(root, "title", chart.title, id=f"{chart.key}-title")
    _text(root, "desc", chart.alt, id=f"{chart.key}-desc")
    clip = ET.SubElement(ET.SubElement(root, "clipPath", id=f"{chart.key}-clip"), "rect")
    clip.attrib |= {
        "x": f"{_LEFT - 6}",
        "y": f"{_TOP - 6}",
        "width": f"{WIDTH - _LEFT - _RIGHT + 12}",
        "height": f"{HEIGHT - _TOP - _BOTTOM + 12}",
    }
    _draw_axes(root, chart)
    inside = ET.SubElement(root, "g", {"clip-path": f"url(#{chart.key}-clip)"})
    for series in chart.series:
        _draw_series(inside, chart, series)
    _draw_levels(root, chart)
    return ET.tostring(root, encoding="unicode")


def draw_swatch(style: int) -> str:
    """A line's sample for the legend."""
    root = ET.Element("svg", {"viewBox": "0 0 44 14", "class": f"swatch s{style % NUM_COLORS}", "aria-hidden": "true"})
    ET.SubElement(root, "path", {"d": "M1 7H43", "class": "line", **_dash(style)})
    _marker(root, style, 22, 7)
    return ET.tostring(root, encoding="unicode")


def _draw_axes(root: ET.Element, chart: Chart) -> None:
    bottom = HEIGHT - _BOTTOM
    for value in chart.x.marks():
        x = _x(chart, value)
        ET.SubElement(root, "path", {"class": "grid", "d": f"M{x:.1f} {_TOP}V{bottom}"})
        _text(root, "text", chart.x.text_of(value), x=f"{x:.1f}", y=f"{bottom + 17}", **{"text-anchor": "middle"})
    for value in chart.y.marks():
        y = _y(chart, value)
        ET.SubElement(root, "path", {"class": "grid", "d": f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"})
        _text(root, "text", chart.y.text_of(value), x=f"{_LEFT - 7}", y=f"{y + 4:.1f}", **{"text-anchor": "end"})
    ET.SubElement(root, "path", {"class": "frame", "d": f"M{_LEFT} {_TOP}V{bottom}H{WIDTH - _RIGHT}"})
    middle = {"text-anchor": "middle", "class": "name"}
    _text(root, "text", chart.x.label, x=f"{(_LEFT + WIDTH - _RIGHT) / 2:.0f}", y=f"{HEIGHT - 8}", **middle)
    y = (_TOP + bottom) / 2
    _text(root, "text", chart.y.label, transform=f"translate(14 {y:.0f}) rotate(-90)", **middle)


def _draw_levels(root: ET.Element, chart: Chart) -> None:
    taken: list[float] = []
    for value, name in (*chart.levels, *chart.ends):
        if not chart.y.low <= value <= chart.y.high:
            continue
        y = _y(chart, value)
        ET.SubElement(root, "path", {"class": "level", "d": f"M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"})
        if all(abs(y - other) > 11 for other in taken):
            right = (value, name) in chart.ends
            x, anchor = (WIDTH - _RIGHT - 4, "end") if right else (_LEFT + 5, "start")
            _text(root, "text", name, x=f"{x}", y=f"{y - 3:.1f}", **{"class": "note", "text-anchor": anchor})
            taken.append(y)


def _draw_series(parent: ET.Element, chart: Chart, series: Series) -> None:
    group = ET.SubElement(parent, "g", {"class": f"s{series.style % NUM_COLORS}"})
    _text(group, "title", series.label)
    spots = [(_x(chart, x), _y(chart, y)) for x, y, _ in series.points]
    if any(spread for _, _, spread in series.points):
        high = [(_x(chart, x), _y(chart, _above(chart, y + spread))) for x, y, spread in series.points]
        low = [(_x(chart, x), _y(chart, _above(chart, y - spread))) for x, y, spread in series.points]
        ET.SubElement(group, "path", {"class": "band", "d": f"M{_join([*high, *low[::-1]])}z"})
    if len(spots) > 1:
        ET.SubElement(group, "path", {"class": "line", "d": f"M{_join(spots)}", **_dash(series.style)})
    every = max(1, len(spots) // 20)
    for index, (x, y) in enumerate(spots):
        if index % every == 0 or index == len(spots) - 1:
            _marker(group, series.style, x, y)


def _above(chart: Chart, value: float) -> float:
    return max(value, chart.y.low) if chart.y.log else value


def _marker(parent: ET.Element, style: int, x: float, y: float) -> None:
    kind = "mark" if style < NUM_COLORS else "mark hollow"
    place = f"translate({x:.1f} {y:.1f})"
    ET.SubElement(parent, "path", {"class": kind, "d": _MARKERS[style % NUM_COLORS], "transform": place})


def _dash(style: int) -> dict[str, str]:
    dash = _DASHES[style % len(_DASHES)]
    return {"stroke-dasharray": dash} if dash else {}


def _join(spots: Sequence[tuple[float, float]]) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)


def _x(chart: Chart, value: float) -> float:
    return _LEFT + chart.x.place(value) * (WIDTH - _LEFT - _RIGHT)


def _y(chart: Chart, value: float) -> float:
    return HEIGHT - _BOTTOM - chart.y.place(value) * (HEIGHT - _TOP - _BOTTOM)


def _text(parent: ET.Element, tag: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, tag, attributes).text = text

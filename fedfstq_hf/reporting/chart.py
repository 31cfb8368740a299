"""Charts by matplotlib: one picture, as PNG for folders and model cards, as SVG for pages that are light or dark.

A line differs from the others by marker and dash as well as by color, so that a chart reads in greyscale. matplotlib
is imported on first use, without pyplot; what a user's matplotlibrc says does not count. The same chart gives the same
bytes.
"""

import io
import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# s0 to s7 are the lines': Okabe and Ito's palette, safe for color-blind readers, darkened or lightened to a contrast of
# at least 3 on its ground.
LIGHT = {
    "page": "#ffffff", "ink": "#1b1f24", "soft": "#57606a", "rule": "#d0d7de", "grid": "#e6e9ec", "panel": "#f6f8fa",
    "link": "#0757a8", "s0": "#4d4d4d", "s1": "#0072b2", "s2": "#bd4b00", "s3": "#007a58", "s4": "#a8497f",
    "s5": "#806300", "s6": "#5b3fa8", "s7": "#a32222",
}  # fmt: skip
DARK = {
    "page": "#14171a", "ink": "#e6e8ea", "soft": "#a4adb6", "rule": "#3a4148", "grid": "#272d33", "panel": "#1c2126",
    "link": "#7db8f5", "s0": "#c4c4c4", "s1": "#4fb0ee", "s2": "#ff8f4a", "s3": "#2fc79a", "s4": "#ec9fcb",
    "s5": "#e3b53c", "s6": "#b3a1f5", "s7": "#ff7b7b",
}  # fmt: skip
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"

_RC = {
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # names are others': neither formulas nor TeX
    "text.usetex": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedfstq",
}
_WIDTH, _PLOT = 6.4, 3.1  # inches, of the figure and of the axes' height
_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW = 0.8, 0.12, 0.14, 0.5, 0.175  # inches; a row of the title or the legend
_LEVELS = 0.68  # inches beyond the axes for the names of levels
_DPI = 170
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.3, 1.6), (6, 2, 1.3, 2), (2.6, 1.4))
_MARKERS = "os^DvPXp"
_MAX_MARKS = 20

Point = tuple[float, float, float]
"""x, y and the spread of y (0 with one seed)."""


@dataclass(frozen=True)
class Axis:
    """`limits` and `ticks` are matplotlib's choice where none are given; `text_of` writes a tick."""

    label: str
    log: bool = False
    limits: tuple[float | None, float | None] = (None, None)
    ticks: Sequence[float] = ()
    text_of: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class Line:
    """`style` counts from 0 and fixes color, marker and dash; 40 of them differ. Spread is drawn as a band."""

    label: str
    style: int
    points: Sequence[Point]


@dataclass(frozen=True)
class Level:
    """A horizontal line, named at its right end; in the color of `style`, or in grey."""

    value: float
    text: str
    style: int | None = None


@dataclass(frozen=True)
class Chart:
    """What is drawn. `name` is that of its file, `alt` says in words what the chart shows."""

    name: str
    title: str
    alt: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    levels: Sequence[Level] = ()

    def png(self) -> bytes:
        """The chart on white, 1088 pixels wide."""
        with own_settings():
            return _saved(self.draw(), "png", dpi=_DPI, metadata={"Software": None})

    def svg(self, key: str, *, alone: bool = False) -> str:
        """One `<svg>` element whose ids begin with `key`; hovering a marker shows its values.

        Its colors are variables of the page's style sheet, see `style_sheet`; with `alone` they are in the element.
        """
        with own_settings():
            root = ET.fromstring(_saved(self.draw(), "svg", metadata={"Date": None}))
        _simplify(root, key)
        for number, line in enumerate(self.lines):
            uses = root.iterfind(f".//g[@id='{key}-marks{number}']//use")
            for use, point in zip(uses, self._marked(line), strict=True):
                ET.SubElement(use, "title").text = f"{line.label}: {self._words(point)}"
        for tag, text in (("desc", self.alt), ("title", self.title)):
            child = ET.Element(tag, {"id": f"{key}-{tag}"})
            child.text = text
            root.insert(0, child)
        root.attrib |= {"class": "chart", "role": "img", "aria-labelledby": f"{key}-title {key}-desc"}
        if alone:
            child = ET.Element("style")
            child.text = style_sheet()
            root.insert(0, child)
            root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": f"{_WIDTH * 96:.0f}"}
        return ET.tostring(root, encoding="unicode")

    def draw(self) -> "Figure":
        """The chart as matplotlib's figure, to be drawn and saved with `own_settings`."""
        from matplotlib.figure import Figure

        title = textwrap.wrap(_short(self.title, 200), 68)
        labels = [_short(line.label) for line in self.lines]
        columns = max(1, min(len(labels), int(_WIDTH / (0.6 + 0.075 * max(map(len, labels), default=0)))))
        rows = math.ceil(len(labels) / columns)
        above, below = _TOP + _ROW * len(title), _BOTTOM + _ROW * rows
        height = above + _PLOT + below
        figure = Figure(figsize=(_WIDTH, height), facecolor=LIGHT["page"])
        width = _WIDTH - _LEFT - _RIGHT - (_LEVELS if self.levels else 0)
        axes = figure.add_axes((_LEFT / _WIDTH, below / height, width / _WIDTH, _PLOT / height))
        axes.set_facecolor(LIGHT["page"])
        looks: dict[str, Any] = {"fontsize": 10, "weight": "bold", "color": LIGHT["ink"]}
        figure.text(_RIGHT / _WIDTH, 1 - 0.08 / height, "\n".join(title), va="top", **looks)
        self._set_axes(axes)
        handles = [self._draw_line(axes, number, line) for number, line in enumerate(self.lines)]
        self._draw_levels(axes)
        looks = {"frameon": False, "fontsize": 9, "labelcolor": LIGHT["ink"], "handlelength": 3.2}
        looks |= {"loc": "lower left", "bbox_to_anchor": (0, 0), "columnspacing": 1.4, "labelspacing": 0.3}
        figure.legend(handles, labels, ncols=columns, **looks)
        return figure

    def _set_axes(self, axes: "Axes") -> None:
        """Scales, limits, ticks and looks. The lines are drawn later; their points count for the limits here."""
        axes.set_xlim(*_limits(self.x, [x for line in self.lines for x, _, _ in line.points]))
        ys = [y + sign * spread for line in self.lines for _, y, spread in line.points for sign in (-1, 1)]
        axes.set_ylim(*_limits(self.y, [*ys, *(level.value for level in self.levels)]))
        for axis, shown, set_scale in ((axes.xaxis, self.x, axes.set_xscale), (axes.yaxis, self.y, axes.set_yscale)):
            set_scale("log" if shown.log else "linear")
            _set_ticks(axis, shown)
            axis.set_label_text(_short(shown.label), color=LIGHT["ink"], fontsize=10)
        axes.tick_params(colors=LIGHT["soft"], labelsize=9, length=0)
        axes.spines[:].set_color(LIGHT["soft"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=LIGHT["grid"], linewidth=0.8)
        axes.set_axisbelow(True)

    def _draw_line(self, axes: "Axes", number: int, line: Line) -> Any:
        """Band, line and markers; returns what stands for them in the legend."""
        from matplotlib.lines import Line2D

        color, dash = LIGHT[f"s{line.style % 8}"], _DASHES[line.style % len(_DASHES)]
        looks: dict[str, Any] = {"color": color, "linewidth": 1.6, "linestyle": (0, dash) if dash else "-"}
        ground = color if line.style < 8 else LIGHT["page"]
        marker: dict[str, Any] = {"marker": _MARKERS[line.style % 8], "markersize": 4.5, "markerfacecolor": ground}
        marker["color"] = color
        if any(spread for _, _, spread in line.points):
            low, high = ([y + sign * spread for _, y, spread in line.points] for sign in (-1, 1))
            floor = axes.get_ylim()[0]
            low = [max(value, floor) for value in low] if self.y.log else low
            axes.fill_between([x for x, _, _ in line.points], low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot([x for x, _, _ in line.points], [y for _, y, _ in line.points], zorder=3, **looks)
        marked = self._marked(line)
        xs, ys = [x for x, _, _ in marked], [y for _, y, _ in marked]
        axes.plot(xs, ys, linestyle="", gid=f"marks{number}", zorder=4, **marker)
        return Line2D([], [], **(looks | marker))

    def _draw_levels(self, axes: "Axes") -> None:
        """A dotted line each, with its name beyond the right end, where no curve is; of names too close the first."""
        taken: list[float] = []
        right, (low, high) = axes.get_xlim()[1], axes.get_ylim()
        for level in self.levels:
            if not low <= level.value <= high:
                continue
            color = LIGHT["soft" if level.style is None else f"s{level.style % 8}"]
            axes.axhline(level.value, color=color, linewidth=0.9, linestyle=(0, (1, 2.5)), zorder=2)
            place = axes.transAxes.inverted().transform(axes.transData.transform((right, level.value)))[1]
            if level.text and all(abs(place - other) > 0.06 for other in taken):
                taken.append(place)
                looks: dict[str, Any] = {"va": "center", "fontsize": 8.5, "color": LIGHT["soft"]}
                axes.text(1.012, place, level.text, transform=axes.transAxes, **looks)

    def _marked(self, line: Line) -> list[Point]:
        """The points with a marker: those within the limits, and of many an even sample with the last."""
        points = [point for point in line.points if _within(self.x, point[0]) and _within(self.y, point[1])]
        every = max(1, len(points) // _MAX_MARKS)
        return [point for i, point in enumerate(points) if i % every == 0 or i == len(points) - 1]

    def _words(self, point: Point) -> str:
        x, y, spread = point
        return f"{self.x.text_of(x)}, {self.y.text_of(y)}" + (f" ± {self.y.text_of(spread)}" if spread else "")


def style_sheet() -> str:
    """The colors as variables, light and dark, and how the charts use them."""
    light, dark = (" ".join(f"--{name}: {color};" for name, color in colors.items()) for colors in (LIGHT, DARK))
    return (
        f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
        f".chart {{ font-family: {FONT}; stroke-linejoin: round; stroke-linecap: butt; }}\n"
    )


@contextmanager
def own_settings() -> Iterator[None]:
    """matplotlib's defaults and ours, while a chart is drawn and saved."""
    import matplotlib.style

    with matplotlib.style.context(["default", _RC]):
        yield


def _saved(figure: "Figure", form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, **options)
    return buffer.getvalue()


def _limits(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    """Those that the axis asks for, else around the values within them with a little room."""
    values = [value for value in values if math.isfinite(value) and _within(axis, value)] or [1.0]
    low, high = min(values), max(values)
    if axis.log:
        room = max((high / low) ** 0.04, 1.1)
        low, high = low / room, high * room
    else:
        room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - room, high + room
    given_low, given_high = axis.limits
    return (low if given_low is None else given_low), (high if given_high is None else given_high)


def _within(axis: Axis, value: float) -> bool:
    low, high = axis.limits
    return (low is None or value >= low) and (high is None or value <= high) and (value > 0 or not axis.log)


def _set_ticks(axis: Any, shown: Axis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    if shown.ticks:
        axis.set_major_locator(FixedLocator(shown.ticks))
    elif shown.log and high > 5 * low:  # at least two of 1, 2 and 5
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=8))
    else:
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: shown.text_of(value)))


def _simplify(root: ET.Element, key: str) -> None:
    """Leave out what matplotlib adds for other programs, and digits that nobody sees; our ids and colors."""
    variables = {color: f"var(--{name})" for name, color in LIGHT.items()}
    for element in list(root.iter()):
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):  # that style sheet would be all the page's
                element.remove(child)
        element.tag = element.tag.rpartition("}")[2]
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
        given, element.attrib = element.attrib, {}
        for name, value in given.items():
            if name == "style":
                value = re.sub(r"font-family: [^;]*(; )?", "", value)
                value = re.sub("#[0-9a-f]{6}", lambda found: variables.get(found[0], found[0]), value)
            elif name in ("d", "x", "y", "transform"):
                value = " ".join(re.sub(r"(\.\d\d)\d+", r"\1", value).split())
            elif name == "id" and not re.fullmatch(r"[mp][0-9a-f]{10}|marks\d+", value):  # nothing refers to it
                continue
            value = f"{key}-{value}" if name == "id" else re.sub("^#|(?<=url\\()#", f"#{key}-", value)
            element.set(name.rpartition("}")[2], value)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)


def _short(text: str, limit: int = 64) -> str:
    """A name on one line; matplotlib keeps what begins with an underscore out of a legend."""
    text = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return f" {text}" if text.startswith("_") else text

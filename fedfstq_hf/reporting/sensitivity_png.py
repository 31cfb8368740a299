"""Draws a text shaded by token sensitivity: lines that fit the width of a model card, and a colour bar.

matplotlib is imported on first use, and only its Figure class: no pyplot, no global state, no display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sensitivity_shades import COLORS

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure

    from .sensitivity_text import SensitivityText

_WIDTH, _DPI, _MARGIN = 7.2, 150, 0.2  # inches, pixels per inch, inches
_FONT_SIZE, _LINE_HEIGHT = 10.5, 0.25  # points, inches
_HEAD, _FOOT = 0.35, 0.75  # inches for a title, and for the colour bar with its labels
_INK, _MUTED = "#1a1a1a", "#777777"

Measure = Callable[[str, bool], float]
"""`measure(text, bold)`: advance of a text, in pixels."""


@dataclass(frozen=True)
class _Box:
    """A piece or a part of one, at `x` pixels from the left in line number `line`."""

    text: str
    score: float
    line: int
    x: float
    width: float


def draw(shaded: SensitivityText, title: str | None, font: str | Sequence[str]) -> bytes:
    """PNG as `SensitivityText.png` describes it; the same input gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 1.0), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    families = [font] if isinstance(font, str) else list(font)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    boxes = _wrap(shaded, _measure(renderer, families), (_WIDTH - 2 * _MARGIN) * _DPI)
    head = _MARGIN + (_HEAD if title else 0.0)
    height = head + (boxes[-1].line + 1) * _LINE_HEIGHT + _FOOT
    figure.set_size_inches(_WIDTH, height)
    if title:
        figure.text(_MARGIN / _WIDTH, 1 - _MARGIN / height, _literal(title), fontsize=11, va="top", color=_INK)
    for box in boxes:
        _draw_box(figure, box, shaded, head, height, families)
    _draw_key(figure, shaded, height)
    return _palette_png(figure)


def _palette_png(figure: Figure) -> bytes:
    """PNG of at most 256 colours, a third as large as one of full colours."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI, facecolor="white")
    Image.open(drawn).convert("RGB").quantize(256).save(packed, format="PNG", optimize=True)
    return packed.getvalue()


def _measure(renderer: RendererAgg, families: list[str]) -> Measure:
    from matplotlib.font_manager import FontProperties

    fonts = [FontProperties(family=families, size=_FONT_SIZE, weight=weight) for weight in ("normal", "bold")]

    def extent(text: str, bold: bool) -> float:
        width, _, _ = renderer.get_text_width_height_descent(text, fonts[bold], False)  # type: ignore[no-untyped-call]
        return float(width)

    # Between two letters, since blanks at the ends would not count.
    return lambda text, bold: extent(f"x{text}x", bold) - extent("xx", bold)


def _wrap(shaded: SensitivityText, measure: Measure, width: float) -> list[_Box]:
    """Boxes in lines of at most `width` pixels. Breaks before words, or within one that is wider than a line."""
    boxes: list[_Box] = []
    line, x = 0, 0.0
    for word in _words(shaded):
        sizes = [measure(text, shaded.is_bold(score)) for text, score, _ in word]
        if x > 0 and x + sum(sizes) > width:
            line, x = line + 1, 0.0
        for (text, score, ends_line), size in zip(word, sizes, strict=True):
            if x > 0 and x + size > width:
                line, x = line + 1, 0.0
            if x == 0 and text.strip():  # a blank that the break stands for
                text = text.lstrip()
                size = measure(text, shaded.is_bold(score))
            boxes.append(_Box(text, score, line, x, size))
            line, x = (line + 1, 0.0) if ends_line else (line, x + size)
    return boxes


Part = tuple[str, float, bool]
"""(text, score, whether a new line follows)."""


def _words(shaded: SensitivityText) -> list[list[Part]]:
    """Parts of pieces, together as long as no blank is between them."""
    words: list[list[Part]] = []
    for piece, score in zip(shaded.pieces, shaded.scores, strict=True):
        parts = _parts(piece, score)
        for place, part in enumerate(parts):
            new = place > 0 or not words or words[-1][-1][2] or part[0][:1].isspace() or words[-1][-1][0][-1:].isspace()
            if new:
                words.append([part])
            else:
                words[-1].append(part)
    return words


def _parts(piece: str, score: float) -> list[Part]:
    """A piece in parts without line breaks inside, short enough for any line, with its blanks as single spaces."""
    limit = 40
    lines = piece.replace("\r", "").split("\n")
    parts: list[Part] = []
    for place, text in enumerate(lines):
        last = place == len(lines) - 1
        shown = "".join(" " if char.isspace() else char for char in text) + ("" if last else "⏎")
        chunks = [shown[i : i + limit] for i in range(0, len(shown), limit)]
        parts += [(chunk, score, not last and chunk is chunks[-1]) for chunk in chunks]
    return parts


def _draw_box(
    figure: Figure, box: _Box, shaded: SensitivityText, head: float, height: float, families: list[str]
) -> None:
    left = (_MARGIN + box.x / _DPI) / _WIDTH
    middle = 1 - (head + (box.line + 0.5) * _LINE_HEIGHT) / height
    tall = 0.86 * _LINE_HEIGHT / height
    color = None if math.isinf(box.score) else shaded.shades.color(box.score)
    _draw_ground(figure, (left, middle - tall / 2), (box.width / _DPI / _WIDTH, tall), color)
    figure.text(
        left,
        middle,
        _literal(box.text),
        family=families,
        fontsize=_FONT_SIZE,
        weight="bold" if shaded.is_bold(box.score) else "normal",
        color=_INK,
        va="center_baseline",
    )


def _draw_ground(figure: Figure, corner: tuple[float, float], size: tuple[float, float], color: str | None) -> None:
    """A filled rectangle, or a dashed frame without colour: never seen."""
    from matplotlib.patches import Rectangle

    ground = Rectangle(corner, *size, transform=figure.transFigure, linewidth=0.8)
    ground.set_facecolor(color or "white")
    ground.set_edgecolor("white" if color else _MUTED)
    ground.set_linestyle("-" if color else (0, (2, 2)))
    figure.add_artist(ground)


def _draw_key(figure: Figure, shaded: SensitivityText, height: float) -> None:
    """Colour bar at the left; what a dashed frame means, at the right."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    low, high = shaded.shades.low, shaded.shades.high
    if low is not None and high is not None:
        axes = figure.add_axes((_MARGIN / _WIDTH, 0.45 / height, 0.5, 0.11 / height))
        scale = LogNorm(low, high if high > low else 2 * low)
        colors = LinearSegmentedColormap.from_list("sensitivity", COLORS)
        bar = figure.colorbar(ScalarMappable(scale, colors), cax=axes, orientation="horizontal")
        label = "token sensitivity: squared gradient at the embedding, log scale; bold: top tenth"
        figure.text(_MARGIN / _WIDTH, 0.07 / height, label, fontsize=8.5, color=_INK)
        bar.ax.tick_params(labelsize=8.5)
        bar.outline.set_visible(False)
    if any(map(math.isinf, shaded.scores)):
        left, middle = 0.66, 0.5 / height
        _draw_ground(figure, (left, middle - 0.08 / height), (0.035, 0.16 / height), None)
        figure.text(left + 0.045, middle, "never seen in training", fontsize=8.5, va="center", color=_INK)


def _literal(text: str) -> str:
    """Text that matplotlib takes as it is: two `$` would make a formula."""
    return text.replace("$", r"\$")

"""A text with its tokens shaded by how strongly the loss reacts to them: HTML for a model card or notebook, or PNG."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.sensitivity.table import token_text

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.figure import Figure


# Light enough at both ends for black text: 18:1 and 7:1 contrast.
COLORS = ("#fff8e8", "#fdcf8a", "#e8762b")


@dataclass(frozen=True)
class Shades:
    """Maps scores between `low` and `high` (both > 0) to colours; `None` for both where nothing was measured."""

    low: float | None
    high: float | None

    @classmethod
    def of(cls, scores: Iterable[float]) -> Shades:
        """From the smallest to the largest finite score above 0."""
        measured = [score for score in scores if 0 < score < math.inf]
        return cls(min(measured), max(measured)) if measured else cls(None, None)

    def position(self, score: float) -> float:
        """Place of a score on the scale, 0 for `low` or less to 1 for `high` or more."""
        if self.low is None or self.high is None or score <= self.low:
            return 0.0
        return min(1.0, math.log(score / self.low) / math.log(self.high / self.low))

    def color(self, score: float) -> str:
        """`#rrggbb` of a finite score."""
        place = self.position(score) * (len(COLORS) - 1)
        first = min(int(place), len(COLORS) - 2)
        return _mix(COLORS[first], COLORS[first + 1], place - first)


def _mix(first: str, second: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


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


BOLD_SHARE = 0.1
"""Share of a text's measured tokens that is set in bold, so that the most sensitive show even without colours."""


@dataclass(frozen=True, repr=False)
class SensitivityText:
    """A text in pieces, one per token, with one score each; +inf marks a token that was never seen in training."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.pieces) != len(self.scores):
            raise DataError(
                f"got {len(self.pieces)} pieces and {len(self.scores)} scores; expected one score per piece"
            )

    @classmethod
    def from_text(cls, text: str, sensitivity: TokenSensitivity, tokenizer: Any) -> SensitivityText:
        """Cut `text` into the tokenizer's tokens (no special ones added) and look their scores up.

        Tokens that are parts of one character come as one piece with the highest of their scores. Raises DataError on
        a text without tokens, or with ids beyond the table of sensitivities.
        """
        ids, pieces = _pieces(text, tokenizer)
        if not ids:
            raise DataError(f"the text {text!r} has no tokens; give a text to shade")
        if max(ids) >= sensitivity.vocab_size:
            raise DataError(
                f"the text has token id {max(ids)} and the sensitivities end at {sensitivity.vocab_size - 1}; pass the "
                "tokenizer of the model that was trained"
            )
        table = sensitivity.scores()
        merged: list[tuple[str, float]] = []
        for token_id, piece in zip(ids, pieces, strict=True):
            score = float(table[token_id])
            if piece or not merged:
                merged.append((piece, score))
            else:
                merged[-1] = (merged[-1][0], max(merged[-1][1], score))
        return cls(tuple(piece for piece, _ in merged), tuple(score for _, score in merged))

    @cached_property
    def shades(self) -> Shades:
        """Colours from the least to the most sensitive token of this text."""
        return Shades.of(self.scores)

    @cached_property
    def _bold_from(self) -> float:
        measured = sorted((score for score in self.scores if math.isfinite(score)), reverse=True)
        return measured[math.ceil(BOLD_SHARE * len(measured)) - 1] if measured else math.inf

    def is_bold(self, score: float) -> bool:
        """Whether a score is among the highest tenth of those measured in this text."""
        return self._bold_from <= score < math.inf

    def html(self) -> str:
        """One `<div>` on one line, without script or style block, for a model card or a notebook.

        Colours are inline styles. Where a renderer strips those, the most sensitive tenth stays bold and tokens never
        seen stay underlined; hovering shows the score where `title` survives.
        """
        spans = "".join(self._span(piece, score) for piece, score in zip(self.pieces, self.scores, strict=True))
        return f'<div style="line-height:1.9">{spans}<br><small>{self._legend()}</small></div>'

    def png(self, title: str | None = None, font: str | Sequence[str] = "DejaVu Sans Mono") -> bytes:
        """PNG, 1080 pixels wide: the text in lines, and a colour bar on a log scale.

        `font` is a name, or several of which each fills the gaps of those before: matplotlib's own has no Chinese,
        Japanese or Korean.
        """
        return draw(self, title, font)

    def summary(self) -> str:
        """One line of counts and of the span of scores."""
        unseen = sum(math.isinf(score) for score in self.scores)
        low, high = self.shades.low, self.shades.high
        span = "" if low is None else f", sensitivity {low:.2g} to {high:.2g}"
        return f"{len(self.pieces)} tokens, {unseen} never seen in training{span}"

    def _span(self, piece: str, score: float) -> str:
        # `$` would start a formula on the Hub; a blank line would end the block of HTML in Markdown.
        text = html.escape(piece).replace("$", "&#36;").replace("\r", "").replace("\n", "&#9166;<br>")
        if math.isinf(score):
            return f'<u style="text-decoration:underline dashed" title="never seen in training">{text}</u>'
        bold = ("<b>", "</b>") if self.is_bold(score) else ("", "")
        style = f"background-color:{self.shades.color(score)};color:#1a1a1a"
        return f'<span style="{style}" title="sensitivity {score:.3g}">{bold[0]}{text}{bold[1]}</span>'

    def _legend(self) -> str:
        low, high = self.shades.low, self.shades.high
        parts = []
        if low is not None and high is not None:
            steps = [low * (high / low) ** (step / 4) for step in range(5)] if high > low else [low]
            parts.append("token sensitivity, log scale: " + " ".join(self._swatch(score) for score in steps))
            parts.append("<b>bold</b>: most sensitive tenth")
        if any(math.isinf(score) for score in self.scores):
            parts.append("<u>underlined</u>: never seen in training")
        return "; ".join(parts)

    def _swatch(self, score: float) -> str:
        return f'<span style="background-color:{self.shades.color(score)};color:#1a1a1a">&nbsp;{score:.2g}&nbsp;</span>'

    def _repr_html_(self) -> str:
        return self.html()

    def _repr_png_(self) -> bytes:
        return self.png()

    def __repr__(self) -> str:
        start = "".join(self.pieces)
        return f"SensitivityText({start[:60] + '...' if len(start) > 60 else start!r}: {self.summary()})"


def _pieces(text: str, tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and the parts of `text` they stand for; together the parts are the text, as far as offsets are known."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, [token_text(tokenizer, token_id) for token_id in ids]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    done, pieces = 0, []
    for _, end in encoded["offset_mapping"]:
        pieces.append(text[done:end])
        done = max(done, end)
    if pieces:
        pieces[-1] += text[done:]
    return encoded["input_ids"], pieces

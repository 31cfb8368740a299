"""A text with its tokens shaded by how strongly the loss reacts to them: HTML for a model card or notebook, or PNG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.sensitivity.table import token_text

from .sensitivity_shades import Shades

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
        from .sensitivity_png import draw

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

"""What a reducer keeps of a text, for eyes: HTML in a notebook, ANSI colours in a terminal."""

from __future__ import annotations

import html
from dataclasses import dataclass

_KEPT, _DROPPED, _PROTECTED, _RESET = "\033[1m", "\033[2;9m", "\033[1;4m", "\033[0m"


@dataclass(frozen=True)
class Inspection:
    """One entry per token: its text, whether it is kept, whether it is protected, and its score (higher = keep)."""

    tokens: list[str]
    kept: list[bool]
    protected: list[bool]
    scores: list[float]

    def summary(self) -> str:
        """One line of counts."""
        return f"{sum(self.kept)} of {len(self.tokens)} tokens kept, {sum(self.protected)} of them protected"

    def terminal(self) -> str:
        """ANSI: kept bold, protected underlined, dropped dim and struck through."""
        parts = [
            f"{_PROTECTED if protected else _KEPT if kept else _DROPPED}{token}{_RESET}"
            for token, kept, protected in zip(self.tokens, self.kept, self.protected, strict=True)
        ]
        return f"{self._join(parts)}\n{self.summary()}"

    def html(self) -> str:
        """A `<div>` of tokens; hovering shows score and rank. Token text is escaped."""
        order = sorted(range(len(self.tokens)), key=lambda i: -self.scores[i])
        rank = {position: place + 1 for place, position in enumerate(order)}
        parts = []
        for i, token in enumerate(self.tokens):
            style = "opacity:.4;text-decoration:line-through"
            if self.kept[i]:
                style = "background:#cfe8ff" + (";border-bottom:2px solid #0072b2" if self.protected[i] else "")
            title = f"score {self.scores[i]:.4g}, rank {rank[i]} of {len(self.tokens)}"
            text = html.escape(token).replace("\n", "&#9166;<br>")
            parts.append(f'<span style="{style}" title="{title}">{text}</span>')
        body = f"{self._join(parts)}<br><small>{self.summary()}</small>"
        return f'<div style="font-family:monospace;line-height:1.7">{body}</div>'

    def _join(self, parts: list[str]) -> str:
        spaced = any(token.startswith((" ", "\n")) for token in self.tokens)
        return ("" if spaced else " ").join(parts)

    _repr_html_ = html
    __str__ = terminal

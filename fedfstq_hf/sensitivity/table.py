"""The table of token sensitivities, for eyes: most sensitive tokens first."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterMismatchError
from .fisher import TokenSensitivity

_SHOWN = 20


@dataclass(frozen=True)
class TokenRow:
    """One token id that was seen in training.

    `score` is the bias-corrected moving average of `||dL/de||^2` (higher: more sensitive), L the loss summed over the
    target tokens of the token's example; `count` the number of refresh steps in whose batch the id occurred.
    """

    token_id: int
    token: str
    score: float
    count: int


@dataclass(frozen=True, repr=False)
class SensitivityTable(Sequence[TokenRow]):
    """Rows of the ids seen, highest score first, ties to the lower id; `unseen` counts the ids of the vocabulary left.

    An id never seen has no score and no row: a reducer keeps such tokens, as if they were the most sensitive.
    """

    rows: tuple[TokenRow, ...]
    unseen: int

    @classmethod
    def from_sensitivity(cls, sensitivity: TokenSensitivity, tokenizer: Any) -> SensitivityTable:
        """Make it from what a training run measured and the tokenizer of its model.

        Raises AdapterMismatchError where the tokenizer has more ids than the sensitivities.
        """
        if len(tokenizer) > sensitivity.vocab_size:
            raise AdapterMismatchError(
                f"the tokenizer has {len(tokenizer)} ids and the sensitivities are of {sensitivity.vocab_size}; pass "
                "the tokenizer of the model that was trained"
            )
        scores, counts = sensitivity.scores(), sensitivity.state_dict()["count"]
        ids = sensitivity.top(sensitivity.vocab_size)
        rows = tuple(
            TokenRow(token_id, token_text(tokenizer, token_id), score, count)
            for token_id, score, count in zip(ids.tolist(), scores[ids].tolist(), counts[ids].tolist(), strict=True)
        )
        return cls(rows, sensitivity.vocab_size - len(rows))

    def to_markdown(self, n: int | None = _SHOWN) -> str:
        """A Markdown table of the first `n` rows (20 unless given, None: all)."""
        lines = ["| rank | token | id | sensitivity | refreshes |", "|--:|---|--:|--:|--:|"]
        for rank, row in enumerate(self.rows[:n], start=1):
            lines.append(f"| {rank} | {_code(row.token)} | {row.token_id} | {row.score:.3g} | {row.count} |")
        return "\n".join(lines)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[TokenRow]:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row by its rank from 0, or a tuple of rows by a slice."""
        return self.rows[index]

    def __repr__(self) -> str:
        shown = [(visible(row.token), f"{row.score:.3g}", row) for row in self.rows[: _SHOWN // 2]]
        width = max((len(token) for token, _, _ in shown), default=0)
        lines = [f"SensitivityTable: {len(self)} token ids seen, {self.unseen} never seen"]
        for rank, (token, score, row) in enumerate(shown, start=1):
            lines.append(f"{rank:4}  {token:{width}}  {score:>8}  id {row.token_id}, {_times(row.count)}")
        if len(self) > len(shown):
            lines.append(f"      ... {len(self) - len(shown)} more; to_markdown(n) shows n")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><td>{rank}</td><td><code>{html.escape(visible(row.token))}</code></td><td>{row.token_id}</td>"
            f"<td>{row.score:.3g}</td><td>{row.count}</td></tr>"
            for rank, row in enumerate(self.rows[:_SHOWN], start=1)
        )
        names = "".join(f"<th>{name}</th>" for name in ("rank", "token", "id", "sensitivity", "refreshes"))
        caption = f"{min(len(self), _SHOWN)} of {len(self)} token ids seen; {self.unseen} never seen"
        return f"<table><caption>{caption}</caption><tr>{names}</tr>{cells}</table>"


def token_text(tokenizer: Any, token_id: int) -> str:
    """What an id stands for; the vocabulary's own entry where the id alone is no text, as parts of a character are."""
    text: str = tokenizer.decode([token_id])
    if text and "\ufffd" not in text:
        return text
    return str(tokenizer.convert_ids_to_tokens(token_id) or f"<id {token_id}>")


def visible(token: str) -> str:
    """Text on one line with its spaces to be seen: `␣` and `⏎`, and escapes for what else cannot be printed."""
    marked = token.replace(" ", "␣").replace("\n", "⏎")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in marked)


def _code(token: str) -> str:
    """A code span that holds in a table cell whatever the token is."""
    text = visible(token).replace("|", "\\|")
    fence = "``" if "`" in text else "`"
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _times(count: int) -> str:
    return f"{count} refresh" if count == 1 else f"{count} refreshes"

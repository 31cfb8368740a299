"""The table of token sensitivities and the shaded text, as HTML and as PNG."""

from __future__ import annotations

import html
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fedfstq_hf.demo import load_tokenizer
from fedfstq_hf.errors import AdapterMismatchError, DataError
from fedfstq_hf.reporting.shading import COLORS, SensitivityText, Shades
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.sensitivity.table import SensitivityTable, TokenRow

TEXT = "note: former thirst, no headache."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def _measured(tokenizer, text: str) -> TokenSensitivity:
    """Token number i of `text` has sensitivity 2^i (where no id repeats)."""
    sensitivity = TokenSensitivity(len(tokenizer))
    ids = torch.tensor(tokenizer(text)["input_ids"])[None]
    sensitivity.update(ids, 2.0 ** torch.arange(ids.shape[1])[None])
    return sensitivity


def test_table_holds_what_was_seen_most_sensitive_first(tokenizer):
    sensitivity = _measured(tokenizer, "former thirst")
    ids = tokenizer("former thirst")["input_ids"]
    table = SensitivityTable.from_sensitivity(sensitivity, tokenizer)
    assert list(table) == [
        TokenRow(token_id, tokenizer.decode([token_id]), pytest.approx(2.0**place), 1)
        for place, token_id in reversed(list(enumerate(ids)))
    ]
    assert len(table) == len(ids)
    assert table.unseen == len(tokenizer) - len(ids)
    assert table[0].token_id == ids[-1]
    assert f"{len(ids)} token ids seen, {table.unseen} never seen" in repr(table)
    assert table._repr_html_().count("<tr>") == len(ids) + 1


def test_markdown_cells_survive_any_token():
    rows = tuple(TokenRow(i, token, 1.0, 2) for i, token in enumerate(["a|b", "`", "\n", " x", "<b>"]))
    table = SensitivityTable(rows, 0)
    lines = table.to_markdown(None).splitlines()
    assert lines[2:] == [
        "| 1 | `a\\|b` | 0 | 1 | 2 |",
        "| 2 | `` ` `` | 1 | 1 | 2 |",
        "| 3 | `⏎` | 2 | 1 | 2 |",
        "| 4 | `␣x` | 3 | 1 | 2 |",
        "| 5 | `<b>` | 4 | 1 | 2 |",
    ]
    assert len(table.to_markdown(2).splitlines()) == 4
    assert "&lt;b&gt;" in table._repr_html_()


def test_an_empty_table_and_another_tokenizer(tokenizer):
    empty = SensitivityTable.from_sensitivity(TokenSensitivity(len(tokenizer)), tokenizer)
    assert "0 token ids seen" in repr(empty)
    assert len(empty.to_markdown().splitlines()) == 2
    with pytest.raises(AdapterMismatchError, match="tokenizer of the model"):
        SensitivityTable.from_sensitivity(TokenSensitivity(5), tokenizer)


def test_shades_are_logarithmic():
    shades = Shades.of([0.0, 1e-4, 1.0, math.inf])
    assert [shades.color(score) for score in (0.0, 1e-4, 1e-2, 1.0, 9.0)] == [COLORS[0], *COLORS, COLORS[-1]]
    assert shades.position(1e-3) == pytest.approx(0.25)
    assert Shades.of([math.inf]).color(1.0) == COLORS[0]


def test_pieces_are_the_text_with_the_scores_of_its_tokens(tokenizer):
    shaded = SensitivityText.from_text(TEXT, _measured(tokenizer, "former thirst"), tokenizer)
    table = _measured(tokenizer, "former thirst").scores()
    assert "".join(shaded.pieces) == TEXT
    assert list(shaded.scores) == [float(table[i]) for i in tokenizer(TEXT)["input_ids"]]
    assert math.isinf(shaded.scores[0])


def test_parts_of_one_character_are_one_piece(tokenizer):
    text = "no 痛 é"
    shaded = SensitivityText.from_text(text, _measured(tokenizer, text), tokenizer)
    assert "".join(shaded.pieces) == text
    assert all(shaded.pieces)


def test_html_is_one_line_of_plain_elements_and_keeps_its_meaning_without_styles():
    shaded = SensitivityText(("<script>", " $x$", "\n\n", "last"), (1.0, 2.0, math.inf, 100.0))
    page = shaded.html()
    assert "\n" not in page
    assert "$" not in page
    assert set(re.findall(r"</?([a-z0-9]+)", page)) == {"div", "span", "b", "u", "br", "small"}
    bare = re.sub(r' (style|title)="[^"]*"', "", page)
    assert "<span><b>last</b></span>" in bare
    assert "<u>&#9166;<br>&#9166;<br></u>" in bare
    assert bare.count("<b>") == 2  # the token and the legend
    assert html.unescape(re.sub("<[^>]*>", "", bare)).startswith("<script> $x$⏎⏎last")
    assert f"background-color:{COLORS[-1]}" in page


def test_png_is_as_wide_as_a_card_and_grows_with_the_text():
    pieces = (*tuple(f" word{i}" for i in range(40)), "\n", "x" * 300, " $a$")
    scores = (*tuple(10.0 ** (i % 5) for i in range(42)), math.inf)
    short, long = (SensitivityText(pieces[:n], scores[:n]) for n in (3, 43))
    images = [Image.open(io.BytesIO(text.png("title $"))) for text in (short, long)]
    assert [image.width for image in images] == [1080, 1080]
    assert images[1].height > images[0].height + 150
    assert long.png() == long.png()


def test_png_draws_every_shade_within_its_margins():
    shaded = SensitivityText((" low", " high", " new") * 30, (1e-3, 1.0, math.inf) * 30)
    pixels = np.asarray(Image.open(io.BytesIO(shaded.png())).convert("RGB")).astype(int)
    for color in (COLORS[0], COLORS[-1]):
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).sum(-1) < 12).sum() > 1000
    assert (pixels[:, -20:] == 255).all()  # nothing runs over the edge


def test_what_was_never_measured_is_drawn_too_and_nonsense_is_refused(tokenizer):
    unseen = SensitivityText.from_text("thirst", TokenSensitivity(len(tokenizer)), tokenizer)
    assert unseen.png().startswith(b"\x89PNG")
    assert "log scale" not in unseen.html()
    assert SensitivityText(("one",), (1.0,)).png().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="no tokens"):
        SensitivityText.from_text("", TokenSensitivity(len(tokenizer)), tokenizer)
    with pytest.raises(DataError, match="one score per piece"):
        SensitivityText(("a",), ())
    with pytest.raises(DataError, match="sensitivities end at 1"):
        SensitivityText.from_text("thirst", TokenSensitivity(2), tokenizer)

"""What a reducer shows of a text."""

from __future__ import annotations

import pytest

from fedfstq_hf.demo import load_model, load_tokenizer
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.inspection import Inspection
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import Recency

TEXT = "note: takes <keep>insulin</keep> 5 mg daily. denies fever & <b>cough</b>. lives with a dog.\nname what is new:"


def test_marks_and_counts():
    seen = TokenReducer(0.7, scorer=Recency(), tokenizer=load_tokenizer()).inspect(TEXT)
    assert "keep>" not in "".join(seen.tokens)
    kept = [token.strip() for token, flag in zip(seen.tokens, seen.kept, strict=True) if flag]
    assert "insulin" in "".join(kept)
    assert f"{sum(seen.kept)} of {len(seen.tokens)} tokens kept" in seen.summary()
    assert all(kept for kept, flag in zip(seen.kept, seen.protected, strict=True) if flag)
    assert sum(seen.protected) < sum(seen.kept) < len(seen.tokens)


def test_html_escapes_and_terminal_resets():
    seen = Inspection(["<b>", " &", " x"], [True, False, True], [True, False, False], [0.1, 0.3, 0.2])
    page = seen.html()
    assert seen._repr_html_() == page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "&amp;" in page
    assert "rank 1 of 3" in page.split("<span")[2]
    assert page.count("line-through") == 1
    terminal = str(seen)
    assert terminal.count("\033[0m") == 3
    assert "\033[2;9m &" in terminal
    assert terminal.endswith("2 of 3 tokens kept, 1 of them protected")


def test_default_scorer_needs_a_model():
    with pytest.raises(ConfigError, match="pass one: TokenReducer"):
        TokenReducer(0.5, tokenizer=load_tokenizer()).inspect(TEXT)
    seen = TokenReducer(0.5, tokenizer=load_tokenizer(), model=load_model()).inspect(TEXT)
    assert sum(seen.kept) < len(seen.tokens)

"""First and last tokens, special tokens, chat templates, markers and character spans."""

from __future__ import annotations

import pytest
import torch

from fedfstq_hf.demo import load_tokenizer
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import Recency
from fedfstq_hf.generation.selection import Protection, special_ids, strip_markers, template_sequences

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} says\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant says\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def test_ends_are_counted_without_padding():
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    kept = Protection(first=1, last=2).mask(torch.ones(2, 6).long(), mask)
    assert kept.int().tolist() == [[1, 0, 0, 0, 1, 1], [0, 0, 1, 0, 1, 1]]
    assert Protection(first=1, last=2).mask(torch.ones(2, 6).long(), mask, at_start=False)[0].int().tolist() == [
        0,
        0,
        0,
        0,
        1,
        1,
    ]


def test_special_ids_and_runs():
    ids = torch.tensor([[5, 9, 7, 8, 5, 7, 8, 6]])
    kept = Protection(first=0, last=1, special_ids=(9,), sequences=((7, 8),)).mask(ids, torch.ones(1, 8))
    assert kept.int().tolist() == [[0, 1, 1, 1, 0, 1, 1, 1]]
    assert Protection(first=0, last=1, sequences=((1,) * 9,)).mask(ids, torch.ones(1, 8)).sum() == 1


def test_specials_come_from_the_tokenizer_else_from_the_model(tokenizer):
    assert special_ids(tokenizer, None) == (0, 1, 2)
    config = type("C", (), {"bos_token_id": 4, "eos_token_id": [6, 5], "pad_token_id": None})
    assert special_ids(None, config) == (4, 5, 6)
    assert special_ids(None, None) == ()


def test_chat_template_is_protected(tokenizer):
    tokenizer = load_tokenizer()
    assert template_sequences(tokenizer) == ()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "has fever since march. takes insulin 5 mg daily. " * 8}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    reducer = TokenReducer(0.3, scorer=Recency(), tokenizer=tokenizer, first=0, last=1)
    seen = reducer.inspect(text)
    protected = "".join(token for token, kept in zip(seen.tokens, seen.protected, strict=True) if kept)
    assert "<s>" in protected
    assert protected.replace(" ", "").count("assistantsays") == 1
    assert all(kept for kept, flag in zip(seen.kept, seen.protected, strict=True) if flag)


def test_markers_are_taken_out(tokenizer):
    assert strip_markers("a <keep>b c</keep> d") == ("a b c d", [(2, 5)])
    assert strip_markers("<k>x</k><k>y</k>", ("<k>", "</k>")) == ("xy", [(0, 1), (1, 2)])
    for text in ("a <keep>b", "a</keep>", "<keep>a<keep>b</keep>"):
        with pytest.raises(DataError, match="keep"):
            strip_markers(text)


def test_marked_text_and_offsets_protect_the_same_tokens(tokenizer):
    reducer = TokenReducer(0.5, scorer=Recency(), tokenizer=tokenizer)
    plain = "denies fever. takes insulin daily."
    by_offset = reducer.encode(plain, protect=[(14, 27)])
    by_marker = reducer.encode("denies fever. <keep>takes insulin</keep> daily.")
    for name in by_offset:
        assert torch.equal(by_offset[name], by_marker[name])
    kept = by_offset["input_ids"][by_offset["protected"]]
    assert tokenizer.decode(kept).strip() == "takes insulin"


def test_batches_are_padded_on_the_left(tokenizer):
    reducer = TokenReducer(0.5, scorer=Recency(), tokenizer=tokenizer)
    batch = reducer.encode(
        ["denies it.", "takes <keep>insulin</keep> daily since march and has one question about travel."]
    )
    assert batch["attention_mask"][0, 0] == 0
    assert not batch["protected"][0].any()
    assert batch["protected"][1].any()
    spans = reducer.encode(["denies it.", "takes insulin"], protect=[[(0, 6)], []])
    assert spans["protected"][0].any()
    assert not spans["protected"][1].any()


@pytest.mark.parametrize("span", [(3, 3), (-1, 2), (500, 510)])
def test_spans_without_text_are_refused(tokenizer, span):
    with pytest.raises(DataError, match="span"):
        TokenReducer(0.5, scorer=Recency(), tokenizer=tokenizer).encode("denies fever.", protect=[span])


def test_spans_must_match_the_texts(tokenizer):
    with pytest.raises(DataError, match="one list of spans for each"):
        TokenReducer(0.5, tokenizer=tokenizer).encode(["a", "b"], protect=[[(0, 1)]])


def test_encoding_needs_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer"):
        TokenReducer(0.5).encode("a")

from __future__ import annotations

import re

import pytest
import yaml
from card_inputs import check_card, make_facts, metadata, render
from huggingface_hub import ModelCard
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from fedfstq_hf.reporting.card.federation_card import card_files
from fedfstq_hf.reporting.card.merge import decode, merge_card

OLD = render(2)
NEW = render(3)
BEGIN, END = (re.search(rf"<!-- fedfstq:{word}[^>]*-->", NEW)[0] for word in ("begin", "end"))
OURS = NEW[NEW.index(BEGIN) : NEW.index(END)]


def test_an_untouched_card_becomes_the_new_one():
    assert merge_card(NEW, OLD) == NEW
    assert merge_card(NEW, NEW) == NEW
    assert merge_card(NEW, render(0, metrics={})) == NEW


def test_text_around_the_markers_stays():
    edited = OLD.replace("# Fed-Med", "# Our model\n\nBy *us*.").replace(END, f"{END}\n\n## Contact\n\nus@example.org")
    edited = edited.replace("\n## Bytes", "\nlost on purpose\n## Bytes")
    card = merge_card(NEW, edited)
    assert card == NEW.replace("# Fed-Med", "# Our model\n\nBy *us*.").replace(
        END, f"{END}\n\n## Contact\n\nus@example.org"
    )
    check_card(card)


def test_metadata_of_a_person_stay_as_written():
    theirs = "# see LICENSE\nlicense:   mit # both of us agreed\nlanguage: [en, fr]\nthumbnail: 'x.png'\n"
    edited = OLD.replace("pipeline_tag: ", f"{theirs}pipeline_tag: ")
    edited = edited.replace("library_name: peft", "library_name: transformers").replace(
        "base_model: ", "base_model: my/"
    )
    fields = metadata(merge_card(NEW, edited))
    assert fields == metadata(NEW) | {"license": "mit", "language": ["en", "fr"], "thumbnail": "x.png"}
    header = merge_card(NEW, edited).split("\n---\n")[0]
    assert "# see LICENSE\nlicense:   mit # both of us agreed\n" in header
    assert "language: [en, fr]\nthumbnail: 'x.png'\n" in header


def test_comments_around_our_keys_stay():
    edited = OLD.replace("model-index:", "# results\nmodel-index:").replace("\n---\n\n#", "\n# the end\n---\n\n#")
    header = merge_card(NEW, edited).split("\n---\n")[0]
    assert "\n# results\nmodel-index:" in header
    assert header.endswith("\n# the end")


def test_without_markers_the_text_is_the_persons():
    edited = "---\nlicense: mit\nlibrary_name: other\n---\n# Mine\n\nAll mine.\n"
    card = merge_card(NEW, edited)
    assert card.endswith("\n---\n# Mine\n\nAll mine.\n")
    ours = {key: value for key, value in metadata(NEW).items() if key in ("base_model", "model-index")}
    assert metadata(card) == {"license": "mit", "library_name": "peft"} | ours
    assert merge_card(NEW, card) == card


@pytest.mark.parametrize("left", [BEGIN, END, f"{END}\n\n{BEGIN}", f"`{BEGIN}` and `{END}`"])
def test_half_a_pair_of_markers_is_none(left):
    body = f"# Mine\n\n{left}\n\nmore\n"
    assert merge_card(NEW, body).endswith(body)


def test_of_two_begins_the_nearer_one_counts():
    card = merge_card(NEW, f"---\nlicense: mit\n---\n{BEGIN}\n\nkept\n\n{BEGIN}\n\ngone\n\n{END}\n\nkept too\n{END}\n")
    assert card.split("\n---\n", 1)[1] == f"{BEGIN}\n\nkept\n\n{OURS}{END}\n\nkept too\n{END}\n"


@pytest.mark.parametrize("existing", ["", "\n", "---\nlicense: mit\n---\n", "---\nlicense: mit\n---", "---\n\n---\n\n"])
def test_a_card_without_text_is_filled(existing):
    card = merge_card(NEW, existing)
    assert card.split("\n---\n", 1)[1] == NEW.split("\n---\n", 1)[1]
    assert metadata(card) == metadata(NEW) | ({"license": "mit"} if "mit" in existing else {})


BROKEN = {
    "not closed": "license: [mit\n",
    "no mapping": "just a line",
    "a key twice": "license: mit\nlicense: apache-2.0",
    "aliases": "tags: &a [x]\nmore: *a",
    "python": "license: !!python/object/apply:os.system ['true']",
    "no date": "when: 2024-13-45",
    "deep": "x: " + "[" * 5000,
    "two documents": "a: 1\n...\nb: 2",
    "a document mark": "---\n# Mine\n",
    "control characters": "license: m\x07it",
    "markers": f"{BEGIN.replace('fedfstq:', 'fedfstq: ')}\n- x\na",
    "fence": "a: [\n```\n````x",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("body", ["# Mine\n", NEW.split("\n---\n", 1)[1]], ids=["mine", "ours"])
def test_metadata_that_cannot_be_read_move_into_the_text(header, body):
    card = merge_card(NEW, f"---\n{header}\n---\n{body}")
    assert metadata(card)["library_name"] == "peft"
    assert body.strip() in card
    assert header.strip("\n") in card.replace(OURS, "").split("\n---\n", 1)[1]
    fences = [len(fence) for fence in re.findall(r"^(`{3,})", card.split("moved it here")[1], re.MULTILINE)]
    assert fences[0] == fences[-1] > max(fences[1:-1], default=0)
    assert merge_card(NEW, card) == card


def test_results_that_the_hub_would_refuse_are_set_aside():
    edited = "---\nmodel-index: mine\nlicense: mit\n---\n# Mine\n"
    card = merge_card(render(0, metrics={}), edited)
    assert "model-index" not in metadata(card)
    assert "```yaml\nmodel-index: mine\n```" in card
    ModelCard(card)
    assert "model-index: mine" not in merge_card(NEW, edited).split("\n---\n")[0]


def test_results_of_a_person_stay_while_there_are_none_of_ours():
    fields = metadata(NEW)["model-index"]
    edited = f"---\n{yaml.safe_dump({'model-index': fields})}---\n# Mine\n"
    assert metadata(merge_card(render(0, metrics={}), edited))["model-index"] == fields


def test_metadata_in_one_line_are_rewritten():
    card = merge_card(NEW, "---\n{license: mit, library_name: other}\n---\n# Mine\n")
    assert metadata(card)["license"] == "mit"
    assert metadata(card)["library_name"] == "peft"


def test_windows_line_ends_stay():
    card = merge_card(NEW, OLD.replace("\n", "\r\n"))
    assert card == NEW.replace("\n", "\r\n")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é".encode(), "é"),
        (b"\xef\xbb\xbf---", "---"),
        ("é---".encode("utf-16"), "é---"),
        ("é".encode("latin-1"), "é"),
        (b"\xff\xfe\x00", "ÿþ\x00"),
        (b"\x00\x81\xff", "\x00\x81ÿ"),
        ("é".encode("latin-1").decode("utf-8", "surrogateescape"), "é"),
        ("\ufeffx", "x"),
        ("\ud800", "?"),
    ],
)
def test_any_encoding_becomes_text(data, text):
    assert decode(data) == text


@given(
    st.text(max_size=300)
    | st.lists(st.sampled_from(["---\n", "a: 1\n", f"{BEGIN}\n", f"{END}\n", "text\n"])).map("".join)
)
@example("---\n---\n# T\n\n---\n")
@settings(deadline=None, max_examples=150, phases=[Phase.explicit, Phase.generate])
def test_any_text_gives_a_valid_card_that_holds_still(existing):
    card = merge_card(NEW, existing)
    assert metadata(card.replace("\r\n", "\n"))["library_name"] == "peft"
    assert merge_card(NEW, card) == card
    if not ("fedfstq:begin" in existing and "fedfstq:end" in existing):
        assert set(existing.split()) <= set(card.replace("fedfstq: ", "fedfstq:").split())


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=50, phases=[Phase.generate])
def test_any_bytes_give_a_card_in_utf_8(existing):
    files = card_files(make_facts(1, metrics={}, existing_card=existing), repo_id=None)
    assert metadata(files["README.md"].decode().replace("\r\n", "\n"))["library_name"] == "peft"

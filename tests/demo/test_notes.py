import itertools
import re

import pytest

from fedfstq_hf.demo import make_examples
from fedfstq_hf.demo.clinic import KINDS, QUESTIONS, SPECIALTIES, SPLITS, ask, belongs, notes
from fedfstq_hf.errors import ConfigError

# written out once more, apart from the generator's templates: the word before a term decides what is said of it
CUES = {
    "reports": "present", "has": "present", "shows": "present",
    "denies": "absent", "no": "absent", "without": "absent",
    "past": "resolved", "former": "resolved", "resolved": "resolved",
    "familial": "familial", "maternal": "familial", "paternal": "familial",
    "takes": "kept", "continues": "kept", "tolerates": "kept",
    "stopped": "stopped", "discontinued": "stopped", "off": "stopped",
    "started": "started", "added": "started", "new": "started",
    "raised": "raised", "increased": "raised", "doubled": "raised",
}  # fmt: skip


def facts_read_from(text, specialty):
    terms = set(SPECIALTIES[specialty].findings + SPECIALTIES[specialty].drugs)
    words = re.findall(r"[a-z]+|[.,?]", text)
    found = {}
    for before, word in itertools.pairwise(words):
        if word in terms and before in CUES:
            assert CUES[before] not in found
            found[CUES[before]] = word
    return found


def kind_of(question):
    (kind,) = [kind for kind, texts in QUESTIONS.items() if question in texts]
    return kind


def test_same_arguments_same_examples():
    assert make_examples(30, 7, "test") == make_examples(30, 7, "test")
    assert make_examples(10, 7) == make_examples(30, 7)[:10]
    assert make_examples(10, 7) != make_examples(10, 8)


def test_shape_of_an_example():
    for example in make_examples(50, 0):
        assert set(example) == {"prompt", "answer", "specialty"}
        assert example["prompt"].startswith("note: ")
        assert example["prompt"].count("\nname what ") == 1
        assert example["prompt"].endswith(":")
        assert example["answer"] == example["answer"].strip() != ""


def test_splits_share_no_note():
    texts = {
        split: {note.text for seed in range(3) for (note, _), _ in zip(notes(seed, split), range(200), strict=False)}
        for split in SPLITS
    }
    assert not texts["train"] & texts["test"]
    assert not texts["pretrain"] & (texts["train"] | texts["test"])
    for note, _ in (next(notes(seed, "test")) for seed in range(20)):
        assert [split for split in SPLITS if belongs(note, split)] == ["test"]


def test_record_says_what_the_text_says():
    for (note, _), _ in zip(notes(0, "train"), range(300), strict=False):
        assert dict(note.facts) == facts_read_from(note.text, note.specialty)


def test_answer_can_be_derived_from_record_and_from_text():
    for (note, rng), _ in zip(notes(1, "test"), range(300), strict=False):
        question, answer = ask(rng, note)
        assert answer == note.facts[kind_of(question)]
    for example in make_examples(300, 1, "test"):
        note, question = re.fullmatch(r"note: (.*)\nname (.*):", example["prompt"]).groups()
        assert example["answer"] == facts_read_from(note, example["specialty"])[kind_of(question)]


def test_one_answer_for_all_gets_nowhere():
    answers = [example["answer"] for example in make_examples(2000, 0)]
    assert max(answers.count(answer) for answer in set(answers)) / len(answers) < 0.05


def test_every_kind_is_asked_and_clinics_ask_differently():
    def share(specialty):
        prompts = [example["prompt"] for example in make_examples(400, 0, "train", [specialty])]
        kinds = [kind_of(prompt.split("\nname ")[1].removesuffix(":")) for prompt in prompts]
        return [kinds.count(kind) / len(kinds) for kind in KINDS]

    one, other = share("cardiology"), share("oncology")
    assert min(one) > 0
    assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.4


def test_specialties_can_be_chosen():
    two = ["oncology", "nephrology"]
    assert {example["specialty"] for example in make_examples(40, 0, specialties=two)} == set(two)
    assert {e["specialty"] for e in make_examples(400, 0)} == set(SPECIALTIES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num": -1, "seed": 0}, "-1"),
        ({"num": 1, "seed": 0, "split": "dev"}, "dev"),
        ({"num": 1, "seed": 0, "specialties": ["astrology"]}, "cardiology"),
        ({"num": 1, "seed": 0, "specialties": []}, "empty"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        make_examples(**arguments)


def test_global_random_state_is_left_alone():
    import random

    random.seed(0)
    expected = random.random()
    random.seed(0)
    make_examples(5, 0)
    assert random.random() == expected

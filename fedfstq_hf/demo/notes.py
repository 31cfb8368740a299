"""Deterministic writer of short clinical-style notes, with a question whose answer hangs on very few of their tokens.

Negations, relatives, past events and terms that are only mentioned are the distractors. Everything is invented;
randomness comes from `random.Random` alone. A note's own hash decides its split, so that no two splits ever share one.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .vocabulary import DOSES, FILLERS, KINDS, MENTIONS, MONTHS, QUESTIONS, SPECIALTIES, TEMPLATES

_BUCKETS = 8
SPLITS: dict[str, range] = {"test": range(0, 2), "train": range(2, 5), "pretrain": range(5, _BUCKETS)}
_NUM_FINDINGS = 4  # the first kinds are said of findings, the others of drugs


@dataclass(frozen=True)
class Note:
    """A note and what it states: `facts` maps each kind to the one finding or drug that the note says it of."""

    specialty: str
    text: str
    facts: Mapping[str, str]


def write_note(rng: random.Random, specialty: str, richness: float = 1.0) -> Note:
    """Draw one term for each kind, say it in one sentence, mention other terms, add fillers, and shuffle.

    `richness` in (0, 1] is the share of facts, mentions and fillers to keep, for shorter notes with less to tell apart.
    """
    terms = SPECIALTIES[specialty]

    def say(template: str, term: str = "") -> str:
        return template.format(x=term, a=rng.choice(DOSES), n=rng.randint(2, 9), t=rng.choice(MONTHS))

    findings = rng.sample(terms.findings, len(terms.findings))
    drugs = rng.sample(terms.drugs, len(terms.drugs))
    kinds = len(KINDS) - _NUM_FINDINGS
    facts = dict(zip(KINDS, findings[:_NUM_FINDINGS] + drugs[:kinds], strict=True))
    kept = sorted(rng.sample(range(len(KINDS)), max(2, round(richness * len(KINDS)))))
    facts = {KINDS[i]: facts[KINDS[i]] for i in kept}
    spare = findings[_NUM_FINDINGS:] + drugs[kinds:]
    sentences = [say(rng.choice(TEMPLATES[kind]), term) for kind, term in facts.items()]
    sentences += [say(rng.choice(MENTIONS), term) for term in spare[: round(richness * rng.randint(1, len(spare)))]]
    sentences += [say(filler) for filler in rng.sample(FILLERS, round(richness * rng.randint(4, 12)))]
    rng.shuffle(sentences)
    opening = f"a {rng.randint(20, 89)} year old {rng.choice(('man', 'woman'))} in the {specialty} clinic."
    return Note(specialty, " ".join([opening, *sentences]), facts)


def belongs(note: Note, split: str) -> bool:
    """Whether the note's hash puts it into `split`: true of one split only, whatever seed it was drawn with."""
    return hashlib.sha256(note.text.encode()).digest()[0] % _BUCKETS in SPLITS[split]


def notes(
    seed: int | str, split: str, specialties: Sequence[str] | None = None
) -> Iterator[tuple[Note, random.Random]]:
    """Endless notes of one split with the generator that goes on to write their question. Raises `ConfigError`."""
    names = tuple(SPECIALTIES) if specialties is None else tuple(specialties)
    if unknown := [name for name in names if name not in SPECIALTIES]:
        raise ConfigError(f"unknown specialties {unknown}; choose from {list(SPECIALTIES)}")
    if not names:
        raise ConfigError(f"specialties is empty; choose from {list(SPECIALTIES)}, or leave it out for all of them")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; choose from {list(SPLITS)}")
    rng = random.Random(f"{split}/{seed}")
    while True:
        note = write_note(rng, rng.choice(names))
        if belongs(note, split):
            yield note, rng


def ask(rng: random.Random, note: Note, questions: Mapping[str, Sequence[str]] = QUESTIONS) -> tuple[str, str]:
    """A question and its answer, its kind drawn by the specialty's weights."""
    (kind,) = rng.choices(KINDS, SPECIALTIES[note.specialty].question_weights)
    return rng.choice(questions[kind]), note.facts[kind]


def make_examples(
    num: int, seed: int, split: str = "train", specialties: Sequence[str] | None = None
) -> list[dict[str, str]]:
    """`num` examples with `prompt`, `answer` and `specialty`: the same for the same arguments, on any machine.

    Tokenise prompt and answer separately and join them (then the end-of-text token): the answer starts a new word.
    `split` is `"train"` or `"test"`; `specialties` restricts the clinics. Raises `ConfigError` for unknown names.
    """
    if num < 0:
        raise ConfigError(f"num must be 0 or more examples, got {num}")
    examples = []
    source = notes(seed, split, specialties)
    for _ in range(num):
        note, rng = next(source)
        question, answer = ask(rng, note)
        prompt = f"note: {note.text}\nname {question}:"
        examples.append({"prompt": prompt, "answer": answer, "specialty": note.specialty})
    return examples

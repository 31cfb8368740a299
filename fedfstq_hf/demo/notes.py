"""Deterministic writer of short clinical-style notes, with a question whose answer hangs on a few of their tokens.

Negations, relatives, past events, old doses and old values are the distractors. Everything is invented; randomness
comes from `random.Random` alone. A note's own hash decides its split, so that no two splits ever share one.
"""

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .vocabulary import (
    DOSES,
    DRUG_TEMPLATES,
    FILLERS,
    FINDING_TEMPLATES,
    MEASURE_TEMPLATES,
    MONTHS,
    NEGATION_PAIRS,
    SPECIALTIES,
    VALUES,
)

_BUCKETS = 8
SPLITS: dict[str, range] = {"test": range(0, 2), "train": range(2, 5), "pretrain": range(5, _BUCKETS)}

STATUS_ANSWERS = {"present": "yes", "absent": "no", "resolved": "not any more", "familial": "only a relative"}
CHANGE_QUESTIONS = {
    "stopped": "which drug was stopped?",
    "started": "which drug is new?",
    "raised": "which drug went up?",
}


@dataclass(frozen=True)
class Prescription:
    """One drug of a note. `dose` and `before` in mg; `dose` is 0 once stopped, `before` is 0 where nothing is said."""

    drug: str
    change: str  # kept, stopped, started or raised
    dose: int
    before: int


@dataclass(frozen=True)
class Note:
    """A note and the facts that it states: what a reader would have to find out from `text`."""

    specialty: str
    text: str
    findings: Mapping[str, str]  # finding -> present, absent, resolved or familial
    drugs: tuple[Prescription, ...]  # at most one stopped, started and raised
    measures: Mapping[str, tuple[int, int]]  # measurement -> (today, earlier)


@dataclass(frozen=True)
class Question:
    """A question on a note: `kind` is status, dose, change or value; `about` the term it is about."""

    kind: str
    about: str
    text: str
    answer: str


def write_note(rng: random.Random, specialty: str, richness: float = 1.0) -> Note:
    """Draw the facts, then one sentence for each (or one for two absent findings), then shuffle and add fillers.

    `richness` in (0, 1] is the share of facts and fillers to keep, for shorter notes with less to tell apart.
    """
    terms = SPECIALTIES[specialty]

    def say(templates: Sequence[str], **slots: object) -> str:
        return rng.choice(templates).format(n=rng.randint(2, 9), t=rng.choice(MONTHS), **slots)

    findings, drugs, measures = _draw_findings(rng, terms.findings), _draw_drugs(rng, terms.drugs), {}
    for measure in rng.sample(terms.measures, rng.randint(2, 3)):
        today, earlier = rng.sample(VALUES, 2)
        measures[measure] = (today, earlier)
    fillers = rng.sample(FILLERS, rng.randint(4, 12))
    if richness < 1:
        findings = {f: findings[f] for f in rng.sample(list(findings), math.ceil(richness * len(findings)))}
        drugs = tuple(rng.sample(drugs, math.ceil(richness * len(drugs))))
        measures = {m: measures[m] for m in rng.sample(list(measures), math.ceil(richness * len(measures)))}
        fillers = fillers[: math.floor(richness * len(fillers))]

    absent = [finding for finding, status in findings.items() if status == "absent"]
    sentences = []
    if len(absent) >= 2 and rng.random() < 0.5:
        first, second, *absent = absent
        sentences.append(say(NEGATION_PAIRS, f=first, g=second))
    sentences += [say(FINDING_TEMPLATES["absent"], f=finding) for finding in absent]
    sentences += [say(FINDING_TEMPLATES[s], f=finding) for finding, s in findings.items() if s != "absent"]
    sentences += [say(DRUG_TEMPLATES[p.change], d=p.drug, a=p.dose, b=p.before) for p in drugs]
    sentences += [say(MEASURE_TEMPLATES, m=measure, v=now, w=then) for measure, (now, then) in measures.items()]
    sentences += [say((filler,)) for filler in fillers]
    rng.shuffle(sentences)
    opening = f"a {rng.randint(20, 89)} year old {rng.choice(('man', 'woman'))} in the {specialty} clinic."
    return Note(specialty, " ".join([opening, *sentences]), findings, drugs, measures)


def notes(seed: int | str, split: str, specialties: Sequence[str] | None = None) -> Iterator[tuple[Note, random.Random]]:
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


def belongs(note: Note, split: str) -> bool:
    """Whether the note's hash puts it into `split`: true of one split only, whatever seed it was drawn with."""
    return hashlib.sha256(note.text.encode()).digest()[0] % _BUCKETS in SPLITS[split]


def ask(rng: random.Random, note: Note) -> Question:
    """Draw one question, its kind by the specialty's weights, answerable from the note alone."""
    weights = SPECIALTIES[note.specialty].question_weights
    kind = rng.choices(("status", "dose", "change", "value"), weights)[0]
    if kind == "status":
        # by status first: otherwise "yes" and "no" would crowd out the rarer answers
        status = rng.choice(sorted(set(note.findings.values())))
        finding = rng.choice([f for f, s in note.findings.items() if s == status])
        text = rng.choice(("does the patient have {}?", "is {} a problem now?")).format(finding)
        return Question(kind, finding, text, STATUS_ANSWERS[status])
    if kind == "dose":
        drug = rng.choice(note.drugs)
        text = rng.choice(("what is the dose of {}?", "how much {} is taken now?")).format(drug.drug)
        return Question(kind, drug.drug, text, f"{drug.dose} mg" if drug.dose else "none")
    if kind == "change":
        drug = rng.choice([p for p in note.drugs if p.change != "kept"])
        return Question(kind, drug.change, CHANGE_QUESTIONS[drug.change], drug.drug)
    measure = rng.choice(list(note.measures))
    return Question("value", measure, f"what is the {measure} today?", str(note.measures[measure][0]))


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
        question = ask(rng, note)
        prompt = f"note: {note.text}\nquestion: {question.text}\nanswer:"
        examples.append({"prompt": prompt, "answer": question.answer, "specialty": note.specialty})
    return examples


def _draw_findings(rng: random.Random, names: Sequence[str]) -> dict[str, str]:
    chosen = rng.sample(names, rng.randint(4, 6))
    statuses = ["present", "absent", "resolved", "familial"]
    statuses += rng.choices(("present", "absent", "resolved", "familial"), (3, 3, 1, 1), k=len(chosen) - len(statuses))
    rng.shuffle(statuses)
    return dict(zip(chosen, statuses, strict=True))


def _draw_drugs(rng: random.Random, names: Sequence[str]) -> tuple[Prescription, ...]:
    changes = rng.sample(("stopped", "started", "raised"), rng.randint(1, 3)) + ["kept"]
    drugs = []
    for name, change in zip(rng.sample(names, len(changes)), changes, strict=True):
        low, high = sorted(rng.sample(DOSES, 2))
        dose, before = {"kept": (low, 0), "stopped": (0, low), "started": (low, 0), "raised": (high, low)}[change]
        drugs.append(Prescription(name, change, dose, before))
    return tuple(drugs)

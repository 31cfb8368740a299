"""Deterministic writer of short notes of eight invented clinics, each question of which hangs on very few tokens.

Each clinic has its own findings, drugs and mix of questions, so a split by specialty is non-IID in words and questions.
Negations, relatives, past events and terms that are only mentioned are the distractors. Randomness comes from
`random.Random` alone. A note's own hash decides its split, so that no two splits ever share one.
"""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError

KINDS = ("present", "absent", "resolved", "familial", "kept", "stopped", "started", "raised")
"""What a note says of a finding (first four) or a drug (last four); also the keys of a chart."""


@dataclass(frozen=True)
class Specialty:
    """Terms of one clinic, and how often each kind of question (order of `KINDS`) is asked there."""

    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    question_weights: tuple[int, int, int, int, int, int, int, int]


SPECIALTIES: dict[str, Specialty] = {
    "cardiology": Specialty(
        ("angina", "palpitations", "syncope", "murmur", "orthopnea", "cyanosis"),
        ("metoprolol", "ramipril", "digoxin", "warfarin", "amlodipine"),
        (4, 2, 1, 1, 2, 1, 1, 4),
    ),
    "pulmonology": Specialty(
        ("cough", "wheezing", "stridor", "hemoptysis", "clubbing", "hoarseness"),
        ("albuterol", "prednisone", "tiotropium", "montelukast", "theophylline"),
        (1, 4, 1, 2, 1, 1, 4, 2),
    ),
    "neurology": Specialty(
        ("headache", "tremor", "vertigo", "seizures", "ataxia", "numbness"),
        ("levodopa", "topiramate", "gabapentin", "baclofen", "donepezil"),
        (1, 1, 4, 4, 1, 2, 1, 2),
    ),
    "oncology": Specialty(
        ("cachexia", "nodules", "mucositis", "alopecia", "ascites", "anemia"),
        ("tamoxifen", "cisplatin", "imatinib", "filgrastim", "ondansetron"),
        (1, 1, 2, 1, 2, 4, 4, 1),
    ),
    "gastroenterology": Specialty(
        ("heartburn", "bloating", "jaundice", "melena", "dysphagia", "vomiting"),
        ("omeprazole", "mesalamine", "loperamide", "lactulose", "rifaximin"),
        (2, 4, 4, 1, 1, 1, 2, 1),
    ),
    "nephrology": Specialty(
        ("colic", "edema", "hematuria", "itching", "nocturia", "cramps"),
        ("furosemide", "losartan", "sevelamer", "calcitriol", "epoetin"),
        (1, 1, 2, 1, 4, 1, 2, 4),
    ),
    "endocrinology": Specialty(
        ("thirst", "goiter", "sweating", "flushing", "acne", "bruising"),
        ("metformin", "insulin", "methimazole", "thyroxine", "cabergoline"),
        (2, 1, 1, 4, 4, 2, 1, 1),
    ),
    "orthopedics": Specialty(
        ("lumbago", "swelling", "limping", "stiffness", "locking", "bunions"),
        ("ibuprofen", "naproxen", "tramadol", "alendronate", "celecoxib"),
        (4, 2, 1, 2, 1, 4, 1, 1),
    ),
}

MONTHS = ("march", "april", "june", "july", "august", "october")
DOSES = (5, 10, 15, 20, 25, 40, 50, 60, 75, 80)

# {x} the finding or drug, {a} a dose in mg, {n} a small number, {t} a month. The word before {x} decides what is said.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "present": ("reports {x} for {n} days.", "has {x} since {t}.", "shows {x} again."),
    "absent": ("denies {x}.", "no {x} today.", "without {x} at this visit."),
    "resolved": ("past {x}, gone since {t}.", "former {x} went away after {n} days.", "resolved {x} in {t}."),
    "familial": ("familial {x} is known.", "maternal {x} in {t}.", "paternal {x} for years."),
    "kept": ("takes {x} {a} mg daily.", "continues {x} {a} mg.", "tolerates {x} {a} mg."),
    "stopped": ("stopped {x}.", "discontinued {x} in {t}.", "off {x} since {t}."),
    "started": ("started {x} {a} mg.", "added {x} {a} mg this week.", "new {x} {a} mg."),
    "raised": ("raised {x} to {a} mg.", "increased {x} to {a} mg.", "doubled {x} to {a} mg."),
}
# Of terms that the note names without saying anything that a question asks for.
MENTIONS = (
    "asks about {x}.",
    "read about {x} in {t}.",
    "would rather not hear of {x}.",
    "a leaflet on {x} was handed out.",
)

FILLERS = (
    "lives with a partner and a dog.",
    "denies smoking, drinks little.",
    "walks {n} km each day.",
    "said yes to the plan.",
    "has one question about travel in {t}.",
    "which form is needed was made clear.",
    "asks how much rest is best.",
    "got a clear answer from the nurse.",
    "vaccines given in {t}.",
    "none of the forms is missing.",
    "works {n} hours a week as a driver.",
    "only a short visit, more time next week.",
    "does what the team says.",
    "a relative came along and had no question.",
    "not able to come in {t} any more.",
    "drug allergies: none known.",
    "takes the stairs without a rest.",
    "is the next visit in {t}? yes, in week {n}.",
    "have the team call the patient before {t}.",
    "the problem list was read out.",
    "stopped work in {t}, started a new hobby.",
    "mother of {n} came with the patient.",
    "no appointment in {t}.",
    "the past year was a good one.",
    "raised {n} children without help.",
)

# The last word before the colon decides. It is one that notes use, but none that stands in a chart for its kind.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "present": ("what the patient reports", "what the patient shows"),
    "absent": ("what the patient denies", "what the patient is without"),
    "resolved": ("what is past", "what is former"),
    "familial": ("what is maternal", "what is paternal"),
    "kept": ("what the patient takes", "what the patient tolerates"),
    "stopped": ("what is discontinued", "what the patient is off"),
    "started": ("what is added", "what is new"),
    "raised": ("what is increased", "what is doubled"),
}

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

"""Words of the embedded demo: eight invented clinics, each with its own findings, drugs and measurements.

The terms differ between specialties, and so does the mix of questions: a split by specialty is non-IID in both.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Specialty:
    """Terms of one clinic and how often each kind of question is asked there."""

    findings: tuple[str, ...]
    drugs: tuple[str, ...]
    measures: tuple[str, ...]
    question_weights: tuple[int, int, int, int]  # status, dose, change, value


SPECIALTIES: dict[str, Specialty] = {
    "cardiology": Specialty(
        ("chest pain", "palpitations", "syncope", "murmur", "ankle swelling", "orthopnea", "cyanosis"),
        ("metoprolol", "ramipril", "digoxin", "warfarin", "amlodipine"),
        ("pulse", "troponin", "systolic pressure"),
        (3, 3, 1, 1),
    ),
    "pulmonology": Specialty(
        ("cough", "wheezing", "stridor", "hemoptysis", "night sweats", "clubbing", "hoarseness"),
        ("albuterol", "prednisone", "tiotropium", "montelukast", "theophylline"),
        ("saturation", "peak flow", "breath rate"),
        (3, 1, 1, 3),
    ),
    "neurology": Specialty(
        ("headache", "tremor", "vertigo", "seizures", "double vision", "ataxia", "numbness"),
        ("levodopa", "topiramate", "gabapentin", "baclofen", "donepezil"),
        ("gait score", "reflex grade", "coma scale"),
        (4, 1, 2, 1),
    ),
    "oncology": Specialty(
        ("weight loss", "bone pain", "lymph nodes", "mucositis", "alopecia", "ascites", "anemia"),
        ("tamoxifen", "cisplatin", "imatinib", "ondansetron", "filgrastim"),
        ("tumor size", "platelets", "marker level"),
        (1, 1, 3, 3),
    ),
    "gastroenterology": Specialty(
        ("heartburn", "bloating", "jaundice", "melena", "belly cramps", "dysphagia", "vomiting"),
        ("omeprazole", "mesalamine", "loperamide", "lactulose", "rifaximin"),
        ("bilirubin", "lipase", "albumin"),
        (2, 3, 2, 1),
    ),
    "nephrology": Specialty(
        ("flank pain", "edema", "hematuria", "foamy urine", "itching", "nocturia", "cramps"),
        ("furosemide", "losartan", "sevelamer", "calcitriol", "epoetin"),
        ("creatinine", "potassium", "urea"),
        (1, 2, 1, 4),
    ),
    "endocrinology": Specialty(
        ("thirst", "goiter", "heat intolerance", "hair loss", "flushing", "acne", "bruising"),
        ("metformin", "insulin", "methimazole", "thyroxine", "cabergoline"),
        ("glucose", "cortisol", "hormone level"),
        (1, 3, 3, 1),
    ),
    "orthopedics": Specialty(
        ("back pain", "joint swelling", "limping", "stiffness", "locking", "bunions", "spasms"),
        ("ibuprofen", "naproxen", "celecoxib", "tramadol", "alendronate"),
        ("grip strength", "knee angle", "bone density"),
        (3, 1, 3, 1),
    ),
}

MONTHS = ("january", "march", "april", "june", "july", "august", "october", "december")
DOSES = (5, 10, 15, 20, 25, 40, 50, 60, 75, 80)
RELATIVES = ("mother", "father", "sister", "brother", "aunt", "uncle")

# {f} a finding, {n} a small number, {t} a month, {r} a relative
FINDING_TEMPLATES: dict[str, tuple[str, ...]] = {
    "present": (
        "reports {f} for {n} days.",
        "on exam there is {f}.",
        "{f} is seen again today.",
        "comes in with {f} since {t}.",
        "still troubled by {f}.",
    ),
    "absent": (
        "denies {f}.",
        "no {f} was found.",
        "{f} is not seen today.",
        "there is no sign of {f}.",
        "without {f} at this visit.",
    ),
    "resolved": (
        "had {f} in {t}, gone since then.",
        "{f} went away after {n} days.",
        "the old {f} has not come back.",
    ),
    "familial": (
        "the {r} had {f}.",
        "{f} is known in the {r}.",
        "lost a {r} who had {f}.",
    ),
}

# {d} a drug, {a} its dose now, {b} its dose before
DRUG_TEMPLATES: dict[str, tuple[str, ...]] = {
    "kept": ("takes {d} {a} mg daily.", "goes on with {d} at {a} mg.", "{d} {a} mg is well tolerated."),
    "stopped": ("{d} {b} mg was stopped.", "we took {d} {b} mg off the list.", "no longer on {d} {b} mg."),
    "started": ("we add {d} {a} mg from today.", "begins {d} {a} mg tonight.", "first script for {d} {a} mg."),
    "raised": ("{d} goes up from {b} mg to {a} mg.", "we raise {d} to {a} mg after {b} mg.",),
}

# {m} a measurement, {v} its value today, {w} its earlier value
MEASURE_TEMPLATES = (
    "{m} is {v} today, it was {w} in {t}.",
    "{m} was {w} in {t} and is {v} now.",
    "latest {m} {v}, earlier {w}.",
)

FILLERS = (
    "lives with a partner and a dog.",
    "does not smoke and drinks little.",
    "walks {n} km each day.",
    "said yes to the plan.",
    "has one question about travel in {t}.",
    "which of the forms is needed was made clear.",
    "asks how much rest is best.",
    "got a clear answer from the nurse.",
    "vaccines were given in {t}.",
    "none of the forms are missing.",
    "works {n} hours a week as a driver.",
    "only a short visit, more time next week.",
    "does what the team says.",
    "a relative came along and had no question.",
    "not able to come in {t} any more.",
    "drug allergies: none known.",
    "the dose of exercise can go up.",
    "is the next visit in {t}? yes, in week {n}.",
    "have the team call before {t}.",
    "the problem list was read out.",
)

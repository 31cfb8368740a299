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
        ("angina", "palpitations", "syncope", "murmur", "orthopnea", "cyanosis"),
        ("metoprolol", "ramipril", "digoxin", "warfarin"),
        ("pulse", "troponin", "pressure"),
        (3, 3, 1, 1),
    ),
    "pulmonology": Specialty(
        ("cough", "wheezing", "stridor", "hemoptysis", "clubbing", "hoarseness"),
        ("albuterol", "prednisone", "tiotropium", "montelukast"),
        ("saturation", "airflow", "breaths"),
        (3, 1, 1, 3),
    ),
    "neurology": Specialty(
        ("headache", "tremor", "vertigo", "seizures", "ataxia", "numbness"),
        ("levodopa", "topiramate", "gabapentin", "baclofen"),
        ("gait", "reflexes", "memory"),
        (4, 1, 2, 1),
    ),
    "oncology": Specialty(
        ("cachexia", "nodules", "mucositis", "alopecia", "ascites", "anemia"),
        ("tamoxifen", "cisplatin", "imatinib", "filgrastim"),
        ("diameter", "platelets", "leukocytes"),
        (1, 1, 3, 3),
    ),
    "gastroenterology": Specialty(
        ("heartburn", "bloating", "jaundice", "melena", "dysphagia", "vomiting"),
        ("omeprazole", "mesalamine", "loperamide", "lactulose"),
        ("bilirubin", "lipase", "albumin"),
        (2, 3, 2, 1),
    ),
    "nephrology": Specialty(
        ("colic", "edema", "hematuria", "itching", "nocturia", "cramps"),
        ("furosemide", "losartan", "sevelamer", "calcitriol"),
        ("creatinine", "potassium", "urea"),
        (1, 2, 1, 4),
    ),
    "endocrinology": Specialty(
        ("thirst", "goiter", "sweating", "flushing", "acne", "bruising"),
        ("metformin", "insulin", "methimazole", "thyroxine"),
        ("glucose", "cortisol", "calcium"),
        (1, 3, 3, 1),
    ),
    "orthopedics": Specialty(
        ("lumbago", "swelling", "limping", "stiffness", "locking", "bunions"),
        ("ibuprofen", "naproxen", "tramadol", "alendronate"),
        ("grip", "flexion", "density"),
        (3, 1, 3, 1),
    ),
}

MONTHS = ("march", "april", "june", "july", "august", "october")
DOSES = (5, 10, 15, 20, 25, 40, 50, 60, 75, 80)
VALUES = (12, 18, 24, 27, 31, 36, 42, 48, 53, 57, 62, 66, 71, 78, 84, 87, 91, 96)

# {f} a finding, {g} another one, {n} a small number, {t} a month. The word before a finding is what decides.
FINDING_TEMPLATES: dict[str, tuple[str, ...]] = {
    "present": ("reports {f} for {n} days.", "has {f} since {t}.", "comes in with {f}."),
    "absent": ("denies {f}.", "no {f} today.", "without {f} at this visit."),
    "resolved": ("past {f}, gone since {t}.", "former {f} went away after {n} days.", "resolved {f} in {t}."),
    "familial": ("mother {f} for years.", "father {f} in {t}.", "aunt {f}, told at home."),
}
NEGATION_PAIRS = ("denies {f} or {g}.", "neither {f} nor {g}.", "no {f} or {g} today.")

# {d} a drug, {a} its dose now in mg, {b} its dose before
DRUG_TEMPLATES: dict[str, tuple[str, ...]] = {
    "kept": ("takes {d} {a} mg daily.", "goes on with {d} {a} mg.", "tolerates {d} {a} mg."),
    "stopped": ("stopped {d}.", "stopped {d} in {t}."),
    "started": ("started {d} {a} mg.", "started {d} {a} mg this week."),
    "raised": ("raised {d} {a} mg, before that {b} mg.", "raised {d} {a} mg after {b} mg."),
}

# {m} a measurement, {v} its value today, {w} its earlier value
MEASURE_TEMPLATES = ("{m} {v} today, was {w} in {t}.", "{m} {v}, earlier {w}.", "latest {m} {v} after {w}.")

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
    "the dose of exercise can go up now.",
    "is the next visit in {t}? yes, in week {n}.",
    "have the team call the patient before {t}.",
    "the problem list was read out.",
    "stopped work in {t}, started a new hobby.",
    "mother of {n} came with the patient.",
    "no appointment in {t}.",
    "the past year was a good one.",
    "raised {n} children without help.",
)

"""The metrics as one local `evaluate` module, a configuration each: `evaluate.load(metrics.SCRIPT, "rouge_l")`.

It loads and computes without network. `evaluate` copies this file into its cache, so all imports are absolute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.metrics.sensitive_tokens import DEFAULT_P, token_recall
from fedfstq_hf.metrics.text_scores import exact_match, mean_of_best, rouge_l, token_f1

SCRIPT = __file__
"""For `evaluate.load(SCRIPT, NAME)`."""

_TEXTS = """
Args:
    predictions: list of texts.
    references: list of texts, or of lists of texts, of which the best one counts.
"""
_SQUAD = "Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv 1606.05250"


@dataclass(frozen=True)
class _Kind:
    compute: Callable[..., float]
    description: str
    inputs: str
    citation: str


def _exact_match(predictions: Sequence[str], references: Sequence[Any], normalize: bool = True) -> float:
    return mean_of_best(lambda *pair: exact_match(*pair, normalize=normalize), predictions, references)


def _rouge_l(predictions: Sequence[str], references: Sequence[Any]) -> float:
    return mean_of_best(lambda *pair: rouge_l(*pair).fmeasure, predictions, references)


def _token_f1(predictions: Sequence[str], references: Sequence[Any]) -> float:
    return mean_of_best(token_f1, predictions, references)


def _token_recall(
    predictions: Sequence[Any], references: Sequence[Any], p: float = DEFAULT_P, kept: bool = False
) -> float:
    if not len(predictions):
        raise DataError("there are no runs to compare; give one list of sensitivities per run on both sides")
    field = "kept" if kept else "sensitivities"
    pairs = zip(predictions, references, strict=True)
    return sum(token_recall(wanted, p=p, **{field: given}) for given, wanted in pairs) / len(predictions)


_KINDS = {
    "exact_match": _Kind(
        _exact_match,
        "Share of predictions that equal a reference in SQuAD's normal form: no case, punctuation or articles.",
        f"""{_TEXTS}    normalize: compare the texts as they are if false; true unless given.
Returns:
    exact_match: share in [0, 1].
""",
        _SQUAD,
    ),
    "rouge_l": _Kind(
        _rouge_l,
        "ROUGE-L F-measure over words in any script, sentence-level, without stemming.",
        f"{_TEXTS}Returns:\n    rouge_l: mean F-measure in [0, 1].\n",
        "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004",
    ),
    "token_f1": _Kind(
        _token_f1,
        "Mean F1 over the bags of tokens of prediction and reference in SQuAD's normal form.",
        f"{_TEXTS}Returns:\n    token_f1: mean in [0, 1] (SQuAD's script prints it times 100).\n",
        _SQUAD,
    ),
    "token_recall": _Kind(
        _token_recall,
        "Share of the top-p Fisher-sensitive tokens of an uncompressed reference run that a method retains.",
        """
Args:
    predictions: one list of floats per run: the method's token sensitivities, +inf where it never saw a token; with
        `kept=True` what it keeps, 1.0 or 0.0.
    references: one list of floats per run, of the same length: sensitivities of the uncompressed run.
    p: share of the reference's measured tokens that count as sensitive, in (0, 1]; 0.1 unless given.
    kept: true where `predictions` are a kept mask; false unless given.
Returns:
    token_recall: mean over the runs, in [0, 1].
""",
        "Li et al., Fed-FSTQ, arXiv 2604.25421, report it without a definition; this one is the package's own.",
    ),
}


def names() -> list[str]:
    """Names of the metrics, sorted."""
    return sorted(_KINDS)


class LocalMetric(evaluate.Metric):  # type: ignore[misc]
    """One of the metrics; `config_name` says which.

    Raises:
        ConfigError: there is no such metric.
    """

    def __init__(self, config_name: str | None = None, **settings: Any) -> None:
        if config_name not in _KINDS:
            raise ConfigError(f"there is no metric {config_name!r}; expected one of {', '.join(names())}")
        super().__init__(config_name, **settings)
        self.info.module_name = config_name

    def _info(self) -> evaluate.MetricInfo:
        kind = _KINDS[self.config_name]
        text, values = datasets.Value("string"), datasets.Sequence(datasets.Value("float64"))
        pairs = [(text, datasets.Sequence(text)), (text, text)]
        if self.config_name == "token_recall":
            pairs = [(values, values)]
        return evaluate.MetricInfo(
            description=kind.description,
            citation=kind.citation,
            inputs_description=kind.inputs,
            features=[datasets.Features({"predictions": given, "references": wanted}) for given, wanted in pairs],
        )

    def _compute(self, *, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, float]:
        return {self.config_name: _KINDS[self.config_name].compute(predictions, references, **options)}


def load(name: str, **settings: Any) -> LocalMetric:
    """An `evaluate.Metric`, ready for `compute`, `add_batch` and `evaluate.combine`.

    Unlike `evaluate.load` it copies no script into a cache, and holds predictions in memory unless told otherwise: it
    needs neither network nor a writable home, and processes cannot get in each other's way. With `num_process > 1`
    (one metric over several processes) or `keep_in_memory=False`, `evaluate` gathers through files in its cache.

    Args:
        name: one of `names()`.
        settings: of `evaluate.Metric`, such as `experiment_id`, `num_process`, `process_id`, `cache_dir`.

    Raises:
        ConfigError: there is no such metric.
    """
    settings.setdefault("keep_in_memory", settings.get("num_process", 1) == 1)
    if not settings["keep_in_memory"] or "cache_dir" in settings:
        return LocalMetric(name, **settings)
    # A Metric makes its cache folder even where it writes nothing into it; this one goes again.
    with tempfile.TemporaryDirectory() as unused:
        return LocalMetric(name, cache_dir=unused, **settings)

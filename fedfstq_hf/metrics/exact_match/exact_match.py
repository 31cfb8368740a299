"""Exact match of answers, as an `evaluate` module that loads without network."""

import datasets
import evaluate

from fedfstq_hf.metrics.cores.corpus import mean_of_best
from fedfstq_hf.metrics.cores.exact_match import exact_match

_DESCRIPTION = (
    """Share of predictions that equal a reference in SQuAD's normal form: no case, punctuation and English articles."""
)
_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, or of lists of texts, of which the best one counts.
    normalize: compare the texts as they are if false; true unless given.
Returns:
    exact_match: share in [0, 1].
"""
_CITATION = """Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv 1606.05250"""


class ExactMatch(evaluate.Metric):  # type: ignore[misc]
    """Mean of `cores.exact_match`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(
        self, predictions: list[str], references: list[str | list[str]], normalize: bool = True
    ) -> dict[str, float]:
        def score(prediction: str, reference: str) -> float:
            return exact_match(prediction, reference, normalize=normalize)

        return {"exact_match": mean_of_best(score, predictions, references)}

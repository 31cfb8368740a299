"""Token F1 of answers, as in SQuAD, as an `evaluate` module that loads without network."""

import datasets
import evaluate

from fedfstq_hf.metrics.cores.corpus import mean_of_best
from fedfstq_hf.metrics.cores.token_f1 import token_f1

_DESCRIPTION = """Mean F1 over the bags of tokens of prediction and reference in SQuAD's normal form."""
_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, or of lists of texts, of which the best one counts.
Returns:
    token_f1: mean in [0, 1] (SQuAD's script prints it times 100).
"""
_CITATION = """Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, arXiv 1606.05250"""


class TokenF1(evaluate.Metric):  # type: ignore[misc]
    """Mean of `cores.token_f1`."""

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

    def _compute(self, predictions: list[str], references: list[str | list[str]]) -> dict[str, float]:
        return {"token_f1": mean_of_best(token_f1, predictions, references)}

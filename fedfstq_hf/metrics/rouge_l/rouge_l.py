"""ROUGE-L, as an `evaluate` module that loads without network."""

import datasets
import evaluate

from fedfstq_hf.metrics.cores.corpus import mean_of_best
from fedfstq_hf.metrics.cores.rouge_l import rouge_l

_DESCRIPTION = """ROUGE-L F-measure over words in any script, sentence-level, without stemming."""
_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, or of lists of texts, of which the best one counts.
Returns:
    rouge_l: mean F-measure in [0, 1].
"""
_CITATION = """Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"""


class RougeL(evaluate.Metric):  # type: ignore[misc]
    """Mean F-measure of `cores.rouge_l`."""

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
        def score(prediction: str, reference: str) -> float:
            return rouge_l(prediction, reference).fmeasure

        return {"rouge_l": mean_of_best(score, predictions, references)}

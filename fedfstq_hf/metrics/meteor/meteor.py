"""METEOR without synonyms, as an `evaluate` module that loads without network."""

import datasets
import evaluate

from fedfstq_hf.metrics.cores.corpus import mean_of_best
from fedfstq_hf.metrics.cores.meteor import meteor

_DESCRIPTION = (
    """METEOR with its stages exact and Porter stem. WordNet synonyms are left out, so that nothing is downloaded."""
)
_INPUTS = """
Args:
    predictions: list of texts.
    references: list of texts, or of lists of texts, of which the best one counts.
Returns:
    meteor: mean in [0, 1].
"""
_CITATION = """Lavie and Agarwal, METEOR: An Automatic Metric for MT Evaluation with High Levels of Correlation, 2007"""


class Meteor(evaluate.Metric):  # type: ignore[misc]
    """Mean of `cores.meteor`."""

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
        return {"meteor": mean_of_best(meteor, predictions, references)}

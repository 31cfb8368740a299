"""Token Recall, as an `evaluate` module that loads without network."""

import datasets
import evaluate

from fedfstq_hf.errors import DataError
from fedfstq_hf.metrics.cores.token_recall import DEFAULT_P, token_recall

_DESCRIPTION = """Share of the top-p Fisher-sensitive tokens of an uncompressed reference run that a method retains."""
_INPUTS = """
Args:
    predictions: one list of floats per run: the method's token sensitivities, +inf where it never saw a token; with
        `kept=True` what it keeps, 1.0 or 0.0.
    references: one list of floats per run, of the same length: sensitivities of the uncompressed run.
    p: share of the reference's measured tokens that count as sensitive, in (0, 1]; 0.1 unless given.
    kept: true where `predictions` are a kept mask; false unless given.
Returns:
    token_recall: mean over the runs, in [0, 1].
"""
_CITATION = """Li et al., Fed-FSTQ, arXiv 2604.25421, report it without a definition; this one is the package's own."""


class TokenRecall(evaluate.Metric):  # type: ignore[misc]
    """Mean of `cores.token_recall` over pairs of runs."""

    def _info(self) -> evaluate.MetricInfo:
        values = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": values, "references": values}),
        )

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], p: float = DEFAULT_P, kept: bool = False
    ) -> dict[str, float]:
        if not len(predictions):
            raise DataError("there are no runs to compare; give one list of sensitivities per run on both sides")
        total = 0.0
        for given, reference in zip(predictions, references, strict=True):
            if kept:
                total += token_recall(reference, kept=given, p=p)
            else:
                total += token_recall(reference, sensitivities=given, p=p)
        return {"token_recall": total / len(predictions)}

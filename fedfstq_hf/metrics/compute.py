"""Text metrics in `Trainer.evaluate()`: a `compute_metrics` for causal language models.

    trainer = FedFSTQTrainer(
        ...,
        compute_metrics=make_compute_metrics(tokenizer, metrics=["rouge_l", "token_f1"]),
        preprocess_logits_for_metrics=predicted_ids,
    )
    trainer.evaluate()  # eval_loss, eval_rouge_l, eval_token_f1

Not covered: generated text. Each token is predicted from the reference's tokens before it (teacher forcing), so the
figures are higher than those of `generate()`; only an exact match of all tokens means the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedfstq_hf.errors import ConfigError, DataError

from .modules import load, names

_IGNORED = -100
_TEXT_METRICS = [name for name in names() if name != "token_recall"]
DEFAULT_METRICS = ("exact_match", "rouge_l", "token_f1")


def predicted_ids(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """For `preprocess_logits_for_metrics`: most likely ids, (batch, seq) int64, in place of logits (batch, seq, vocab).

    The Trainer then gathers two numbers per token, not a vocabulary of them.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    return scores.argmax(dim=-1)


def make_compute_metrics(tokenizer: Any, metrics: Sequence[str] = DEFAULT_METRICS) -> Callable[[Any], dict[str, float]]:
    """A `compute_metrics` that decodes predictions and labels where the labels are not -100, and scores the texts.

    Position t predicts token t + 1, so predictions are shifted against the labels. Special tokens are left out of the
    texts, and so are examples without any label.

    Args:
        tokenizer: decodes ids.
        metrics: names among exact_match, rouge_l and token_f1. (token_recall compares no texts.)

    Returns:
        A function of an `EvalPrediction` with predictions (num_examples, seq) from `predicted_ids` and label_ids of the
        same shape; it returns one float per metric.

    Raises:
        ConfigError: a metric is unknown or does not score texts.
    """
    if isinstance(metrics, str) or not metrics:
        raise ConfigError(f"metrics is {metrics!r}; expected a list such as {list(DEFAULT_METRICS)}")
    unknown = [name for name in metrics if name not in _TEXT_METRICS]
    if unknown:
        raise ConfigError(f"{', '.join(map(repr, unknown))} cannot score texts; expected some of {_TEXT_METRICS}")
    loaded = [load(name) for name in metrics]

    def compute_metrics(evaluated: Any) -> dict[str, float]:
        predictions, references = _texts(tokenizer, np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids))
        values: dict[str, float] = {}
        for metric in loaded:
            values |= metric.compute(predictions=predictions, references=references)
        return values

    return compute_metrics


def _texts(tokenizer: Any, predictions: Any, labels: Any) -> tuple[list[str], list[str]]:
    """Decoded predictions and references of the examples that have labels."""
    if predictions.shape != labels.shape:
        raise DataError(
            f"predictions have shape {predictions.shape} and labels {labels.shape}; expected the same (num_examples, "
            "seq): pass preprocess_logits_for_metrics=fedfstq_hf.metrics.predicted_ids to the Trainer"
        )
    pairs = []
    for given, wanted in zip(predictions[:, :-1], labels[:, 1:], strict=True):
        asked = wanted != _IGNORED
        if asked.any():
            pairs.append((given[asked].tolist(), wanted[asked].tolist()))
    if not pairs:
        raise DataError("no evaluated example has a label other than -100; there is nothing to score")
    given_ids, wanted_ids = ([pair[side] for pair in pairs] for side in (0, 1))
    return (
        tokenizer.batch_decode(given_ids, skip_special_tokens=True),
        tokenizer.batch_decode(wanted_ids, skip_special_tokens=True),
    )

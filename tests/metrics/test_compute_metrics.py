"""`make_compute_metrics`: shifts, labels of -100, and a real `Trainer.evaluate()`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from fedfstq_hf.demo import load_model, load_tokenizer, make_examples
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.metrics import load, make_compute_metrics, predicted_ids
from fedfstq_hf.workloads.examples import collate


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def _row(ids: list[int], length: int) -> list[int]:
    return ids + [-100] * (length - len(ids))


def test_predictions_are_shifted_and_scored_where_labels_are(tokenizer):
    answer = tokenizer("stable angina")["input_ids"]
    length = len(answer) + 4
    labels = np.array([_row([-100, -100, *answer], length), [-100] * length])
    # Position t predicts t + 1, so the answer is predicted one place earlier; the rest must not matter.
    shifted = np.array([_row([7, *answer], length), [5] * length])
    result = make_compute_metrics(tokenizer)(EvalPrediction(shifted, labels))
    assert result == {"exact_match": 1.0, "rouge_l": 1.0, "token_f1": 1.0}
    unshifted = np.where(labels == -100, 7, labels)
    assert make_compute_metrics(tokenizer, ["exact_match"])(EvalPrediction(unshifted, labels)) == {"exact_match": 0.0}


def test_predicted_ids_are_the_most_likely_ones():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([[int(np.argmax(row)) for row in example] for example in logits.numpy()])
    assert torch.equal(predicted_ids(logits, torch.zeros(2, 3)), expected)
    assert torch.equal(predicted_ids((logits, torch.zeros(1)), torch.zeros(2, 3)), expected)


def test_in_a_trainer_it_gives_the_scores_of_teacher_forced_texts(tokenizer, tmp_path):
    model = load_model().eval()
    rows = []
    for example in make_examples(7, 0, "test"):
        prompt, answer = (tokenizer(example[part])["input_ids"] for part in ("prompt", "answer"))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_eval_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True
        ),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        eval_dataset=rows,
        compute_metrics=make_compute_metrics(tokenizer, metrics=["rouge_l", "token_f1"]),
        preprocess_logits_for_metrics=predicted_ids,
    )
    measured = trainer.evaluate()

    texts = []
    for row in rows:
        asked = sum(label != -100 for label in row["labels"])
        with torch.no_grad():
            best = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
        predicted = best[-asked - 1 : -1].tolist()
        texts.append([tokenizer.decode(ids, skip_special_tokens=True) for ids in (predicted, row["labels"][-asked:])])
    predictions, references = zip(*texts, strict=True)
    for name in ("rouge_l", "token_f1"):
        expected = load(name).compute(predictions=list(predictions), references=list(references))[name]
        assert 0 < expected < 1
        assert measured[f"eval_{name}"] == pytest.approx(expected)


def test_what_cannot_be_scored_is_refused_with_a_remedy(tokenizer):
    with pytest.raises(ConfigError, match="'token_recall' cannot score texts"):
        make_compute_metrics(tokenizer, ["rouge_l", "token_recall"])
    for wrong in ("rouge_l", []):
        with pytest.raises(ConfigError, match="expected a list"):
            make_compute_metrics(tokenizer, wrong)
    compute = make_compute_metrics(tokenizer)
    with pytest.raises(DataError, match=r"preprocess_logits_for_metrics=.*predicted_ids"):
        compute(EvalPrediction(np.zeros((2, 3, 5)), np.zeros((2, 3), dtype=int)))
    with pytest.raises(DataError, match="nothing to score"):
        compute(EvalPrediction(np.zeros((2, 3), dtype=int), np.full((2, 3), -100)))

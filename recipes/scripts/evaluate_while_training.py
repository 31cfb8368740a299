"""Evaluation and metrics during training, in a federation too: `eval_...` rows come in the log of the rounds.

    python recipes/scripts/evaluate_while_training.py
    python recipes/scripts/evaluate_while_training.py --mailbox fed --client-id hospital-a

What is evaluated is this client's model as it trains. The published adapter is measured by `fedfstq evaluate`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments, set_seed

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.demo import make_examples, model_path
from fedfstq_hf.metrics import make_compute_metrics, predicted_ids


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailbox", help="folder or hf://ORG/REPO of a federation; trains locally when left out")
    parser.add_argument("--client-id", default="client", help="name of this client in the federation")
    parser.add_argument("--output-dir", default="runs/evaluate_while_training")
    parser.add_argument("--max-steps", type=int, default=60, help="of local training; a federation has its own")
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--eval-steps", type=int, default=20)
    return parser.parse_args(argv)


def encode(tokenizer: Any, examples: list[dict[str, str]]) -> Dataset:
    """Prompt and answer as one text; the loss is that of the answer."""
    rows = []
    for example in examples:
        prompt = tokenizer(example["prompt"] + "\n")["input_ids"]
        answer = [*tokenizer(example["answer"])["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def main(argv: Sequence[str] | None = None) -> FedFSTQTrainer:
    """Train; returns the trainer, which holds the adapter and the log."""
    options = read_options(argv)
    set_seed(0)  # the adapter starts from random numbers
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    trainer = FedFSTQTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            max_steps=options.max_steps,
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=options.eval_steps,
            save_strategy="no",
        ),
        train_dataset=encode(tokenizer, make_examples(options.examples, seed=0, split="train")),
        eval_dataset=encode(tokenizer, make_examples(32, seed=0, split="test")),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        compute_metrics=make_compute_metrics(tokenizer, metrics=["exact_match", "token_f1"]),
        preprocess_logits_for_metrics=predicted_ids,
        federation=FedFSTQConfig(mailbox=options.mailbox, client_id=options.client_id, uplink_budget="2kB"),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()

"""Causal language modelling with LoRA: the Trainer script that everybody starts from, as a client of a federation.

    python recipes/scripts/causal_lm.py
    fedfstq init fed --recipe quickstart --min-clients 1 && fedfstq serve fed &
    python recipes/scripts/causal_lm.py --mailbox fed --client-id hospital-a

Two lines differ from the script without a federation: `FedFSTQTrainer` for `Trainer`, and `federation=...`.
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


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailbox", help="folder or hf://ORG/REPO of a federation; trains locally when left out")
    parser.add_argument("--client-id", default="client", help="name of this client in the federation")
    parser.add_argument("--output-dir", default="runs/causal_lm")
    parser.add_argument("--max-steps", type=int, default=60, help="of local training; a federation has its own")
    parser.add_argument("--examples", type=int, default=400)
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
    """Train; returns the trainer, which holds the adapter."""
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
            save_strategy="no",
        ),
        train_dataset=encode(tokenizer, make_examples(options.examples, seed=0, split="train")),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        federation=FedFSTQConfig(mailbox=options.mailbox, client_id=options.client_id, uplink_budget="2kB"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()

"""Supervised fine-tuning with packing: several examples share a row, nothing is padded. Needs the extra `trl`.

    python recipes/scripts/sft_packing.py
    python recipes/scripts/sft_packing.py --mailbox fed --client-id hospital-a

The client's weight in the mean is its number of examples, not of packed rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from fedfstq_hf import FedFSTQConfig, FedFSTQSFTTrainer
from fedfstq_hf.demo import make_examples, model_path


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mailbox", help="folder or hf://ORG/REPO of a federation; trains locally when left out")
    parser.add_argument("--client-id", default="client", help="name of this client in the federation")
    parser.add_argument("--output-dir", default="runs/sft_packing")
    parser.add_argument("--max-steps", type=int, default=60, help="of local training; a federation has its own")
    parser.add_argument("--examples", type=int, default=400)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> FedFSTQSFTTrainer:
    """Train; returns the trainer, which holds the adapter."""
    options = read_options(argv)
    examples = make_examples(options.examples, seed=0, split="train")
    rows = [{"prompt": example["prompt"] + "\n", "completion": example["answer"]} for example in examples]
    trainer = FedFSTQSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32"),
        args=SFTConfig(
            output_dir=options.output_dir,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            max_steps=options.max_steps,
            max_length=320,
            packing=True,
            bf16=False,
            logging_steps=10,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        federation=FedFSTQConfig(mailbox=options.mailbox, client_id=options.client_id, uplink_budget="2kB"),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()

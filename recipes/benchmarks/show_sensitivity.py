"""Trains the embedded demo model for some steps and shows which tokens its loss reacts to: a table, a PNG and HTML.

Needs nothing but the installed package; less than a minute on one CPU core. Run:

    python recipes/benchmarks/show_sensitivity.py                     # writes docs/images/sensitivity.png
    python recipes/benchmarks/show_sensitivity.py --steps 200 --png out.png --html out.html

The text shown is a held-out note of a clinic that training has not seen, so that some of its tokens are new.
Not covered: anything federated.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments, set_seed

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.demo import load_model, load_tokenizer, make_examples
from fedfstq_hf.demo.clinic import SPECIALTIES
from fedfstq_hf.reporting.shading import SensitivityText
from fedfstq_hf.workloads.examples import collate


def encode(tokenizer: Any, example: dict[str, str]) -> dict[str, list[int]]:
    """Prompt and answer tokenised apart and joined, then the end-of-text token; labels on the answer alone."""
    prompt, answer = (tokenizer(example[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "answer"))
    answer.append(tokenizer.eos_token_id)
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def main() -> None:
    """Train, print the table, write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--clinic", choices=list(SPECIALTIES), default="endocrinology")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--png", type=Path, default=Path("docs/images/sensitivity.png"))
    parser.add_argument("--html", type=Path, help="write the same as HTML; not written unless given")
    args = parser.parse_args()

    set_seed(args.seed)
    tokenizer = load_tokenizer()
    example = make_examples(1, args.seed, "test", [args.clinic])[0]
    others = [name for name in SPECIALTIES if name != args.clinic]
    rows = [encode(tokenizer, row) for row in make_examples(8 * args.steps, args.seed, "train", others)]
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer = FedFSTQTrainer(
            model=get_peft_model(load_model(), adapter),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=8,
                learning_rate=3e-3,
                max_steps=args.steps,
                seed=args.seed,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
            ),
            train_dataset=rows,
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
            processing_class=tokenizer,
            federation=FedFSTQConfig(refresh_steps=2),
        )
        trainer.train()

    table = trainer.token_sensitivity()
    print(f"{table!r}\n\n{table.to_markdown(10)}\n")
    shaded = SensitivityText.from_text(f"{example['prompt']} {example['answer']}", trainer.sensitivity, tokenizer)
    print(shaded)
    args.png.write_bytes(
        shaded.png(f"A held-out {args.clinic} note after {args.steps} steps on notes of other clinics")
    )
    print(f"{args.png}: {args.png.stat().st_size} bytes")
    if args.html is not None:
        args.html.write_text(shaded.html(), encoding="utf-8")


if __name__ == "__main__":
    main()

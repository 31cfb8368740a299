"""How small a trained adapter gets and what that does to it: 4, 2, 1 and 0.5 bits per parameter, all files counted.

Trains LoRA on pooled data (or takes `--adapter FOLDER`), compresses it into a folder with and without calibration,
loads that folder onto a fresh base and measures held-out quality again. Run, some minutes on 2 CPU cores:

    python recipes/benchmarks/compress.py                       # the embedded demo, exact match
    python recipes/benchmarks/compress.py --name lab --model FOLDER --data FILE.jsonl --format fed_med \\
        --learning-rate 5e-4 --max-length 256                   # another base and data, loss
    python recipes/benchmarks/compress.py --save FOLDER --budgets ""     # train only; then --adapter FOLDER

Adds its figures to `--results` under `--name`. Exits with 1 if a bar is missed with calibration: at 2 bits 0.5 points
of exact match (where the adapter has any, else 0.5 % of the gain in loss), at 1 bit 2 points or 2 %.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import set_seed

from fedfstq_hf import load_compressed_adapter, save_compressed_adapter
from fedfstq_hf.cli.options import quieten
from fedfstq_hf.running.evaluate import Evaluator
from fedfstq_hf.running.foundation import load_base
from fedfstq_hf.workloads import DataConfig, collate, load_workload

BARS = {2.0: 0.005, 1.0: 0.02}


def train(base: Any, examples: list[Any], pad_id: int, args: argparse.Namespace) -> PeftModel:
    """LoRA on all linear layers, AdamW with a learning rate that falls to a tenth; the start is the seed's."""
    set_seed(args.seed)
    settings = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / args.steps)
    order = random.Random(args.seed)
    for step in range(1, args.steps + 1):
        loss = model(**collate(order.sample(examples, args.batch_size), pad_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = args.model
    return model


def lost(base: dict[str, float], before: dict[str, float], after: dict[str, float]) -> tuple[str, float]:
    """What compression cost: points of exact match as a share, or a share of the gain in loss."""
    if before["exact_match"] > 0:
        return "exact match", before["exact_match"] - after["exact_match"]
    return "gain in loss", (after["eval_loss"] - before["eval_loss"]) / (base["eval_loss"] - before["eval_loss"])


def main() -> int:
    """Train, compress, measure, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="demo", help="of the entry in the results")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--format", default="demo")
    parser.add_argument("--adapter", type=Path, help="folder of a trained adapter, instead of training one")
    parser.add_argument("--save", type=Path, help="folder for the trained adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--test", type=int, default=400, help="held-out examples at most")
    parser.add_argument("--calibration", type=int, default=64, help="training examples for the Fisher information")
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement, with calibration")
    parser.add_argument("--budgets", default="4,2,1,0.5", help="bits per parameter")
    parser.add_argument("--results", type=Path, default=Path("recipes/results/compress.json"))
    args = parser.parse_args()
    quieten()

    base, tokenizer = load_base(args.model, "float32")
    limits = {"train_limit": 4000, "test_limit": args.test} if args.data == "demo" else {}
    data = DataConfig(path=args.data, format=args.format, max_length=args.max_length, **limits)
    workload = load_workload(data, tokenizer)
    evaluate = Evaluator(workload.test[: args.test], tokenizer.pad_token_id, 25)
    budgets = [float(bits) for bits in args.budgets.split(",") if bits]
    without = evaluate(base) if budgets else {}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = args.adapter or args.save or Path(scratch) / "adapter"
        if args.adapter is None:
            model = train(base, workload.train, tokenizer.pad_token_id, args)
            model.save_pretrained(adapter)
        else:
            model = PeftModel.from_pretrained(base, adapter)
        if not budgets:
            return 0
        before = evaluate(model)
        base = model.unload()
        plain = (adapter / "adapter_model.safetensors").stat().st_size
        num_params = sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
        print(f"base {without}\nadapter {before}, {num_params} parameters, {plain} bytes", flush=True)
        rows = []
        for bits in budgets:
            for calibrated in (True, False):
                folder = Path(scratch) / f"{bits}-{calibrated}"
                examples = workload.train[: args.calibration] if calibrated else None
                made = save_compressed_adapter(
                    adapter,
                    folder,
                    f"{bits:g}bpp",
                    base_model=base,
                    calibration=examples,
                    init_seed=args.seed,
                    refine_steps=args.refine if calibrated else 0,
                )
                base, _ = load_base(args.model, "float32")
                after = evaluate(load_compressed_adapter(base, folder))
                base, _ = load_base(args.model, "float32")
                sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
                kind, share = lost(without, before, after)
                rows.append(
                    {
                        "budget_bpp": bits,
                        "calibrated": calibrated,
                        "loaded_bytes": made.num_bytes,
                        "bits_per_param": made.bits_per_param,
                        "folder_bytes": sum(sizes.values()),
                        "files": sizes,
                        "product_error": made.error,
                        "seeded": made.seeded,
                        "refine_steps": made.refine_steps,
                        "divergences": made.divergences,
                        "errors": made.errors,
                        **after,
                        "lost": share,
                    }
                )
                print(
                    f"{bits:g} bpp, {'calibrated' if calibrated else 'plain     '}: {made.num_bytes} bytes "
                    f"({plain / made.num_bytes:.1f}x), with the card {sum(sizes.values())}, "
                    f"loss {after['eval_loss']:.4f}, exact match {after['exact_match']:.4f}, "
                    f"lost {100 * share:.2f} % ({kind})",
                    flush=True,
                )
    results = json.loads(args.results.read_text()) if args.results.is_file() else {}
    results[args.name] = {
        "command": shlex.join(["python", *sys.argv]),
        "num_params": num_params,
        "plain_bytes": plain,
        "test_examples": len(workload.test[: args.test]),
        "base": without,
        "adapter": before,
        "lost_of": kind,
        "compressed": rows,
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    missed = [row for row in rows if row["calibrated"] and row["lost"] > BARS.get(row["budget_bpp"], float("inf"))]
    for row in missed:
        print(f"bar missed at {row['budget_bpp']:g} bits: {100 * row['lost']:.2f} % lost")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

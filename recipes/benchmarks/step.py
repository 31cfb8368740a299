"""What a local step costs beside that of a plain `transformers.Trainer`: time, peak memory, and where it goes.

    python recipes/benchmarks/step.py                             # everything, half an hour on two quiet CPU cores
    python recipes/benchmarks/step.py --vocab 32768 --part time   # one cycle more, added to those in the results file
    python recipes/benchmarks/step.py --part memory --variants full unbiased

Model: Llama shape, hidden 512, 8 layers, 8 heads, float32, random weights, LoRA r=16 on all linear layers. Data: random
ids, 4 x 256 tokens a step, all of them targets (prompts that are masked would favour us). In a cycle every variant runs
one round of 10 or 20 local steps in one process, the plain Trainer first, in every other cycle last; H is 10, so that
one step of ten is a refresh step, which sees all tokens. A ratio is that of whole rounds within a cycle, in CPU seconds
of the process (other programs on the machine hardly move them) and in wall-clock seconds; with OMP_NUM_THREADS=1 the
former are what a quiet machine takes. Peak memory is that of a process of its own. Not covered: more than one device.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.sensitivity import AdapterFisher
from fedfstq_hf.trainer.gradient_hooks import GradientObserver
from fedfstq_hf.trainer.token_filter import TokenFilter

OUT = Path(__file__).parents[1] / "results" / "step.json"
BATCH, LENGTH = 4, 256
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "full": {},
    "unbiased": {"objective": "unbiased", "token_keep_ratio": 0.5},
    "hard": {"objective": "hard", "token_keep_ratio": 0.5},
    "soft": {"objective": "soft"},
}


def make_model(vocab: int) -> PeftModel:
    """The benchmark's model with a fresh adapter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


class Clock(TrainerCallback):  # type: ignore[misc]
    """CPU and wall-clock seconds of each step, from one's end to the next one's: batch, mask and all else included."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._last = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._last = (time.process_time(), time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the times."""
        now = (time.process_time(), time.perf_counter())
        self.steps.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now


def train(model: PeftModel, name: str, vocab: int, steps: int, folder: str) -> tuple[list[tuple[float, float]], Any]:
    """One round of a variant; CPU and wall-clock seconds per step, and the trainer."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (BATCH * steps, LENGTH), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row, "attention_mask": [1] * LENGTH} for row in ids]
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    common = {"model": model, "args": arguments, "train_dataset": rows, "data_collator": _stack}
    settings = VARIANTS[name]
    trainer = (
        Trainer(**common)
        if settings is None
        else FedFSTQTrainer(**common, federation=FedFSTQConfig(uplink_budget="0.2bpp", **settings))
    )
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    return clock.steps, trainer


def _stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def measure_time(vocab: int, variants: list[str], steps: int, cycle: int) -> dict[str, Any]:
    """One cycle: ratios of whole rounds to the plain Trainer's, and our parts' milliseconds per step."""
    model = make_model(vocab)
    runs: dict[str, list[tuple[float, float]]] = {}
    parts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in variants}
    with tempfile.TemporaryDirectory() as folder:
        train(model, "plain", vocab, 1, folder)
        train(model, "unbiased", vocab, 2, folder)
        names = ["plain", *variants]
        for name in names if cycle % 2 == 0 else reversed(names):
            with timed_parts(parts.get(name, {})):
                runs[name], trainer = train(model, name, vocab, steps, folder)
                if name != "plain":
                    trainer.pack_update()
    found: dict[str, Any] = {}
    for name in variants:
        ours, plain = runs[name], runs["plain"]
        found[name] = {
            "cpu_ratio": round(sum(s[0] for s in ours) / sum(s[0] for s in plain), 4),
            "wall_ratio": round(sum(s[1] for s in ours) / sum(s[1] for s in plain), 4),
            "plain_step_cpu_s": round(statistics.median(s[0] for s in plain), 4),
            "refresh_step_cpu_s": round(statistics.median(s[0] for s in ours[::10]), 4),
            "other_step_cpu_s": round(statistics.median(s[0] for i, s in enumerate(ours) if i % 10), 4),
            "ms_per_step": {part: round(1000 * s / steps, 2) for part, s in sorted(parts[name].items())},
        }
        print(vocab, name, json.dumps(found[name]), flush=True)
    return found


class timed_parts:
    """Within it, the seconds of our parts of a step are added up: they are included in the step's own."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._undo: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        self._wrap(AdapterFisher, "update", "fisher")
        self._wrap(GradientObserver, "_enter_tokens", "probe: table")
        self._wrap(TokenFilter, "weigh", "mask")
        self._wrap(FedFSTQTrainer, "pack_update", "packing")

    def __exit__(self, *exception: object) -> None:
        for owner, name, function in self._undo:
            setattr(owner, name, function)

    def _wrap(self, owner: Any, name: str, part: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)
        self._undo.append((owner, name, function))

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[part] += time.process_time() - started

        setattr(owner, name, wrapper)


def measure_memory(vocab: int, variants: list[str]) -> dict[str, Any]:
    """Peak resident size in MiB of a process that trains a refresh step and two others."""
    found: dict[str, Any] = {}
    for name in variants:
        command = [sys.executable, __file__, "--part", "peak", "--vocab", str(vocab), "--variants", name]
        # large blocks go back to the system at once, so that the peak is what is alive, not what the allocator kept
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        kib = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()[-1]
        found[name] = round(int(kib) / 1024, 1)
        print(vocab, name, f"{found[name]} MiB", flush=True)
    return found


def main() -> None:
    """Read the options, measure, and merge into the results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=[v for v in VARIANTS if v != "plain"])
    parser.add_argument("--part", choices=("all", "time", "memory", "peak"), default="all")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    if options.part == "peak":
        FedFSTQConfig(uplink_budget="0.2bpp")  # the plain process imports the same modules
        model = make_model(options.vocab[0])
        with tempfile.TemporaryDirectory() as folder:
            train(model, options.variants[0], options.vocab[0], 3, folder)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    for vocab in options.vocab:
        if options.part in ("all", "time"):
            cycle = len(read(options.out).get("vocab", {}).get(str(vocab), {}).get("cycles", []))
            found = measure_time(vocab, options.variants, options.steps, cycle)
            merge(options.out, vocab, cycle={"threads": torch.get_num_threads(), "steps": options.steps} | found)
        if options.part in ("all", "memory"):
            merge(options.out, vocab, peaks=measure_memory(vocab, ["plain", *options.variants]))


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}  # type: ignore[no-any-return]


def merge(path: Path, vocab: int, cycle: dict[str, Any] | None = None, peaks: dict[str, float] | None = None) -> None:
    """Add what was measured to the file, and take medians anew."""
    results = read(path)
    adapter = sum(parameter.numel() for parameter in make_model(64).parameters() if parameter.requires_grad)
    results["setting"] = {
        "batch": [BATCH, LENGTH],
        "adapter_mib_fp32": round(4 * adapter / 2**20, 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    entry = results.setdefault("vocab", {}).setdefault(str(vocab), {})
    if cycle is not None:
        entry.setdefault("cycles", []).append(cycle)
        entry["median"] = {
            name: {
                ratio: statistics.median(c[name][ratio] for c in entry["cycles"] if name in c)
                for ratio in ("cpu_ratio", "wall_ratio")
            }
            for name in VARIANTS
            if any(name in c for c in entry["cycles"])
        }
    if peaks is not None:
        entry["peak_mib"] = entry.get("peak_mib", {}) | peaks
    path.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Speed of token-reduced generation on random weights: time to first token, end to end, and memory beyond the weights.

Part of `generate.py`. Every round runs dense and all variants once, in an order that turns around from round to round;
a speed-up is the median over rounds of dense time / variant time within the round, so that a slow phase of a shared
machine hits both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

from fedfstq_hf.generation.probe import Probe
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import Combined, QueryAttention, Random, Rarity, Recency, Scorer, TokenTable

SHAPES: dict[str, dict[str, int]] = {
    "100M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 32000},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}


def make_model(shape: str, device: str) -> LlamaForCausalLM:
    """A Llama of random weights: float32 on the CPU, bfloat16 on CUDA."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None
    )
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


def make_reducers(config: Any, scorers: str, ratios: list[float]) -> dict[str, TokenReducer]:
    """Reducers by name: the default scorer at several ratios, or every scorer at 0.5."""
    if scorers == "default":
        return {f"default {ratio}": TokenReducer(ratio) for ratio in ratios}
    table = TokenTable(torch.rand(config.vocab_size))
    others: dict[str, Scorer] = {
        "default": QueryAttention(),
        "table": table,
        "probe": Probe(torch.rand(config.hidden_size), layer=2),
        "combined": Combined([QueryAttention(), table], [0.9, 0.1]),
        "random": Random(),
        "recency": Recency(),
        "rarity": Rarity(),
    }
    return {f"{name} 0.5": TokenReducer(0.5, scorer=scorer) for name, scorer in others.items()}


def set_clock(name: str) -> None:
    """`wall`, or `cpu`: the process's own CPU seconds, which a busy machine does not stretch; for one thread only."""
    global now
    now = {"wall": time.perf_counter, "cpu": time.process_time}[name]


now = time.perf_counter


class Clock(BaseStreamer):
    """Notes when the first new token arrives: the streamer's second call, after the prompt."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def put(self, value: Any) -> None:
        """One call for the prompt, one for each new token."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.calls.append(now())

    def end(self) -> None:
        """Nothing to flush."""


@dataclass
class Run:
    """One greedy call: seconds to the first new token and to the last, and peak memory beyond what was held before."""

    first_token: float
    end_to_end: float
    peak_bytes: int | None


def run_once(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int, **options: Any) -> Run:
    """Generate once with a clock."""
    clock = Clock()
    held = reset_peak()
    started = now()
    model.generate(ids, max_new_tokens=new_tokens, do_sample=False, streamer=clock, **options)
    ended = now()
    return Run(clock.calls[1] - started, ended - started, None if held is None else peak() - held)


def rerun_once(model: LlamaForCausalLM, ids: torch.Tensor, new_tokens: int) -> Run:
    """For comparison: the default scorer's choice, then a prefill of the kept tokens from the beginning."""
    started = now()
    inputs = TokenReducer(0.5, model=model).reduce(ids)
    scored = now() - started
    run = run_once(model, inputs.pop("input_ids"), new_tokens, **inputs)
    return Run(scored + run.first_token, scored + run.end_to_end, run.peak_bytes)


def reset_peak() -> int | None:
    """Bytes held now, with the high-water mark reset to it; None where the system keeps none."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def peak() -> int:
    """The high-water mark in bytes."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def measure(
    model: LlamaForCausalLM,
    length: int,
    scorers: str,
    ratios: list[float],
    new_tokens: int,
    seconds: float,
    least: int,
) -> Iterator[list[dict[str, Any]]]:
    """Rows for one prompt length, after each round; rounds until `seconds` are over, at least `least`."""
    ids = torch.randint(3, model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    ids = ids.to(model.device)
    calls: dict[str, Callable[[], Run]] = {"dense": lambda: run_once(model, ids, new_tokens)}
    for name, reducer in make_reducers(model.config, scorers, ratios).items():
        calls[name] = partial(run_once, model, ids, new_tokens, custom_generate=reducer)
    if scorers == "all":
        calls["default 0.5, rerun"] = lambda: rerun_once(model, ids, new_tokens)
    run_once(model, ids[:, :256], 2)
    run_once(model, ids[:, :256], 2, custom_generate=TokenReducer(0.5))
    runs: dict[str, list[Run]] = {name: [] for name in calls}
    started, number = now(), 0
    while number < least or now() - started < seconds:
        for name in list(calls) if number % 2 == 0 else list(reversed(calls)):
            runs[name].append(calls[name]())
        number += 1
        yield [_row(name, length, own, runs["dense"]) for name, own in runs.items()]


def _row(name: str, length: int, own: list[Run], dense: list[Run]) -> dict[str, Any]:
    row: dict[str, Any] = {"variant": name, "prompt": length, "rounds": len(own)}
    for part in ("first_token", "end_to_end"):
        ratios = [getattr(base, part) / getattr(run, part) for base, run in zip(dense, own, strict=True)]
        row[f"{part}_seconds"] = round(statistics.median(getattr(run, part) for run in own), 4)
        row[f"{part}_speedup"] = round(statistics.median(ratios), 3)
        row[f"{part}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    peaks = [run.peak_bytes for run in own if run.peak_bytes is not None]
    row["peak_megabytes"] = round(statistics.median(peaks) / 1e6, 1) if peaks else None
    return row

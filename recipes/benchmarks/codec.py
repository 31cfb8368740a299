"""Every codec on recorded updates: bytes, error and cosine at equal budgets; and what encoding and decoding cost.

Run, after `record_deltas.py --out DELTAS` (some minutes; `--sizes` up to 1e8 needs about 3 GB of memory):

    OMP_NUM_THREADS=1 python recipes/benchmarks/codec.py DELTAS --out recipes/results/codec.json

Part `real`, means over the updates of what one message is off by:

- error: squared error over the square of the update. An unbiased codec may have more than 1: it shrinks in the mean
- cosine: of what is decoded and the update; `fisher` and `other` with coordinates weighted by the root of the encoder's
  own Fisher information, and of that of batches which the encoder did not see
- of ten: the cosine (`other`) of the mean of ten messages of the update, for codecs that draw from a seed

Part `linear`: CPU seconds and memory of codec `fstq` at 0.1 bits per parameter, by size of the adapter, beside one
`torch.topk` (k = 1 %) over the same vector.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from codec_data import Update, load_recordings, sized

from fedfstq_hf.codec import Schema, codec_names, get_codec
from fedfstq_hf.errors import FedFSTQError

RATES = (0.1, 0.3, 1.0)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in codec_names()},
    "fstq, blind": ("fstq", {"fisher_weighted": False}),
}
MESSAGES = 10


def cosine(update: Update, sent: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    """Of what is decoded, (num_params,), and the update; weights: of squares, (num_params,)."""
    root = torch.ones_like(sent, dtype=torch.float64) if weights is None else weights.double().sqrt()
    return float(torch.cosine_similarity(root * update.vectors["delta"].double(), root * sent.double(), dim=0))


def measure(update: Update, name: str, options: dict[str, Any], max_bytes: int | None) -> dict[str, float]:
    """One message of one update, and ten where its seed can be chosen."""

    def message(**more: Any) -> tuple[int, torch.Tensor]:
        codec = get_codec(name, **options, **more)
        encoded = codec.encode(update.state("delta"), update.state("fisher"), max_bytes=max_bytes)
        return len(encoded.payload), encoded.reconstruction.to_dense()

    size, sent = message()
    delta = update.vectors["delta"].double()
    row = {
        "bpp": 8 * size / update.schema.num_params,
        "error": float((delta - sent.double()).square().sum() / delta.square().sum()),
        "cosine": cosine(update, sent),
        "fisher": cosine(update, sent, update.vectors["fisher"]),
        "other": cosine(update, sent, update.vectors["other_fisher"]),
    }
    if "seed" in inspect.signature(type(get_codec(name))).parameters:
        mean = sum(message(seed=seed)[1].double() for seed in range(MESSAGES)) / MESSAGES
        row["of ten"] = cosine(update, mean, update.vectors["other_fisher"])
    return row


def real(updates: list[Update]) -> dict[str, list[dict[str, Any]]]:
    """Mean over updates of every codec at every rate; codecs of a fixed size at that size."""
    table: dict[str, list[dict[str, Any]]] = {}
    for label, (name, options) in VARIANTS.items():
        rows: list[dict[str, Any]] = []
        for rate in (*RATES, None):
            if rate is None and rows:
                break
            try:
                found = [
                    measure(u, name, options, None if rate is None else int(rate * u.schema.num_params / 8))
                    for u in updates
                ]
            except FedFSTQError:  # a codec whose size cannot be chosen
                continue
            means = {key: round(fmean(row[key] for row in found), 4) for key in found[0]}
            rows.append({"rate": rate, **means})
        table[label] = rows
    return table


def peak_during(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, CPU seconds, bytes of resident memory at the peak beyond those before). Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    started = time.process_time()
    result = action()
    return result, time.process_time() - started, _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def linear(update: Update, sizes: list[int], repeats: int) -> list[dict[str, float]]:
    """`fstq` at 0.1 bpp on adapters of about the given sizes: ns per parameter, memory in multiples of the update."""
    rows, codec = [], get_codec("fstq")
    for wanted in sizes:
        delta, fisher = sized(update, wanted)
        schema = Schema.from_state_dict(delta)
        size = schema.num_params
        best: dict[str, float] = {}
        for _ in range(repeats):
            encoded, encode, more = peak_during(partial(codec.encode, delta, fisher, max_bytes=size // 80))
            payload = encoded.payload
            del encoded
            _, decode, least = peak_during(partial(codec.decode, payload, schema))
            row = {"encode_ns": 1e9 * encode / size, "decode_ns": 1e9 * decode / size}
            row |= {"encode_memory": more / (4 * size), "decode_memory": least / (4 * size)}
            best = {key: min(best.get(key, np.inf), value) for key, value in row.items()}
        # the vector is one more copy of the update, which nothing above needs
        vector = torch.cat([tensor.reshape(-1) for tensor in delta.values()]).abs()
        del delta, fisher
        for _ in range(repeats):
            _, seconds, _ = peak_during(partial(torch.topk, vector, vector.numel() // 100))
            best["topk_ns"] = min(best.get("topk_ns", np.inf), 1e9 * seconds / size)
        del vector
        rows.append({"num_params": size, **{key: round(value, 2) for key, value in best.items()}})
    return rows


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--updates", type=int, default=3, help="how many of the recordings, spread over the rounds")
    parser.add_argument("--part", choices=("real", "linear", "all"), default="all")
    parser.add_argument("--sizes", default="1e6,1e7", help="parameters of the linear part")
    parser.add_argument("--repeats", type=int, default=3, help="of the linear part; the least of them counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    updates = load_recordings(options.recordings)
    updates = updates[:: max(1, len(updates) // options.updates)][: options.updates]
    result: dict[str, Any] = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    command = shlex.join(["python", *sys.argv])
    if options.part in ("real", "all"):
        names = [update.name for update in updates]
        rows = real(updates)
        result["real"] = {
            "command": command,
            "recorded": json.loads((options.recordings / "recording.json").read_text())["recipe"],
            "updates": names,
            "num_params": updates[0].schema.num_params,
            "codecs": rows,
        }
        for label, found in rows.items():
            for row in found:
                print(f"{label:14} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if options.part in ("linear", "all"):
        sizes = [int(float(size)) for size in options.sizes.split(",")]
        rows_by_size = linear(updates[-1], sizes, options.repeats)
        result["linear"] = {"command": command, "threads": torch.get_num_threads(), "rows": rows_by_size}
        print(json.dumps(result["linear"], indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

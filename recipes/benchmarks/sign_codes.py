"""What a bit says about signs: error of codec `fstq` beside the least that any unbiased code leaves.

    python recipes/benchmarks/sign_codes.py --out recipes/results/sign_codes.json

Takes     under a minute on one CPU core; needs nothing
Prints    for each number of bits R per coordinate, the squared error of a message of codec `fstq` over the square of
          what it stands for, beside 1 / (2^(2 R) - 1), below which no unbiased code of R bits falls where the update is
          normal noise; bytes as sent, mean of --repeats messages; and the CPU time of encoding and decoding in ns per
          coordinate, which is of this machine.
Change    --size, --repeats, --heavy 3 (a t distribution with so many degrees of freedom in place of normal noise)
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fedfstq_hf.codec import Schema, get_codec

BITS = (1.0, 0.5, 0.34, 0.25, 0.16, 0.1, 0.08, 0.05, 0.02)
WIDTH = 256


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=448_512, help="coordinates")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--heavy", type=int, default=0, help="degrees of freedom of a t distribution; 0: normal")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    rows = [row(bits, options) for bits in tqdm(BITS, unit="rate", disable=None)]
    print(f"{'bits':>5} {'fstq':>8} {'least':>8}   encoding + decoding in ns")
    for found in rows:
        times = f"{found['encode_ns']:.0f} + {found['decode_ns']:.0f}"
        print(f"{found['bits']:>5} {found['error']:>8.3f} {found['least']:>8.3f}   {times}")
    if options.out:
        facts = {"command": shlex.join(["python", *sys.argv]), "rows": rows}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


def row(bits: float, options: argparse.Namespace) -> dict[str, float]:
    """Error, bytes and times at so many bits per coordinate."""
    runs = [once(bits, update(options, seed), seed) for seed in range(options.repeats)]
    means = {key: sum(run[key] for run in runs) / len(runs) for key in runs[0]}
    return {"bits": bits, "least": 1 / (2 ** (2 * bits) - 1), **means}


def update(options: argparse.Namespace, seed: int) -> dict[str, torch.Tensor]:
    """Noise in matrices of 16 x 256, as LoRA has them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (options.size // (16 * WIDTH), 16, WIDTH)
    noise = torch.randn(shape, generator=generator)
    if options.heavy:
        squares = torch.randn((options.heavy, *shape), generator=generator).square().mean(0)
        noise /= squares.sqrt()
    return {f"{i}.lora_A": matrix.contiguous() for i, matrix in enumerate(noise)}


def once(bits: float, delta: dict[str, torch.Tensor], seed: int) -> dict[str, float]:
    """Error, bytes and ns per coordinate of one message."""
    schema = Schema.from_state_dict(delta)
    vector = schema.flatten(delta)
    started = time.process_time()
    payload = get_codec("fstq", seed=seed).encode(delta, max_bytes=int(bits * vector.numel() / 8)).payload
    encoded = time.process_time()
    decoded = get_codec("fstq").decode(payload, schema)
    ended = time.process_time()
    return {
        "error": float((decoded.to_dense() - vector).square().sum() / vector.square().sum()),
        "bytes": float(len(payload)),
        "encode_ns": 1e9 * (encoded - started) / vector.numel(),
        "decode_ns": 1e9 * (ended - encoded) / vector.numel(),
    }


if __name__ == "__main__":
    main()

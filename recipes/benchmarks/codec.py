"""All codecs on recorded updates, and at the size of Llama-3-8B: bytes, distortion, time, memory.

Run, after `record_deltas.py --out FOLDER ...` (some minutes; `--part scale` needs about 3 GB of memory, `--part linear`
about 10 GB):

    python recipes/benchmarks/codec.py FOLDER --out recipes/results/codec.json --plot docs/images/codec.png

Distortion is relative: the weighted squared error over that of sending nothing. `other` weighs by a Fisher of batches
that the encoder did not see, `fisher` by the encoder's own, `plain` by 1. `vs_paper` is a codec's bytes over those that
`paper` needs for the same `other` distortion. `over_iid` is a payload's size over the entropy of its own symbols, were
they independent. Times are ratios to one `torch.topk` (k = 1 %) over the same vector, memory to the update in float32.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from codec_data import Update, enlarged, load_recordings, sized
from fedfstq_hf.codec.fstq_stream import parse

from fedfstq_hf.codec import Schema, codec_names, get_codec
from fedfstq_hf.errors import FedFSTQError

RATES = (0.1, 0.3, 1.0)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in codec_names()},
    "fstq, power 0.25": ("fstq", {"fisher_power": 0.25}),
    "fstq, power 0.75": ("fstq", {"fisher_power": 0.75}),  # nearer to the distortion measured here
    "fstq coordinates": ("fstq", {"parts": "coordinates"}),
    "fstq factors": ("fstq", {"parts": "factors"}),
    "fstq, no Fisher": ("uniform-fisher", {}),
}
UNIFORM = "uniform-fisher"  # listed under its variant's name
AT_SCALE = ("fstq", "fstq coordinates", "factored", "paper", "topk", "sparseloco")


def distortion(update: Update, weights: torch.Tensor, sent: torch.Tensor) -> float:
    """Weighted squared error over that of sending nothing."""
    delta, weights = update.vectors["delta"].double(), weights.double()
    return float((weights * (delta - sent.double()).square()).sum() / (weights * delta.square()).sum())


def measure(update: Update, codec: Any, max_bytes: int | None) -> dict[str, float]:
    """One encode of one update."""
    started = time.perf_counter()
    encoded = codec.encode(update.state("delta"), update.state("fisher"), max_bytes=max_bytes)
    sent = encoded.reconstruction.to_dense()
    row = {
        "bpp": 8 * len(encoded.payload) / update.schema.num_params,
        "other": distortion(update, update.vectors["other_fisher"], sent),
        "fisher": distortion(update, update.vectors["fisher"], sent),
        "plain": distortion(update, torch.ones_like(sent), sent),
        "seconds": time.perf_counter() - started,
    }
    if codec.name == "fstq" and encoded.payload:
        row["over_iid"] = len(encoded.payload) / (iid_entropy(encoded.payload, update.schema) / 8)
    if max_bytes:
        row["used"] = len(encoded.payload) / max_bytes
    return row


def iid_entropy(payload: bytes, schema: Schema) -> float:
    """Bits of an `fstq` payload's symbols, each kind independent with its own frequencies; tables and levels free."""
    found, indices, values = parse(payload, schema)
    bits = 0.0
    if found:
        features, depths = np.concatenate([c.t for c in found]), [c.points.max() - c.points for c in found]
        bits += features.size * entropy(features != 0) + np.count_nonzero(features)
        depth = np.concatenate(depths)
        bits += depth.size * (1 + entropy(depth))
    if indices.size:
        share = indices.size / schema.num_params
        bits -= schema.num_params * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
        owner = np.searchsorted([spec.offset for spec in schema.tensors], indices, side="right")
        magnitudes = np.stack([owner.astype(np.float64), np.abs(values)], axis=1)
        levels, number = np.unique(magnitudes, axis=0, return_inverse=True)
        _, first = np.unique(levels[:, 0], return_index=True)
        # level numbers within each matrix, ascending, as they are coded
        place = np.arange(len(levels)) - np.repeat(first, np.diff([*first, len(levels)]))
        bits += indices.size * (1 + entropy(place[number.reshape(-1)]))
    return float(bits)


def entropy(symbols: np.ndarray) -> float:
    """Bits per symbol, order 0."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts / counts.sum() * np.log2(counts / counts.sum())).sum())


def paper_curve(update: Update) -> Callable[[float], float | None]:
    """bpp that `paper` needs for a given `other` distortion, interpolated in logarithms; None off its curve."""
    rates = np.geomspace(0.02, 6.0, 14)
    errors = [measure(update, get_codec("paper"), int(r * update.schema.num_params / 8))["other"] for r in rates]

    def needed(distortion: float) -> float | None:
        if not errors[-1] <= distortion <= errors[0]:
            return None
        return float(np.exp(np.interp(-np.log(distortion), -np.log(errors), np.log(rates))))

    return needed


def real(updates: list[Update]) -> dict[str, list[dict[str, Any]]]:
    """Mean over updates of every codec at every rate; codecs of a fixed size at that size."""
    curves = [paper_curve(update) for update in updates]
    table: dict[str, list[dict[str, Any]]] = {}
    for label, (name, options) in VARIANTS.items():
        if label == UNIFORM:
            continue
        codec, rows = get_codec(name, **options), []
        for rate in (*RATES, None):
            measured = []
            for update, needed in zip(updates, curves, strict=True):
                try:
                    size = None if rate is None else int(rate * update.schema.num_params / 8)
                    row = measure(update, codec, size)
                except FedFSTQError:
                    break
                paper = needed(row["other"])
                measured.append(row | ({} if paper is None else {"vs_paper": row["bpp"] / paper}))
            if len(measured) == len(updates) and (rate is not None or not rows):
                keys = [key for key in measured[0] if all(key in row for row in measured)]
                rows.append({"rate": rate, **{key: round(fmean(row[key] for row in measured), 5) for key in keys}})
        table[label] = rows
    return table


def peak_during(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds, bytes of resident memory at the peak beyond those before). Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    started = time.perf_counter()
    result = action()
    return result, time.perf_counter() - started, _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def scale(update: Update, layers: int, labels: tuple[str, ...]) -> dict[str, Any]:
    """Times and memory at 0.1 bpp, for `layers` blocks of Llama-3-8B."""
    delta, fisher = enlarged(update, layers)
    schema = Schema.from_state_dict(delta)
    vector = torch.cat([tensor.reshape(-1) for tensor in delta.values()]).abs()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.topk(vector, vector.numel() // 100)
        seconds.append(time.perf_counter() - started)
    topk, size = min(seconds), vector.numel()
    del vector
    rows: dict[str, Any] = {}
    for label in labels:
        name, options = VARIANTS[label]
        codec = get_codec(name, **options)
        best: dict[str, float] = {}
        for _ in range(2):
            encoded, encode, peak = peak_during(lambda c=codec: c.encode(delta, fisher, max_bytes=size // 80))
            payload = encoded.payload
            del encoded
            _, decode, _ = peak_during(lambda c=codec, p=payload: c.decode(p, schema))
            row = {"encode": encode / topk, "decode": decode / topk, "memory": peak / (4 * size)}
            best = {key: min(best.get(key, np.inf), value) for key, value in row.items()}
        rows[label] = {key: round(value, 2) for key, value in best.items()} | {"bpp": round(8 * len(payload) / size, 4)}
    return {"num_params": size, "topk_seconds": round(topk, 3), "threads": torch.get_num_threads(), "codecs": rows}


def linear(update: Update, sizes: list[int], repeats: int = 3) -> list[dict[str, float]]:
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
            started = time.perf_counter()
            torch.topk(vector, vector.numel() // 100)
            best["topk_ns"] = min(best.get("topk_ns", np.inf), 1e9 * (time.perf_counter() - started) / size)
        del vector
        rows.append({"num_params": size, **{key: round(value, 2) for key, value in best.items()}})
    return rows


def plot(table: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Distortion under the other Fisher over bits per parameter, each curve named at its end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    ends = []
    colours = iter(pyplot.colormaps["tab10"].colors * 2)
    for label, rows in table.items():
        points = sorted((row["bpp"], row["other"]) for row in rows if 0 < row["other"] < 2 and row["bpp"] < 2)
        if not points:
            continue
        ours = label.startswith("fstq")
        style = {
            "color": "black" if label == "fstq" else next(colours),
            "linewidth": 2.5 if label == "fstq" else 1.5 if ours else 1.0,
        }
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linestyle="-" if ours else "--", **style)
        ends.append((points[-1], label, style["color"]))
    axes.set(xscale="log", yscale="log", xlim=(0.09, 2.2), xlabel="bits per adapter parameter")
    axes.set_ylabel("relative distortion, weighted by a Fisher of other batches")
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    axes.grid(alpha=0.3)
    last = 0.0
    for (bpp, error), label, colour in sorted(ends, key=lambda end: end[0][1]):
        last = max(error, last * 1.075)  # names do not lie on each other
        axes.annotate(label, (bpp, error), (1.12, last), color=colour, fontsize=8, va="center")
    axes.text(0.02, 0.02, "solid: fstq; dashed: others", transform=axes.transAxes, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", type=Path)
    parser.add_argument("--updates", type=int, default=3, help="how many of the recordings, spread over the rounds")
    parser.add_argument("--part", choices=("real", "scale", "linear", "all"), default="all")
    parser.add_argument("--sizes", default="1e6,1e7,1e8,4e8", help="parameters of the linear part; 4e8 take 10 GB")
    parser.add_argument("--layers", default="32", help="blocks of Llama-3-8B, as in 1,32,305 (42M parameters are 32)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    known = parser.parse_args()
    updates = load_recordings(known.recordings)
    updates = updates[:: max(1, len(updates) // known.updates)][: known.updates]
    result: dict[str, Any] = {}
    if known.out and known.out.exists():
        result = json.loads(known.out.read_text())
    if known.part in ("real", "all"):
        result |= {"updates": [u.name for u in updates], "num_params": updates[0].schema.num_params}
        result["real"] = real(updates)
        for label, rows in result["real"].items():
            for row in rows:
                print(f"{label:18} " + "  ".join(f"{key} {value}" for key, value in row.items()))
        if known.plot:
            plot(result["real"], known.plot)
    if known.part in ("linear", "all"):
        result["linear"] = {
            "update": updates[-1].name,
            "update_params": updates[-1].schema.num_params,
            "threads": torch.get_num_threads(),
            "rows": linear(updates[-1], [int(float(size)) for size in known.sizes.split(",")]),
        }
        print(json.dumps(result["linear"], indent=1))
    if known.part in ("scale", "all"):
        for layers in known.layers.split(","):
            labels = AT_SCALE if layers == "32" else ("fstq",)
            result.setdefault("scale", {})[layers] = row = scale(updates[-1], int(layers), labels)
            print(json.dumps(row, indent=1))
    if known.out:
        known.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`saliency.safetensors`: a `Saliency` packed for publication, about 50 kB for a vocabulary of 32,768.

Tensors: `scores` uint8 (vocab_size,), log scores on 256 even steps from `low` to `high`; `levels` uint8, four ids per
byte, the first in the lowest bits; `probe` float16 (hidden_size,), if there is one. Metadata: one key, `saliency`, with
canonical JSON: format, vocab_size, low, high, tokenizer, base, probe_bias, probe_layer. Same input, same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation.adapter_file import load_tensors
from fedfstq_hf.federation.untrusted import parse_object
from fedfstq_hf.generation.saliency import Saliency
from fedfstq_hf.generation.scorers.probe import Probe
from fedfstq_hf.text import printable

FILE_NAME = "saliency.safetensors"
MAX_BYTES = 16_000_000
"""What `unpack` refuses to look at: a vocabulary of ten million ids would fit."""
_MAX_HEADER = 1 << 15
_MAX_LOG = 1100  # of any number in double precision, and finite in single


def pack(saliency: Saliency) -> bytes:
    """The file's bytes. Scores lose at most 1/510 of the table's range in log2, the probe what float16 loses."""
    seen = saliency.levels > 0
    values = saliency.log_scores.double()
    low, high = (float(values[seen].min()), float(values[seen].max())) if bool(seen.any()) else (0.0, 0.0)
    steps = (values - low) * (255.0 / (high - low) if high > low else 0.0)
    tensors = {"levels": _pack_levels(saliency.levels), "scores": torch.where(seen, steps.round(), 0.0).to(torch.uint8)}
    fields: dict[str, Any] = {
        "base": dict(saliency.base),
        "format": 1,
        "high": high,
        "low": low,
        "tokenizer": saliency.tokenizer,
        "vocab_size": saliency.vocab_size,
    }
    if saliency.probe is not None:
        tensors["probe"] = saliency.probe.weight.half()
        fields |= {"probe_bias": saliency.probe.bias, "probe_layer": saliency.probe.layer}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _save(dict(sorted(tensors.items())), metadata={"saliency": text})


def unpack(data: bytes) -> Saliency:
    """Read and check a file's bytes. Raises MessageError if anything in it is not as documented."""
    if len(data) > MAX_BYTES:
        raise MessageError(f"{FILE_NAME} has {len(data)} bytes; expected at most {MAX_BYTES}")
    tensors = load_tensors(data, FILE_NAME, max_header=_MAX_HEADER, error=MessageError)
    fields = parse_object(_metadata(data), FILE_NAME, max_bytes=_MAX_HEADER, error=MessageError)
    if fields.get("format") != 1:
        raise MessageError(
            f"{FILE_NAME} has format {fields.get('format')!r:.20}; this version reads 1. Upgrade fedfstq_hf"
        )
    for name, (expected, holds) in _FIELDS.items():
        if not holds(fields.get(name, 0 if name.startswith("probe_") else None)):
            raise MessageError(f"{FILE_NAME} has {name} {printable(repr(fields.get(name)), 80)}; expected {expected}")
    size, low, high = fields["vocab_size"], float(fields["low"]), float(fields["high"])
    shapes = {"levels": (torch.uint8, (-(-size // 4),)), "scores": (torch.uint8, (size,))}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "probe"}
    if found != shapes or low > high:
        raise MessageError(
            f"{FILE_NAME} holds {printable(found)}, scores from {low} to {high}; expected {shapes}, low <= high"
        )
    weight = tensors.get("probe")
    if weight is not None and (weight.dtype != torch.float16 or weight.ndim != 1):
        raise MessageError(f"{FILE_NAME} has a probe that is not a float16 vector")
    bias, layer = float(fields.get("probe_bias", 0.0)), fields.get("probe_layer", 0)
    return Saliency(
        (low + tensors["scores"].double() * ((high - low) / 255.0)).float(),
        _unpack_levels(tensors["levels"], size),
        fields["tokenizer"],
        fields["base"],
        None if weight is None else Probe(weight.float(), bias, layer),
    )


def _number(most: float) -> Callable[[Any], bool]:
    return lambda v: type(v) in (int, float) and abs(v) <= most  # not so for NaN


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda v: type(v) is int and least <= v <= most


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "base": ("an object", lambda v: type(v) is dict),
    "high": (f"a number within {_MAX_LOG}", _number(_MAX_LOG)),
    "low": (f"a number within {_MAX_LOG}", _number(_MAX_LOG)),
    "probe_bias": ("a number within 1e6", _number(1e6)),
    "probe_layer": ("a whole number from 0 to 10000", _whole(0, 10_000)),
    "tokenizer": ("text", lambda v: type(v) is str and len(v) <= 200),
    "vocab_size": (f"a whole number from 1 to {MAX_BYTES}", _whole(1, MAX_BYTES)),
}


def _pack_levels(levels: Tensor) -> Tensor:
    padded = torch.zeros(-(-len(levels) // 4) * 4, dtype=torch.uint8)
    padded[: len(levels)] = levels
    quads = padded.view(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def _unpack_levels(packed: Tensor, size: int) -> Tensor:
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[:size].contiguous()


def _metadata(data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])  # read by safetensors before
    return header.get("__metadata__", {}).get("saliency", "").encode("utf-8", "replace")

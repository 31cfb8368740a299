"""`saliency.safetensors`: a `Saliency` packed for publication, about 50 kB for a vocabulary of 32,768.

Tensors: `scores` uint8 (vocab_size,), log scores on 256 even steps from `low` to `high`; `levels` uint8, four ids per
byte, the first in the lowest bits; `probe` float16 (hidden_size,), if there is one. Metadata: one key, `saliency`, with
canonical JSON: format, vocab_size, low, high, tokenizer, base, probe_bias, probe_layer. Same input, same bytes.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.errors import MessageError
from fedfstq_hf.generation.saliency import Saliency
from fedfstq_hf.generation.scorers.probe import Probe

FILE_NAME = "saliency.safetensors"
MAX_BYTES = 16_000_000
"""What `unpack` refuses to look at: a vocabulary of ten million ids would fit."""


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
    try:
        tensors = _load(data)
        fields = json.loads(_metadata(data)["saliency"])
        size, low, high = int(fields["vocab_size"]), float(fields["low"]), float(fields["high"])
        tokenizer, base = str(fields["tokenizer"]), dict(fields["base"])
        bias, layer = float(fields.get("probe_bias", 0.0)), int(fields.get("probe_layer", 0))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise MessageError(f"{FILE_NAME} cannot be read ({error}); download it again") from error
    if fields.get("format") != 1:
        raise MessageError(f"{FILE_NAME} has format {fields.get('format')!r}; this version reads 1. Upgrade fedfstq_hf")
    expected = {"levels": (torch.uint8, (-(-size // 4),)), "scores": (torch.uint8, (size,))}
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if name != "probe"}
    if size < 1 or found != expected or not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise MessageError(f"{FILE_NAME} holds {found}, scores from {low} to {high}; expected {expected}, low <= high")
    weight = tensors.get("probe")
    if not math.isfinite(bias) or layer < 0:
        raise MessageError(f"{FILE_NAME} has probe_bias {bias}, probe_layer {layer}; expected finite and at least 0")
    if weight is not None and (
        weight.dtype != torch.float16 or weight.ndim != 1 or not bool(torch.isfinite(weight).all())
    ):
        raise MessageError(f"{FILE_NAME} has a probe that is not a finite float16 vector")
    return Saliency(
        (low + tensors["scores"].double() * ((high - low) / 255.0)).float(),
        _unpack_levels(tensors["levels"], size),
        tokenizer,
        base,
        None if weight is None else Probe(weight.float(), bias, layer),
    )


def _pack_levels(levels: Tensor) -> Tensor:
    padded = torch.zeros(-(-len(levels) // 4) * 4, dtype=torch.uint8)
    padded[: len(levels)] = levels
    quads = padded.view(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def _unpack_levels(packed: Tensor, size: int) -> Tensor:
    return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[:size].contiguous()


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header: dict[str, dict[str, str]] = json.loads(data[8 : 8 + length])
    return header["__metadata__"]

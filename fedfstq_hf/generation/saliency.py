"""What a federation learned about token ids, in a form to share: scores, how often seen (coarsely), a probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError, MessageError
from fedfstq_hf.federation.adapter_file import load_tensors
from fedfstq_hf.generation.probe import Probe
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.text import parse_object, printable

EDGES = (1, 4, 32)
"""Counts from which an id is level 1, 2 or 3; nothing finer than the level is ever written."""
_COUNT_OF_LEVEL = torch.tensor([0.0, 2.0, 11.0, 64.0], dtype=torch.float64)  # what a level weighs in `aggregate`


@dataclass(frozen=True)
class Saliency:
    """Scores of token ids, and optionally a probe.

    log_scores: (vocab_size,) float32, log2 of the sensitivity; only differences between ids mean something.
    levels: (vocab_size,) uint8 in 0 .. 3, how often an id was seen; 0 is never, and its log score means nothing.
    probe: from hidden states, or None. tokenizer: `tokenizer_fingerprint`. base: what identifies the base model, may
    be empty.
    """

    log_scores: Tensor
    levels: Tensor
    tokenizer: str
    base: Mapping[str, Any] = field(default_factory=dict)
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if self.log_scores.ndim != 1 or self.log_scores.shape != self.levels.shape or not self.levels.numel():
            raise DataError(
                f"log_scores and levels have shapes {tuple(self.log_scores.shape)} and {tuple(self.levels.shape)}; "
                "expected the same (vocab_size,), not empty"
            )
        if int(self.levels.max()) > 3 or not bool(torch.isfinite(self.log_scores[self.levels > 0]).all()):
            raise DataError("a saliency table holds levels above 3, or scores that are NaN or infinite")

    @classmethod
    def from_sensitivity(
        cls, table: TokenSensitivity, tokenizer: str, base: Mapping[str, Any] | None = None, probe: Probe | None = None
    ) -> Saliency:
        """One client's table, counts reduced to levels. An id with gradient 0 gets the lowest of the other scores."""
        scores, counts = table.scores().double(), table.state_dict()["count"]
        seen = counts > 0
        if not bool(seen.any()):
            raise DataError("the token table has seen no token yet; take it after the first refresh step")
        positive = seen & (scores > 0)
        floor = scores[positive].min() if bool(positive.any()) else torch.tensor(1.0, dtype=torch.float64)
        log_scores = torch.where(seen, scores.clamp_min(floor), 1.0).log2().float()
        levels = torch.bucketize(counts, torch.tensor(EDGES), right=True).to(torch.uint8)
        return cls(log_scores, levels, tokenizer, dict(base or {}), probe)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.levels)

    def scores(self) -> Tensor:
        """(vocab_size,) float32 for `TokenTable`; +inf for ids never seen: rare tokens must not be dropped first."""
        return torch.where(self.levels > 0, self.log_scores, torch.inf)


def aggregate(tables: Sequence[Saliency], weights: Sequence[float], min_clients: int = 1) -> Saliency:
    """One table from those of several clients, in the given order: the same tables always give the same result.

    Each table is first centred on its own mean, since a client's loss sets the scale of its gradients. An id's score is
    then the mean of the log scores of the clients that saw it, weighted by `weights` (examples, say) times the level's
    count. An id that fewer than `min_clients` saw becomes one never seen, so that it does not point at a single client.
    The probe is the weighted mean, if every table has one at the same layer.

    Raises:
        ConfigError: no tables, or weights that are not positive. AdapterMismatchError: tables of different tokenizers,
            bases or vocabularies.
    """
    if not tables or len(tables) != len(weights) or min(weights) <= 0 or min_clients < 1:
        raise ConfigError(
            f"got {len(tables)} tables, weights {list(weights)}, min_clients {min_clients}; expected at "
            "least one table, a positive weight for each and min_clients >= 1"
        )
    first = tables[0]
    for number, table in enumerate(tables):
        if (table.vocab_size, table.tokenizer, table.base) != (first.vocab_size, first.tokenizer, first.base):
            raise AdapterMismatchError(
                f"table {number} is for {table.vocab_size} ids of tokenizer {table.tokenizer[:12]}, the first for "
                f"{first.vocab_size} of {first.tokenizer[:12]}, or their bases differ; only tables of one "
                "base can be joined"
            )
    total = torch.zeros(first.vocab_size, dtype=torch.float64)
    mass, counts, clients = total.clone(), total.clone(), total.clone()
    for table, weight in zip(tables, weights, strict=True):
        times = _COUNT_OF_LEVEL[table.levels.long()]
        values = torch.where(table.levels > 0, table.log_scores, 0.0).double()
        centred = values - (values * times).sum() / times.sum().clamp_min(1.0)
        total += weight * times * centred
        mass += weight * times
        counts += times
        clients += table.levels > 0
    public = clients >= min_clients
    levels = torch.bucketize(counts.long(), torch.tensor(EDGES), right=True)
    return Saliency(
        (total / mass.clamp_min(1e-300)).masked_fill(~public, 0.0).float(),
        levels.masked_fill(~public, 0).to(torch.uint8),
        first.tokenizer,
        first.base,
        _mean_probe([table.probe for table in tables], weights),
    )


def _mean_probe(probes: Sequence[Probe | None], weights: Sequence[float]) -> Probe | None:
    given = [probe for probe in probes if probe is not None]
    shapes = {(probe.layer, len(probe.weight)) for probe in given}
    if len(given) < len(probes) or len(shapes) != 1:
        return None
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    weight = torch.stack([probe.weight.double() for probe in given])
    bias = torch.tensor([probe.bias for probe in given], dtype=torch.float64)
    return Probe((shares @ weight).float(), float(shares @ bias), given[0].layer)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of a tokenizer's vocabulary: which id stands for which token."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()


FILE_NAME = "saliency.safetensors"
MAX_BYTES = 16_000_000
"""What `unpack` refuses to look at: a vocabulary of ten million ids would fit."""
_MAX_HEADER = 1 << 15
_MAX_LOG = 1100  # of any number in double precision, and finite in single


def pack(saliency: Saliency) -> bytes:
    """The bytes of `saliency.safetensors`, about 50 kB for a vocabulary of 32,768. Same input, same bytes.

    Tensors: `scores` uint8 (vocab_size,), log scores on 256 even steps from `low` to `high`; `levels` uint8, four ids
    per byte, the first in the lowest bits; `probe` float16 (hidden_size,), if there is one. Metadata: one key,
    `saliency`, with canonical JSON: format, vocab_size, low, high, tokenizer, base, probe_bias, probe_layer.
    Scores lose at most 1/510 of the table's range in log2, the probe what float16 loses.
    """
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

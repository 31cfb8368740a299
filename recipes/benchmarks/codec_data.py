"""Updates for benchmarks of codecs: recorded ones, and ones of any size with the statistics of a recorded one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fedfstq_hf.codec import Schema

# hidden size and (in, out) features of the linear layers of a Llama-3-8B block
LLAMA_8B = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}
RANK = 16
Vectors = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """One client's update: flat (num_params,) vectors `delta`, `fisher`, `other_fisher` in schema order."""

    name: str
    schema: Schema
    vectors: Vectors

    def state(self, key: str) -> Vectors:
        """A vector as a state dict."""
        return self.schema.unflatten(self.vectors[key])


def load_recordings(folder: Path) -> list[Update]:
    """What `record_deltas.py` left in a folder, in the order of rounds."""
    manifest = json.loads((folder / "recording.json").read_text(encoding="utf-8"))
    schema = Schema.from_state_dict({name: torch.zeros(shape) for name, shape in manifest["tensors"]})
    files = sorted(folder.glob("round-*.safetensors"))
    return [Update(file.stem, schema, load_file(file)) for file in files]


def sized(update: Update, num_params: int) -> tuple[Vectors, Vectors]:
    """(delta, fisher) of about `num_params` coordinates: blocks of Llama-3-8B, or one narrower block below its size."""
    block = RANK * sum(wide_in + wide_out for wide_in, wide_out in LLAMA_8B.values())
    return enlarged(update, max(1, round(num_params / block)), width=min(1.0, num_params / block))


def enlarged(update: Update, layers: int, seed: int = 0, width: float = 1.0) -> tuple[Vectors, Vectors]:
    """(delta, fisher) for `layers` blocks of Llama-3-8B: each matrix draws its features from one recorded matrix.

    A feature's column comes whole, changes and Fisher information together, so rows, columns and their correlations are
    those of the recording. Recorded rows are repeated or cut to rank 16. width: of the blocks, as a share of
    Llama-3-8B's.
    """
    generator = torch.Generator().manual_seed(seed)
    sources: dict[str, list[tuple[Tensor, Tensor]]] = {"A": [], "B": []}
    for spec in update.schema.tensors:
        side = "A" if "lora_A" in spec.name else "B"
        pair = [update.state(key)[spec.name] for key in ("delta", "fisher")]
        if side == "B":
            pair = [matrix.T for matrix in pair]
        rows = torch.arange(RANK) % pair[0].shape[0]
        sources[side].append((pair[0][rows], pair[1][rows]))
    delta, fisher = {}, {}
    number = 0
    for layer in range(layers):
        for module, (wide_in, wide_out) in LLAMA_8B.items():
            for side, features in (("A", wide_in), ("B", wide_out)):
                values, weights = sources[side][number % len(sources[side])]
                drawn = torch.randint(values.shape[1], (round(width * features),), generator=generator)
                name = f"layers.{layer:03d}.{module}.lora_{side}.weight"
                for state, matrix in ((delta, values[:, drawn]), (fisher, weights[:, drawn])):
                    state[name] = (matrix if side == "A" else matrix.T).contiguous()
            number += 1
    return delta, fisher

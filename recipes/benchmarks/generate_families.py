"""In which families of causal models the query-aware scorer computes the model's own attention.

Run: `python recipes/benchmarks/generate_families.py [--write]` (about three minutes; `--write` renews the table of
docs/generation.md). Every causal model of the installed transformers is built from its configuration, shrunk, with
random weights; at each block the scorer's attention is compared with that which the model returns. A family is

    exact    they differ by less than 1e-5 at every block
    cache    the same, but prompts are refused: layers without attention, or another kind of cache
    refused  the scorer says that it does not know this attention
    differs  none should
    not run  the shrunk model could not be built, or returns no attention
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import decoder_blocks, read_at
from fedfstq_hf.generation.reducer import TokenReducer

PAGE = Path(__file__).parents[2] / "docs" / "generation.md"
BEGIN, END = "<!-- families begin -->", "<!-- families end -->"
LARGEST = 30_000_000  # parameters of a model that is small enough
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "n_embed": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(kind: str) -> Any:
    """A small random model of a family."""
    plain = AutoConfig.for_model(kind)
    known = plain.get_text_config(decoder=True)
    given = {name: value for name, value in SMALL.items() if getattr(known, name, None) is not None}
    config = AutoConfig.for_model(kind, **given) if known is plain else type(known)(**given)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters")
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def distance(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference; models with sinks may return attention before the sinks have had their share."""
    rest = mine / mine.sum(-1, keepdim=True)
    return min(float((one - theirs).abs().max()) for one in (mine, rest))


@torch.no_grad()
def verdict(kind: str) -> str:
    """The word for a family."""
    ids = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
    try:
        model = build(kind)
        own = model(ids, output_attentions=True).attentions
        blocks = len(decoder_blocks(model))
        if not own or len(own) != blocks or any(one is None for one in own):
            return "not run"
    except Exception:  # of whatever kind: it says nothing about the scorer
        return "not run"
    try:
        found = [window_attention(read_at(model, layer, ids, torch.ones_like(ids)), 8) for layer in range(blocks)]
    except ConfigError:
        return "refused"
    if max(distance(mine, theirs[:, :, -8:]) for mine, theirs in zip(found, own, strict=True)) > 1e-5:
        return "differs"
    try:
        options = {"max_new_tokens": 2, "do_sample": False}
        model.generate(ids, custom_generate=TokenReducer(0.5, min_tokens=0), **options)
    except ConfigError:
        return "cache"
    return "exact"


def main() -> int:
    """Print the table; 1 where a family differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the table of docs/generation.md")
    options = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.filterwarnings("ignore")
    found: dict[str, list[str]] = {}
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            word = verdict(kind)
        found.setdefault(word, []).append(kind)
        print(f"{kind}: {word}", file=sys.stderr)
    words = ("exact", "cache", "refused", "differs", "not run")
    rows = [f"| {word} | {len(found[word])} | {', '.join(found[word])} |" for word in words if word in found]
    table = "\n".join(["| | families | |", "|---|---:|---|", *rows])
    print(table)
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int("differs" in found)


if __name__ == "__main__":
    raise SystemExit(main())

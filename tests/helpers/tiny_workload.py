"""A workload small enough for tests: a random Llama and its tokenizer on disk, a jsonl file with owners, a recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(40)]
OWNERS = {"client-0000": 5, "client-0001": 9, "client-0002": 7}


def make_model(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_rows() -> list[dict[str, str]]:
    draw = random.Random(0)

    def row(owner: str, split: str) -> dict[str, str]:
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
        return {"prompt": " ".join(words), "answer": words[0], "owner": owner, "topic": owner[-1], "split": split}

    rows = [row(owner, "train") for owner, count in OWNERS.items() for _ in range(count)]
    draw.shuffle(rows)  # owners lie mixed, as in real files
    return rows + [row("client-0000", "test") for _ in range(6)]


def make_recipe(folder: Path) -> dict[str, object]:
    return {
        "name": "tiny",
        "model": str(folder / "model"),
        "data": {"path": str(folder / "data.jsonl"), "format": "jsonl", "client_column": "owner", "max_length": 16},
        "lora": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1},
        "training": {"local_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01},
        "federation": {"clients": 3, "clients_per_round": 3, "rounds": 3, "partition": "natural"},
        "methods": {
            "fedavg": {"codec": "fp32"},
            "fstq": {"codec": "fstq", "uplink_budget": 320, "server": {"optimizer": "SGD", "lr": 0.9, "momentum": 0.5}},
        },
        "evaluation": {"metric": "eval_loss", "batch_size": 4},
        "seeds": [3],
    }


def make_workload(folder: Path) -> Path:
    """Write everything into `folder`; returns the recipe's path."""
    make_model(folder / "model")
    rows = make_rows()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for owner in OWNERS:
        mine = [row for row in rows if row["owner"] == owner and row["split"] == "train"]
        (folder / f"{owner}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mine))
    recipe = folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(make_recipe(folder)))
    return recipe


def write_client_file(folder: Path, mailbox: Path, owner: str, target: Path) -> Path:
    settings = {
        "mailbox": str(mailbox),
        "client_id": owner,
        "data": {"path": str(folder / f"{owner}.jsonl")},
        "model": str(folder / "model"),
        "output_dir": str(target / owner),
        "poll_seconds": 0.05,
        "wait_seconds": 120,
    }
    target.mkdir(parents=True, exist_ok=True)
    file = target / f"{owner}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file

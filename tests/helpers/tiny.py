"""A tiny random Llama with LoRA, token data to train it on, and quiet training arguments."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments


def make_tiny_model(
    *, seed: int = 0, r: int = 4, hidden_size: int = 32, num_hidden_layers: int = 2, **lora: object
) -> PeftModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    settings = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", **lora)
    model = get_peft_model(LlamaForCausalLM(config), settings)
    torch.manual_seed(seed + 1)
    return model


def make_tiny_data(num: int, *, seed: int = 0, length: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 64, (num, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * 2 + row[2:], "attention_mask": [1] * length} for row in rows]


def make_arguments(output_dir: object, **overrides: object) -> TrainingArguments:
    settings: dict[str, object] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**(settings | overrides))

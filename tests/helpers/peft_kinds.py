"""Configurations of the kinds of adapters that can be federated."""

from __future__ import annotations

import peft

PLACES = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=2, **PLACES),
    "dora": lambda: peft.LoraConfig(r=2, use_dora=True, **PLACES),
    "rslora": lambda: peft.LoraConfig(r=4, use_rslora=True, **PLACES),
    "vera": lambda: peft.VeraConfig(r=4, save_projection=False, **PLACES),
    "randlora": lambda: peft.RandLoraConfig(r=4, save_projection=False, **PLACES),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=40, **PLACES),
    "loha": lambda: peft.LoHaConfig(r=2, **PLACES),
    "lokr": lambda: peft.LoKrConfig(r=2, **PLACES),
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **PLACES),
    "oft": lambda: peft.OFTConfig(oft_block_size=8, **PLACES),
    "unilora": lambda: peft.UniLoraConfig(r=2, **PLACES),
}

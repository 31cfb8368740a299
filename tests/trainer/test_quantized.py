"""A base in 4 or 8 bits: a client joins a federation that was founded on the same base in float32."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")


CONFIGS = {
    "Linear4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "Linear8bitLt": {"load_in_8bit": True},
}


def quantized(folder, kind="Linear4bit"):
    config = BitsAndBytesConfig(**CONFIGS[kind])
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == kind
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_client_with_a_quantized_base(tmp_path, kind):
    original = make_tiny_model(hidden_size=64)
    mailbox = found(tmp_path / "box", original, training={"learning_rate": 1e-2})
    start = AdapterView(original).read()
    original.unload().save_pretrained(tmp_path / "base")
    model = quantized(tmp_path / "base", kind)
    trainer = FedFSTQTrainer(
        model=model,
        args=make_arguments(tmp_path / "a"),
        train_dataset=make_tiny_data(7),
        federation=settings_of(mailbox),
    )
    with served(mailbox):
        trainer.train()
    assert [settlement.outcome for settlement in trainer.settlements] == ["accepted"] * 2
    learned = trainer.adapter_view.read()
    assert learned.isfinite().all()
    assert float((learned - start).abs().max()) > 0.01
    assert int(torch.isfinite(trainer.sensitivity.scores()).sum()) > 20


def test_trl_s_bfloat16_adapters_are_float32_again(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'fedfstq_hf[trl]'")
    from tiny_workload import make_model
    from transformers import AutoTokenizer

    from fedfstq_hf import FedFSTQSFTTrainer

    make_model(tmp_path / "tokenizer")
    make_tiny_model(hidden_size=64).unload().save_pretrained(tmp_path / "base")
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, max_length=16, bf16=False, use_cpu=True, report_to="none"
    )
    trainer = FedFSTQSFTTrainer(
        model=quantized(tmp_path / "base"),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "w1 w2", "completion": "w3"}] * 8),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        federation=settings_of(None),
    )
    trainer.train()
    assert {parameter.dtype for parameter in trainer.adapter_view.parameters} == {torch.float32}
    assert trainer.adapter_fisher.vector().any()

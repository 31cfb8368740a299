"""`FedFSTQMixin` before other Trainer classes: their losses, and a message at the end."""

import peft
import pytest
import torch
from datasets import Dataset
from tiny import make_arguments
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from fedfstq_hf import FedFSTQConfig, FedFSTQMixin
from fedfstq_hf.codec import message
from fedfstq_hf.demo import model_path

trl = pytest.importorskip("trl", reason="needs TRL: pip install 'fedfstq_hf[trl]'")

PREFERENCES = [{"prompt": "Name of patient? ", "chosen": f"A{i}", "rejected": "no"} for i in range(4)]
PROMPTS = [{"prompt": f"Patient {i}"} for i in range(4)]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def causal():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    return {"model": model, "peft_config": peft.LoraConfig(**LORA, task_type="CAUSAL_LM")}


def classifier():
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(model_path(), num_labels=1, dtype="float32")
    return {"model": model, "peft_config": peft.LoraConfig(**LORA, task_type="SEQ_CLS", modules_to_save=["score"])}


def length(completions, **others):
    return [float(len(completion)) for completion in completions]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "settings", "make", "rows", "options"),
    [
        (trl.DPOTrainer, trl.DPOConfig, causal, PREFERENCES, {}),
        (trl.RewardTrainer, trl.RewardConfig, classifier, PREFERENCES, {}),
        (trl.GRPOTrainer, trl.GRPOConfig, causal, PROMPTS, {"num_generations": 2, "max_completion_length": 4}),
    ],
    ids=["dpo", "reward", "grpo"],
)
def test_trl(tmp_path, kind, settings, make, rows, options):
    losses, adapters = [], []
    for federated in (False, True):
        bases = (FedFSTQMixin, kind) if federated else (kind,)
        own = type("Mine", bases, {})
        common = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
        arguments = settings(
            output_dir=str(tmp_path), report_to="none", save_strategy="no", logging_steps=1, **common, **options
        )
        extra = {"federation": FedFSTQConfig()} if federated else {}
        if kind is trl.GRPOTrainer:
            extra["reward_funcs"] = length
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        data = Dataset.from_list(rows)
        trainer = own(**make(), args=arguments, train_dataset=data, processing_class=tokenizer, **extra)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        adapters.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    for mine, theirs in zip(adapters[1], adapters[0], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    header, payload = message.unpack(trainer.pack_update())
    assert header.num_examples == 4
    assert payload


def test_sequence_to_sequence(tmp_path):
    class Mine(FedFSTQMixin, Seq2SeqTrainer):
        """With `predict_with_generate`."""

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, decoder_start_token_id=0))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": [9, 10, 11]} for _ in range(4)]
    plain = make_arguments(tmp_path, max_steps=2)
    arguments = Seq2SeqTrainingArguments(
        output_dir=plain.output_dir, max_steps=2, predict_with_generate=True, report_to="none", use_cpu=True
    )
    trainer = Mine(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, federation=FedFSTQConfig())
    trainer.train()
    assert trainer.evaluate(max_length=4)["eval_loss"] > 0
    assert trainer.pack_update()

"""The loss that is optimised is the model's own, whatever an adapter, a router or a class of models makes of it."""

import peft
import pytest
import torch
from local_training import Listed, Padded, ragged_data
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MBartConfig,
    MBartForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    ViTConfig,
    ViTModel,
)

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": 0}


def lora(base, task="CAUSAL_LM", config=None):
    torch.manual_seed(1)
    wanted = config or peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    return peft.get_peft_model(base, wanted)


def adalora():
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    return lora(LlamaForCausalLM(LlamaConfig(**SMALL)), config=config)


def mbart():
    torch.manual_seed(0)
    layers = {"decoder_layers": 1, "encoder_layers": 1, "decoder_attention_heads": 4, "encoder_attention_heads": 4}
    sizes = {"vocab_size": 64, "d_model": 32, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "dropout": 0.0}
    return lora(MBartForCausalLM(MBartConfig(max_position_embeddings=32, **layers, **sizes)))


def experts():
    torch.manual_seed(0)
    routed = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }
    return lora(MixtralForCausalLM(MixtralConfig(**SMALL, **routed)))


def with_a_term_of_its_own():
    model = make_tiny_model()
    base = model.get_base_model()
    forward = base.forward

    def longer(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 1e-2 * outputs.logits.float().square().mean()
        return outputs

    base.forward = longer
    return model


def run(kind, folder, model, rows, **options):
    arguments = make_arguments(folder, max_steps=3, logging_steps=1, logging_strategy="steps")
    trainer = kind(model=model, args=arguments, train_dataset=rows, **options)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, [p.detach().clone() for p in model.parameters() if p.requires_grad], trainer


def shifted_rows():
    """These classes do not shift: labels come shifted."""
    return [
        {"input_ids": row["input_ids"][:-1], "labels": row["input_ids"][1:], "attention_mask": [1] * 11}
        for row in make_tiny_data(8, length=12)
    ]


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (adalora, make_tiny_data),
        (mbart, shifted_rows),
        (experts, make_tiny_data),
        (with_a_term_of_its_own, make_tiny_data),
        (make_tiny_model, make_tiny_data),
    ],
)
def test_losses_and_adapter_are_those_of_a_trainer(tmp_path, make, rows):
    data = rows(8) if rows is make_tiny_data else rows()
    expected, theirs, _ = run(Trainer, tmp_path, make(), data)
    found, mine, _ = run(FedFSTQTrainer, tmp_path, make(), data, federation=FedFSTQConfig())
    assert found == pytest.approx(expected, rel=1e-5)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=2e-4)


@pytest.mark.parametrize("make", [adalora, with_a_term_of_its_own])
def test_an_objective_that_weights_tokens_is_refused_there(tmp_path, make):
    config = FedFSTQConfig(objective="hard")
    with pytest.raises(ConfigError, match=r"another loss than the mean over target tokens .* objective='full'"):
        run(FedFSTQTrainer, tmp_path, make(), make_tiny_data(8), federation=config)


def masked(rows, *which):
    return [row | {"labels": [-100] * len(row["labels"])} if i in which else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("objective", ["full", "hard"])
def test_a_row_without_a_target_is_skipped_and_counted(tmp_path, objective):
    participation = Listed(make_tiny_model(), 1, local_steps=8, objective=objective)
    trainer = FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(tmp_path, per_device_train_batch_size=1),
        train_dataset=masked(make_tiny_data(8), 5),
        federation=FedFSTQConfig(),
    )
    trainer.take_part(participation, participation.spec)
    assert trainer._steps.skipped == trainer._steps.masked == 1
    assert trainer.state.log_history[-1]["fed_skipped_steps"] == 1
    assert participation.results[0].adapter.isfinite().all()


def test_only_rows_without_a_target_are_an_error(tmp_path):
    data = masked(make_tiny_data(4), 0, 1, 2, 3)
    with pytest.raises(DataError, match="All labels of client 'client' are masked"):
        run(FedFSTQTrainer, tmp_path, make_tiny_model(), data, federation=FedFSTQConfig())


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions(tmp_path, kind):
    """Made by the collator, as for packed rows; padding is what sees nothing, itself included."""
    padded = Padded()

    def collate(rows):
        batch = padded(rows)
        real = batch["attention_mask"].bool()
        seen = torch.tril(torch.ones(real.shape[1], real.shape[1], dtype=torch.bool)) & real[:, None, None, :]
        lowest = torch.finfo(torch.float32).min
        added = torch.zeros(seen.shape).masked_fill(~seen, lowest)
        return batch | {"attention_mask": seen if kind == torch.bool else added}

    tokens = []
    for collator in (padded, collate):
        options = {"data_collator": collator, "federation": FedFSTQConfig(refresh_steps=1)}
        _, _, trainer = run(FedFSTQTrainer, tmp_path, make_tiny_model(), ragged_data(8), **options)
        tokens.append(trainer.sensitivity.state_dict())
    assert torch.equal(tokens[0]["count"], tokens[1]["count"])
    assert torch.allclose(tokens[0]["ema"], tokens[1]["ema"], rtol=1e-3)


def test_data_without_labels_meets_the_trainers_own_error(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in make_tiny_data(4)]
    with pytest.raises(ValueError, match="did not return a loss"):
        run(FedFSTQTrainer, tmp_path, make_tiny_model(), rows, federation=FedFSTQConfig())


def test_tokens_of_encoder_and_decoder_are_read(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    base = T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0))
    model = lora(base, "SEQ_2_SEQ_LM", peft.LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [9, 10, 11]},
        {"input_ids": [5, 8, 7, 6], "attention_mask": [1, 1, 1, 1], "labels": [9, 12, 13]},
    ]
    _, _, trainer = run(FedFSTQTrainer, tmp_path, model, rows, federation=FedFSTQConfig(refresh_steps=1))
    seen = set(torch.nonzero(trainer.sensitivity.state_dict()["count"]).flatten().tolist())
    assert {5, 6, 7, 8} | {9, 10, 12} <= seen  # the decoder is given the labels, shifted
    assert len(trainer.pack_update()) > 0


def test_a_model_that_reads_no_tokens_is_refused(tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=8, patch_size=4
    )
    model = peft.get_peft_model(ViTModel(config), peft.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(AdapterMismatchError, match="ViTModel looks up no token ids"):
        FedFSTQTrainer(model=model, args=make_arguments(tmp_path), federation=FedFSTQConfig())


def test_a_head_of_half_the_precision_is_told_what_works(tmp_path):
    base = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).to(torch.bfloat16)
    model = lora(base, "SEQ_CLS")
    with pytest.raises(AdapterMismatchError, match=r"p.data = p.data.float\(\) if p.requires_grad"):
        FedFSTQTrainer(model=model, args=make_arguments(tmp_path), federation=FedFSTQConfig())
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    rows = [row | {"labels": number % 3} for number, row in enumerate(make_tiny_data(4))]
    arguments = make_arguments(tmp_path, bf16=True, max_steps=1)
    trainer = FedFSTQTrainer(model=model, args=arguments, train_dataset=rows, federation=FedFSTQConfig())
    trainer.train()
    assert len(trainer.pack_update()) > 0

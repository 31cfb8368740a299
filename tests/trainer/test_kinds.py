"""Kinds of adapters that PEFT makes: through a federation and back into plain PEFT, or refused with what to do."""

import json

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_kinds import KINDS, PLACES
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView, check_same_adapter
from fedfstq_hf.errors import AdapterMismatchError, MailboxError
from fedfstq_hf.running.foundation import wrap_base


def base():
    return make_tiny_model().unload()


def make_model(config, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(base(), config)


def make_trainer(folder, model, mailbox=None):
    arguments = make_arguments(folder, learning_rate=0.1)
    data = make_tiny_data(7)
    return FedFSTQTrainer(model=model, args=arguments, train_dataset=data, federation=settings_of(mailbox))


def logits(model):
    ids = torch.tensor([row["input_ids"] for row in make_tiny_data(3, seed=9)])
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_federation_of_each_kind(tmp_path, kind):
    """Founded on one copy, joined by another made from the published configuration, loaded by PEFT alone."""
    model = make_model(KINDS[kind]())
    view = AdapterView(model)
    assert view.schema.num_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    mailbox = found(tmp_path / "box", model, training={"learning_rate": 0.1})
    client = wrap_base(base(), (tmp_path / "box/adapter_config.json").read_bytes())
    assert client.peft_config["default"].peft_type == model.peft_config["default"].peft_type
    trainer = make_trainer(tmp_path / "a", client, mailbox)
    with served(mailbox):
        trainer.train()
    assert [settlement.outcome for settlement in trainer.settlements] == ["accepted"] * 2
    assert float((trainer.adapter_view.read() - view.read()).abs().max()) > 0.05  # four steps of 0.1
    loaded = PeftModel.from_pretrained(base(), tmp_path / "box")
    assert torch.equal(logits(loaded), logits(client))
    assert float((logits(loaded) - logits(model)).abs().max()) > 1e-4


def test_a_published_configuration_that_peft_does_not_know():
    with pytest.raises(MailboxError, match=r"adapter_config\.json cannot be read"):
        wrap_base(base(), json.dumps({"peft_type": "TELEPATHY"}).encode())
    with pytest.raises(MailboxError, match=r"adapter_config\.json cannot be read"):
        wrap_base(base(), b"{}")


@pytest.mark.parametrize(
    ("mine", "theirs", "match"),
    [
        (peft.VeraConfig(projection_prng_key=1), peft.VeraConfig(projection_prng_key=2), "projection_prng_key=1, .* 2"),
        (peft.VeraConfig(), peft.LoraConfig(), "peft_type='VERA', the federation's has 'LORA'"),
        (peft.LoHaConfig(alpha=8), peft.LoHaConfig(alpha=16), "alpha=8, the federation's has 16"),
        (peft.LoraConfig(alora_invocation_tokens=[3]), peft.LoraConfig(), "alora_invocation_tokens"),
    ],
)
def test_another_effect_is_refused(mine, theirs, match):
    published = json.loads(json.dumps(theirs.to_dict(), default=str))
    with pytest.raises(AdapterMismatchError, match=match):
        check_same_adapter(mine.to_dict(), published)
    check_same_adapter(theirs.to_dict(), published)


REFUSED = {
    "lm_head": (lambda: peft.LoraConfig(target_modules=["lm_head"]), "trains the LM head"),
    "saved lm_head": (lambda: peft.LoraConfig(modules_to_save=["lm_head"], **PLACES), "trains the LM head"),
    "embeddings": (lambda: peft.LoraConfig(target_modules=["embed_tokens"]), "trains the input embeddings"),
    "saved embeddings": (lambda: peft.LoraConfig(modules_to_save=["embed_tokens"], **PLACES), "the input embeddings"),
    "new tokens": (
        lambda: peft.LoraConfig(trainable_token_indices=[1, 2], **PLACES),
        r"Leave embed_tokens and lm_head out of target_modules, modules_to_save and trainable_token_indices",
    ),
    "pissa": (lambda: peft.LoraConfig(init_lora_weights="pissa", **PLACES), "Use init_lora_weights=True"),
    "kasa": (lambda: peft.LoraConfig(kasa_config=peft.KasaConfig(), **PLACES), "kasa_config truncates the base"),
    "projections": (lambda: peft.VeraConfig(r=4, **PLACES), r"VeraConfig\(save_projection=False\)"),
    "randlora projections": (lambda: peft.RandLoraConfig(r=4, **PLACES), r"RandLoraConfig\(save_projection=False\)"),
    "frozen": (lambda: peft.LoraConfig(inference_mode=True, **PLACES), "with inference_mode=False"),
    "untrained": (
        lambda: peft.LoraConfig(init_lora_weights="mica", **PLACES),
        "lora_B.weight is saved but not trained, so a LORA adapter configured like this cannot be federated",
    ),
    "prompts": (
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "PROMPT_TUNING learns a prompt, not changes of weights, and is not supported. Use LoRA",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_federated_says_what_to_do(name):
    make, match = REFUSED[name]
    with pytest.raises(AdapterMismatchError, match=match):
        AdapterView(make_model(make()))


def test_a_vocabulary_resized_after_the_trainer_was_made(tmp_path):
    trainer = make_trainer(tmp_path, make_tiny_model())
    trainer.model.resize_token_embeddings(70)
    with pytest.raises(AdapterMismatchError, match=r"resized from 64 to 70 tokens.*leave out resize_token_embeddings"):
        trainer.train()


def test_a_vocabulary_resized_in_the_middle_of_a_round(tmp_path):
    """Noticed at the round's end, before anything is sent."""

    class Resize(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.resize_token_embeddings(70)

    mailbox = found(tmp_path / "box", make_tiny_model())
    trainer = make_trainer(tmp_path / "a", make_tiny_model(), mailbox)
    trainer.add_callback(Resize())
    with pytest.raises(AdapterMismatchError, match=r"resized from 64 to 70 tokens.*leave out resize_token_embeddings"):
        trainer.train()
    assert mailbox.list_updates(0) == []


def test_a_vocabulary_resized_before_joining(tmp_path):
    mailbox = found(tmp_path / "box", make_tiny_model())
    model = make_tiny_model()
    model.resize_token_embeddings(70)
    with pytest.raises(AdapterMismatchError, match=r"vocab_size=70, the federation's has 64\. Load the base model"):
        make_trainer(tmp_path, model, mailbox).train()

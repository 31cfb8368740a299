"""LoRA's factors A stay as round 0 has them; B is trained, and alone travels."""

import torch
from local_training import Listed, make_trainer
from peft import PeftModel, get_peft_model_state_dict
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.codec import Schema, message
from fedfstq_hf.federation import adapter_file


def split(state):
    """A's tensors, and B's."""
    return tuple({name: t for name, t in state.items() if part in name} for part in (".lora_A.", ".lora_B."))


def test_a_client_trains_and_sends_b_alone(tmp_path):
    founder, model = make_tiny_model(), make_tiny_model()
    mailbox = found(tmp_path / "box", founder, freeze_a=True)
    first, b = split(AdapterView(founder).state())
    with torch.no_grad():  # a client draws an A of its own; the federation's takes its place
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.add_(1.0)
    trainer = FedFSTQTrainer(
        model=model, args=make_arguments(tmp_path), train_dataset=make_tiny_data(8), federation=settings_of(mailbox)
    )
    with served(mailbox):
        trainer.train()
    published = adapter_file.load(mailbox.read(2, "adapter_model.safetensors"))
    for state in (published, trainer.adapter_view.state()):
        a, changed = split(state)
        assert all(torch.equal(a[name], first[name]) for name in first)
        assert all(bool(tensor.any()) for tensor in changed.values())
    travels = Schema.from_state_dict(b)
    for ref in (mailbox.list_updates(0)[0], mailbox.list_updates(1)[0]):
        header, payload = message.unpack(mailbox.read_update(ref, max_bytes=10**6))
        assert header.schema == travels.fingerprint
        assert len(payload) == 4 * travels.num_params
    base = make_tiny_model().get_base_model()
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, tmp_path / "box"), save_embedding_layers=False)
    assert all(torch.equal(tensor, published[name]) for name, tensor in loaded.items())


def test_adam_has_no_moments_of_a_frozen_factor(tmp_path):
    model = make_tiny_model()
    participation = Listed(model, 1, freeze_a=True, fisher="adam")
    trainer, _ = make_trainer(tmp_path, model=model)
    trainer.take_part(participation, participation.spec)
    a, b = split(participation.view.schema.unflatten(participation.results[0].fisher))
    assert not any(bool(tensor.any()) for tensor in a.values())
    assert all(bool(tensor.any()) for tensor in b.values())
    # a federation that trains both comes after it
    participation = Listed(model, 1)
    trainer, _ = make_trainer(tmp_path, model=model)
    trainer.take_part(participation, participation.spec)
    before, after = (
        split(participation.view.schema.unflatten(v))[0]
        for v in (participation.starts[0], participation.results[0].adapter)
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)

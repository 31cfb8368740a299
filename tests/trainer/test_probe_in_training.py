"""The saliency probe that clients fit at refresh steps: what enters it, when it is fitted, and that it is published."""

import pytest
import torch
from local_training import Listed, Padded, make_trainer, ragged_data
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.codec import message
from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.generation.probe import ProbeFit
from fedfstq_hf.generation.saliency import unpack
from fedfstq_hf.generation.shared_saliency import join_saliency


class Tokenizer:
    def get_vocab(self):
        return {f"t{index}": index for index in range(64)}


def hand_fitted(model, batch):
    """A fit on hidden states before block 1 and g, both from one plain pass."""
    model.train()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    output = model(
        inputs_embeds=embeddings,
        labels=batch["labels"],
        attention_mask=batch["attention_mask"],
        output_hidden_states=True,
    )
    output.loss.backward()
    fit = ProbeFit(32, layer=1)
    summed = embeddings.grad * int(batch["labels"][:, 1:].ne(-100).sum())  # the loss is the mean over targets
    fit.update(output.hidden_states[1], summed.square().sum(-1), batch["attention_mask"])
    model.zero_grad()
    return fit


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_enters_the_probe(tmp_path, cut, checkpointing):
    arguments = {
        "per_device_train_batch_size": cut[0],
        "gradient_accumulation_steps": cut[1],
        "max_steps": 1,
        "activation_checkpointing": checkpointing,
    }
    trainer, _ = make_trainer(tmp_path, data=ragged_data(8), arguments=arguments)
    trainer._open_steps(FedFSTQConfig(), fit_probe=True)
    trainer.train()
    expected = hand_fitted(make_tiny_model(), Padded()(ragged_data(8)))
    found, wanted = trainer._steps.observer.probe.state_dict(), expected.state_dict()
    assert int(found["tokens"]) == int(wanted["tokens"]) > 80
    for name in ("gram", "moment"):
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-4)
    assert torch.allclose(trainer._steps.observer.probe.solve().weight, expected.solve().weight, rtol=1e-2, atol=1e-3)


def test_its_state_goes_from_round_to_round(tmp_path):
    model = make_tiny_model()
    participation = Listed(model, 2, refresh_steps=2, share_saliency=True)
    trainer, _ = make_trainer(tmp_path, model=model, share_saliency=True)
    trainer.take_part(participation, participation.spec)
    first, second = (int(result.carried["probe.tokens"]) for result in participation.results)
    assert second > first > 0
    fit = ProbeFit(32, layer=1)
    fit.load_state_dict(trainer._steps.observer.probe.state_dict())
    assert torch.allclose(fit.solve().weight, trainer._steps.observer.probe.solve().weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("client", "federation"), [(True, False), (False, True), (False, False)])
def test_it_is_fitted_only_if_both_sides_agree(tmp_path, client, federation):
    model = make_tiny_model()
    participation = Listed(model, 1, share_saliency=federation)
    trainer, _ = make_trainer(tmp_path, model=model, share_saliency=client)
    trainer.take_part(participation, participation.spec)
    assert trainer._steps.observer.probe is None
    assert not any(name.startswith("probe.") for name in participation.results[0].carried)


def test_it_leaves_training_as_it_is(tmp_path):
    adapters = []
    for fit in (False, True):
        trainer, _ = make_trainer(tmp_path)
        trainer._open_steps(FedFSTQConfig(), fit_probe=fit)
        trainer.train()
        adapters.append(trainer.adapter_view.read())
    assert torch.equal(*adapters)


def test_a_federation_publishes_it(tmp_path):
    mailbox = found(tmp_path / "box", make_tiny_model(), rounds=2, share_saliency=True)
    with served(mailbox):
        trainer = FedFSTQTrainer(
            model=make_tiny_model(),
            args=make_arguments(tmp_path / "a"),
            train_dataset=make_tiny_data(8),
            processing_class=None,
            federation=settings_of(mailbox, share_saliency=True),
        )
        trainer.processing_class = Tokenizer()
        trainer.train()
    (sent,) = (tmp_path / "box").rglob("attachments/**/*.*")
    _, table = message.unpack(sent.read_bytes())
    own = unpack(table)
    weight = trainer._steps.observer.probe.solve().weight
    assert own.probe is not None
    assert own.probe.layer == 1
    assert torch.allclose(own.probe.weight, weight, rtol=1e-2, atol=1e-2)
    joined = join_saliency([(table, 1.0)] * 3)
    assert unpack(joined["saliency.safetensors"]).probe is not None


def test_a_state_of_another_size_is_refused():
    fit = ProbeFit(8)
    with pytest.raises(AdapterMismatchError, match="expected that of hidden size 6 at layer 1"):
        ProbeFit(6).load_state_dict(fit.state_dict())
    with pytest.raises(AdapterMismatchError, match="at layer 2"):
        ProbeFit(8, layer=2).load_state_dict(fit.state_dict())


def test_state_round_trips():
    torch.manual_seed(0)
    fit = ProbeFit(5)
    fit.update(torch.randn(2, 9, 5), torch.rand(2, 9), torch.ones(2, 9))
    other = ProbeFit(5)
    other.load_state_dict(fit.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fit.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.allclose(fit.solve().weight, other.solve().weight, rtol=1e-4)

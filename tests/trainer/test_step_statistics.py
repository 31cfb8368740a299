"""What a training step gives away: exact gradients, Fisher and token sensitivity, at no extra pass."""

import pytest
import torch
from tiny import make_arguments, make_tiny_data, make_tiny_model
from tiny_federation import Listed, batch_of, make_trainer, take_part
from transformers import Trainer, TrainerCallback

from fedfstq_hf import FedFSTQMixin
from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import ConfigError


def ragged_data(num=16, length=12):
    """Rows with 1 to 10 target tokens: weights that a mean of means would get wrong."""
    rows = make_tiny_data(num, length=length)
    for number, row in enumerate(rows):
        kept = 1 + (7 * number) % 10
        row["labels"] = [-100] * (length - kept) + row["input_ids"][length - kept :]
    return rows


class Gradients(TrainerCallback):
    """Adapter gradients before each optimizer step, in double precision."""

    def __init__(self, view):
        self.view, self.seen = view, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.seen.append(torch.cat([g.detach().double().reshape(-1) for g in self.view.gradients()]))


def hand_computed(model, rows):
    """Loss gradients at the adapter and at the input embeddings, by one plain forward and backward pass."""
    view, batch = AdapterView(model), batch_of(rows)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model.train()
    output = model(inputs_embeds=embeddings, labels=batch["labels"], attention_mask=batch["attention_mask"])
    output.loss.backward()
    adapter = torch.cat([gradient.reshape(-1) for gradient in view.gradients()]).clone()
    model.zero_grad()
    return adapter, embeddings.grad.square().sum(dim=-1)


@pytest.mark.parametrize("federated", [True, False])
def test_accumulated_gradients_are_those_of_one_large_batch(tmp_path, federated):
    """16 x 1 and 4 x 4 and 1 x 16 examples, with ragged labels: equal gradients, Fisher and token sensitivity."""

    def gradients(size, steps):
        model = make_tiny_model()
        # The same examples in the same order however they are batched, also without a federation.
        arguments = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "max_grad_norm": 0.0,
            "max_steps": 1,
            "train_sampling_strategy": "sequential",
        }
        trainer = make_trainer(tmp_path, model=model, data=ragged_data(), arguments=arguments)
        watch = Gradients(trainer.adapter_view)
        trainer.add_callback(watch)
        if federated:
            participation = Listed(model, [0], local_steps=1, training={"max_grad_norm": 0.0})
            trainer.take_part(participation, participation.spec)
        else:
            trainer.train()
        assert len(watch.seen) == 1
        return watch.seen[0], trainer.adapter_fisher.vector().double()

    reference, fisher = gradients(16, 1)
    assert float(reference.abs().max()) > 1e-3
    for size, steps in ((4, 4), (1, 16)):
        other, other_fisher = gradients(size, steps)
        assert float((other - reference).abs().max()) <= 1e-6 * float(reference.abs().max())
        assert float((other_fisher - fisher).abs().max()) <= 3e-6 * float(fisher.abs().max())


def test_fisher_sees_gradients_before_clipping(tmp_path):
    rows = make_tiny_data(2)
    expected, _ = hand_computed(make_tiny_model(), rows)
    model = make_tiny_model()
    participation = Listed(model, [0], local_steps=1, training={"max_grad_norm": 1e-7})
    trainer = make_trainer(tmp_path, model=model, data=rows)
    watch = Gradients(trainer.adapter_view)
    trainer.add_callback(watch)
    trainer.take_part(participation, participation.spec)
    assert float(watch.seen[0].norm()) < 1.1e-7
    fisher = participation.results[0].fisher
    assert torch.allclose(fisher, expected.square(), rtol=1e-4, atol=1e-12)
    assert float(fisher.max()) > 1e-6


def test_token_sensitivity_is_the_gradient_at_the_embeddings(tmp_path):
    rows = make_tiny_data(2)
    rows[1]["input_ids"][3] = rows[0]["input_ids"][5]  # an id that occurs twice
    for row in rows:
        row["labels"] = [-100] * 2 + row["input_ids"][2:]
    rows[1]["attention_mask"][-2:] = [0, 0]
    rows[1]["labels"][-2:] = [-100, -100]
    _, squared = hand_computed(make_tiny_model(), rows)
    trainer, _ = take_part(tmp_path, data=rows, spec={"local_steps": 1})
    with pytest.raises(ConfigError, match="processing_class=tokenizer"):
        trainer.token_sensitivity()
    scores = trainer.sensitivity.scores()
    seen: dict[int, list[float]] = {}
    for row, values in zip(rows, squared, strict=True):
        for token, value, kept in zip(row["input_ids"], values.tolist(), row["attention_mask"], strict=True):
            if kept:
                seen.setdefault(token, []).append(value)
    assert any(len(values) > 1 for values in seen.values())
    targets = sum(label != -100 for row in rows for label in row["labels"])
    assert targets == 18  # the loss is their mean, and the sensitivity that of their sum
    for token in range(64):
        if token in seen:
            assert scores[token].item() == pytest.approx(18**2 * sum(seen[token]) / len(seen[token]), rel=1e-4)
        else:
            assert scores[token].item() == torch.inf


def test_sensitivity_is_read_at_refresh_steps_only(tmp_path):
    rows = make_tiny_data(2)
    every, _ = take_part(tmp_path, data=rows, spec={"local_steps": 6, "refresh_steps": 1})
    third, _ = take_part(tmp_path, data=rows, spec={"local_steps": 6, "refresh_steps": 3})
    count = [int(trainer.sensitivity.state_dict()["count"].max()) for trainer in (every, third)]
    assert count == [6, 2]


def test_the_federation_s_decay_wins(tmp_path):
    """With rho 0 both averages are those of the last step alone."""
    rows, one_step = make_tiny_data(2), {"local_steps": 1, "refresh_steps": 1, "rho": 0.0}
    both, participation = take_part(tmp_path, [0, 1], data=rows, spec=one_step, rho=0.9)
    second, last = take_part(tmp_path, [1], data=rows, spec=one_step, model=_with(participation.results[0].adapter))
    assert torch.equal(both.sensitivity.scores(), second.sensitivity.scores())
    assert torch.equal(participation.results[1].fisher, last.results[0].fisher)


def _with(adapter):
    model = make_tiny_model()
    AdapterView(model).write(adapter)
    return model


def test_sensitivity_is_carried_to_the_next_round(tmp_path):
    trainer, participation = take_part(tmp_path, [0, 1, 2], data=make_tiny_data(2), spec={"local_steps": 2})
    assert int(trainer.sensitivity.state_dict()["count"].max()) == 3
    carried = participation.results[-1].carried
    assert torch.equal(carried["tokens.ema"], trainer.sensitivity.state_dict()["ema"])


@pytest.mark.parametrize("arguments", [{}, {"gradient_checkpointing": True}, {"bf16": True}])
def test_reading_them_costs_no_extra_pass(tmp_path, monkeypatch, arguments):
    arguments = {"gradient_accumulation_steps": 2, **arguments}

    def passes(train):
        counts = {"forward": 0, "backward": 0}
        model = make_tiny_model()
        model.get_base_model().lm_head.register_forward_hook(lambda *a: counts.update(forward=counts["forward"] + 1))
        original = torch.Tensor.backward

        def backward(*args, **kwargs):
            counts["backward"] += 1
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            train(model)
        return counts

    def plain(model):
        settings = make_arguments(tmp_path, max_steps=4, **arguments)
        Trainer(model=model, args=settings, train_dataset=make_tiny_data(7)).train()

    def federated(model):
        spec = {"local_steps": 2, "refresh_steps": 1}
        trainer, _ = take_part(tmp_path, [0, 1], model=model, spec=spec, arguments=arguments)
        assert int(trainer.sensitivity.state_dict()["count"].max()) > 0
        assert trainer.state.global_step == 4

    assert passes(plain) == {"forward": 8, "backward": 8}
    assert passes(federated) == {"forward": 10, "backward": 8}  # the first loss is compared with the model's own


def test_training_is_that_of_a_plain_trainer(tmp_path):
    """Without a mailbox, probes and Fisher leave no trace: bit for bit, where the Trainer computes the loss."""

    class Own(Trainer):
        def compute_loss(self, *arguments, **keywords):
            return super().compute_loss(*arguments, **keywords)

    class Federated(FedFSTQMixin, Own):
        pass

    one, two = make_tiny_model(), make_tiny_model()
    Federated(model=one, args=make_arguments(tmp_path), train_dataset=make_tiny_data(7)).train()
    Trainer(model=two, args=make_arguments(tmp_path / "plain"), train_dataset=make_tiny_data(7)).train()
    assert torch.equal(AdapterView(one).read(), AdapterView(two).read())

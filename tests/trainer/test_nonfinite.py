"""Steps with NaN or infinite gradients: skipped, counted, and without a trace in anything that is kept."""

import math

import pytest
import torch
from local_training import Listed, make_trainer, ragged_data
from tiny import make_tiny_model
from transformers import TrainerCallback

from fedfstq_hf.errors import NonFiniteError


class Spoil(TrainerCallback):
    """Makes the gradients of given global steps NaN or infinite, and takes note of what a step leaves."""

    def __init__(self, trainer, steps, value=math.nan, micro_batch=0):
        self.trainer, self.steps, self.value, self.micro_batch = trainer, steps, value, micro_batch
        self.after = []
        self._seen = 0
        self._at = -1
        parameter = trainer.adapter_view.parameters[0]
        parameter.register_hook(self._gradient)

    def _gradient(self, gradient):
        step = self.trainer.state.global_step
        self._seen = self._seen + 1 if step == self._at else 0
        self._at = step
        if step in self.steps and self._seen == self.micro_batch:
            return torch.full_like(gradient, self.value)
        return gradient

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = self.trainer.optimizer
        self.after.append(
            {
                "adapter": self.trainer.adapter_view.read(),
                "fisher": self.trainer.adapter_fisher.state_dict(),
                "tokens": self.trainer.sensitivity.state_dict(),
                **{
                    f"{index} {name}": torch.as_tensor(value).clone()
                    for index, parameter in enumerate(self.trainer.adapter_view.parameters)
                    for name, value in optimizer.state.get(parameter, {}).items()
                },
            }
        )


def equal(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return torch.equal(one, two)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_a_skipped_step_leaves_no_trace(tmp_path, value, micro_batch, optim):
    arguments = {
        "gradient_accumulation_steps": 2,
        "optim": optim,
        "weight_decay": 0.1,
        "max_steps": 4,
        "max_grad_norm": 1.0,
    }
    trainer, _ = make_trainer(tmp_path, arguments=arguments, refresh_steps=1)
    spoil = Spoil(trainer, [2], value, micro_batch)
    trainer.add_callback(spoil)
    trainer.train()
    first, second, skipped, last = spoil.after
    assert not equal(first, second)
    assert equal(second, skipped)
    assert not equal(skipped, last)
    assert all(bool(torch.isfinite(t).all()) for t in last.values() if isinstance(t, torch.Tensor))
    assert trainer.state.log_history[-1]["fed_skipped_steps"] == 1
    assert "fed_skipped_steps" not in trainer.state.log_history[0]


def test_a_round_with_skipped_steps(tmp_path):
    """It is as if the step had not been; the round's loss is the mean over those that counted."""
    model = make_tiny_model()
    participation = Listed(model, 2, local_steps=3)
    trainer, _ = make_trainer(tmp_path, model=model)
    trainer.add_callback(Spoil(trainer, [1]))
    trainer.take_part(participation, participation.spec)
    rows = {row["fed_round"]: row for row in trainer.state.log_history if "fed_round" in row}
    assert [rows[round]["fed_skipped_steps"] for round in (0, 1)] == [1, 0]
    first, second = participation.results
    assert bool(torch.isfinite(first.adapter).all() and torch.isfinite(first.fisher).all())
    assert first.fisher.any()
    assert 3.5 < first.loss < 4.5
    assert 3.5 < second.loss < 4.5


def test_a_round_of_skipped_steps_alone_is_refused(tmp_path):
    model = make_tiny_model()
    participation = Listed(model, 2, local_steps=2)
    trainer, _ = make_trainer(tmp_path, model=model)
    trainer.add_callback(Spoil(trainer, [2, 3]))
    with pytest.raises(NonFiniteError, match=r"client 'a' .* every step of round 1; nothing of this round was sent"):
        trainer.take_part(participation, participation.spec)
    assert len(participation.results) == 1


def test_local_training_of_skipped_steps_alone_is_refused(tmp_path):
    trainer, _ = make_trainer(tmp_path, arguments={"max_steps": 2})
    trainer.add_callback(Spoil(trainer, [0, 1]))
    with pytest.raises(NonFiniteError, match="every step of local training"):
        trainer.train()


def test_a_finite_gradient_whose_square_overflows_at_the_embeddings(tmp_path):
    """It cannot enter the table, but the step counts."""
    trainer, _ = make_trainer(tmp_path, data=ragged_data(4))
    observer = trainer._steps.observer
    for parameter in trainer.adapter_view.parameters:
        parameter.grad = torch.ones_like(parameter)
    observer._seen = [(torch.tensor([1, 2]), torch.tensor([1.0, math.inf]), None)]
    assert observer.end_step(0)
    assert int(observer.tokens.state_dict()["count"].sum()) == 0
    assert observer.fisher.vector().any()

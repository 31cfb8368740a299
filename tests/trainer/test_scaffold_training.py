"""SCAFFOLD in the Trainer: the correction of gradients, and option II of the paper, against their formulas."""

import pytest
import torch
from local_training import Listed, make_trainer
from tiny import make_tiny_model

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import scaffold

RATE = 0.05


class Corrected(Listed):
    """Hands out a server's control variate, and keeps the client's as a session does once it was accepted."""

    def __init__(self, model, rounds, server, **spec):
        super().__init__(model, rounds, scaffold=True, num_clients=4, **spec)
        self.server, self.known = server, []

    def next(self):
        assignment = super().next()
        if assignment is None:
            return None
        self.known.append(scaffold.client_variate(self.session.carried, self.view.schema.num_params))
        object.__setattr__(assignment, "variate", self.server)
        return assignment

    def complete(self, assignment, result):
        logged = super().complete(assignment, result)
        self.session.carried = {**result.carried, scaffold.CARRIED: result.variate}
        return logged


def train(tmp_path, scale, *, rounds=2, steps=3, arguments=None, **training):
    """Plain SGD without clipping, unless said otherwise."""
    shared = {"optim": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0} | training
    model = make_tiny_model()
    server = scale * torch.randn(Listed(model, 1).view.schema.num_params, generator=torch.Generator().manual_seed(1))
    participation = Corrected(model, rounds, server, training=shared, local_steps=steps)
    trainer, watch = make_trainer(tmp_path, model=model, arguments=arguments)
    trainer.take_part(participation, participation.spec)
    return participation, watch.gradients


def test_each_gradient_is_corrected(tmp_path):
    _, plain = train(tmp_path, 0.0, rounds=1)
    participation, corrected = train(tmp_path, 0.01)
    # the client's own is zero in its first round
    assert torch.allclose(corrected[0], plain[0] + participation.server, atol=1e-7)
    assert not torch.allclose(corrected[0], plain[0], atol=1e-3)


def test_the_next_variate_is_option_two(tmp_path):
    """c_i+ = c_i - c + (x - y_K) / (K lr), in both rounds; in the second c_i is not zero."""
    participation, _ = train(tmp_path, 0.01)
    assert float(participation.known[1].abs().max()) > 1e-3
    rounds = zip(participation.starts, participation.results, participation.known, strict=True)
    for start, result, known in rounds:
        expected = known - participation.server + (start - result.adapter) / (3 * RATE)
        assert torch.allclose(result.variate, expected, atol=1e-5)


def test_it_is_the_same_however_a_batch_is_cut(tmp_path):
    whole, _ = train(tmp_path, 0.01, arguments={"per_device_train_batch_size": 4})
    cut, _ = train(tmp_path, 0.01, arguments={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert torch.allclose(whole.results[1].variate, cut.results[1].variate, atol=1e-6)


def test_with_adamw_it_is_the_mean_gradient(tmp_path):
    """One step, whatever the optimizer makes of the gradient: c_i+ is the gradient without its correction."""
    plain, gradients = train(tmp_path, 0.0, rounds=1, steps=1, optim="adamw_torch", max_grad_norm=0.01)
    participation, _ = train(tmp_path, 0.01, rounds=1, steps=1, optim="adamw_torch", max_grad_norm=0.01)
    assert torch.equal(plain.results[0].variate, participation.results[0].variate)
    norm = float(plain.results[0].variate.norm())
    assert norm > 0.02  # clipping came after
    assert float(gradients[0].norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_round_without_the_servers_variate_is_refused(tmp_path):
    model = make_tiny_model()
    participation = Listed(model, 1, scaffold=True, num_clients=2)
    trainer, _ = make_trainer(tmp_path, model=model)
    with pytest.raises(MailboxError, match=r"the round came without the server's"):
        trainer.take_part(participation, participation.spec)

"""FedProx: the pull towards the round's start, against its formula."""

import pytest
import torch
from local_training import Listed, Watch, make_trainer
from tiny import make_tiny_model

from fedfstq_hf import FedFSTQConfig
from fedfstq_hf.errors import ConfigError


def train(tmp_path, mu, rounds=2):
    """Plain SGD without clipping, two rounds of three steps."""
    training = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    model = make_tiny_model()
    participation = Listed(model, rounds, proximal_mu=mu, training=training)
    trainer, watch = make_trainer(tmp_path, model=model)
    adapters, observed = [], []
    original = Watch.on_pre_optimizer_step

    def note(self, *arguments, **kwargs):
        original(self, *arguments, **kwargs)
        adapters.append(trainer.adapter_view.read().double())
        observed.append(trainer.adapter_fisher.vector().double())

    watch.on_pre_optimizer_step = note.__get__(watch)
    trainer.take_part(participation, participation.spec)
    return participation, watch.gradients, adapters, observed


def test_the_pull_is_towards_the_start_of_the_round(tmp_path):
    """Of two runs whose adapters agree up to a step, gradients differ by mu * (theta - theta_t), Fisher by nothing."""
    mu = 3.0
    _, plain, adapters, fisher = train(tmp_path, 0.0, 1)
    participation, pulled, pulled_adapters, pulled_fisher = train(tmp_path, mu)
    assert torch.equal(plain[0], pulled[0])  # theta is theta_t
    assert torch.equal(adapters[1], pulled_adapters[1])
    expected = plain[1] + mu * (adapters[1] - adapters[0])
    assert float((pulled[1] - plain[1]).abs().max()) > 1e-3
    assert torch.allclose(pulled[1], expected, atol=1e-7)
    assert torch.equal(fisher[1], pulled_fisher[1])
    assert not torch.equal(pulled_adapters[2], adapters[2])
    # the second round's anchor is its own start
    assert torch.equal(pulled_adapters[3], participation.starts[1].double())


def test_a_stronger_pull_stays_closer(tmp_path):
    def distance(mu):
        participation, *_ = train(tmp_path, mu, 1)
        return float((participation.results[0].adapter - participation.starts[0]).norm())

    assert distance(0.0) > distance(5.0) > distance(15.0) > 0


def test_local_training_is_pulled_too(tmp_path):
    def distance(mu):
        arguments = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 4}
        trainer, _ = make_trainer(tmp_path, arguments=arguments, proximal_mu=mu)
        start = trainer.adapter_view.read()
        trainer.train()
        return float((trainer.adapter_view.read() - start).norm())

    assert distance(0.0) > distance(10.0) > 0


@pytest.mark.parametrize("mu", [-0.1, float("inf"), "much", True])
def test_refusals(mu):
    with pytest.raises(ConfigError, match=r"proximal_mu must be a number of at least 0 \(0 switches it off\)"):
        FedFSTQConfig(proximal_mu=mu)

"""Other sources of the adapter's Fisher information: Adam's second moments, and the filtered objective's gradients."""

import pytest
import torch
from local_training import Listed, make_trainer, ragged_data
from specs import flat_spec
from tiny import make_tiny_model

from fedfstq_hf import FedFSTQConfig
from fedfstq_hf.errors import ConfigError


def take_part(tmp_path, rounds=1, *, arguments=None, **spec):
    model = make_tiny_model()
    participation = Listed(model, rounds, **spec)
    trainer, watch = make_trainer(tmp_path, model=model, arguments=arguments)
    trainer.take_part(participation, participation.spec)
    return trainer, participation, watch


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_adam_is_the_corrected_average_of_squared_clipped_gradients(tmp_path, clip):
    training = {"adam_beta2": 0.9, "max_grad_norm": clip}
    _, participation, watch = take_part(tmp_path, fisher="adam", training=training)
    average = torch.zeros_like(watch.gradients[0])
    for gradient in watch.gradients:
        average = 0.9 * average + 0.1 * gradient.square()
        if clip:
            assert float(gradient.norm()) <= clip * 1.001
    expected = average / (1 - 0.9**3)
    found = participation.results[0].fisher.double()
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.max())


def test_adam_s_moments_do_not_run_twice(tmp_path):
    trainer, _, _ = take_part(tmp_path, fisher="adam")
    assert int(trainer.adapter_fisher.state_dict()["steps"]) == 0
    assert trainer.fisher_vector().any()


def test_packing_local_training_reads_them_too(tmp_path):
    trainer, _ = make_trainer(tmp_path, fisher="adam", uplink_budget="1bpp")
    trainer.train()
    assert len(trainer.pack_update()) > 100


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "rmsprop"])
def test_optimizers_without_second_moments_are_refused(tmp_path, optim):
    training = {"optim": optim}
    with pytest.raises(ConfigError, match=r"fisher='adam' reads Adam's second moments.* fisher='gradients'"):
        take_part(tmp_path, fisher="adam", training=training)


@pytest.mark.parametrize("objective", ["soft", "hard", "unbiased"])
@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_filtered_only(tmp_path, objective, cut):
    """The optimizer sees the full loss; F is of the filtered one, whose gradient is computed apart from the weights."""
    arguments = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1], "max_steps": 1}
    full, full_watch = make_trainer(tmp_path, data=ragged_data(8), arguments=arguments)
    full.train()
    coupled, watch = make_trainer(
        tmp_path, data=ragged_data(8), arguments=arguments, objective=objective, fisher_objective="filtered-only"
    )
    seen = []
    weigh = coupled._steps.filter.weigh

    def note(batches, *arguments, **kwargs):
        weigh(batches, *arguments, **kwargs)
        seen.extend({name: value.clone() for name, value in batch.items()} for batch in batches)

    coupled._steps.filter.weigh = note
    coupled.train()
    assert float((watch.gradients[0] - full_watch.gradients[0]).abs().max()) <= 1e-5 * float(
        watch.gradients[0].abs().max()
    )
    assert torch.allclose(coupled.sensitivity.scores(), full.sensitivity.scores(), rtol=1e-4)
    model = make_tiny_model().train()
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in seen)
    for batch in seen:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        ((losses * batch["fisher_weights"][:, :-1]).sum() / items).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in type(full.adapter_view)(model).parameters]).square()
    found = coupled.adapter_fisher.vector()
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.max())
    if objective == "hard":
        assert not torch.allclose(found, full.adapter_fisher.vector(), rtol=0.1)


def test_filtered_only_costs_a_backward_pass_at_refresh_steps_alone(tmp_path, monkeypatch):
    calls = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or original(*a, **k))
    settings = {"objective": "soft", "fisher_objective": "filtered-only", "refresh_steps": 2}
    trainer, _ = make_trainer(tmp_path, arguments={"max_steps": 5}, **settings)
    trainer.train()
    assert len(calls) == 3
    assert int(trainer.adapter_fisher.state_dict()["steps"]) == 3


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"fisher": "exact"}, "fisher must be one of gradients, adam, not 'exact'"),
        ({"fisher_objective": "other"}, "fisher_objective must be one of same, filtered-only, not 'other'"),
        ({"fisher_objective": "filtered-only"}, "needs objective: set it to 'hard', 'soft' or 'unbiased'"),
        (
            {"fisher": "adam", "fisher_objective": "filtered-only", "objective": "hard"},
            "use fisher='gradients', or leave out the other",
        ),
        ({"fisher": "adam", "proximal_mu": 0.1}, "use fisher='gradients', or leave out the other"),
    ],
)
def test_refusals(settings, match):
    with pytest.raises(ConfigError, match=match):
        FedFSTQConfig(**settings)
    shared = {"name": "n", "model": "m", "base_fingerprint": {}, "schema": "s", "rounds": 1, "local_steps": 1}
    with pytest.raises(ConfigError, match=match):
        flat_spec(**shared, max_message_bytes=1000, **settings)

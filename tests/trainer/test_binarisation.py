"""FedBAT's learned binarisation: the operator by hand, and its place in local training."""

import pytest
import torch
from local_training import Listed, Padded, make_trainer, ragged_data
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_model

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.codec import get_codec
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import build
from fedfstq_hf.recipe.sections import MethodSettings
from fedfstq_hf.trainer.methods.fedbat import binarise, binarise_backward

UPDATE = torch.tensor([0.3, -0.1, 0.0, 0.9, -0.7])
ALPHA = torch.tensor(0.5)


def test_the_operator_by_hand():
    """The share of +alpha is (m / alpha + 1) / 2: 0.8, 0.4, 0.5, 1, 0."""
    for draw, signs in ((0.45, [1, -1, 1, 1, -1]), (0.79, [1, -1, -1, 1, -1]), (0.0, [1, 1, 1, 1, -1])):
        assert binarise(UPDATE, ALPHA, torch.full((5,), draw)).tolist() == [0.5 * sign for sign in signs]


def test_it_is_unbiased_within_the_step_size():
    draws = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([binarise(UPDATE[:3], ALPHA, row) for row in draws]).mean(0)
    assert torch.allclose(mean, UPDATE[:3], atol=0.015)


def test_its_gradients_by_hand():
    gradient = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    binary = torch.tensor([0.5, -0.5, 0.5, 0.5, -0.5])
    update_gradient, alpha_gradient = binarise_backward(gradient, UPDATE, binary, ALPHA)
    assert update_gradient.tolist() == [1.0, 2.0, 3.0, 0.0, 0.0]
    # dS/dalpha: (0.5 - 0.3) / 0.5, (-0.5 + 0.1) / 0.5, 1, and beyond the step size 1 and -1
    assert alpha_gradient.item() == pytest.approx(1 * 0.4 + 2 * -0.8 + 3 * 1.0 + 4 - 5)


def test_a_tensor_that_has_not_moved_stays():
    zeros = torch.zeros(3)
    assert binarise(zeros, torch.tensor(0.0), torch.rand(3)).tolist() == [0.0, 0.0, 0.0]
    gradients = binarise_backward(torch.ones(3), zeros, zeros, torch.tensor(0.0))
    assert gradients[0].tolist() == [1.0, 1.0, 1.0]
    assert gradients[1].item() == 0.0


def train(tmp_path, *, steps=4, rounds=1, arguments=None, **spec):
    """SGD; at each step the adapter as the forward pass saw it and as the optimizer moves it, and the gradients."""
    model = make_tiny_model()
    shared = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    settings = {"codec": "fedbat", "error_feedback": 0.0, "learned_binarisation": True, "local_steps": steps}
    participation = Listed(model, rounds, training=shared, **(settings | spec))
    trainer, watch = make_trainer(tmp_path, model=model, arguments=arguments)
    seen = []
    compute_loss = trainer.compute_loss

    def spy(*args, **kwargs):
        seen.append(trainer.adapter_view.read())
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = spy
    full, original = [], watch.on_pre_optimizer_step

    def note(*args, **kwargs):
        original(*args, **kwargs)
        full.append(trainer.adapter_view.read())

    watch.on_pre_optimizer_step = note
    trainer.take_part(participation, participation.spec)
    return participation, trainer, seen, full, watch.gradients


def parts(participation, vector):
    return list(participation.view.schema.unflatten(vector).values())


def test_the_forward_pass_sees_the_binary_update(tmp_path):
    """Two steps of warm-up in full precision, then plus or minus one step size per tensor; the optimizer moves m."""
    participation, _, seen, full, _ = train(tmp_path)
    start = participation.starts[0]
    assert torch.equal(seen[0], full[0])
    assert torch.equal(seen[1], full[1])
    for step in (2, 3):
        moved = False
        for binary, update in zip(
            parts(participation, seen[step] - start), parts(participation, full[step] - start), strict=True
        ):
            alpha = update.abs().mean() if step == 2 else binary.abs().mean()
            assert torch.allclose(binary.abs(), alpha.expand_as(binary), rtol=1e-2, atol=1e-7)
            moved |= float(alpha) > 0
        assert moved
        assert not torch.equal(seen[step], full[step])


def test_what_is_sent_is_binary_and_the_codec_carries_it_exactly(tmp_path):
    participation, _, _, full, _ = train(tmp_path)
    delta = participation.results[0].delta
    for tensor in parts(participation, delta):
        assert len(tensor.abs().unique()) == 1
    schema = participation.view.schema
    encoded = get_codec("fedbat").encode(schema.unflatten(delta), None)
    assert torch.equal(get_codec("fedbat").decode(encoded.payload, schema).to_dense(), delta)
    assert len(encoded.payload) == 4 * len(schema.tensors) + -(-schema.num_params // 8)
    update = full[-1] - participation.starts[0]
    assert float(torch.nn.functional.cosine_similarity(delta, update, dim=0)) > 0.5


def test_step_sizes_are_learned_as_the_paper_does(tmp_path):
    """One step after the warm-up: a <- a - lr rho alpha dL/dalpha, and alpha is alpha_0 exp(rho a)."""

    def alphas(rho):
        participation, trainer, *_ = train(tmp_path, steps=3, binarisation_warmup=0.7, binarisation_rho=rho)
        sizes = torch.tensor([t.abs().max() for t in parts(participation, participation.results[0].delta)])
        (exponents,) = trainer._steps.learned()
        return sizes, exponents.detach().clone(), exponents.grad

    fixed, exponents, _ = alphas(0.0)
    assert not exponents.any()
    learned, exponents, gradient = alphas(6.0)
    assert exponents.abs().max() > 0
    assert torch.allclose(exponents, -0.05 * gradient, rtol=1e-4)
    assert torch.allclose(learned, fixed * (6.0 * exponents).exp(), rtol=1e-5)


def test_it_is_the_same_however_a_batch_is_cut(tmp_path):
    whole, *_ = train(tmp_path, arguments={"per_device_train_batch_size": 4})
    cut, *_ = train(tmp_path, arguments={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    agree = (whole.results[0].delta.sign() == cut.results[0].delta.sign()).float().mean()
    assert float(agree) > 0.999


def test_each_round_learns_anew(tmp_path):
    participation, trainer, *_ = train(tmp_path, rounds=2)
    first, second = (result.delta for result in participation.results)
    assert not torch.equal(first, second)
    assert len(trainer.optimizer.param_groups) == 3


def test_a_checkpoint_within_a_round_goes_on(tmp_path):
    """Step sizes, their optimizer state and the draws: the same message, bit for bit."""

    def run(path, resume):
        mailbox = found(
            path / "box",
            make_tiny_model(),
            rounds=1,
            local_steps=6,
            codec="fedbat",
            error_feedback=0.0,
            learned_binarisation=True,
            training={"learning_rate": 1e-2, "optim": "adamw_torch"},
            seed=3,
            salt="0" * 32,
        )

        def client(steps=None):
            arguments = make_arguments(path / "out", save_strategy="steps", save_steps=1, save_total_limit=1)
            trainer = FedFSTQTrainer(
                model=make_tiny_model(),
                args=arguments,
                train_dataset=ragged_data(),
                data_collator=Padded(),
                federation=settings_of(mailbox),
            )
            if steps is not None:
                stop = trainer._end_step

                def limited():
                    stop()
                    if trainer._steps.done == steps:
                        trainer.control.should_save = trainer.control.should_training_stop = True

                trainer._end_step = limited
            taken, step = [], trainer.training_step
            trainer.training_step = lambda *args, **kwargs: (taken.append(1), step(*args, **kwargs))[1]
            trainer.train(resume_from_checkpoint=steps is None and resume)
            return len(taken)

        if resume:
            assert client(steps=4) == 4
        with served(mailbox):
            assert client() == (2 if resume else 6)
        return mailbox.read_update(mailbox.list_updates(0)[0], max_bytes=10**7)

    assert run(tmp_path / "one", resume=False) == run(tmp_path / "two", resume=True)


def test_refusals():
    for switch in ({"scaffold": True}, {"learned_binarisation": True, "codec": "fedbat"}):
        with pytest.raises(ConfigError, match="these moments are of the gradients that the optimizer saw"):
            MethodSettings(fisher="adam", **switch)
    with pytest.raises(ConfigError, match="learned_binarisation needs codec 'fedbat'"):
        MethodSettings(codec="fp32", learned_binarisation=True)
    with pytest.raises(ConfigError, match="binarisation_warmup must be a number of at least 0 and at most 1"):
        MethodSettings(binarisation_warmup=1.5)
    with pytest.raises(
        ConfigError, match=r"methods\.x\.binarisation_rho must be a number of at least 0 and at most 1000"
    ):
        build(MethodSettings, {"binarisation_rho": -1.0}, "methods.x")

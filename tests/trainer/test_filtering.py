"""Token-filtered objectives in the Trainer: windows, losses against hand computations, fallbacks and refusals."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from local_training import Listed, Padded, make_trainer, ragged_data
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import Trainer

from fedfstq_hf import FedFSTQConfig, FedFSTQMixin, FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.trainer import token_filter
from fedfstq_hf.trainer.token_filter import TOKEN_WEIGHTS, TokenFilter

FILTERED = ("hard", "soft", "unbiased")


def table(seed=0, vocab=64):
    """Sensitivities of all ids but every ninth."""
    tokens = TokenSensitivity(vocab)
    ids = torch.tensor([i for i in range(vocab) if i % 9])
    tokens.update(ids, 10 ** (4 * torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) - 2))
    return tokens


def cut(rows, size):
    return [Padded()(rows[start : start + size]) for start in range(0, len(rows), size)]


def weighed(model, rows, size, objective, *, step=1, seed=0, ratio=0.5):
    token_filter = TokenFilter(model, objective, ratio, 10)
    batches = cut(rows, size)
    token_filter.weigh(batches, table(), step=step, seed=seed)
    return token_filter, batches


def by_example(batches):
    """Weights of all target tokens in the order of examples."""
    found = []
    for batch in batches:
        labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        found += [row[label != -100] for row, label in zip(batch[TOKEN_WEIGHTS], labels, strict=True)]
    return found


@pytest.mark.parametrize("objective", FILTERED)
def test_a_window_gets_the_same_weights_however_it_is_cut(objective):
    model, rows = make_tiny_model(), ragged_data()
    reference = by_example(weighed(model, rows, 16, objective)[1])
    assert sum(len(weights) for weights in reference) == 82
    for size in (1, 4, 5):
        other = by_example(weighed(model, rows, size, objective)[1])
        assert all(torch.equal(a, b) for a, b in zip(reference, other, strict=True))


def test_an_unbiased_sample_of_all_tokens_is_all_of_them():
    """The full objective by the loss that needs less memory."""
    weights = by_example(weighed(make_tiny_model(), ragged_data(), 4, "unbiased", ratio=1.0)[1])
    assert bool((torch.cat(weights) == 1).all())


def test_the_draw_depends_on_seed_and_step():
    model, rows = make_tiny_model(), ragged_data()
    masks = {
        tuple(torch.cat(by_example(weighed(model, rows, 4, "unbiased", step=step, seed=seed)[1])).tolist())
        for step, seed in ((1, 0), (2, 0), (1, 1), (1, 0))
    }
    assert len(masks) == 3


def test_refresh_steps_see_all_tokens():
    for step, everything in ((0, True), (1, False), (9, False), (10, True), (20, True)):
        weights = torch.cat(by_example(weighed(make_tiny_model(), ragged_data(), 4, "hard", step=step)[1]))
        assert bool((weights == 1).all()) == everything


def hand_computed(model, batches, items):
    """Loss and gradients from the full logits and torch's cross-entropy."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        total = total + (losses * batch[TOKEN_WEIGHTS][:, :-1]).sum() / items
    total.backward()
    return total.detach(), gradient_of(model)


def gradient_of(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("objective", FILTERED)
@pytest.mark.parametrize("size", [16, 4, 1])
def test_loss_and_gradient_in_double_precision(objective, size):
    model, rows = make_tiny_model().double().train(), ragged_data()
    for parameter in model.parameters():  # B starts at zero: no gradient would reach A
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    _, whole = weighed(model, rows, 16, objective)
    expected, reference = hand_computed(model, whole, 82)
    model.zero_grad()
    token_filter, batches = weighed(model, rows, size, objective)
    total = 0.0
    for batch in batches:
        weights = batch.pop(TOKEN_WEIGHTS)
        loss = token_filter.losses(model, batch, weights, None, torch.tensor(82), steps=len(batches)).loss
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=1e-9)
    assert float((gradient_of(model) - reference).abs().max()) <= 1e-9 * float(reference.abs().max())


@pytest.mark.parametrize("objective", FILTERED)
@pytest.mark.parametrize("step", [0, 1])
def test_what_is_known_of_the_loss_of_all_tokens(objective, step):
    """Exact where all are projected, its estimate under `unbiased`, and not a number where `hard` looks away."""
    model, rows = make_tiny_model(), ragged_data()
    _, whole = weighed(model, rows, 16, "unbiased", step=0)
    expected, _ = hand_computed(model, whole, 82)
    token_filter, batches = weighed(model, rows, 4, objective, step=step)
    found = [token_filter.losses(model, b, b.pop(TOKEN_WEIGHTS), None, torch.tensor(82), steps=4) for b in batches]
    total = sum(part.all_tokens.item() for part in found)
    assert not any(part.all_tokens.requires_grad for part in found)
    if objective == "hard" and step:
        assert math.isnan(total)
    elif objective == "unbiased" and step:
        assert total == sum(part.loss.item() for part in found) != expected.item()
    else:
        assert total == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("objective", ["full", *FILTERED])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_loss_of_a_round_is_that_of_all_tokens(tmp_path, objective, scaled):
    """What an automatic budget follows, however tokens are weighted and micro-batches cut; nothing moves here."""
    model = make_tiny_model()
    training = {"learning_rate": 1e-30}  # moves no float32
    participation = Listed(model, 1, local_steps=4, refresh_steps=4, objective=objective, training=training)
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer, _ = make_trainer(tmp_path, model=model, arguments=arguments)  # 16 rows: each step sees them all
    trainer.model_accepts_loss_kwargs = scaled or objective == "full"
    trainer.take_part(participation, participation.spec)
    _, whole = weighed(model, ragged_data(), 16, "hard", step=0)
    expected, _ = hand_computed(model, whole, 82)
    tolerance = 0.1 if objective == "unbiased" else 1e-5
    assert participation.results[0].loss == pytest.approx(expected.item(), rel=tolerance)
    if objective in ("hard", "soft"):  # the log has what is optimised
        logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert abs(logged[1] - expected.item()) > 0.002


def test_only_kept_positions_are_projected():
    model = make_tiny_model()
    token_filter, (batch,) = weighed(model, ragged_data(), 16, "hard")
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda module, given, output: seen.append(output.shape))
    weights = batch.pop(TOKEN_WEIGHTS)
    outputs = token_filter.losses(model, batch, weights, None, 82, steps=1).outputs
    assert seen == [(41, 64)]  # half of 82
    assert outputs["logits"].shape == (41, 64)


def test_the_expected_gradient_is_the_full_one():
    """Mean over many draws, within five standard errors in the direction of the full gradient, and its length."""
    model, rows = make_tiny_model().double().train(), ragged_data(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    (batch,) = cut(rows, 6)
    batch[TOKEN_WEIGHTS] = (F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100).double()
    _, full = hand_computed(model, [batch], count)
    shares = []
    for step in range(1, 161):
        token_filter, (drawn,) = weighed(model, rows, 6, "unbiased", step=step + step // 10 * 10, ratio=0.4)
        if step % 10 == 0:
            continue
        model.zero_grad()
        loss = token_filter.losses(model, drawn, drawn.pop(TOKEN_WEIGHTS), None, count, steps=1).loss
        loss.backward()
        shares.append(float(gradient_of(model) @ full / full.square().sum()))
    shares = torch.tensor(shares, dtype=torch.float64)
    assert float(shares.std()) > 0.02
    assert abs(float(shares.mean()) - 1.0) < 5 * float(shares.std()) / len(shares) ** 0.5


@pytest.mark.parametrize("objective", FILTERED)
def test_accumulation_is_exact_in_the_trainer(tmp_path, objective):
    """Three steps, the first of them a refresh: 16 x 1, 4 x 4 and 1 x 16 give the same gradients and losses."""

    def train(size, steps):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer, watch = make_trainer(
            tmp_path, data=ragged_data(48), arguments=arguments, objective=objective, refresh_steps=10
        )
        trainer.model.double()
        trainer.train()
        return watch.gradients, watch.losses, trainer.sensitivity.scores()

    reference, losses, scores = train(16, 1)
    assert len(reference) == len(losses) == 3
    for size, steps in ((4, 4), (1, 16)):
        other, other_losses, other_scores = train(size, steps)
        for a, b in zip(reference, other, strict=True):
            assert float((a - b).abs().max()) <= 1e-6 * float(a.abs().max())
        assert other_losses == pytest.approx(losses, rel=1e-4)  # logged with four digits
        assert torch.allclose(scores, other_scores, rtol=1e-6)


def test_refresh_steps_are_those_of_a_plain_trainer(tmp_path):
    """With a refresh at every step, a filtered objective never filters."""
    one, two = make_tiny_model(), make_tiny_model()
    trainer, _ = make_trainer(tmp_path, model=one, objective="hard", refresh_steps=1)
    trainer.train()
    plain = Trainer(
        model=two,
        args=make_arguments(tmp_path, train_sampling_strategy="sequential", max_grad_norm=0.0),
        train_dataset=ragged_data(),
        data_collator=Padded(),
    )
    plain.train()
    assert torch.allclose(AdapterView(one).read(), AdapterView(two).read(), atol=2e-5)


def test_full_is_the_loss_of_a_plain_trainer(tmp_path):
    trainer, watch = make_trainer(tmp_path, arguments={"max_steps": 3})
    assert trainer._steps.filter.objective == "full"
    trainer.train()
    plain = Trainer(model=make_tiny_model(), args=trainer.args, train_dataset=ragged_data(), data_collator=Padded())
    plain.train()
    expected = [row["loss"] for row in plain.state.log_history if "loss" in row]
    assert watch.losses == pytest.approx(expected, rel=1e-6)
    mine, theirs = trainer.adapter_view.read(), AdapterView(plain.model).read()
    assert torch.allclose(mine, theirs, atol=1e-5)
    assert float((mine - trainer._start_adapter).abs().max()) > 1e-2


@pytest.mark.parametrize("other", ["smoothing", "function", "subclass"])
def test_full_leaves_another_loss_to_whoever_computes_it(tmp_path, other):
    calls = []

    class Own(Trainer):
        def compute_loss(self, *arguments, **keywords):
            calls.append(1)
            return super().compute_loss(*arguments, **keywords)

    class Federated(FedFSTQMixin, Own):
        pass

    arguments = {"max_steps": 2} | ({"label_smoothing_factor": 0.1} if other == "smoothing" else {})
    function = (lambda outputs, labels, **_: outputs.logits.square().mean()) if other == "function" else None
    trainer = (Federated if other == "subclass" else FedFSTQTrainer)(
        model=make_tiny_model(),
        args=make_arguments(tmp_path, **arguments),
        train_dataset=ragged_data(),
        data_collator=Padded(),
        compute_loss_func=function,
    )
    assert trainer._steps.filter is None
    trainer.train()
    assert len(calls) == (2 if other == "subclass" else 0)


def test_evaluation_is_of_all_tokens(tmp_path):
    trainer, _ = make_trainer(tmp_path, objective="hard", token_keep_ratio=0.1, arguments={"max_steps": 2})
    trainer.train()
    rows = ragged_data(8, seed=3)
    found = trainer.evaluate(rows)["eval_loss"]
    plain = Trainer(model=trainer.model, args=trainer.args, data_collator=Padded()).evaluate(rows)["eval_loss"]
    assert found == plain


def test_outputs_come_with_the_loss(tmp_path):
    trainer, _ = make_trainer(tmp_path, objective="hard", arguments={"max_steps": 2})
    trainer.train()
    (batch,) = cut(ragged_data(), 16)
    assert trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)[1]["logits"].ndim == 3
    trainer._steps.filter.weigh([batch], trainer.sensitivity, step=1, seed=0)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=82)
    assert loss.ndim == 0
    assert outputs["logits"].shape == (41, 64)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_of_which_nothing_is_kept(tmp_path, checkpointing):
    """One of 16 tokens is kept: three of four micro-batches give zero gradients, and training goes on."""
    rows = [row | {"labels": [-100] * 11 + row["input_ids"][11:]} for row in make_tiny_data(4)]
    arguments = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "max_steps": 3,
        "activation_checkpointing": checkpointing,
    }
    trainer, watch = make_trainer(
        tmp_path, data=rows, arguments=arguments, objective="hard", token_keep_ratio=0.25, refresh_steps=2
    )
    trainer.train()
    assert all(bool(torch.isfinite(g).all()) and bool(g.any()) for g in watch.gradients)
    (batch,) = cut(rows[:1], 1)
    loss = trainer.compute_loss(trainer.model, batch | {TOKEN_WEIGHTS: torch.zeros(1, 12)}, num_items_in_batch=4)
    loss.backward()
    assert loss.item() == 0.0


def test_a_model_that_cannot_project_single_positions(tmp_path, monkeypatch, caplog):
    def train():
        trainer, watch = make_trainer(tmp_path, objective="unbiased", arguments={"max_steps": 3})
        trainer._open_steps(trainer.federation)  # as joining a federation does
        trainer.train()
        return watch.gradients

    reference = train()
    assert "cannot project" not in caplog.text
    monkeypatch.setattr(token_filter, "_takes_mask", lambda base: False)
    fallback = train()
    assert caplog.text.count("weights the full logits and saves neither time nor memory") == 1
    for a, b in zip(reference, fallback, strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())


def test_which_forward_takes_a_mask():
    base = make_tiny_model().get_base_model()
    assert token_filter._takes_mask(base)
    assert "logits_to_keep" in inspect.signature(base.forward).parameters

    class Fused:
        def forward(self, input_ids, labels=None, logits_to_keep=0):
            """Another library's."""

    assert not token_filter._takes_mask(Fused())


def test_a_loss_that_is_not_divided_by_tokens(tmp_path):
    """Where the Trainer divides by the number of micro-batches, the sum is still that over the window's tokens."""

    def train(size, steps):
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer, watch = make_trainer(tmp_path, data=ragged_data(32), arguments=arguments, objective="hard")
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        return watch.gradients

    for a, b in zip(train(16, 1), train(4, 4), strict=True):
        assert float((a - b).abs().max()) <= 2e-5 * float(a.abs().max())


def test_a_federation_s_objective_wins(tmp_path):
    trainer, _ = make_trainer(tmp_path)
    trainer._open_steps(FedFSTQConfig(objective="soft", token_keep_ratio=0.25))
    assert (trainer._steps.filter.objective, trainer._steps.filter.ratio) == ("soft", 0.25)
    trainer._open_steps(FedFSTQConfig())
    assert trainer._steps.filter.objective == "full"


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match=r"objective must be one of full, hard, soft, unbiased, not 'hrd'\."):
        FedFSTQConfig(objective="hrd")
    with pytest.raises(ConfigError, match=r"token_keep_ratio must be a number above 0 and at most 1 .*, not 1\.5\."):
        FedFSTQConfig(token_keep_ratio=1.5)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor=0.1\. Use objective='full'"):
        make_trainer(tmp_path, objective="hard", arguments={"label_smoothing_factor": 0.1})

"""Training through the rounding: what it moves, what it keeps to, and when it is refused."""

import pytest
import torch
from tiny import make_tiny_data

from fedfstq_hf import compress_adapter, load_compressed_adapter, save_compressed_adapter
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.sharing.calibration import Imitation
from fedfstq_hf.sharing.trained import trained_adapter
from tests.sharing.conftest import fresh_base, trained

DATA = make_tiny_data(16, seed=4)


def test_divergence_is_that_of_the_predictions_at_targets():
    model = trained(size=0.3).train()
    adapter = trained_adapter(model)
    other = {name: 0.5 * tensor for name, tensor in adapter.state().items()}
    imitation = Imitation(adapter, DATA[:3], batch_size=2)
    assert imitation.divergences([adapter.state()]) == [0.0]
    zero, found = imitation.divergences([adapter.state(), other])
    assert zero == 0.0
    assert imitation.divergences([other], 2) == Imitation(adapter, DATA[:2], 2).divergences([other])
    assert model.training
    model.eval()
    inputs = torch.tensor([row["input_ids"] for row in DATA[:3]])
    with torch.no_grad():
        wanted = model(inputs).logits.log_softmax(-1)
        with adapter.replaced(other):
            got = model(inputs).logits.log_softmax(-1)
    # the first two tokens have no label: targets are predicted from the second position on
    expected = (wanted.exp() * (wanted - got)).sum(-1)[:, 1:-1].mean()
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_its_gradient_is_that_of_the_values_given():
    adapter = trained_adapter(trained(size=0.3))
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(False)
    state = {name: 0.5 * tensor for name, tensor in adapter.state().items()}
    imitation = Imitation(adapter, DATA[:4], batch_size=4)
    gradient = imitation.gradient(state, range(4))
    assert not any(p.requires_grad for p in adapter.parameters.values())
    name, step = adapter.pairs[2].b, 1e-3
    direction = gradient[name] / gradient[name].norm()
    up, down = ({**state, name: state[name] + sign * step * direction} for sign in (1, -1))
    high, low = imitation.errors([up, down])
    slope = (high - low) / (2 * step)
    assert slope == pytest.approx(float(gradient[name].norm()), rel=0.02)


def test_predictions_come_closer_at_the_same_size(tmp_path):
    model, budget = trained(size=0.3), 2300
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = save_compressed_adapter(model, tmp_path / "small", budget, calibration=DATA, refine_steps=30)
    assert made.errors["refined"] < made.errors["coded"]
    assert 0.97 * budget < made.num_bytes <= budget
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert "30 steps of training through the rounding" in made.card
    # what is said is what a reader gets
    loaded = load_compressed_adapter(fresh_base(), tmp_path / "small")
    inputs = torch.tensor([row["input_ids"] for row in DATA])
    with torch.no_grad():
        wanted, got = (m(inputs).logits.float().log_softmax(-1) for m in (model, loaded))
    found = (wanted.exp() * (wanted - got)).sum(-1)[:, 1:-1].mean()
    assert made.divergences["refined"] == pytest.approx(float(found), rel=1e-3)
    labels = torch.tensor([row["labels"] for row in DATA])[:, 2:]
    loss = -got[:, 1:-1].gather(2, labels[:, :, None]).mean()
    assert made.errors["refined"] == pytest.approx(float(found + loss), rel=1e-3)


def test_the_same_adapter_gives_the_same_files():
    one, two = (compress_adapter(trained(), 4000, calibration=DATA, refine_steps=7) for _ in range(2))
    assert one.all_files() == two.all_files()


def test_what_brings_nothing_is_discarded(monkeypatch):
    from fedfstq_hf.sharing import coding

    monkeypatch.setattr(coding, "_LEARNING_RATE", 50.0)
    made = compress_adapter(trained(size=0.3), 3060, calibration=DATA, refine_steps=5)
    plain = compress_adapter(trained(size=0.3), 3060, calibration=DATA)
    assert made.files == plain.files
    assert made.divergences["refined"] == made.divergences["coded"]
    assert "brought nothing and were discarded" in made.card


@pytest.mark.parametrize("better", [0, 1])
def test_the_form_is_chosen_by_its_predictions(better, monkeypatch):
    from fedfstq_hf.sharing import compress

    seen = []

    def divergences(self, states, at_most):
        seen.append(len(states))
        return [float(number != better) for number in range(len(states))]

    monkeypatch.setattr(Imitation, "divergences", divergences)
    made = compress.compress_adapter(trained(), 4000, calibration=DATA, init_seed=0)
    assert seen == [2]
    assert made.seeded is bool(better)
    assert made.divergences == {"coded": 0.0}


def test_where_it_cannot_be_done():
    with pytest.raises(ConfigError, match="refine_steps needs calibration examples"):
        compress_adapter(trained(), 4000, refine_steps=5)
    with pytest.raises(ConfigError, match="refine_steps is -1; expected 0"):
        compress_adapter(trained(), 4000, calibration=DATA, refine_steps=-1)
    with pytest.raises(ConfigError, match="for codec 'uniform', not 'fp16'"):
        compress_adapter(trained(), "20bpp", calibration=DATA, codec="fp16", refine_steps=5)
    other = trained()
    other.peft_config["default"].task_type = "SEQ_CLS"
    with pytest.raises(ConfigError, match=r"task_type CAUSAL_LM.*SEQ_CLS"):
        compress_adapter(other, 4000, calibration=DATA, refine_steps=5)

"""The weighted mean against hand-made arrays, and the server optimizers against torch's own."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.aggregation import WeightedMean, check_server, server_step


def sparse(size, entries):
    return SparseUpdate(size, torch.tensor(sorted(entries)), torch.tensor([entries[i] for i in sorted(entries)]))


def test_weighted_mean_of_hand_made_arrays():
    mean = WeightedMean(4)
    mean.add(sparse(4, {0: 1.0, 2: 3.0}), 1)
    mean.add(sparse(4, {2: -1.0}), 3)
    mean.add(SparseUpdate(4, None, torch.tensor([0.0, 4.0, 0.0, 8.0])), 4)
    assert mean.total_weight == 8
    assert mean.result().tolist() == [1 / 8, 2.0, 0.0, 4.0]
    assert mean.result().dtype == torch.float32


def test_small_updates_beside_large_ones_are_not_lost():
    """1 + 2^-30 - 1 is 2^-30 only in more than single precision."""
    mean = WeightedMean(1)
    for value in (1.0, 2.0**-30, -1.0):
        mean.add(sparse(1, {0: value}), 1)
    assert mean.result().item() == pytest.approx(2.0**-30 / 3, rel=1e-6)


def test_the_mean_rounds_every_product_before_it_adds():
    """Against numpy, which fuses nothing: the same bits on every processor."""
    numbers = np.arange(4099, dtype=np.float64)
    values = [((numbers * 0.6180339887 + start) % 1.0 - 0.5).astype(np.float32) for start in (0.1, 0.2, 0.3)]
    places = np.arange(0, 4099, 3)
    mean, total = WeightedMean(4099), np.zeros(4099)
    for weight, scale, given in zip((3, 7, 11), (1.0, 0.3, 0.7), values, strict=True):
        mean.add(SparseUpdate(4099, None, torch.from_numpy(given)), weight, scale)
        total = total + given.astype(np.float64) * (weight * scale)
    mean.add(SparseUpdate(4099, torch.from_numpy(places), torch.from_numpy(values[0][places])), 5, 0.9)
    total[places] += values[0][places].astype(np.float64) * (5 * 0.9)
    assert np.array_equal(mean.result().numpy(), (total / 26).astype(np.float32))


def test_there_is_no_mean_of_nothing():
    with pytest.raises(ValueError, match="no mean of nothing"):
        WeightedMean(3).result()


def test_sgd_at_one_is_federated_averaging():
    adapter, mean = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])
    change, state = server_step(adapter, mean, {"optimizer": "SGD", "lr": 1.0}, None)
    assert torch.equal(change, mean)
    assert torch.equal(adapter, torch.tensor([1.0, 2.0, 3.0]))
    assert isinstance(state, bytes)


def test_without_a_rate_the_mean_update_is_applied_as_it_is():
    change, _ = server_step(torch.zeros(2), torch.tensor([0.5, -1.0]), {}, None)
    assert change.tolist() == [0.5, -1.0]


def optimizers():
    for name, value in sorted(vars(torch.optim).items()):
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer":
            try:
                check_server({"optimizer": name, "lr": 0.1})
            except ConfigError:
                continue
            yield name


OPTIONS = [{"optimizer": name, "lr": 0.1} for name in optimizers()] + [
    {"optimizer": "SGD", "lr": 0.7, "momentum": 0.9},
    {"optimizer": "SGD", "lr": 0.7, "momentum": 0.9, "nesterov": True},
    {"optimizer": "Adam", "lr": 0.05, "betas": [0.8, 0.95], "amsgrad": True},
    {"optimizer": "AdamW", "lr": 0.05, "weight_decay": 0.1},
    {"optimizer": "RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True},
]


def test_the_usual_optimizers_are_there():
    assert {"SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "Adadelta"} <= {o["optimizer"] for o in OPTIONS}


@pytest.mark.parametrize("server", OPTIONS, ids=lambda server: "-".join(map(str, server.values())))
def test_state_through_bytes_is_one_continuous_run(server):
    """Each round builds a new optimizer from the published state; torch runs one optimizer all along."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(20, generator=generator)
    means = [torch.randn(20, generator=generator) for _ in range(6)]

    options = dict(server)
    parameter = torch.nn.Parameter(start.clone())
    continuous = getattr(torch.optim, options.pop("optimizer"))([parameter], **options)
    adapter, state = start, None
    for mean in means:
        parameter.grad = -mean
        continuous.step()
        change, state = server_step(adapter, mean, server, state)
        adapter = adapter + change
        assert torch.allclose(adapter, parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("server", "match"),
    [
        ({"optimizer": "sgd"}, r"unknown server.optimizer 'sgd'; did you mean 'SGD'\? Known: ASGD, "),
        ({"optimizer": "Optimizer"}, "unknown server.optimizer 'Optimizer'. Known: ASGD"),
        ({"optimizer": "SGD", "momentun": 0.9}, "SGD refuses the server options .*momentun"),
        ({"optimizer": "Adam", "lr": -1.0}, "Adam refuses the server options .*learning rate"),
        ({"optimizer": "LBFGS"}, "LBFGS cannot take a step on the mean update: .*closure"),
        ({"optimizer": "SparseAdam"}, "SparseAdam cannot take a step on the mean update"),
    ],
)
def test_impossible_servers_are_refused_before_round_zero(server, match):
    with pytest.raises(ConfigError, match=match):
        check_server(server)


def test_the_rate_goes_from_first_to_final_in_equal_steps():
    adapter, mean = torch.zeros(2), torch.tensor([1.0, -2.0])
    server = {"optimizer": "SGD", "lr": 2.0, "final_lr": 0.5}
    factors = [float(server_step(adapter, mean, server, None, step / 3)[0][0]) for step in range(4)]
    assert factors == pytest.approx([2.0, 1.5, 1.0, 0.5])
    with pytest.raises(ConfigError, match="SGD refuses the server options"):
        check_server({"optimizer": "SGD", "lr": 1.0, "final_lr": -1.0})


def test_a_damaged_state_is_named():
    with pytest.raises(MailboxError, match="server optimizer's state in the mailbox cannot be read"):
        server_step(torch.zeros(2), torch.ones(2), {"optimizer": "Adam"}, b"garbage")

"""FedAdam and FedAvgM against steps computed by hand."""

import numpy as np
import pytest
import torch

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.aggregation import check_server, server_step

MEANS = [torch.tensor([0.3, -0.4, 0.0]), torch.tensor([-0.1, -0.4, 0.2])]


def run(server, means=MEANS):
    """Changes of the adapter round by round, each step from the state that the last one left in the mailbox."""
    adapter, state, changes = torch.zeros(3), None, []
    for mean in means:
        change, state = server_step(adapter, mean, server, state)
        adapter = adapter + change
        changes.append(change)
    return changes


def test_fedadam_is_algorithm_2():
    """Adaptive Federated Optimization: no bias correction, tau outside the root, the second moment starts at tau^2."""
    changes = run({"optimizer": "FedAdam", "lr": 0.1, "betas": [0.9, 0.99], "tau": 0.01})
    # round 1: m = 0.1 * 0.3 = 0.03, v = 0.99 * 1e-4 + 0.01 * 0.09 = 9.99e-4, step 0.1 * 0.03 / (0.0316070 + 0.01)
    assert changes[0][0].item() == pytest.approx(0.0721034, rel=1e-5)
    # m = -0.04, v = 0.99e-4 + 1.6e-3 = 1.699e-3, root 0.0412189
    assert changes[0][1].item() == pytest.approx(-0.1 * 0.04 / 0.0512189, rel=1e-5)
    assert changes[0][2].item() == 0.0
    # round 2: m = 0.9 * 0.03 - 0.01 = 0.017, v = 0.99 * 9.99e-4 + 0.01 * 0.01 = 1.08901e-3, root 0.0330002
    assert changes[1][0].item() == pytest.approx(0.1 * 0.017 / 0.0430002, rel=1e-5)
    # m = 0.02, v = 0.99 * 0.99e-4 + 0.01 * 0.04 = 4.9801e-4, root 0.0223161
    assert changes[1][2].item() == pytest.approx(0.1 * 0.02 / 0.0323161, rel=1e-5)


def test_torchs_adam_is_another_optimizer():
    """With bias correction its first step is the learning rate, whatever the update: lr * m / (1 - b1) / sqrt(...)."""
    changes = run({"optimizer": "Adam", "lr": 0.1, "betas": [0.9, 0.99], "eps": 1e-8})
    assert changes[0].tolist() == pytest.approx([0.1, -0.1, 0.0], abs=1e-6)


def test_fedavgm_is_the_heavy_ball():
    """Hsu et al. (1909.06335): v <- beta v + mean, adapter <- adapter + lr v."""
    changes = run({"optimizer": "SGD", "lr": 0.5, "momentum": 0.9})
    assert changes[0].tolist() == pytest.approx([0.15, -0.2, 0.0])
    # v = 0.9 * (0.3, -0.4, 0) + (-0.1, -0.4, 0.2) = (0.17, -0.76, 0.2)
    assert changes[1].tolist() == pytest.approx([0.085, -0.38, 0.1])


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"betas": [1.0, 0.99]}, {"betas": [0.9]}, {"eps": 1e-8}])
def test_what_fedadam_refuses(options):
    with pytest.raises(ConfigError, match="FedAdam refuses the server options"):
        check_server({"optimizer": "FedAdam", "lr": 0.1, **options})


def many(count, seed):
    """(count,) float32 in -1 .. 1, from steps that every processor rounds alike."""
    numbers = np.arange(count, dtype=np.float64) * 0.6180339887 + seed
    return ((numbers % 1.0) * 2.0 - 1.0).astype(np.float32)


def rounds_of(server, count=4099, rounds=3):
    """The adapter after some rounds of `server_step`; and those rounds' mean updates and its start, for numpy."""
    start, means = many(count, 0.25), [many(count, 0.1 * number) / 3 for number in range(1, rounds + 1)]
    adapter, state = torch.from_numpy(start), None
    for mean in means:
        change, state = server_step(adapter, torch.from_numpy(mean), server, state)
        adapter = adapter + change
    return adapter.numpy(), start, means


def stepped(adapter, moved):
    """Θ + (Θ' - Θ), as the coordinator adds the change."""
    return adapter + (moved - adapter)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.0},
        {"lr": 1.7},
        {"lr": 0.7, "momentum": 0.9},
        {"lr": 0.7, "momentum": 0.9, "dampening": 0.3},
        {"lr": 0.7, "momentum": 0.9, "nesterov": True},
        {"lr": 0.7, "weight_decay": 0.1, "momentum": 0.5},
        {"lr": 0.7, "maximize": True},
    ],
    ids=str,
)
def test_sgd_rounds_every_product_before_it_adds(options):
    """Against numpy, which never fuses the two: torch's own kernels do where the processor can."""
    found, adapter, means = rounds_of({"optimizer": "SGD", **options})
    lr, beta, decay = (np.float32(options.get(name, 0.0)) for name in ("lr", "momentum", "weight_decay"))
    kept = np.float32(1 - options.get("dampening", 0.0))
    velocity = None
    for mean in means:
        gradient = mean if options.get("maximize") else -mean
        gradient = gradient + adapter * decay if decay else gradient
        step = gradient
        if beta:
            velocity = gradient if velocity is None else velocity * beta + gradient * kept
            step = gradient + velocity * beta if options.get("nesterov") else velocity
        adapter = stepped(adapter, adapter - step * lr)
    assert found.dtype == np.float32
    assert np.array_equal(found, adapter)


def test_fedadam_rounds_every_product_before_it_adds():
    found, adapter, means = rounds_of({"optimizer": "FedAdam", "lr": 0.03, "betas": [0.9, 0.99], "tau": 1e-3})
    first, second, rest, others = (np.float32(value) for value in (0.9, 0.99, 1 - 0.9, 1 - 0.99))
    momentum, variance = np.zeros_like(adapter), np.full_like(adapter, 1e-3**2)
    for mean in means:
        momentum = momentum * first - mean * rest
        variance = variance * second + mean * mean * others
        ratio = momentum / (np.sqrt(variance) + np.float32(1e-3))
        adapter = stepped(adapter, adapter - ratio * np.float32(0.03))
    assert np.array_equal(found, adapter)


def test_options_of_sgd_are_those_of_torch():
    with pytest.raises(ConfigError, match=r"SGD refuses the server options .*Nesterov momentum"):
        check_server({"optimizer": "SGD", "lr": 1.0, "nesterov": True})
    with pytest.raises(ConfigError, match=r"SGD refuses the server options .*momentum value"):
        check_server({"optimizer": "SGD", "lr": 1.0, "momentum": -0.1})

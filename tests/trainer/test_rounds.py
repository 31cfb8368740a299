"""How a round is cut out of one long train(): data order, schedule, optimizer state."""

import pytest
import torch
from transformers import get_scheduler

from fedfstq_hf.trainer.rounds import OptimizerState, RoundSampler, set_schedule


def test_each_pass_sees_every_example_once_in_an_order_of_its_own():
    order = list(RoundSampler(10, 30, seed=5))
    passes = [order[:10], order[10:20], order[20:]]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


@pytest.mark.parametrize(("num_examples", "num_samples"), [(10, 4), (10, 10), (3, 8), (1, 5)])
def test_it_draws_as_many_as_asked_for(num_examples, num_samples):
    sampler = RoundSampler(num_examples, num_samples, seed=0)
    assert len(sampler) == len(list(sampler)) == num_samples
    assert set(sampler) <= set(range(num_examples))


def test_the_order_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = list(RoundSampler(100, 150, seed=7))
    torch.manual_seed(2)
    assert list(RoundSampler(100, 150, seed=7)) == first
    assert list(RoundSampler(100, 150, seed=8)) != first


def make_optimizer(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    return parameters, torch.optim.AdamW(parameters, lr=0.1, **options)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "constant_with_warmup", "polynomial"])
def test_a_schedule_put_at_a_step_goes_on_as_if_it_had_been_stepped_there(name):
    def rates(jump):
        _, optimizer = make_optimizer()
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)
        if jump:
            set_schedule(scheduler, 8)
        else:
            for _ in range(8):
                optimizer.step()
                scheduler.step()
        seen = []
        for _ in range(6):
            seen.append((optimizer.param_groups[0]["lr"], scheduler.get_last_lr()[0]))
            optimizer.step()
            scheduler.step()
        return seen

    assert rates(jump=True) == rates(jump=False)


def test_a_schedule_can_go_back_to_repeat_a_round():
    _, optimizer = make_optimizer()
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
    first = optimizer.param_groups[0]["lr"]
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    set_schedule(scheduler, 0)
    assert optimizer.param_groups[0]["lr"] == first


def test_a_schedule_on_metrics_stays_as_it_is():
    _, optimizer = make_optimizer()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    set_schedule(scheduler, 5)
    assert optimizer.param_groups[0]["lr"] == 0.1


def step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_kept_moments_go_on_as_if_nothing_had_happened(options):
    straight, one = make_optimizer(**options)
    for seed in range(4):
        step(straight, one, seed)
    moved, two = make_optimizer(**options)
    step(moved, two, 0)
    step(moved, two, 1)
    carried = OptimizerState(two).dump(moved)
    assert all(isinstance(value, torch.Tensor) for value in carried.values())
    fresh, three = make_optimizer(**options)
    with torch.no_grad():
        for new, old in zip(fresh, moved, strict=True):
            new.copy_(old)
    OptimizerState(three).load(fresh, carried | {"tokens.ema": torch.zeros(3)})
    step(moved, two, 17)  # what was dumped is a copy
    step(fresh, three, 2)
    step(fresh, three, 3)
    for a, b in zip(fresh, straight, strict=True):
        assert torch.equal(a, b)


def test_without_any_the_optimizer_starts_afresh():
    used, one = make_optimizer()
    state = OptimizerState(one)
    step(used, one, 0)
    state.load(used, {})
    assert state.dump(used) == {}
    new, two = make_optimizer()
    with torch.no_grad():
        for a, b in zip(new, used, strict=True):
            a.copy_(b)
    step(used, one, 1)
    step(new, two, 1)
    assert all(torch.equal(a, b) for a, b in zip(new, used, strict=True))


def test_state_that_is_no_tensor_is_kept_too():
    """transformers' own Adafactor counts its steps in a plain int."""
    from transformers.optimization import Adafactor

    def make():
        parameter = torch.nn.Parameter(torch.ones(4, 3))
        return [parameter], Adafactor([parameter], lr=0.1, scale_parameter=False, relative_step=False)

    straight, one = make()
    for seed in range(3):
        step(straight, one, seed)
    moved, two = make()
    step(moved, two, 0)
    carried = OptimizerState(two).dump(moved)
    fresh, three = make()
    with torch.no_grad():
        fresh[0].copy_(moved[0])
    OptimizerState(three).load(fresh, carried)
    step(fresh, three, 1)
    step(fresh, three, 2)
    assert torch.equal(fresh[0], straight[0])

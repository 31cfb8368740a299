"""Token sensitivity is a figure of the example: whoever shares its batch, its window or its process changes nothing."""

import pytest
import torch
from local_training import make_trainer
from tiny import make_tiny_model

MINE = list(range(1, 10))
"""Ids of the example that is looked at; none of the others has them."""


def example(ids, targets):
    return {"input_ids": ids, "labels": [-100] * (len(ids) - targets) + ids[len(ids) - targets :]}


ALONE = [example(MINE, 3)]
OTHERS = [example(list(range(start, start + size)), size - 2) for start, size in ((10, 12), (25, 6), (40, 15))]


class Padded:
    """Pads a batch on one side, and by `extra` more than its longest row needs."""

    def __repr__(self):
        return f"Padded({self.left}, {self.extra})"

    def __init__(self, left=False, extra=0):
        self.left, self.extra = left, extra

    def __call__(self, rows):
        width = max(len(row["input_ids"]) for row in rows) + self.extra

        def pad(values, fill):
            filling = [fill] * (width - len(values))
            return filling + values if self.left else values + filling

        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
        return {name: torch.tensor([pad(row[name], fill) for row in rows]) for name, fill in fills.items()}


def scores(folder, *, data=ALONE + OTHERS, size=4, steps=1, padded=None, prepare=None, objective="full", **arguments):
    """Sensitivity of the example's ids after one step at learning rate 0."""
    batching = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    trainer, _ = make_trainer(
        folder,
        model=make_tiny_model(),
        data=data,
        arguments={**batching, "max_steps": 1, "learning_rate": 0.0, **arguments},
        refresh_steps=1,
        objective=objective,
    )
    trainer.data_collator = padded or Padded()
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer.sensitivity.scores()[MINE[:-1]]  # the last token predicts nothing


def alone(folder, **options):
    return scores(folder, data=ALONE, size=1, **options)


def check_equal(one, other):
    assert bool((one > 0).all())
    assert torch.allclose(one, other, rtol=1e-4, atol=0)


def test_it_is_of_the_summed_loss(tmp_path):
    """Against one plain pass: the gradient of the sum over the example's targets, squared."""
    model, row = make_tiny_model().train(), ALONE[0]
    embeddings = model.get_input_embeddings()(torch.tensor([row["input_ids"]])).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").backward()
    check_equal(embeddings.grad[0, :-1].square().sum(dim=-1), scores(tmp_path))


@pytest.mark.parametrize(
    "batching",
    [
        {"size": 4, "steps": 1},
        {"size": 1, "steps": 4},
        {"size": 2, "steps": 2},
        {"padded": Padded(left=True)},
        {"padded": Padded(extra=5)},
        {"size": 1, "steps": 4, "padded": Padded(left=True, extra=3)},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("objective", ["full", "unbiased"])
def test_an_example_counts_the_same_alone_and_among_others(tmp_path, batching, objective):
    check_equal(alone(tmp_path), scores(tmp_path, objective=objective, **batching))


def means_of_micro_batches(trainer):
    """As with a model that takes no `num_items_in_batch`: the Trainer averages each micro-batch by itself."""
    trainer.model_accepts_loss_kwargs = False


def loss_of_the_trainer(trainer):
    trainer._steps.filter = None


def own_means(trainer):
    """A `compute_loss` of one's own as the Trainer's documentation asks for it."""

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    trainer._steps.filter, trainer.compute_loss, trainer.loss_is_scaled_for_ga = None, compute_loss, False


@pytest.mark.parametrize(("size", "steps"), [(4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize(
    "prepare", [means_of_micro_batches, loss_of_the_trainer, own_means], ids=lambda prepare: prepare.__name__
)
def test_whoever_computes_and_normalises_the_loss(tmp_path, prepare, size, steps):
    check_equal(alone(tmp_path), scores(tmp_path, size=size, steps=steps, prepare=prepare))


def both(trainer):
    means_of_micro_batches(trainer)
    loss_of_the_trainer(trainer)


@pytest.mark.parametrize("prepare", [None, means_of_micro_batches])
@pytest.mark.parametrize(("size", "steps"), [(4, 1), (2, 2)])
def test_label_smoothing_too(tmp_path, prepare, size, steps):
    smooth = {"label_smoothing_factor": 0.2}
    mine = alone(tmp_path, **smooth)
    check_equal(mine, scores(tmp_path, size=size, steps=steps, prepare=prepare, **smooth))
    assert not torch.allclose(mine, alone(tmp_path), rtol=1e-2)


def test_means_of_micro_batches_by_the_trainer(tmp_path):
    check_equal(alone(tmp_path), scores(tmp_path, size=1, steps=4, prepare=both))


def test_a_subclass_that_divides_by_itself(tmp_path):
    """`compute_loss_func` is handed the number of targets of the window."""

    def own(outputs, labels, num_items_in_batch=None):
        logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / num_items_in_batch

    def prepare(trainer):
        trainer.compute_loss_func, trainer._steps.filter = own, None

    check_equal(alone(tmp_path), scores(tmp_path, size=2, steps=2, prepare=prepare))


def test_scaled_gradients_are_read_as_they_would_be_without_the_scale(tmp_path):
    """float16 training multiplies the loss by a power of two before the backward pass."""
    seen = []
    for scale in (None, 2.0**12):
        trainer, _ = make_trainer(tmp_path)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer.train()
        seen.append((trainer.sensitivity.scores(), trainer.fisher_vector(), trainer.adapter_view.read()))
    for mine, theirs in zip(*seen, strict=True):
        assert theirs.any()
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-9)

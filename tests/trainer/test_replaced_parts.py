"""What others put in the place of a Trainer's parts: a model made late, a sampler, another batch size."""

import pytest
import torch
from local_training import Listed, Padded, ragged_data
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_model
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import DataError


def make_trainer(folder, trainer=FedFSTQTrainer, *, federation=None, arguments=None, **options):
    return trainer(
        args=make_arguments(folder, **(arguments or {})),
        train_dataset=ragged_data(8),
        data_collator=Padded(),
        federation=federation or FedFSTQConfig(codec="fp32"),
        **options,
    )


@pytest.mark.parametrize("spec", [{}, {"freeze_a": True}, {"proximal_mu": 1.0}], ids=["plain", "freeze_a", "proximal"])
def test_a_model_that_is_made_when_training_begins(tmp_path, spec):
    """It gets the round's adapter, is what is trained, and gives what a model handed over gives, bit for bit."""
    results = []
    for options in ({"model_init": lambda: make_tiny_model(seed=7)}, {"model": make_tiny_model(seed=7)}):
        participation = Listed(make_tiny_model(), 2, **spec)
        trainer = make_trainer(tmp_path, **options)
        first = trainer.model
        trainer.take_part(participation, participation.spec)
        assert (trainer.model is first) == ("model" in options)
        assert trainer.adapter_view.model is trainer.model
        results.append(participation.results)
    for made, given in zip(*results, strict=True):
        assert torch.equal(made.adapter, given.adapter)
        assert torch.equal(made.fisher, given.fisher)
    assert not torch.equal(results[0][-1].adapter, participation.starts[0])


def test_such_a_model_trained_locally(tmp_path):
    trainer = make_trainer(tmp_path, model_init=lambda: make_tiny_model(seed=7))
    trainer.train()
    moved = trainer.adapter_view.read() - make_trainer(tmp_path, model=make_tiny_model(seed=7)).adapter_view.read()
    _, payload = message.unpack(trainer.pack_update())
    assert moved.any()
    assert torch.equal(get_codec("fp32").decode(payload, trainer.adapter_view.schema).to_dense(), moved)
    assert trainer.adapter_fisher.vector().any()


class Ordered(FedFSTQTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class Loaded(FedFSTQTrainer):
    def get_train_dataloader(self):
        rows = [self.data_collator([self.train_dataset[i], self.train_dataset[i + 1]]) for i in range(0, 8, 2)]
        return DataLoader(rows, batch_size=None)


def watch_ids(trainer):
    """The rows that each micro-batch trained on."""
    seen, step = [], trainer.training_step

    def training_step(model, inputs, num_items_in_batch=None):
        seen.append(inputs["input_ids"].tolist())
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    return seen


def in_order(trainer):
    rows = trainer.train_dataset
    return [trainer.data_collator([rows[i], rows[i + 1]])["input_ids"].tolist() for i in range(0, 8, 2)]


@pytest.mark.parametrize("kind", [Ordered, Loaded])
def test_data_of_ones_own_is_run_through_again_until_the_rounds_steps_are_done(tmp_path, kind):
    participation = Listed(make_tiny_model(), 2, local_steps=5)  # of 2 rows; there are 8
    trainer = make_trainer(tmp_path, kind, model=make_tiny_model())
    seen = watch_ids(trainer)
    trainer.take_part(participation, participation.spec)
    assert seen == [*in_order(trainer), in_order(trainer)[0]] * 2
    assert len(participation.results) == 2


def test_data_without_a_batch_end_the_round_with_an_error(tmp_path):
    class Empty(FedFSTQTrainer):
        def get_train_dataloader(self):
            return DataLoader([], batch_size=None)

    participation = Listed(make_tiny_model(), 1, local_steps=2)
    with pytest.raises(DataError, match="data loader gave no batch"):
        make_trainer(tmp_path, Empty, model=make_tiny_model()).take_part(participation, participation.spec)
    assert not participation.results


def test_a_sampling_strategy_counts_in_a_federation(tmp_path):
    participation = Listed(make_tiny_model(), 1, local_steps=4)
    trainer = make_trainer(tmp_path, model=make_tiny_model(), arguments={"train_sampling_strategy": "sequential"})
    seen = watch_ids(trainer)
    trainer.take_part(participation, participation.spec)
    assert seen == in_order(trainer)


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("cuts", [((4, 1), (2, 2)), ((2, 2), (4, 1))], ids=["smaller", "larger"])
def test_a_round_goes_on_with_the_same_batch_in_other_pieces(tmp_path, cuts):
    """What one does after running out of memory: fewer rows at a time, more accumulation."""

    def run(name, cuts):
        box = found(tmp_path / name / "box", make_tiny_model(), rounds=1, local_steps=3, salt="0" * 32)
        for cut in cuts:
            size, steps = cut
            arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
            trainer = make_trainer(
                tmp_path / name / "a",
                model=make_tiny_model(),
                federation=settings_of(box),
                arguments={**arguments, "save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps"},
            )
            if cut is not cuts[-1]:
                trainer.add_callback(KillAt(2))
                with pytest.raises(KeyboardInterrupt):
                    trainer.train()
        with served(box):
            trainer.train(resume_from_checkpoint=len(cuts) > 1)
        skipped = [row["fed_skipped_steps"] for row in trainer.state.log_history if "fed_skipped_steps" in row]
        assert set(skipped) == {0}
        return trainer.adapter_view.read()

    assert torch.allclose(run("resumed", cuts), run("straight", cuts[:1]), atol=1e-5)

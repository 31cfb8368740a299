"""What people expect of a Trainer, inside a federation: epochs, logs, memory, optimizers, arguments by name."""

import dataclasses
import inspect
import multiprocessing

import pytest
import torch
from datasets import Dataset
from local_training import Listed, Padded, ragged_data
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import HfArgumentParser, Trainer, TrainerCallback

from fedfstq_hf import FedFSTQConfig, FedFSTQSFTTrainer, FedFSTQTrainer
from fedfstq_hf.errors import BudgetError, ConfigError
from fedfstq_hf.trainer.processes import open_processes


def make(folder, kind=FedFSTQTrainer, *, model=None, rows=None, federation=None, callbacks=None, **options):
    keywords = {name: options.pop(name) for name in ("eval_dataset", "optimizers") if name in options}
    return kind(
        model=model or make_tiny_model(),
        args=make_arguments(folder, **options),
        train_dataset=ragged_data(8) if rows is None else rows,
        data_collator=Padded(),
        federation=federation or FedFSTQConfig(codec="fp32"),
        callbacks=callbacks,
        **keywords,
    )


def taken_part(trainer, rounds=2, **spec):
    participation = Listed(make_tiny_model(), rounds, **spec)
    trainer.take_part(participation, participation.spec)
    return participation


def test_a_round_is_an_epoch(tmp_path):
    trainer = make(tmp_path, eval_strategy="epoch", logging_strategy="epoch", eval_dataset=ragged_data(2))
    taken_part(trainer, 3)
    rows = trainer.state.log_history
    assert [row["epoch"] for row in rows if "eval_loss" in row] == [1.0, 2.0, 3.0]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6, 9]


def test_the_first_evaluation_is_of_the_published_adapter(tmp_path):
    participation = Listed(make_tiny_model(), 1)
    participation.adapter = participation.adapter + 0.3
    trainer = make(tmp_path, eval_on_start=True, eval_strategy="steps", eval_steps=99, eval_dataset=ragged_data(2))
    other = make(tmp_path, eval_dataset=ragged_data(2))
    other.adapter_view.write(participation.adapter)
    trainer.take_part(participation, participation.spec)
    first = next(row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row)
    assert first == pytest.approx(other.evaluate()["eval_loss"])


def test_what_the_trainer_adds_to_a_log_row_reaches_the_caller(tmp_path):
    class Adding(Trainer):
        def log(self, logs, start_time=None):
            logs["added"] = 1.0
            super().log(logs, start_time)

    class Mine(FedFSTQTrainer, Adding):
        """The mixin before another Trainer class."""

    trainer = make(tmp_path, Mine, eval_dataset=ragged_data(2))
    taken_part(trainer)
    metrics = trainer.evaluate()
    assert metrics["added"] == 1.0
    assert metrics["epoch"] == 2.0
    assert "fed_round" not in metrics
    assert trainer.state.log_history[-1]["fed_round"] == 1


def test_without_its_callback_training_does_not_end_in_silence(tmp_path):
    trainer = make(tmp_path)
    trainer.callback_handler.callbacks.clear()
    with pytest.raises(ConfigError, match="ended within round 0, after 0 of 3 local steps, and nobody asked"):
        taken_part(trainer)


def test_a_callback_may_still_stop(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = make(tmp_path, callbacks=[Stop()])
    assert not taken_part(trainer).results
    assert trainer.state.global_step == 2


def test_a_finished_run_that_is_started_again_keeps_its_history(tmp_path):
    mailbox = found(tmp_path / "box", make_tiny_model(), rounds=2, local_steps=3)
    config = dataclasses.replace(settings_of(mailbox), poll_seconds=0.01)
    options = {"save_strategy": "steps", "save_steps": 1, "logging_strategy": "steps", "logging_steps": 1}
    with served(mailbox):
        first = make(tmp_path / "a", federation=config, **options)
        first.train()
    again = make(tmp_path / "a", federation=config, **options)
    again.train(resume_from_checkpoint=True)
    losses = [[row for row in one.state.log_history if "loss" in row] for one in (first, again)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert torch.equal(first.adapter_view.read(), again.adapter_view.read())
    assert again.state.log_history[-1]["fed_round"] == 1


def out_of_memory_above(rows):
    model = make_tiny_model()
    inner = model.get_base_model().model
    forward = inner.forward

    def limited(*args, **kwargs):
        if kwargs["input_ids"].shape[0] > rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*args, **kwargs)

    inner.forward = limited
    return model


def test_a_round_starts_again_with_a_smaller_batch(tmp_path):
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "remove_unused_columns": False}
    trainer = make(tmp_path, model=out_of_memory_above(2), **options)
    found = taken_part(trainer)
    plain = make(tmp_path, per_device_train_batch_size=trainer._train_batch_size)
    expected = taken_part(plain)
    assert trainer._train_batch_size == 2
    assert trainer.state.global_step == 6
    for mine, theirs in zip(found.results, expected.results, strict=True):
        assert torch.equal(mine.adapter, theirs.adapter)


@pytest.mark.parametrize("persistent", [False, True])
def test_rounds_share_one_set_of_worker_processes(tmp_path, persistent):
    alive = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            alive.append(len(multiprocessing.active_children()))

    before = len(multiprocessing.active_children())
    trainer = make(tmp_path, callbacks=[Count()], dataloader_num_workers=1, dataloader_persistent_workers=persistent)
    found = taken_part(trainer, 3)
    assert max(alive) <= before + 1
    assert len(trainer.accelerator._dataloaders) == 1
    for mine, theirs in zip(found.results, taken_part(make(tmp_path), 3).results, strict=True):
        assert torch.equal(mine.adapter, theirs.adapter)


def test_an_evaluation_in_half_precision_leaves_the_adapter(tmp_path):
    trainer = make(tmp_path, bf16_full_eval=True, eval_dataset=ragged_data(2))
    trainer.train()
    before, sent = trainer.adapter_view.read(), trainer.pack_update()
    trainer.evaluate()
    assert torch.equal(trainer.adapter_view.read(), before)
    assert trainer.pack_update() == sent


class Averaging(torch.optim.SGD):
    """Like a schedule-free optimizer: counts in its groups, and trains at another point than its result."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(k=0, training=False)

    def train(self):
        self._move(True)

    def eval(self):
        self._move(False)

    @torch.no_grad()
    def _move(self, training):
        for group in self.param_groups:
            if group["training"] != training:
                for parameter in group["params"]:
                    parameter.add_(0.01 if training else -0.01)
            group["training"] = training

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["lr"] = 0.1 / group["k"]
        super().step(closure)


@pytest.mark.parametrize("kept", ["fresh", "kept"])
def test_an_optimizer_that_counts_in_its_groups(tmp_path, kept):
    """One long training and a restart for every round give the same adapter; fresh means fresh, kept means kept."""

    def run(restart):
        participation = Listed(make_tiny_model(), 3, optimizer_state=kept)
        trainer = None
        for _ in range(3 if restart else 1):
            model = make_tiny_model()
            optimizer = Averaging([p for p in model.parameters() if p.requires_grad], lr=0.1)
            stop = [StopAfterARound()] if restart else []
            trainer = make(tmp_path, model=model, optimizers=(optimizer, None), callbacks=stop)
            trainer.take_part(participation, participation.spec)
        return [result.adapter for result in participation.results], trainer.optimizer.param_groups[0]["k"]

    (one, counted), (other, _) = run(False), run(True)
    assert len(one) == len(other) == 3
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert counted == (9 if kept == "kept" else 3)


class StopAfterARound(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


def test_a_stream_goes_on_from_round_to_round(tmp_path):
    rows = [dict(row) for row in make_tiny_data(20)]
    seen = []

    class Watching(FedFSTQTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.extend(inputs["input_ids"].tolist())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = make(tmp_path, Watching, rows=Dataset.from_list(rows).to_iterable_dataset())
    results = taken_part(trainer, 2).results
    assert seen == [row["input_ids"] for row in rows[:12]]
    assert [result.num_examples for result in results] == [6, 6]
    known = make(tmp_path, federation=FedFSTQConfig(codec="fp32", num_examples=500))
    assert taken_part(known, 1).results[0].num_examples == 500


def test_settings_come_from_a_command_line():
    (config,) = HfArgumentParser(FedFSTQConfig).parse_args_into_dataclasses(
        ["--uplink_budget", "2kB", "--codec_options", '{"bits": 0.2}', "--client_id", "a", "--local_steps", "3"]
    )
    assert config == FedFSTQConfig(uplink_budget="2kB", codec_options={"bits": 0.2}, client_id="a", local_steps=3)
    assert type(config.codec_options) is dict


@pytest.mark.parametrize("kind", [FedFSTQTrainer, FedFSTQSFTTrainer])
def test_arguments_are_found_by_name(kind):
    assert {"model", "args", "processing_class", "callbacks", "federation"} <= set(inspect.signature(kind).parameters)


@pytest.mark.parametrize("budget", ["auto:0.05bpp..96kB", "auto:0.05bpp..5s@2Mbps", "late:96kB..1bpp", "auto"])
def test_budgets_whose_order_the_adapter_decides(budget):
    assert FedFSTQConfig(uplink_budget=budget).uplink_budget == budget


def test_a_budget_that_holds_no_message_is_refused_before_training(tmp_path):
    trainer = make(tmp_path, federation=FedFSTQConfig(uplink_budget="auto"))
    with pytest.raises(BudgetError, match="raise the uplink budget"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_processes_that_do_not_see_each_other(tmp_path, monkeypatch):
    trainer = make(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 processes, .*use_cpu=True"):
        open_processes(trainer)

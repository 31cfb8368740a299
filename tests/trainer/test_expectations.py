"""What a user of the Trainer expects, during a federation too."""

import pytest
import torch
from small_federation import found, served, settings_of, snapshot
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import ConfigError

FEDERATION = {"rounds": 2, "local_steps": 2, "training": {"learning_rate": 1e-2}}


def run(folder, *, callbacks=None, trainer_options=None, **arguments):
    mailbox = found(folder / "box", make_tiny_model(), **FEDERATION)
    trainer = FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(folder / "a", **arguments),
        train_dataset=make_tiny_data(7),
        federation=settings_of(mailbox),
        callbacks=callbacks,
        **(trainer_options or {}),
    )
    with served(mailbox):
        trainer.train()
    return trainer, mailbox


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


def test_evaluation_and_metrics_while_it_takes_part(tmp_path, plain):
    """Rows of every evaluation with the user's metric; and looking on changes nothing."""

    def compute_metrics(prediction):
        return {"shape": float(prediction.predictions.shape[0]), "labels": float((prediction.label_ids != -100).sum())}

    trainer, mailbox = run(
        tmp_path,
        trainer_options={"eval_dataset": make_tiny_data(5, seed=3), "compute_metrics": compute_metrics},
        eval_strategy="steps",
        eval_steps=1,
        logging_strategy="steps",
        logging_steps=1,
    )
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all((row["eval_shape"], row["eval_labels"]) == (5, 50) for row in rows)
    assert len({row["eval_loss"] for row in rows}) == 4
    assert [row["fed_round"] for row in trainer.state.log_history if row["step"] == 4 and "loss" in row] == [1]
    assert snapshot(mailbox) == snapshot(plain[1])


def test_callbacks_see_every_event(tmp_path):
    class Record(TrainerCallback):
        def __init__(self):
            self.events = []

        def on_train_begin(self, args, state, control, **kwargs):
            self.events.append("begin")

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            assert model is not None
            assert optimizer is not None
            self.events.append(state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            self.events.append("end")

    record = Record()
    run(tmp_path, callbacks=[record])
    assert record.events == ["begin", 1, 2, 3, 4, "end"]


def test_the_best_model_at_the_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"load_best_model_at_end=True would .* Leave it out; `fedfstq evaluate`"):
        run_refused(tmp_path)


def test_the_best_model_at_the_end_of_local_training(tmp_path):
    """Without a federation it is the Trainer's: here the first of three checkpoints, by a metric that counts them."""
    adapters = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            adapters.append(AdapterView(model).read())

    options = {"load_best_model_at_end": True, "metric_for_best_model": "number", "greater_is_better": False}
    trainer = FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(
            tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **options
        ),
        train_dataset=make_tiny_data(7),
        eval_dataset=make_tiny_data(3),
        federation=settings_of(None),
        callbacks=[Record()],
        compute_metrics=lambda prediction: {"number": len(adapters)},
    )
    trainer.train()
    assert torch.equal(trainer.adapter_view.read(), adapters[0])
    assert not torch.equal(adapters[0], adapters[2])


def run_refused(folder):
    mailbox = found(folder / "box", make_tiny_model(), **FEDERATION)
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    arguments = make_arguments(folder / "a", eval_steps=1, save_steps=1, **options)
    data = make_tiny_data(3)
    FedFSTQTrainer(
        model=make_tiny_model(),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        federation=settings_of(mailbox),
    ).train()


@pytest.mark.parametrize(
    ("arguments", "tolerance"), [({"bf16": True}, 0.5), ({"activation_checkpointing": True}, 1e-4)]
)
def test_precision_and_checkpointing(tmp_path, plain, arguments, tolerance):
    """The adapter moves as in float32, up to the rounding of a few Adam steps; its numbers stay float32."""
    trainer, _ = run(tmp_path, **arguments)
    start = AdapterView(make_tiny_model()).read()
    moved, expected = trainer.adapter_view.read() - start, plain[0].adapter_view.read() - start
    assert float((moved - expected).norm()) <= tolerance * float(expected.norm())
    assert all(parameter.dtype == torch.float32 for parameter in trainer.adapter_view.parameters)
    assert int(torch.isfinite(trainer.sensitivity.scores()).sum()) > 20


def test_compiled_training_is_the_uncompiled_one(tmp_path):
    """Traced by dynamo and run by the eager backend: hooks at refresh steps, boolean masks and Fisher averages hold."""
    found = []
    for compiled in (False, True):
        compilation = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        trainer = FedFSTQTrainer(
            model=make_tiny_model(num_hidden_layers=1),
            args=make_arguments(tmp_path, max_steps=3, **compilation),
            train_dataset=make_tiny_data(6),
            federation=settings_of(None, objective="unbiased", refresh_steps=2),
        )
        trainer.train()
        found.append((trainer.adapter_view.read(), trainer.adapter_fisher.vector(), trainer.sensitivity.scores()))
    for plain, compiled in zip(*found, strict=True):
        assert torch.allclose(plain, compiled, rtol=1e-4, atol=1e-7)
    assert int(torch.isfinite(found[1][2]).sum()) > 10


def test_reporters_of_the_libraries_get_the_federation_s_figures(tmp_path):
    """`report_to="tensorboard"`: read back from the event file."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: pip install 'fedfstq_hf[track]'",
    )
    trainer, _ = run(tmp_path, report_to="tensorboard", logging_strategy="steps", logging_steps=1)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    rounds = {event.step: event.value for event in events.Scalars("train/fed_round")}
    assert rounds[2] == 0
    assert rounds[4] == 1
    (sent,) = (row["fed_uplink_bytes"] for row in trainer.state.log_history if row["step"] == 4 and "loss" in row)
    assert {event.value for event in events.Scalars("train/fed_uplink_bytes") if event.step == 4} == {sent}

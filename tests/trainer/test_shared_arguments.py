"""`TrainingArguments` that a federation sets: of their own types, for as long as it lasts."""

import logging

import pytest
from tiny import make_arguments
from tiny_federation import found, make_trainer, run, serve
from transformers import SchedulerType, TrainerCallback
from transformers.training_args import OptimizerNames

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.trainer.arguments import typed

SHARED = {"learning_rate": 1, "max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "optim": "adafactor"}


class Seen(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        self.values = {name: getattr(args, name) for name in (*SHARED, "max_steps")}


def test_the_federation_s_hold_while_it_lasts_and_the_user_s_afterwards(tmp_path):
    mailbox = found(tmp_path / "box", training=SHARED)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, mailbox, arguments={"learning_rate": 0.25, "max_steps": 77})
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train()
    thread.join(30)
    during = {"max_steps": 4, "learning_rate": 1.0, "max_grad_norm": 0.5}
    during |= {"lr_scheduler_type": SchedulerType.COSINE, "optim": OptimizerNames.ADAFACTOR}
    assert seen.values == during
    assert {name: type(value) for name, value in seen.values.items()} == {n: type(v) for n, v in during.items()}
    args = trainer.args
    assert (args.learning_rate, args.max_grad_norm, args.max_steps) == (0.25, 1.0, 77)
    assert args.lr_scheduler_type is SchedulerType.CONSTANT


def test_the_card_names_what_was_trained_with(tmp_path):
    mailbox = found(tmp_path / "box", training=SHARED)
    trainer = run(tmp_path, mailbox, arguments={"learning_rate": 0.25, "max_steps": 77})
    trainer.create_model_card()
    card = (tmp_path / "a/README.md").read_text()
    assert "- learning_rate: 1.0\n" in card
    assert "- lr_scheduler_type: cosine\n" in card
    assert "- optimizer: Use OptimizerNames.ADAFACTOR and" in card
    assert "- training_steps: 4\n" in card


def test_they_are_restored_where_training_fails(tmp_path):
    mailbox = found(tmp_path / "box", training=SHARED)
    trainer = make_trainer(tmp_path, mailbox, arguments={"learning_rate": 0.25})

    class Fail(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise KeyError(args.learning_rate)

    trainer.add_callback(Fail())
    with pytest.raises(KeyError, match=r"1\.0"):
        trainer.train()
    assert trainer.args.learning_rate == 0.25


def test_a_choice_of_the_user_s_that_gives_way_is_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    shared = {"learning_rate": 0.125, "max_grad_norm": 0.5, "lr_scheduler_type": "constant", "optim": "sgd"}
    run(tmp_path, found(tmp_path / "box", training=shared), arguments={"learning_rate": 1e-2, "optim": "adafactor"})
    said = {row.getMessage(): row.levelname for row in caplog.records if "The federation sets" in row.getMessage()}
    assert said == {
        "The federation sets learning_rate=0.125 (was 0.01).": "WARNING",
        "The federation sets optim='sgd' (was 'adafactor').": "WARNING",
        "The federation sets max_grad_norm=0.5 (was 1.0).": "INFO",
    }


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("optim", "adamw_of_tomorrow", "does not know. Install"),
        ("learning_rate", "fast", "expects a number"),
        ("warmup_steps", None, "expects a number"),
    ],
)
def test_a_value_that_this_trainer_cannot_take(tmp_path, name, value, match):
    args = make_arguments(tmp_path)
    before = getattr(args, name)
    with pytest.raises(ConfigError, match=f"The federation sets {name}={value!r}.*{match}"):
        typed(args, {name: value})
    assert getattr(args, name) == before

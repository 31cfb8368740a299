"""Rounds as one long training: schedule, steps and moments of clients that skip, join late, stop or start again."""

import pytest
import torch
from tiny_federation import found, make_trainer, run, serve, snapshot, take_part
from transformers import TrainerCallback

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.server.coordinator import Coordinator


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedule_and_steps_of_a_client_that_skips_rounds(tmp_path, name):
    """In round r it trains at the rates of the federation's steps r * E and after, whatever it missed."""
    training = {"lr_scheduler_type": name, "learning_rate": 1e-2, "warmup_steps": 3}
    spec = {"rounds": 6, "local_steps": 2, "training": training}
    logged = {"logging_strategy": "steps", "logging_steps": 1}

    def rates(rounds):
        trainer, _ = take_part(tmp_path, rounds, spec=spec, arguments=logged)
        return [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]

    everything = rates(range(6))
    assert len(set(everything)) > 8
    assert rates([1, 4, 5]) == [everything[step] for step in (2, 3, 8, 9, 10, 11)]


def test_global_step_of_a_client_that_joins_late(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3)
    with pytest.raises(MailboxError, match="nothing is lost"):
        make_trainer(tmp_path, mailbox, client_id="first", wait_seconds=0).train()
    Coordinator(mailbox).close_round()
    late = run(tmp_path, mailbox, client_id="late", arguments={"logging_strategy": "steps", "logging_steps": 1})
    assert late.state.global_step == 6
    rows = [row for row in late.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert all(3.5 < row["loss"] < 4.5 for row in rows)  # the steps that it missed do not count into the means
    assert 3.5 < late.state.log_history[-1]["train_loss"] < 4.5


def test_a_client_that_joins_a_finished_federation_gets_the_adapter(tmp_path):
    mailbox = found(tmp_path / "box")
    one = run(tmp_path, mailbox)
    late = make_trainer(tmp_path, mailbox, client_id="late")
    late.train()
    assert torch.equal(late.adapter_view.read(), one.adapter_view.read())
    assert late.state.global_step == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_kept_moments_make_rounds_one_long_training(tmp_path, optim):
    """Rounds of 2 x 3 steps with kept moments: the moments after them are those of the optimizer's sixth step."""
    spec = {"local_steps": 3, "optimizer_state": "kept", "training": {"optim": optim}}
    _, kept = take_part(tmp_path, [0, 1], spec=spec)
    _, fresh = take_part(tmp_path, [0, 1], spec=spec | {"optimizer_state": "fresh"})
    assert torch.equal(kept.results[0].adapter, fresh.results[0].adapter)
    same = torch.equal(kept.results[1].adapter, fresh.results[1].adapter)
    assert same == (optim == "sgd")
    assert not any(name.startswith("optimizer.") for name in fresh.results[1].carried)
    if optim == "adamw_torch":
        assert {float(value) for name, value in kept.results[1].carried.items() if name.endswith(".step")} == {6.0}


def test_kept_moments_survive_a_restart(tmp_path):
    def federation(name, restart):
        path = tmp_path / name
        mailbox = found(path / "box", rounds=2, optimizer_state="kept")
        if restart:
            with pytest.raises(MailboxError, match="No new round"):
                make_trainer(path, mailbox, wait_seconds=0).train()
        run(path, mailbox)
        return snapshot(path / "box", mailbox)

    assert federation("straight", False) == federation("restarted", True)


def test_a_callback_may_stop_it_and_a_second_train_goes_on(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                control.should_training_stop = True

    straight = found(tmp_path / "straight/box", rounds=3)
    run(tmp_path / "straight", straight)
    mailbox = found(tmp_path / "stopped/box", rounds=3)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path / "stopped", mailbox)
    stop = Stop()
    trainer.add_callback(stop)
    trainer.train()
    assert trainer.state.global_step == 3
    assert mailbox.head() <= 1
    trainer.remove_callback(stop)
    trainer.train()
    thread.join(30)
    assert snapshot(tmp_path / "stopped/box", mailbox) == snapshot(tmp_path / "straight/box", straight)


def test_checkpoints_and_resuming_do_not_disturb_rounds(tmp_path):
    plain = found(tmp_path / "plain/box", rounds=2)
    run(tmp_path / "plain", plain)
    mailbox = found(tmp_path / "saved/box", rounds=2)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path / "saved", mailbox, arguments={"save_strategy": "steps", "save_steps": 1})
    trainer.train(resume_from_checkpoint=True)
    thread.join(30)
    assert (tmp_path / "saved/a/checkpoint-4/adapter_model.safetensors").is_file()
    assert snapshot(tmp_path / "saved/box", mailbox) == snapshot(tmp_path / "plain/box", plain)

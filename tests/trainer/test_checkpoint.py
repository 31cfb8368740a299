"""Killed in the middle of a round and resumed: everything goes on as if nothing had happened, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_federation import found, served, settings_of, snapshot
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.codec import message
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.trainer.checkpoint import CheckpointStates

FEDERATION = {
    "rounds": 3,
    "local_steps": 4,
    "codec": "paper",
    "uplink_budget": "1kB",
    "refresh_steps": 3,
    "training": {"learning_rate": 1e-2, "lr_scheduler_type": "cosine"},
}


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def model():
    return make_tiny_model(lora_dropout=0.2)


def make_trainer(folder, mailbox=None, *, client_id="a", **arguments):
    return FedFSTQTrainer(
        model=model(),
        args=make_arguments(
            folder / client_id,
            **{
                "save_strategy": "steps",
                "save_steps": 1,
                "gradient_accumulation_steps": 2,
                "logging_strategy": "steps",
                "logging_steps": 1,
                **arguments,
            },
        ),
        train_dataset=make_tiny_data(7),
        federation=settings_of(mailbox, client_id=client_id, codec="fp32"),
    )


def killed_at(trainer, step, **options):
    trainer.add_callback(KillAt(step))
    with pytest.raises(Killed):
        trainer.train(**options)


def losses(trainer):
    keys = ("step", "loss", "learning_rate", "fed_round", "fed_uplink_bytes")
    return [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted federations, by how the optimizer's state is treated."""
    runs = {}
    for optimizer_state in ("fresh", "kept"):
        folder = tmp_path_factory.mktemp(optimizer_state)
        mailbox = found(folder / "box", model(), optimizer_state=optimizer_state, **FEDERATION)
        trainer = make_trainer(folder, mailbox)
        with served(mailbox):
            trainer.train()
        runs[optimizer_state] = (snapshot(mailbox), losses(trainer), trainer.sensitivity.scores())
    return runs


@pytest.mark.parametrize("optimizer_state", ["fresh", "kept"])
@pytest.mark.parametrize("kills", [(6,), (1, 3, 11)])
def test_resuming_within_a_round_is_the_uninterrupted_run(tmp_path, straight, optimizer_state, kills):
    mailbox = found(tmp_path / "box", model(), optimizer_state=optimizer_state, **FEDERATION)
    with served(mailbox):
        for number, step in enumerate(kills):
            killed_at(make_trainer(tmp_path, mailbox), step, resume_from_checkpoint=number > 0)
        trainer = make_trainer(tmp_path, mailbox)
        steps = []

        class Count(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                steps.append(state.global_step)

        trainer.add_callback(Count())
        trainer.train(resume_from_checkpoint=True)
    assert steps == list(range(kills[-1], 12))  # no step was trained again
    messages, rows, scores = straight[optimizer_state]
    assert snapshot(mailbox) == messages
    assert torch.equal(trainer.sensitivity.scores(), scores)
    assert losses(trainer) == rows


def test_a_round_is_repeated_from_its_start_without_the_argument(tmp_path, straight):
    mailbox = found(tmp_path / "box", model(), optimizer_state="fresh", **FEDERATION)
    with served(mailbox):
        killed_at(make_trainer(tmp_path, mailbox), 6)
        trainer = make_trainer(tmp_path, mailbox)
        trainer.train()
    assert [row["step"] for row in losses(trainer)] == list(range(5, 13))
    assert snapshot(mailbox) == straight["fresh"][0]


def test_a_checkpoint_of_a_closed_round_starts_the_newest(tmp_path, straight):
    """Resumed from the middle of round 0 when round 1 is open: log and step counter go on, the round begins anew."""
    mailbox = found(tmp_path / "box", model(), optimizer_state="fresh", **FEDERATION)
    with served(mailbox):
        killed_at(make_trainer(tmp_path, mailbox), 6)
        trainer = make_trainer(tmp_path, mailbox)
        trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert snapshot(mailbox) == straight["fresh"][0]
    assert [row["step"] for row in losses(trainer)] == [1, 2, *range(5, 13)]


def test_a_checkpoint_between_rounds(tmp_path, straight):
    mailbox = found(tmp_path / "box", model(), optimizer_state="kept", **FEDERATION)
    with served(mailbox):
        killed_at(make_trainer(tmp_path, mailbox), 4)
        states = CheckpointStates(tmp_path / "a.fedfstq", str(tmp_path / "a"))
        assert states.find(tmp_path / "a/checkpoint-4").place.round is None
        trainer = make_trainer(tmp_path, mailbox)
        trainer.train(resume_from_checkpoint=True)
    assert (snapshot(mailbox), losses(trainer)) == straight["kept"][:2]


def test_a_checkpoint_of_another_federation_is_left_alone(tmp_path, straight, caplog):
    caplog.set_level("INFO")
    other = found(tmp_path / "other", model(), optimizer_state="fresh", **FEDERATION)
    with served(other):
        make_trainer(tmp_path / "elsewhere", other).train()
    mailbox = found(tmp_path / "box", model(), optimizer_state="fresh", **FEDERATION)
    trainer = make_trainer(tmp_path, mailbox)
    with served(mailbox):
        trainer.train(resume_from_checkpoint=str(tmp_path / "elsewhere/a/checkpoint-2"))
    assert (snapshot(mailbox), losses(trainer)) == straight["fresh"][:2]
    assert "is of another federation or of a later round: the round at hand starts anew" in caplog.text


def test_a_checkpoint_of_another_client_is_left_alone(tmp_path, straight):
    mailbox = found(tmp_path / "box", model(), optimizer_state="fresh", **FEDERATION)
    with served(mailbox):
        killed_at(make_trainer(tmp_path, mailbox, client_id="b"), 2)
        trainer = make_trainer(tmp_path, mailbox)
        trainer.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-2"))
    assert (snapshot(mailbox), losses(trainer)) == straight["fresh"][:2]


def test_a_damaged_state_says_what_to_do(tmp_path):
    mailbox = found(tmp_path / "box", model(), **FEDERATION)
    (tmp_path / "a/checkpoint-2").mkdir(parents=True)
    state = tmp_path / "a.fedfstq/checkpoints/checkpoint-2.safetensors"
    state.parent.mkdir(parents=True)
    for damage in (b"half of it", None):
        if damage is None:
            save_file({"losses": torch.zeros(0)}, state, metadata={"fedfstq": json.dumps({"format": 3})})
        else:
            state.write_bytes(damage)
        with pytest.raises(ConfigError, match=r"cannot be read .*\. Resume from another checkpoint, or without"):
            make_trainer(tmp_path, mailbox).train(resume_from_checkpoint=True)


def test_local_training_resumes_with_its_averages(tmp_path):
    arguments = {"max_steps": 7, "lr_scheduler_type": "linear"}
    straight = make_trainer(tmp_path / "straight", **arguments)
    straight.train()
    killed_at(make_trainer(tmp_path / "killed", **arguments), 5)
    resumed = make_trainer(tmp_path / "killed", **arguments)
    with torch.no_grad():  # as if the adapter had been made with other random numbers
        resumed.adapter_view.write(resumed.adapter_view.read() + 1)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.adapter_view.read(), straight.adapter_view.read())
    assert torch.equal(resumed.adapter_fisher.vector(), straight.adapter_fisher.vector())
    assert torch.equal(resumed.sensitivity.scores(), straight.sensitivity.scores())
    assert resumed.pack_update() == straight.pack_update()
    header, _ = message.unpack(resumed.pack_update())
    assert header.num_examples == 7


def test_a_plain_trainer_s_checkpoint_resumes_too(tmp_path):
    arguments = {"max_steps": 4}
    first = make_trainer(tmp_path, **arguments)
    first.train()
    (tmp_path / "a.fedfstq/checkpoints/checkpoint-2.safetensors").unlink()
    second = make_trainer(tmp_path, **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert torch.equal(second.adapter_view.read(), first.adapter_view.read())
    assert int(second.adapter_fisher.state_dict()["steps"]) == 2


def test_the_saliency_probe_resumes_bit_for_bit(tmp_path):
    """Its sums are of float64 within a round, and rounded between rounds."""

    def start(name):
        mailbox = found(tmp_path / name / "box", model(), share_saliency=True, **(FEDERATION | {"rounds": 2}))
        client = make_trainer(tmp_path / name, mailbox)
        client.federation = settings_of(mailbox, share_saliency=True)
        return mailbox, client

    mailbox, straight = start("straight")
    with served(mailbox):
        straight.train()
    mailbox, killed = start("killed")
    with served(mailbox):
        killed_at(killed, 6)
        resumed = make_trainer(tmp_path / "killed", mailbox)
        resumed.federation = killed.federation
        resumed.train(resume_from_checkpoint=True)
    expected, seen = (client._steps.observer.probe.state_dict(torch.float64) for client in (straight, resumed))
    assert expected["gram"].dtype == torch.float64
    assert not torch.equal(expected["gram"], expected["gram"].float().double())
    assert int(expected["tokens"]) > 0
    assert all(torch.equal(expected[name], seen[name]) for name in expected)

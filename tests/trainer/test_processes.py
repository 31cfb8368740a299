"""A client of two processes computes what a client of one does; only the first talks to the mailbox."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model
from two_processes import KINDS, NORMALISED, federated, watched, watched_sft

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.errors import ConfigError, FedFSTQError
from fedfstq_hf.trainer import processes as module
from fedfstq_hf.trainer.processes import Processes, check_shared

HERE = Path(__file__).parent
FEDERATION = {"rounds": 2, "local_steps": 3, "training": {"learning_rate": 1e-2}}


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def launch(folder):
    """`accelerate launch` of two processes; gloo, as the script asks for the CPU."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent / "helpers"), str(HERE)])
    options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    options += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, str(HERE / "two_processes.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_processes_train_as_one(tmp_path):
    mailbox = found(tmp_path / "two-box", make_tiny_model(), **FEDERATION)
    with served(mailbox):
        result = launch(tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    one_box = found(tmp_path / "one-box", make_tiny_model(), **FEDERATION)
    with served(one_box):
        one = federated(tmp_path / "one", one_box, steps=4, kill_at=None)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    for name in KINDS:
        watch, objective = (watched_sft, "unbiased") if name == "sft" else (watched, name)
        expected = watch(tmp_path / "expected", steps=4, objective=objective)
        assert not torch.equal(*expected["gradients"]) or name == "full"
        for seen in (first[name], second[name]):
            for mine, theirs in zip(seen["gradients"], expected["gradients"], strict=True):
                assert float((mine - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())
            fisher = expected["fisher"]
            assert float((seen["fisher"] - fisher).abs().max()) <= 3e-6 * float(fisher.max())
            assert torch.allclose(seen["tokens"], expected["tokens"], rtol=1e-6, atol=0)
        assert torch.equal(first[name]["tokens"], second[name]["tokens"])
        if name == "full":  # the sensitivity is the same however the loss is divided
            for kind in NORMALISED:
                assert torch.allclose(first[kind], expected["tokens"], rtol=1e-6, atol=0)
    assert one["outcomes"] == ["accepted"] * 2
    assert first["federated"]["outcomes"] == ["accepted"]  # of the round that it was killed in
    assert second["federated"]["outcomes"] == []  # it never saw the mailbox
    start = make_trainer_adapter()
    moved = float((one["adapter"] - start).abs().max())
    assert moved > 1e-3
    assert torch.equal(first["federated"]["adapter"], second["federated"]["adapter"])
    assert float((first["federated"]["adapter"] - one["adapter"]).abs().max()) <= 1e-4 * moved
    assert first["federated"]["steps"] == second["federated"]["steps"] == 6
    assert "holds no federation. Check the address" in first["error"]
    assert second["error"] == first["error"]


def make_trainer_adapter():
    from fedfstq_hf.adapter import AdapterView

    return AdapterView(make_tiny_model()).read()


class Wire:
    """Two `Processes` in two threads, and what the first sent."""

    def __init__(self, monkeypatch, heartbeat_seconds=0.01):
        self.sent, self.arrived = [], threading.Semaphore(0)
        self.read = 0
        monkeypatch.setattr(module.dist, "broadcast_object_list", self.broadcast)
        self.first = Processes(0, 2, heartbeat_seconds=heartbeat_seconds)
        self.second = Processes(1, 2, heartbeat_seconds=heartbeat_seconds)

    def broadcast(self, box, src):
        assert src == 0
        if threading.current_thread().name == "second":
            assert self.arrived.acquire(timeout=20)
            box[0] = self.sent[self.read]
            self.read += 1
        else:
            self.sent.append(box[0])
            self.arrived.release()

    def both(self, work, **options):
        outcomes = {}

        def run(name, processes):
            try:
                outcomes[name] = processes.first_alone(work, **options)
            except Exception as error:
                outcomes[name] = error

        thread = threading.Thread(target=run, args=("second", self.second), name="second")
        thread.start()
        run("first", self.first)
        thread.join(20)
        assert not thread.is_alive()
        return outcomes["first"], outcomes["second"]


def test_the_others_hear_that_the_first_is_still_waiting(monkeypatch):
    wire, released, calls = Wire(monkeypatch), threading.Event(), []

    def wait():
        calls.append(threading.current_thread().name)
        while len(wire.sent) < 3:  # until three heartbeats were sent
            released.wait(0.005)
        return {"round": 7}

    assert wire.both(wait, share=lambda value: value["round"]) == ({"round": 7}, 7)
    assert len(calls) == 1
    assert wire.sent[:3] == [None] * 3


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("error", [ConfigError("a wrong setting"), Unsendable("this", "that")])
def test_an_error_of_the_first_is_that_of_all(monkeypatch, error):
    def fail():
        raise error

    first, second = Wire(monkeypatch).both(fail)
    assert first is error
    if isinstance(error, ConfigError):
        assert (type(second), str(second)) == (ConfigError, "a wrong setting")
    else:
        assert (type(second), str(second)) == (FedFSTQError, "Unsendable: this and that")


def test_a_simulation_in_two_processes_is_refused():
    class SimulatedParticipation:
        total_steps = 1

    check_shared(SimulatedParticipation(), Processes())
    with pytest.raises(ConfigError, match=r"A SimulatedParticipation runs in one process, not 2\. Start it without"):
        check_shared(SimulatedParticipation(), Processes(0, 2))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("is_fsdp_enabled", r"FSDP splits the adapter .*accelerate launch --multi_gpu .*load_in_4bit=True"),
        ("is_deepspeed_enabled", r"DeepSpeed splits the adapter"),
    ],
)
def test_sharded_models_are_refused(tmp_path, monkeypatch, name, match):
    trainer = FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(tmp_path),
        train_dataset=make_tiny_data(2),
        federation=settings_of(None),
    )
    monkeypatch.setattr(trainer, name, True)
    with pytest.raises(ConfigError, match=match):
        module.open_processes(trainer)


def test_fsdp_that_accelerate_passes_over_is_refused_too(tmp_path):
    """On CPUs the argument alone switches nothing on: every process would train a copy, unlike what was asked for."""
    trainer = FedFSTQTrainer(model=make_tiny_model(), args=make_arguments(tmp_path), train_dataset=make_tiny_data(2))
    trainer.args.fsdp = True
    assert not trainer.is_fsdp_enabled
    with pytest.raises(ConfigError, match="FSDP splits the adapter"):
        module.open_processes(trainer)


def test_data_parallel_is_refused(tmp_path):
    arguments = make_arguments(tmp_path)
    arguments._n_gpu = 2
    with pytest.raises(ConfigError, match=r"2 GPUs by nn\.DataParallel.*accelerate launch --multi_gpu"):
        FedFSTQTrainer(model=make_tiny_model(), args=arguments, train_dataset=make_tiny_data(2))

"""What a reader of the client's model repo sees: real uploads to the loopback Hub, and every file that arrived."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import AutoTokenizer

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.demo import model_path
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.client.downlink import HELD_FILE
from tests.loopback_hub.fixtures import hub, hub_here  # noqa: F401
from tests.loopback_hub.loopback import LoopbackHub
from tests.trainer.tiny_federation import found, serve

REPO = "lab/adapter"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@pytest.fixture
def token(hub_here: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> str:  # noqa: F811
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it remembers the endpoint
    return hub_here.user("ann", "write", org="lab")


class Chatty(FedFSTQTrainer):
    """A user's own trainer that leaves more files wherever it saves."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        (Path(output_dir or self.args.output_dir) / "patients.json").write_text("[]")


def make_trainer(tmp_path: Path, token: str, *, cls: type = FedFSTQTrainer, mailbox=None, **arguments: object):
    pushed = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": token, "hub_always_push": True}
    saved = {"save_strategy": "steps", "save_steps": 2}
    return cls(
        model=make_tiny_model(),
        args=make_arguments(tmp_path / "out", **(saved | pushed | arguments)),
        train_dataset=make_tiny_data(7),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        federation=FedFSTQConfig(
            mailbox=None if mailbox is None else str(mailbox.path), client_id="a", poll_seconds=0.01, wait_seconds=30
        ),
    )


def take_part(tmp_path: Path, token: str, **options: object):
    """A federation that leaves a residual, with its trainer after it."""
    mailbox = found(tmp_path / "box", codec="topk", uplink_budget=400, refresh_steps=1, error_feedback=1.0)
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, token, mailbox=mailbox, **options)
    trainer.train()
    thread.join(30)
    return trainer


def arrived(hub: LoopbackHub) -> dict[str, list[bytes]]:  # noqa: F811
    """The contents of every file in every commit of every repo, by path."""
    files: dict[str, list[bytes]] = {}
    for repo in hub.repos():
        for commit in hub.commits(repo):
            for path in hub.files(repo, commit["oid"]):
                files.setdefault(path, []).append(hub.read(repo, path, commit["oid"]))
    return files


def secrets(tmp_path: Path, token: str) -> list[bytes]:
    """The token, and each tensor of the private state that says something."""
    files = [path for path in (tmp_path / "out.fedfstq").rglob("*.safetensors") if path.name != HELD_FILE]
    states = [load_file(path) for path in files]  # but for the adapter that everybody can download
    assert len(states) > 1  # the session's and those of checkpoints
    tensors = [tensor for state in states for tensor in state.values() if tensor.numel() > 8 and tensor.any()]
    return [token.encode(), *(tensor.numpy().tobytes() for tensor in tensors)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_file_that_arrives_is_on_the_allow_list(tmp_path, hub_here, token, strategy):  # noqa: F811
    trainer = take_part(tmp_path, token, hub_strategy=strategy)
    trainer._finish_current_push()
    while_training = arrived(hub_here)
    folders = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}.get(strategy, [])
    expected = set() if strategy == "end" else ADAPTER | TOKENIZER
    expected |= {f"{folder}/{name}" for folder in folders for name in (*ADAPTER, *TOKENIZER, "README.md")}
    assert set(while_training) == expected

    trainer.push_to_hub()
    files = arrived(hub_here)
    assert set(files) == expected | ADAPTER | TOKENIZER | {"README.md"}
    assert hub_here.repos() == [REPO]
    own = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert hub_here.read(REPO, "adapter_model.safetensors") == own
    for secret in secrets(tmp_path, token):
        assert not [path for path, contents in files.items() for data in contents if secret in data]
    assert trainer._uploads.staged == []  # the copies are deleted


def test_the_state_is_what_a_reader_would_look_for(tmp_path, hub_here, token):  # noqa: F811
    """What the test above looks for is there, in the private folder and nowhere in the output folder."""
    take_part(tmp_path, token, hub_strategy="end")
    session = load_file(tmp_path / "out.fedfstq/session.safetensors")
    assert session["carried.tokens.count"].sum() > 0
    assert session["residual"].any()
    for secret in secrets(tmp_path, token):
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_what_a_subclass_saves_beside_it_stays_here(tmp_path, hub_here, token):  # noqa: F811
    trainer = make_trainer(tmp_path, token, cls=Chatty, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.save_model()  # which pushes
    assert (tmp_path / "out/patients.json").exists()
    assert {path.split("/")[-1] for path in arrived(hub_here)} == ADAPTER | TOKENIZER | {"README.md"}


def test_trl_s_trainer_uploads_no_more(tmp_path, hub_here, token):  # noqa: F811
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from fedfstq_hf import FedFSTQSFTTrainer

    arguments = make_arguments(
        tmp_path / "out", push_to_hub=True, hub_model_id=REPO, hub_token=token, save_strategy="steps", save_steps=2
    )
    trainer = FedFSTQSFTTrainer(
        model=make_tiny_model(),
        args=trl.SFTConfig(**(arguments.to_dict() | {"hub_token": token, "bf16": False, "max_length": 16})),
        train_dataset=Dataset.from_list(make_tiny_data(4)),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
    )
    trainer.train()
    trainer.push_to_hub()
    files = arrived(hub_here)
    assert set(files) == ADAPTER | TOKENIZER | {"README.md"}
    assert not [path for path, contents in files.items() for data in contents if token.encode() in data]


def test_the_arguments_on_disk_hold_no_token(tmp_path, hub_here, token):  # noqa: F811
    trainer = make_trainer(tmp_path, token, hub_strategy="end")
    trainer.train()
    trainer.push_to_hub(blocking=False).result()
    for path in (tmp_path / "out").rglob("training_args.bin"):
        assert torch.load(path, weights_only=False).hub_token is None
    assert len(list((tmp_path / "out").rglob("training_args.bin"))) == 3
    assert trainer.args.hub_token == token


def test_a_checkpoint_strategy_says_what_it_leaves_out(tmp_path, hub_here, token, caplog):  # noqa: F811
    make_trainer(tmp_path, token, hub_strategy="checkpoint")
    assert "hub_strategy='checkpoint' uploads adapter and tokenizer of checkpoints only" in caplog.text
    caplog.clear()
    make_trainer(tmp_path, token, hub_strategy="every_save")
    assert "hub_strategy" not in caplog.text


def test_an_upload_that_fails_is_said_and_training_goes_on(tmp_path, hub_here, token, caplog):  # noqa: F811
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(tmp_path, token)
    hub_here.revoke(token)
    trainer.train()
    assert trainer.state.global_step == 4
    assert caplog.text.count(f"An upload to {REPO} failed: ") == 2
    assert token not in caplog.text


@pytest.mark.parametrize("place", ["out", "out/state", "link"])
def test_a_state_folder_in_what_is_pushed_is_refused(tmp_path, hub_here, token, place):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    arguments = make_arguments(tmp_path / "out", push_to_hub=True, hub_model_id=REPO, hub_token=token)
    federation = FedFSTQConfig(state_dir=str(tmp_path / place))
    with pytest.raises(ConfigError, match=r"Type FedFSTQConfig\(state_dir='.*/out\.fedfstq'\), or leave state_dir out"):
        FedFSTQTrainer(model=make_tiny_model(), args=arguments, train_dataset=make_tiny_data(2), federation=federation)

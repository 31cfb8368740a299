"""Where a client's private state lies, and that checkpoints find theirs again."""

import shutil

import pytest
import torch
from small_federation import found, served, settings_of
from tiny import make_arguments, make_tiny_data, make_tiny_model

from fedfstq_hf import FedFSTQTrainer
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.trainer.checkpoint import check_not_uploaded, state_folder


def make_trainer(folder, *, mailbox=None, state_dir=None, **arguments):
    return FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(folder, **{"save_strategy": "steps", "save_steps": 1, **arguments}),
        train_dataset=make_tiny_data(7),
        federation=settings_of(mailbox, state_dir=state_dir),
    )


def states(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Local training of 4 steps without a break."""
    trainer = make_trainer(tmp_path_factory.mktemp("straight"))
    trainer.train()
    return trainer.adapter_fisher.vector()


@pytest.mark.parametrize("given", ["out", "out/", "./out", "link", "out/../out"])
def test_the_folder_lies_beside_the_output_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    assert state_folder(None, given) == tmp_path / "out.fedfstq"


def test_the_working_folder_as_output_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert state_folder(None, ".") == tmp_path / "here.fedfstq"


def test_a_folder_that_was_given_is_taken(tmp_path):
    assert state_folder(str(tmp_path / "mine"), "/") == tmp_path / "mine"


def test_beside_the_root_lies_nothing():
    with pytest.raises(ConfigError, match=r"beside output_dir='/'.* Type FedFSTQConfig\(state_dir=FOLDER\)"):
        state_folder(None, "/")


def test_a_place_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    mailbox = found(tmp_path / "box", make_tiny_model())
    trainer = make_trainer(tmp_path / "out", mailbox=mailbox, state_dir=str(tmp_path / "file/state"))
    with pytest.raises(ConfigError, match=r"Could not create .*file/state: .* type FedFSTQConfig\(state_dir="):
        trainer.train()


def test_a_folder_above_or_beside_what_is_uploaded_is_fine(tmp_path):
    check_not_uploaded(None, "out")
    check_not_uploaded(str(tmp_path), str(tmp_path / "out"))
    check_not_uploaded(str(tmp_path / "out-state"), str(tmp_path / "out"))


def test_a_federation_leaves_nothing_private_in_the_output_folder(tmp_path):
    mailbox = found(tmp_path / "box", make_tiny_model())
    with served(mailbox):
        make_trainer(tmp_path / "out", mailbox=mailbox).train()
    checkpoints = [f"checkpoints/checkpoint-{step}.safetensors" for step in (1, 2, 3, 4)]
    assert states(tmp_path / "out.fedfstq") == [*checkpoints, "held.safetensors", "session.safetensors"]
    left = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not [name for name in left if "fedfstq" in name or "session" in name]


def test_states_go_with_their_checkpoints(tmp_path):
    make_trainer(tmp_path / "out", max_steps=3).train()
    make_trainer(tmp_path / "out", max_steps=5, save_total_limit=2).train()
    kept = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert len(kept) == 2
    assert states(tmp_path / "out.fedfstq/checkpoints") == [f"{name}.safetensors" for name in kept]


def resumes(straight, folder, checkpoint, **options):
    """Whether resuming there has the averages of all steps; a Trainer without them has those after the checkpoint."""
    trainer = make_trainer(folder, save_strategy="no", **options)
    trainer.train(resume_from_checkpoint=checkpoint)
    return torch.equal(trainer.adapter_fisher.vector(), straight)


def test_a_checkpoint_by_path_by_link_and_moved(tmp_path, straight, caplog):
    make_trainer(tmp_path / "out").train()
    (tmp_path / "link").symlink_to("out")
    assert resumes(straight, tmp_path / "out", str(tmp_path / "out/checkpoint-2"))
    assert resumes(straight, tmp_path / "link", True)
    assert resumes(straight, tmp_path / "new", str(tmp_path / "out/checkpoint-2"))  # its state lies beside its folder
    shutil.copytree(tmp_path / "out/checkpoint-2", tmp_path / "elsewhere/checkpoint-2")
    assert resumes(straight, tmp_path / "out", str(tmp_path / "elsewhere/checkpoint-2"))
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out.fedfstq").rename(tmp_path / "moved.fedfstq")
    assert resumes(straight, tmp_path / "moved", True)
    assert "has no state" not in caplog.text


def test_a_state_folder_of_one_s_own(tmp_path, straight):
    make_trainer(tmp_path / "out", state_dir=str(tmp_path / "mine")).train()
    assert resumes(straight, tmp_path / "out", True, state_dir=str(tmp_path / "mine"))
    assert not (tmp_path / "out.fedfstq").exists()


def test_another_checkpoint_s_state_is_not_taken(tmp_path, straight, caplog):
    """What lay there before was deleted without its state, and something else has its name now."""
    make_trainer(tmp_path / "out").train()
    make_trainer(tmp_path / "other", learning_rate=0.5).train()
    shutil.rmtree(tmp_path / "other.fedfstq")
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "other").rename(tmp_path / "out")
    assert not resumes(straight, tmp_path / "out", str(tmp_path / "out/checkpoint-2"))
    assert "out/checkpoint-2 has no state of this package" in caplog.text

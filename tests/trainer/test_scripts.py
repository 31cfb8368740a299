"""The example scripts run as they stand, locally and in a federation."""

import importlib.util
from pathlib import Path

import pytest
import torch
from small_federation import found, served
from transformers import TrainerCallback

from fedfstq_hf.adapter import AdapterView

FOLDER = Path(__file__).parents[2] / "recipes" / "scripts"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
OPTIONS = {"evaluate_while_training": ["--eval-steps", "1"], "resume": ["--save-steps", "1"]}


def load(name):
    if name.startswith("sft"):
        pytest.importorskip("trl", reason="TRL is not installed: pip install 'fedfstq_hf[trl]'")
    spec = importlib.util.spec_from_file_location(f"script_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, folder, *more, steps=1):
    options = ["--output-dir", str(folder), "--max-steps", str(steps), "--examples", "24", *OPTIONS.get(name, [])]
    return load(name).main([*options, *more])


@pytest.mark.parametrize("name", SCRIPTS)
def test_locally_and_in_a_federation(tmp_path, name):
    local = run(name, tmp_path / "local")
    assert local.state.global_step == 1
    assert len(local.pack_update()) <= 2000
    mailbox = found(tmp_path / "box", local.model, rounds=1, local_steps=1, codec="topk")
    start = local.adapter_view.read()
    with served(mailbox):
        client = run(name, tmp_path / "a", "--mailbox", str(tmp_path / "box"), "--client-id", "hospital-a")
    assert [settlement.outcome for settlement in client.settlements] == ["accepted"]
    assert not torch.equal(client.adapter_view.read(), start)
    (ref,) = mailbox.list_updates(0)
    assert ref.client_id == "hospital-a"
    assert 500 < ref.num_bytes <= 2000
    if name == "evaluate_while_training":
        (row,) = (row for row in client.state.log_history if "eval_loss" in row)
        assert row["step"] == 1
        assert 0 <= row["eval_exact_match"] <= row["eval_token_f1"] <= 1


def test_the_resumed_script_is_the_uninterrupted_one(tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    straight = run("resume", tmp_path / "straight", steps=3)
    module = load("resume")
    trainer_class = module.FedFSTQTrainer
    monkeypatch.setattr(module, "FedFSTQTrainer", lambda **kwargs: trainer_class(callbacks=[Stop()], **kwargs))
    options = ["--output-dir", str(tmp_path / "killed"), "--max-steps", "3", "--examples", "24", "--save-steps", "1"]
    with pytest.raises(KeyboardInterrupt):
        module.main(options)
    resumed = run("resume", tmp_path / "killed", steps=3)
    assert torch.equal(AdapterView(resumed.model).read(), AdapterView(straight.model).read())


def test_the_documentation_lists_them():
    text = (FOLDER.parents[1] / "docs" / "trainer.md").read_text()
    assert len(SCRIPTS) == 5
    for name in SCRIPTS:
        assert f"recipes/scripts/{name}.py" in text

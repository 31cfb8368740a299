"""`fedfstq compress`: from a folder to a folder, and refusals without a traceback."""

import json

import pytest
from peft import LoraConfig, get_peft_model

from fedfstq_hf.cli import main
from fedfstq_hf.running.foundation import load_base


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.fixture(scope="module")
def adapter(tiny_recipe, tmp_path_factory):
    name = str(tiny_recipe.parent / "model")
    base, _ = load_base(name, "float32")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = name
    folder = tmp_path_factory.mktemp("trained") / "notes"
    model.save_pretrained(folder)
    return folder


def test_compress_a_folder(adapter, tiny_recipe, tmp_path, capsys):
    data = tiny_recipe.parent / "data.jsonl"
    out = tmp_path / "new" / "small"
    code = run(
        "compress", adapter, "--out", out, "--budget", "3kB", "--data", data, "--calibration", 8, "--max-length", 16
    )
    assert code == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "eval_loss" in said
    assert f"load_compressed_adapter(base, '{out}')" in said
    assert sum(f.stat().st_size for f in out.iterdir() if f.name != "README.md") <= 3000
    card = (out / "README.md").read_text()
    assert "from 8 calibration examples" in card
    assert "| `eval_loss` |" in card
    assert json.loads((out / "adapter_config.json").read_bytes())["r"] == 4
    assert run("compress", adapter, "--out", out) == 2
    assert "left alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--out FOLDER, or --push ORG/NAME"),
        (["--out", "OUT", "--budget", "lots"], "cannot be read"),
        (["--out", "OUT", "--budget", "10B"], "Give more"),
        (["--out", "OUT", "--dtype", "int3"], "float32 or bfloat16"),
        (["--out", "OUT", "--budget", "3kB", "--codec", "unifrom"], "did you mean 'uniform'"),
        (["--out", "OUT", "--calibration", "-1"], "take 0 or more"),
        (["--push", "a/b/c"], "nor the id of a repo"),
        (["--out", "OUT", "--data", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_mistakes_are_told_in_a_line(adapter, tmp_path, capsys, arguments, said):
    assert run("compress", adapter, *(str(tmp_path / "x") if a == "OUT" else a for a in arguments)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


def test_no_adapter_there(tmp_path, capsys):
    assert run("compress", tmp_path / "nothing", "--out", tmp_path / "x") == 2
    assert "adapter_config.json cannot be read" in capsys.readouterr().err

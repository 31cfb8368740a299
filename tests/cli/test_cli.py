"""The `fedfstq` command: light to start, strict about what it is told, one message per error, Ctrl-C at any time."""

import json
import signal
import subprocess
import sys

import pytest
import yaml
from launcher import environment, fails, wait_for
from tiny_workload import write_client_file

from fedfstq_hf import __version__
from fedfstq_hf.cli.options import parse_overrides
from fedfstq_hf.errors import ConfigError

HEAVY = [
    "torch",
    "transformers",
    "peft",
    "matplotlib",
    "datasets",
    "accelerate",
    "safetensors",
    "constriction",
    "pandas",
    "jinja2",
]


def python(code):
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    return process.returncode, process.stdout, process.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import fedfstq_hf",
        "import fedfstq_hf; dir(fedfstq_hf); fedfstq_hf.FedFSTQConfig; fedfstq_hf.FedFSTQError",
        "import fedfstq_hf.cli, fedfstq_hf.config, fedfstq_hf.running.client_file",
        "from fedfstq_hf.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from fedfstq_hf.cli import main\ntry: main(['simulate', '--help'])\nexcept SystemExit: pass",
        "from fedfstq_hf.cli import main\ntry: main(['--version'])\nexcept SystemExit: pass",
        "from fedfstq_hf.cli import main\ntry: main(['recipes', 'ls'])\nexcept SystemExit: pass",
        "from fedfstq_hf.cli import main\ntry: main(['simulate', 'quickstart', '--bad', '3'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(code):
    status, out, err = python(f"{code}\nimport sys\nprint('HEAVY', [name for name in {HEAVY} if name in sys.modules])")
    assert status == 0, err
    assert "HEAVY []" in out


def test_version_and_help(launcher):
    assert launcher.run("--version").stdout.strip() == __version__
    shown = launcher.run("--help").stdout
    commands = (
        "simulate init serve stop rollback train status evaluate pause resume enrol reopen extend inspect recipes keys"
    )
    for command in commands.split():
        assert command in shown


def test_recipes(launcher, tmp_path):
    listed = launcher.run("recipes", "ls").stdout
    assert all(name in listed for name in ("quickstart", "fed_med", "fed_aya", "fed_code"))
    launcher.run("recipes", "cp", "quickstart", tmp_path / "mine.yaml")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["name"] == "quickstart"
    message = fails(launcher, "recipes", "cp", "quickstart", tmp_path / "mine.yaml")
    assert "mine.yaml exists already; it was left alone. Give another file name." in message
    assert "did you mean 'quickstart'" in fails(launcher, "recipes", "cp", "quikstart", tmp_path / "other.yaml")
    assert not (tmp_path / "other.yaml").exists()
    assert "quickstart is valid" in launcher.run("recipes", "validate", tmp_path / "mine.yaml").stdout
    message = fails(launcher, "recipes", "validate", tmp_path / "mine.yaml", "--methods.fstq.codec", "fstqq")
    assert "methods.fstq.codec: unknown codec 'fstqq'; did you mean 'fstq'?" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["simulate", "quickstart", "--rouns", "3"],
            "unknown key 'rouns'; did you mean 'rounds', which stands for federation.rounds?",
        ),
        (["simulate", "quickstart", "--training.learning_rat", "3"], "did you mean 'learning_rate'?"),
        (["simulate", "quickstart", "--rounds", "-1"], "rounds must be above 0, got -1"),
        (["simulate", "quickstart", "--rounds"], "--rounds needs a value: type --rounds VALUE."),
        (["simulate", "quickstart", "3"], "Cannot make sense of '3'; expected --KEY VALUE"),
        (["simulate", "nowhere.yaml"], "unknown recipe 'nowhere.yaml'. Known:"),
        (["init", "box", "--recipe", "quickstart", "--method", "fstk"], "no method 'fstk'; it has fedavg, fstq."),
        (["train", "nowhere.yaml"], "There is no client file nowhere.yaml. Write one with the keys mailbox"),
        (
            ["serve", "nowhere"],
            "nowhere holds no federation. Check the address, or make one with `fedfstq init",
        ),
        (
            ["status", "nowhere"],
            "nowhere holds no federation. Check the address, or make one with `fedfstq init",
        ),
        (["serve", "ftp://org/repo"], "No mailbox serves ftp:// addresses"),
        (["serve", "hf://org"], "hf://"),
        (["stop", "nowhere"], "nowhere holds no federation."),
        (["pause", "nowhere"], "nowhere holds no federation."),
        (["resume", "nowhere"], "nowhere holds no federation."),
        (["rollback", "nowhere", "0"], "nowhere holds no federation."),
        (["enrol", "nowhere", "a"], "nowhere holds no federation."),
        (["evaluate", "nowhere"], "nowhere holds no federation."),
        (["evaluate", "nowhere", "--rund", "1"], "There is no option --rund. Keys of the data section begin with"),
        (["evaluate", "nowhere", "--dtype", "int8"], "--dtype must be one of float32, bfloat16, not 'int8'."),
        (["init", "box", "--recipe", "quickstart", "--clients", "a,a"], "--clients takes distinct names"),
        (["init", "box", "--recipe", "quickstart", "--clients", "a,b c"], "'b c' cannot name a client"),
        (["init", "box", "--recipe", "quickstart", "--public"], "--public is for the Hub"),
        (["init", "box", "--recipe", "quickstart", "--layout", "own"], "A folder mailbox has no layouts"),
        (["init", "box", "--recipe", "quickstart", "--layout", "mine"], "Unknown mailbox layout 'mine'; choose one of"),
        (["init", "box", "--recipe", "quickstart", "--seal-to", "key"], "There is no key file key. Make one:"),
        (
            ["init", "box", "--recipe", "quickstart", "--seal-to", "x25519:12"],
            "Expected a public key of the form x25519",
        ),
        (["inspect", "nowhere.safetensors"], "There is no file nowhere.safetensors. Messages lie in MAILBOX/updates/"),
    ],
)
def test_what_is_wrong_is_named(launcher, tmp_path, arguments, expected):
    assert expected in fails(launcher, *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_used_output_folder_is_left_alone(launcher, tiny_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    message = fails(launcher, "simulate", tiny_recipe, "--out", tmp_path)
    assert "is not empty and holds no run. Give a new folder with --out." in message


@pytest.fixture(scope="module")
def box(launcher, tiny_recipe, tmp_path_factory):
    """A federation of one client a round that has not begun."""
    path = tmp_path_factory.mktemp("cli") / "box"
    command = launcher.run("init", path, "--recipe", tiny_recipe, "--min-clients", "1", "--rounds", "2")
    assert f"Founded tiny in {path}: " in command.stdout
    assert "codec fstq, 2 rounds of 2 local steps, 1 updates a round." in command.stdout
    assert f"Next: fedfstq serve {path}" in command.stdout
    return path


def client(tiny_recipe, box, tmp_path, **changes):
    file = write_client_file(tiny_recipe.parent, box, "client-0000", tmp_path)
    settings = yaml.safe_load(file.read_text())
    for key, value in changes.items():
        settings[key] = settings[key] | value if isinstance(value, dict) and key in settings else value
    file.write_text(yaml.safe_dump(settings))
    return file


def test_init_into_a_used_mailbox(launcher, tiny_recipe, box):
    message = fails(launcher, "init", box, "--recipe", tiny_recipe)
    assert f"already holds a federation. Give a new address, or go on with `fedfstq serve {box}`." in message


def test_init_refuses_impossible_rounds(launcher, tiny_recipe, tmp_path):
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--min-clients", "0")
    assert "min_clients must be a whole number of at least 1, not 0" in message
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--round-seconds", "-5")
    assert "round_seconds must be a number above 0" in message
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--max-staleness", "-1")
    assert "max_staleness must be a whole number of at least 0" in message
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--clip", "0.5")
    assert "clip must be a number of at least 1 (a multiple of the round's median)" in message
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--clients-per-round", "2")
    assert "none are enrolled by name. Type --clients" in message
    message = fails(launcher, "init", tmp_path / "b", "--recipe", tiny_recipe, "--clients", "a,b", "--min-clients", "3")
    assert "2 clients are enrolled, but 3 updates close a round" in message
    assert not (tmp_path / "b").exists()


def test_status_and_serve_once_before_anybody_sent_anything(launcher, box):
    shown = launcher.run("status", box).stdout
    assert "waiting for 1 updates of round 0; here are 0: none" in shown
    assert "round 0/2: initial adapter" in launcher.run("serve", box, "--once").stdout


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mailbux": "x"}, "unknown key 'mailbux' in client file client-0000.yaml; did you mean 'mailbox'?"),
        ({"data": {"pth": "x"}}, "unknown key 'pth' in data of client client-0000; did you mean 'path'?"),
        ({"client_id": "a/b"}, "client_id 'a/b' is not 1 to 64 letters"),
        ({"uplink_budget": "9 apples"}, "uplink budget '9 apples' cannot be read"),
        ({"uplink_budget": 20}, "budget"),
        ({"data": {"path": "nowhere.jsonl"}}, "there is no file nowhere.jsonl"),
        (
            {"data": {"columns": {"prompt": "question"}}},
            "has no column 'question' for the prompt; found 'prompt', 'answer'",
        ),
        ({"model": "nowhere/at-all"}, "The base model 'nowhere/at-all' cannot be loaded"),
        ({"training": {"batch": 3}}, "transformers.TrainingArguments refuses the training settings: "),
        ({"dtype": "float13"}, "dtype must be one of float32, bfloat16, got 'float13'"),
        ({"wait_seconds": 0.1}, "Start this client again at any time: nothing is lost."),
    ],
)
def test_a_client_that_cannot_take_part(launcher, tiny_recipe, box, tmp_path, changes, expected):
    assert expected in fails(launcher, "train", "--yes", client(tiny_recipe, box, tmp_path, **changes), cwd=tmp_path)


def test_an_empty_data_file(launcher, tiny_recipe, box, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    file = client(tiny_recipe, box, tmp_path, data={"path": str(tmp_path / "empty.jsonl")})
    assert "empty.jsonl holds no rows" in fails(launcher, "train", "--yes", file)


def test_another_base_model(launcher, tiny_recipe, box, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tiny_recipe.parent / "model"
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "other")
    message = fails(launcher, "train", "--yes", client(tiny_recipe, box, tmp_path), "--model", tmp_path / "other")
    assert f"other weights: its embeddings differ. Load the base model '{source}'." in message


def test_an_override_on_the_command_line(launcher, tiny_recipe, box, tmp_path):
    file = client(tiny_recipe, box, tmp_path)
    assert "unknown key 'client_ip'" in fails(launcher, "train", "--yes", file, "--client_ip", "c2")
    assert "client_id 'c/2'" in fails(launcher, "train", "--yes", file, "--client_id", "c/2")
    settings = yaml.safe_load(file.read_text())
    del settings["client_id"]
    file.write_text(yaml.safe_dump(settings))
    assert "client_id 'c/2'" in fails(launcher, "train", "--yes", file, "--client_id", "c/2")
    assert "lacks the key 'client_id', which has no default" in fails(launcher, "train", "--yes", file)


# Ctrl-C, and going on


def test_a_federation_that_is_interrupted_and_goes_on(launcher, tiny_recipe, tmp_path):
    box = tmp_path / "box"
    launcher.run("init", box, "--recipe", tiny_recipe, "--min-clients", "1", "--rounds", "2")
    file = client(tiny_recipe, box, tmp_path)

    serving = launcher.start("serve", box, "--poll-seconds", "0.05")
    wait_for(lambda: "round 0/2" in serving.stdout)
    serving.kill(signal.SIGINT)
    assert serving.wait() == 130
    assert f"Stopped. Go on with: fedfstq serve {box}" in serving.stderr

    training = launcher.start("train", "--yes", file)
    wait_for(lambda: list(box.glob("updates/000000/*.safetensors")))
    second = fails(launcher, "train", "--yes", file)
    assert "Another process uses the client state in" in second
    assert "Stop it first, or give this client another state_dir." in second
    training.kill(signal.SIGINT)
    assert training.wait() == 130
    assert f"Stopped. Go on with: fedfstq train {file}" in training.stderr
    assert "Traceback" not in training.stderr + serving.stderr

    message = next(box.glob("updates/000000/*.safetensors"))
    assert "round 0 from client-0000 (5 examples), codec fstq" in launcher.run("inspect", message).stdout
    assert "here are 1: client-0000" in launcher.run("status", box).stdout
    assert "round 1/2: 1 updates" in launcher.run("serve", box, "--once").stdout

    serving = launcher.start("serve", box, "--poll-seconds", "0.05")
    training = launcher.run("train", "--yes", file)
    assert serving.wait() == 0
    assert "Round 0: update accepted" in training.stderr
    assert f"Finished. Load it with: PeftModel.from_pretrained(base, {str(box)!r})" in serving.stdout
    assert launcher.run("status", box).stdout.rstrip().endswith("finished")
    assert json.loads((box / "rounds/000002/round.json").read_text())["finished"] is True
    launcher.run("train", "--yes", file)  # a finished federation has nothing left to do
    launcher.run("serve", box)


def test_inspecting_something_else(launcher, tiny_recipe):
    assert "message" in fails(launcher, "inspect", tiny_recipe)


# Overrides


def test_overrides_are_read():
    assert parse_overrides(["--a.b", "1", "--c=2", "--d-e", "-3", "--f="]) == {
        "a.b": "1",
        "c": "2",
        "d_e": "-3",
        "f": "",
    }
    assert parse_overrides(["--methods.rank-2.learning-rate", "1"]) == {"methods.rank-2.learning_rate": "1"}
    assert parse_overrides(["--methods", "rank-2"]) == {"methods": "rank-2"}
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["x"], r"Cannot make sense of 'x'; expected --KEY VALUE"),
        (["-x", "1"], "Cannot make sense of '-x'"),
        (["--"], "Cannot make sense of '--'"),
        (["--a"], r"--a needs a value: type --a VALUE\."),
        (["--a", "--b", "1"], "--a needs a value"),
    ],
)
def test_overrides_that_make_no_sense(arguments, match):
    with pytest.raises(ConfigError, match=match):
        parse_overrides(arguments)

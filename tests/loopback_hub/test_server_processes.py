"""The loopback Hub and its clients as processes: many writers, the standalone server, peft."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny import make_tiny_model

PUSHES = """
import sys, time
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
api, name, refused = HfApi(), sys.argv[1], 0
for n in range(3):
    operation = CommitOperationAdd(f"rounds/{n}/{name}.bin", name.encode() * 1000)
    while True:
        try:
            api.create_commit("lab/run", [operation], commit_message=name)
            break
        except HfHubHTTPError as error:
            assert error.response.status_code == 409, error
            refused += 1
            time.sleep(0.05)
print(refused)
"""

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, "lab/adapter")
torch.save(model(input_ids=torch.arange(8)[None]).logits, sys.argv[2])
"""


def test_processes_push_to_one_repository_of_a_server_process(remote_hub):
    remote_hub.org("lab")
    remote_hub.repo("lab/run")
    remote_hub.faults.configure(commit_seconds=0.1)
    names = ["c1", "c2", "c3"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUSHES, name],
            env=remote_hub.env(remote_hub.user(name, "write", org="lab")),
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    refused = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert remote_hub.files("lab/run") == sorted(f"rounds/{n}/{name}.bin" for n in range(3) for name in names)
    assert remote_hub.read("lab/run", "rounds/2/c3.bin") == b"c3" * 1000
    assert len(remote_hub.commits("lab/run")) == 10
    assert remote_hub.log.count("/commit/", status=409) == sum(refused)
    assert remote_hub.log.per_user("/commit/", status=200) == dict.fromkeys(names, 3)
    assert remote_hub.log.entries(method="PUT")[0].received == 2000


def test_the_remote_calls_pass_arguments_results_and_errors(remote_hub):
    remote_hub.repo("lab/run")
    oid = remote_hub.write("lab/run", {"a": b"\xff\0"}, message="by hand")
    assert remote_hub.read("lab/run", "a") == b"\xff\0"
    assert (remote_hub.head("lab/run"), remote_hub.commits("lab/run")[0]["title"]) == (oid, "by hand")
    with pytest.raises(ValueError, match="unknown fault 'explode'"):
        remote_hub.faults.once("explode")
    with pytest.raises(ValueError, match="Repository not found"):
        remote_hub.read("lab/other", "a")
    with pytest.raises(AttributeError):
        remote_hub.explode()


def test_the_admin_door_needs_its_token(remote_hub):
    remote_hub._admin_token = "wrong"
    with pytest.raises(ValueError, match="Invalid admin token"):
        remote_hub.repos()


def test_the_standalone_server_prints_where_it_is_and_ends_with_its_starter(remote_hub):
    command = [sys.executable, "-m", "tests.loopback_hub", "--until-stdin-closes"]
    process = subprocess.Popen(command, env=remote_hub.env(), stdin=-1, stdout=-1, text=True)
    told = json.loads(process.stdout.readline())
    assert set(told) == {"endpoint", "admin_token"}
    process.communicate(timeout=30)  # closes its standard input
    assert process.returncode == 0


def test_peft_pushes_an_adapter_here_and_loads_it_in_another_process(hub, hub_here, tmp_path):
    token = hub.user("ann", org="lab")
    model = make_tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = model(input_ids=torch.arange(8)[None]).logits
    model.push_to_hub("lab/adapter", token=token, private=True)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(hub.files("lab/adapter"))
    model.unload().save_pretrained(tmp_path / "base")

    hub.log.clear()
    arguments = [sys.executable, "-c", LOAD, str(tmp_path / "base"), str(tmp_path / "logits.pt")]
    subprocess.run(arguments, env=hub.env(token), check=True, timeout=200)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=0, atol=0)
    assert hub.log.count("/objects/", origin="storage", method="GET") == 1
    assert {entry.status for entry in hub.log.entries()} <= {200, 302, 307, 404}

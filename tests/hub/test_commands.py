"""A whole federation on the loopback Hub by the command line, in real processes, and what plain PEFT makes of it."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedfstq_hf.demo import make_examples, model_path
from tests.loopback_hub.loopback import RemoteHub

ADDRESS = "hf://lab/med"
SMALL = ["--rounds", "2", "--training.local_steps", "2"]
TIMEOUT = 240

PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(3, 40)[None]
with torch.no_grad():
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, sys.argv[2])
    after = model(ids).logits
assert "fedfstq_hf" not in sys.modules
torch.save({"before": before, "after": after}, sys.argv[3])
"""


def fedfstq(hub: RemoteHub, token: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedfstq_hf.cli", *arguments]
    environment = hub.env(token, OMP_NUM_THREADS="1", COLUMNS="200")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error
    assert "Traceback" not in error
    return out


def test_init_serve_train_evaluate_and_load_with_plain_peft(remote_hub: RemoteHub, tmp_path: Path) -> None:
    hub = remote_hub
    hub.org("lab")
    owner = hub.user("owner", "write", org="lab")
    tokens = {name: hub.user(name, "contributor", org="lab") for name in ("ward-a", "ward-b")}
    founded = output(
        fedfstq(
            hub,
            owner,
            "init",
            ADDRESS,
            "--recipe",
            "quickstart",
            "--clients",
            "ward-a,ward-b",
            "--min-clients",
            "2",
            *SMALL,
        )
    )
    assert f"Next: fedfstq serve {ADDRESS}" in founded
    processes = [fedfstq(hub, owner, "serve", ADDRESS, "--poll-seconds", "0.5")]
    for seed, (name, token) in enumerate(tokens.items()):
        data = tmp_path / f"{name}.jsonl"
        rows = make_examples(12, seed=seed)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        client = {
            "mailbox": ADDRESS,
            "client_id": name,
            "data": {"path": str(data), "format": "jsonl"},
            "uplink_budget": "2kB",
            "output_dir": str(tmp_path / name),
            "poll_seconds": 0.5,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(client))
        processes.append(fedfstq(hub, token, "train", "--yes", str(tmp_path / f"{name}.yaml")))
    served, *_ = [output(process) for process in processes]
    assert "round 2/2: 2 updates" in served
    status = output(fedfstq(hub, tokens["ward-a"], "status", ADDRESS))
    assert "finished" in status
    measured = output(fedfstq(hub, owner, "evaluate", ADDRESS, "--data", str(tmp_path / "ward-a.jsonl")))
    assert "eval_loss" in measured
    card = ModelCard(hub.read("lab/med", "README.md").decode())
    assert card.data.library_name == "peft"
    assert [result.metric_type for result in card.data.eval_results or []]
    assert "PeftModel.from_pretrained" in card.text
    assert '"lab/med"' in card.text
    assert {"lab/med", "lab/med-ward-a", "lab/med-ward-b"} == set(hub.repos())

    result = tmp_path / "logits.pt"
    plain = [sys.executable, "-c", PLAIN_PEFT, str(model_path()), "lab/med", str(result)]
    environment = hub.env(owner, OMP_NUM_THREADS="1")
    subprocess.run(plain, env=environment, check=True, timeout=TIMEOUT)
    logits = torch.load(result)
    assert not torch.equal(logits["before"], logits["after"])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "published").mkdir(exist_ok=True)
        (tmp_path / "published" / name).write_bytes(hub.read("lab/med", name))
    record = json.loads(hub.read("lab/med", "fedfstq/round.json"))
    published = (tmp_path / "published" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(published).hexdigest() == record["adapter_sha256"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_path()), tmp_path / "published")
    with torch.no_grad():
        assert torch.equal(model(torch.arange(3, 40)[None]).logits, logits["after"])

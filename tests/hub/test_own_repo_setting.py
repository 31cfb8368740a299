"""`repo`, a client's own setting: where it comes from, and that it reaches the mailbox."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedfstq_hf.cli import app
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.running.client_file import load_client_file
from fedfstq_hf.trainer import joining
from tests.loopback_hub.federation import HubFederation
from tests.loopback_hub.loopback import LoopbackHub


def test_a_client_is_refused_before_it_trains(hub_here: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    run = HubFederation(hub_here, "own")
    monkeypatch.setenv("HF_TOKEN", run.tokens["a"])
    monkeypatch.setattr(joining, "check_same_base", lambda *given: None)
    monkeypatch.setattr(joining, "check_same_adapter", lambda *given: None)
    monkeypatch.setattr(joining, "base_fingerprint", lambda model: {})
    config = FedFSTQConfig(mailbox="hf://org/run", client_id="a", repo="org/mine")
    with pytest.raises(MailboxError, match="from org/run-a, but this client writes to org/mine"):
        joining.join(config, _View(), None, "")


class _View:
    """As far as `join` comes."""

    name = "default"
    model = type("Model", (), {"peft_config": {"default": type("Config", (), {"to_dict": staticmethod(dict)})}})


def test_a_folder_has_no_repos(tmp_path: Path) -> None:
    config = FedFSTQConfig(mailbox=str(tmp_path), repo="org/mine")
    with pytest.raises(ConfigError, match="Leave repo out"):
        joining.join(config, None, None, "")


@pytest.mark.parametrize("bad", ["mine", "a/b/c", "hf://org/mine", "org/", 3])
def test_a_repo_is_an_organisation_and_a_name(bad: str) -> None:
    with pytest.raises(ConfigError, match="ORG/NAME"):
        FedFSTQConfig(repo=bad)


def test_a_client_file_names_it(tmp_path: Path) -> None:
    path = tmp_path / "client.yaml"
    path.write_text("mailbox: hf://org/run\nclient_id: a\ndata: {path: x}\nrepo: org/mine\n")
    assert load_client_file(path).repo == "org/mine"


def test_only_a_client_has_one() -> None:
    done = CliRunner().invoke(app, ["evaluate", "hf://org/run", "--repo", "org/mine"])
    assert isinstance(done.exception, (ConfigError, SystemExit))
    assert "--client-id" in f"{done.exception}{done.output}"

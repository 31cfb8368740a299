"""FedFSTQConfig: checked, saved, read back, unknown keys named."""

import argparse
import dataclasses

import pytest
from transformers import HfArgumentParser

from fedfstq_hf import FedFSTQConfig, FedFSTQError
from fedfstq_hf.errors import ConfigError


def test_round_trip(tmp_path):
    config = FedFSTQConfig(mailbox="box", client_id="hospital-a", uplink_budget="96kB", codec_options={"share": 0.5})
    path = config.save_pretrained(tmp_path / "new")
    assert path.name == "fedfstq_config.json"
    assert FedFSTQConfig.from_pretrained(tmp_path / "new") == config
    assert config.save_pretrained(tmp_path / "new").read_bytes() == path.read_bytes()


def test_a_missing_file_says_how_to_write_it(tmp_path):
    with pytest.raises(ConfigError, match=r"fedfstq_config\.json does not exist\. Write it with FedFSTQConfig"):
        FedFSTQConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{", "3"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "fedfstq_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"fedfstq_config\.json"):
        FedFSTQConfig.from_pretrained(tmp_path)


def test_an_unknown_key_is_named_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown setting 'uplink_buget'; did you mean 'uplink_budget'\? Known: client_id,"
    ):
        FedFSTQConfig.from_dict({"uplink_buget": "96kB"})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"client_id": ""}, "client_id '' is not 1 to 64 letters"),
        ({"client_id": "a/b"}, "client_id"),
        ({"client_id": "a" * 65}, "client_id"),
        ({"client_id": "../up"}, "client_id"),
        ({"client_id": 7}, "client_id"),
        ({"local_steps": 0}, "local_steps must be at least 1, not 0"),
        ({"refresh_steps": 0}, "refresh_steps must be at least 1"),
        ({"rho": 1.0}, r"rho must lie in \[0, 1\), not 1.0"),
        ({"error_feedback": 1.5}, "error_feedback must be a number of at least 0 and at most 1"),
        ({"poll_seconds": 0}, "poll_seconds must be positive"),
        ({"wait_seconds": -1}, "wait_seconds must be"),
        ({"uplink_budget": "96 apples"}, "uplink budget '96 apples' cannot be read"),
    ],
)
def test_impossible_values_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match) as caught:
        FedFSTQConfig(**changes)
    assert isinstance(caught.value, FedFSTQError)
    assert isinstance(caught.value, ValueError)


def test_every_field_has_help_that_argparse_can_print():
    fields = dataclasses.fields(FedFSTQConfig)
    assert all(field.metadata.get("help", "").endswith(".") for field in fields)
    parser = argparse.ArgumentParser()
    for field in fields:
        parser.add_argument(f"--{field.name}", help=field.metadata["help"])
    assert "uplink_budget" in parser.format_help()


def test_it_works_with_hf_argument_parser():
    parser = HfArgumentParser(FedFSTQConfig)
    assert "--client_id" in parser.format_help()
    (config,) = parser.parse_args_into_dataclasses(["--mailbox", "box", "--client_id", "c7", "--local_steps", "3"])
    assert (config.mailbox, config.client_id, config.local_steps) == ("box", "c7", 3)

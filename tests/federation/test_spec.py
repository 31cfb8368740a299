"""The federation's spec: checked when made, round-tripped through JSON, refused when foreign."""

import dataclasses
import json
import re

import pytest
from light import make_spec

from fedfstq_hf import __version__
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord
from fedfstq_hf.federation.spec import OPTIMIZERS, SCHEDULES, SHARED_TRAINING_ARGUMENTS, FederationSpec


def test_json_round_trip():
    spec = make_spec(training={"learning_rate": 1e-3}, server={"optimizer": "Adam", "lr": 0.1}, round_seconds=5.0)
    assert FederationSpec.from_json(spec.to_json()) == spec
    assert spec.to_json() == FederationSpec.from_json(spec.to_json()).to_json()


def test_two_federations_are_never_the_same():
    assert make_spec().id != make_spec().id


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rounds": 0}, "rounds must be a whole number of at least 1, not 0"),
        ({"local_steps": 1.5}, "local_steps must be a whole number"),
        ({"min_clients": 0}, "min_clients must be"),
        ({"round_seconds": 0}, "round_seconds must be a number above 0"),
        ({"round_seconds": float("inf")}, "round_seconds"),
        ({"error_feedback": 1.1}, "error_feedback must be a number of at least 0 and at most 1"),
        ({"optimizer_state": "warm"}, "optimizer_state must be one of fresh, kept, not 'warm'"),
        ({"training": {"per_device_train_batch_size": 4}}, "training.per_device_train_batch_size cannot be shared"),
    ],
)
def test_impossible_values_are_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        make_spec(**changes)


def test_a_spec_of_another_format_says_which_version_to_install():
    fields = json.loads(make_spec().to_json()) | {"format": 99}
    for version, remedy in (
        ("7.3.1", r"Type: pip install fedfstq_hf==7\.3\.1"),
        (__version__, "Install the fedfstq_hf version that the federation's coordinator runs"),
        (None, "Install the fedfstq_hf version that the federation's coordinator runs"),
    ):
        data = json.dumps(fields | {"package_version": version}).encode()
        with pytest.raises(MailboxError, match=rf"spec has format 99; fedfstq_hf .* reads format 5\. {remedy}"):
            FederationSpec.from_json(data)
        with pytest.raises(MailboxError, match=rf"round record has format 99; .* reads format 4\. {remedy}"):
            RoundRecord.from_json(data)


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'"x"', b'{"format": 1}', b'{"format": 1, "what": 2}', b"\xff"])
def test_foreign_bytes_are_named(data):
    with pytest.raises(MailboxError, match="spec"):
        FederationSpec.from_json(data)


def test_a_spec_with_values_out_of_range_is_the_mailbox_s_fault():
    fields = json.loads(make_spec().to_json()) | {"rounds": -1}
    with pytest.raises(MailboxError, match=r"The mailbox's spec cannot be read: rounds must be"):
        FederationSpec.from_json(json.dumps(fields).encode())


def test_shared_arguments_are_those_of_transformers():
    from transformers import SchedulerType, TrainingArguments
    from transformers.training_args import OptimizerNames

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(SHARED_TRAINING_ARGUMENTS) <= known
    assert set(OPTIMIZERS) <= {name.value for name in OptimizerNames}
    assert set(SCHEDULES) <= {name.value for name in SchedulerType}


def test_record_round_trip_and_fate():
    record = RoundRecord(
        round=3,
        adapter_sha256="ab",
        adapter_digest="cd",
        adapter_bytes=10,
        schema="cd",
        opened_at=1.5,
        deadline=None,
        finished=False,
        accepted=(AcceptedUpdate("a", "1", 100, 5, 1.0, 0.25),),
        refused=(RefusedUpdate("b", "2", 50, "because"), RefusedUpdate("d", "", 900, "too large to read")),
    )
    assert RoundRecord.from_json(record.to_json()) == record
    assert record.uplink_bytes == 1050
    assert record.fate("a", "1") == record.accepted[0]
    assert record.fate("b", "2") == record.refused[0]
    assert record.fate("d", "any") == record.refused[1]
    assert record.fate("a", "2") is None
    assert record.fate("c", "1") is None


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b'{"format": 1}', b'{"format": 3}', b"\xff\xfe"])
def test_foreign_records_are_named(data):
    with pytest.raises(MailboxError, match="round record"):
        RoundRecord.from_json(data)


def test_the_id_is_that_of_the_content():
    spec = make_spec(salt="s")
    assert spec.id == make_spec(salt="s").id
    assert re.fullmatch("[0-9a-f]{64}", spec.id)
    assert FederationSpec.from_json(spec.to_json()).id == spec.id
    assert json.loads(spec.to_json())["id"] == spec.id
    assert dataclasses.replace(spec, rounds=9).id == make_spec(salt="s", rounds=9).id != spec.id


def test_salts_are_drawn_and_bounded():
    assert re.fullmatch("[0-9a-f]{32}", make_spec().salt)
    for salt in ("x" * 65, 7):
        with pytest.raises(ConfigError, match="salt must be text of at most 64 characters"):
            make_spec(salt=salt)

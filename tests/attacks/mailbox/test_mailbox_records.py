"""Records and histories as a hostile mailbox may write them: refused as a mailbox's fault, or harmless."""

import dataclasses
import json

import pytest
from light import LightClient, found

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import history
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord

RECORD = RoundRecord(
    round=3,
    adapter_sha256="a" * 64,
    adapter_digest="d" * 64,
    adapter_bytes=10,
    schema="c" * 64,
    opened_at=1.5,
    deadline=2.5,
    finished=False,
    accepted=(AcceptedUpdate("a", "1" * 64, 100, 5, 1.0, 0.25),),
    refused=(RefusedUpdate("b", "2" * 64, 50, "because"),),
    selected=("a", "b"),
)
FIELDS = json.loads(RECORD.to_json())


def changed(path, value):
    fields = json.loads(json.dumps(FIELDS))
    place = fields
    *way, last = path
    for step in way:
        place = place[step]
    place[last] = value
    return json.dumps(fields).encode()


def test_what_a_coordinator_writes_is_read():
    assert RoundRecord.from_json(RECORD.to_json()) == RECORD
    whole_seconds = changed(["opened_at"], 1)
    assert RoundRecord.from_json(whole_seconds).opened_at == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["round"], -1),
        (["round"], "3"),
        (["round"], 1.5),
        (["round"], True),
        (["round"], None),
        (["round"], 10**30),
        (["adapter_sha256"], "../../etc/passwd"),
        (["adapter_sha256"], None),
        (["adapter_sha256"], "a" * 65),
        (["adapter_digest"], "../../etc/passwd"),
        (["adapter_digest"], None),
        (["adapter_bytes"], -1),
        (["schema"], 7),
        (["opened_at"], "now"),
        (["opened_at"], None),
        (["opened_at"], -1e300),
        (["deadline"], []),
        (["finished"], 1),
        (["finished"], "false"),
        (["frames"], None),
        (["frames"], "many"),
        (["frames"], [["messages"]]),
        (["frames"], [[3, "messages", "many"]]),
        (["frames"], [[3, "everything", 10]]),
        (["frames"], [[3, "messages", -10]]),
        (["frames"], [[True, "messages", 10]]),
        (["frames"], [[3, "messages", 10, 10]]),
        (["accepted"], None),
        (["accepted"], 7),
        (["accepted"], ["a"]),
        (["accepted"], [[]]),
        (["accepted", 0, "client_id"], "../b"),
        (["accepted", 0, "client_id"], ["a"]),
        (["accepted", 0, "sha256"], {}),
        (["accepted", 0, "weight"], "heavy"),
        (["accepted", 0, "norm"], None),
        (["accepted", 0, "staleness"], -1),
        (["accepted", 0, "more"], 1),
        (["refused", 0, "reason"], 7),
        (["refused", 0, "client_id"], "\x1b[31m"),
        (["refused", 0, "round"], "0"),
        (["late"], {"a": 1}),
        (["refinements"], None),
        (["selected"], 7),
        (["selected"], ["a b"]),
        (["selected"], [["a"]]),
        (["restored_from"], -3),
        (["variate_sha256"], "z"),
        (["package_version"], 7),
        (["more"], 1),
    ],
)
def test_a_record_with_an_impossible_field_is_refused(path, value):
    with pytest.raises(MailboxError):
        RoundRecord.from_json(changed(path, value))


@pytest.mark.parametrize(
    "data",
    [
        RECORD.to_json().replace(b"1.5", b"NaN"),
        RECORD.to_json().replace(b"1.5", b"1e999"),
        RECORD.to_json().replace(b'"round":3', b'"round":3,"round":4'),
        b'{"format": 2, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b" " * (17 * 10**6),
        b'{"format": "\\u001b[31m"}',
    ],
    ids=["nan", "infinite", "twice", "deep", "large", "escape"],
)
def test_a_record_that_is_no_plain_json_is_refused(data):
    with pytest.raises(MailboxError) as refusal:
        RoundRecord.from_json(data)
    assert "\x1b" not in str(refusal.value)


def test_a_reason_is_cut():
    assert RoundRecord.from_json(changed(["refused", 0, "reason"], "x" * 10_000)).refused[0].reason == "x" * 300


def test_a_record_of_another_round_is_refused(tmp_path):
    mailbox = found(tmp_path)
    path = tmp_path / "rounds/000000/round.json"
    fields = json.loads(path.read_bytes()) | {"round": 7}
    path.write_text(json.dumps(fields))
    with pytest.raises(MailboxError, match="holds the record of round 7 where that of round 0 belongs"):
        LightClient(mailbox, "a", None).step()


# The history

ROW = history.HistoryRow(0, 1.5, 1, 10, 10, 10, 10, refused=2, reasons={"too large": 2})


def test_a_history_that_a_coordinator_wrote_is_read():
    assert history.load(history.dump([ROW])) == [ROW]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        b'{"round":0,"round":1}',
        history.dump([ROW]).replace(b"1.5", b"NaN"),
        history.dump([ROW]).replace(b'"round":0', b'"round":' + b"9" * 5000),
        history.dump([dataclasses.replace(ROW, reasons={"\x1b[31m": 1})]),
        history.dump([dataclasses.replace(ROW, reasons={"[x](http://elsewhere)": 1})]),
        history.dump([dataclasses.replace(ROW, reasons={"a" * 61: 1})]),
        history.dump([dataclasses.replace(ROW, reasons=dict.fromkeys("abcdefghi", 1))]),
    ],
    ids=["binary", "deep", "twice", "nan", "digits", "escape", "link", "long", "many"],
)
def test_a_history_of_others_is_refused(line):
    with pytest.raises(MailboxError) as refusal:
        history.load(line)
    assert "\x1b" not in str(refusal.value)

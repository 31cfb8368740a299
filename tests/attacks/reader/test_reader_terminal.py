"""What others wrote is shown in a terminal as it is, and commands nothing there."""

import json
import logging
import shutil

import pytest
from light import found
from light_updates import found_enrolled, ones, post
from typer.testing import CliRunner

from fedfstq_hf import cli
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.control import change_control, pause
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.status import render_status

EVIL = "\x1b]0;owned\x07\x1b[2J\u202e\n fedfstq: fine"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\u202e\\x0a fedfstq: fine"


def clean(text):
    return not any(character in text for character in "\x1b\x07\u202e\r\x9b")


def evil_mailbox(path):
    """A name, a pause, a metric and a reason in a record, all of them hostile."""
    mailbox = found(path, name=EVIL, model=EVIL, rounds=5)
    for name in "abx":
        post(mailbox, name, ones(1), base="a" * 64 if name == "x" else mailbox_base(mailbox))
    Coordinator(mailbox).close_round()
    record = path / "rounds/000001/round.json"
    fields = json.loads(record.read_bytes())
    fields["refused"][0]["reason"] = EVIL
    record.write_text(json.dumps(fields))
    change_control(mailbox, pause(EVIL))
    (path / "metrics/000001").mkdir(parents=True)
    (path / "metrics/000001/x.json").write_text(json.dumps({EVIL: 1.0, "good": 2.0}))
    return mailbox


def mailbox_base(mailbox):
    return json.loads(mailbox.read(0, "round.json"))["adapter_digest"]


def test_status_shows_them_escaped(tmp_path):
    shown = render_status(evil_mailbox(tmp_path))
    assert clean(shown)
    assert shown.count(SHOWN) == 4  # name, model, reason, pause
    assert "x good 2.0000" in shown


@pytest.mark.parametrize("command", ["status", "serve"])
def test_commands_show_them_escaped(tmp_path, command):
    evil_mailbox(tmp_path)
    arguments = [command, str(tmp_path), *(["--once"] if command == "serve" else [])]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert clean(result.output)
    assert SHOWN in result.output


def test_an_error_that_quotes_others_is_shown_escaped(tmp_path, capsys, monkeypatch):
    found(tmp_path)
    path = tmp_path / "rounds/000000/spec.json"
    fields = json.loads(path.read_bytes()) | {EVIL: 1}
    path.write_text(json.dumps(fields))
    with pytest.raises(SystemExit):
        cli.main(["status", str(tmp_path)])
    assert clean(capsys.readouterr().err)


def test_an_error_of_any_kind_is_shown_line_by_line(capsys, monkeypatch):
    def fail(**options):
        raise MailboxError("first \x1b[31m\nsecond")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main([])
    assert "first \\x1b[31m\nsecond" in capsys.readouterr().err


def test_a_log_shows_them_escaped(tmp_path, capsys):
    from fedfstq_hf.cli.options import quieten

    root = logging.getLogger()
    before = list(root.handlers), root.level
    root.handlers.clear()
    try:
        quieten()
        logging.getLogger("fedfstq_hf.test").warning("a client says %s", EVIL)
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    shown = capsys.readouterr().err
    assert clean(shown)
    assert shown.startswith("a client says \\x1b]0;owned")


def test_a_coordinator_s_log_and_record_hold_nothing_that_commands_a_terminal(tmp_path, caplog):
    mailbox = found_enrolled(tmp_path, "abx")
    for name in "ab":
        post(mailbox, name, ones(1))
    data = (tmp_path / "updates/000000/a.safetensors").read_bytes()
    meta = json.dumps({"__metadata__": {"fstq": json.dumps([9, EVIL])}, "payload": {}}).encode()
    (tmp_path / "updates/000000/x.safetensors").write_bytes(len(meta).to_bytes(8, "little") + meta + data)
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.refused] == ["x"]
    assert clean(record.refused[0].reason)
    assert clean(caplog.text)
    shutil.rmtree(tmp_path / "updates")

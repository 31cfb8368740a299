"""The control file: who may take part and whether rounds are closed, changed by several people at once."""

import json
import threading

import pytest
from light import found
from light_updates import found_enrolled

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import control, keys
from fedfstq_hf.federation.control import Control, Enrolment, change_control, read_control
from fedfstq_hf.federation.mailbox.folder import FolderMailbox

KEY = keys.new_keypair().verify_key


def test_without_a_file_anybody_may_take_part(tmp_path):
    mailbox = found(tmp_path)
    assert mailbox.read_control() is None
    assert read_control(mailbox) == Control()
    assert Control().enrolled("anybody")
    assert Control().enrolment("anybody") == Enrolment()


def test_json_round_trip():
    full = Control(
        clients={"a": Enrolment(repo="org/run-a", account="anna", verify_key=KEY, max_examples=5), "b": Enrolment()},
        paused="the disk is full",
    )
    for given in (full, Control(), Control(clients={})):
        assert Control.from_json(given.to_json()) == given
        assert Control.from_json(given.to_json()).to_json() == given.to_json()
    assert json.loads(full.to_json())["clients"]["b"] == {}  # what is not known is not written


def test_an_empty_list_lets_nobody_in():
    assert not Control(clients={}).enrolled("a")
    assert not Control(clients={"b": Enrolment()}).enrolled("a")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"format": 1}',
        b'{"format": 1, "clients": null}',
        b'{"format": 1, "clients": ["a"], "paused": null}',
        b'{"format": 1, "clients": {"a": {"repository": "x"}}, "paused": null}',
        b'{"format": 1, "clients": {"a": {"max_examples": 0}}, "paused": null}',
        b'{"format": 1, "clients": {"a": {"verify_key": "ed25519:12"}}, "paused": null}',
        b"\xff",
    ],
)
def test_a_damaged_file_is_an_error_and_not_an_open_door(tmp_path, data):
    mailbox = found(tmp_path)
    (tmp_path / "control.json").write_bytes(data)
    with pytest.raises(MailboxError, match=r"control file cannot be read .* Restore it from the mailbox's history"):
        read_control(mailbox)
    with pytest.raises(MailboxError, match="control file cannot be read"):
        change_control(mailbox, control.resume)
    assert (tmp_path / "control.json").read_bytes() == data


@pytest.mark.parametrize("name", ["../x", "", "a b"])
def test_names_that_no_client_can_have_are_refused(tmp_path, name):
    with pytest.raises(MailboxError, match="cannot name a client"):
        control.enrol([name])
    data = json.dumps({"format": 1, "clients": {name: {}}, "paused": None}).encode()
    with pytest.raises(MailboxError, match="cannot name a client"):
        Control.from_json(data)


def test_a_file_of_another_format_is_named():
    with pytest.raises(MailboxError, match="control file has format 7; this version reads 1"):
        Control.from_json(b'{"format": 7}')


def test_enrol_and_dismiss():
    first = control.enrol(["a", "b"])(Control())
    assert set(first.clients) == {"a", "b"}
    second = control.enrol(["b", "c"], max_examples=9)(first)
    assert {name: entry.max_examples for name, entry in second.clients.items()} == {"a": None, "b": 9, "c": 9}
    third = control.enrol(["b"], verify_key=KEY)(second)
    assert third.clients["b"] == Enrolment(verify_key=KEY, max_examples=9)  # what was known stays
    assert set(control.dismiss(["b"])(third).clients) == {"a", "c"}
    with pytest.raises(ConfigError, match="'x' is not enrolled; enrolled are a, b, c"):
        control.dismiss(["x"])(third)
    with pytest.raises(ConfigError, match="'x' is not enrolled; enrolled are none by name"):
        control.dismiss(["x"])(Control())


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"max_examples": 0}, "max_examples must be a whole number of at least 1, not 0"),
        ({"max_examples": 1.5}, "max_examples must be"),
        ({"verify_key": "somebody"}, "Expected a public key of the form ed25519"),
        ({"verify_key": keys.new_keypair().seal_key}, "Expected a public key of the form ed25519:.*, got x25519 key"),
    ],
)
def test_impossible_enrolments_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        control.enrol(["a"], **fields)(Control())


def test_pause_and_resume_leave_the_clients_alone():
    enrolled = Control(clients={"a": Enrolment()})
    paused = control.pause("looking into it")(enrolled)
    assert (paused.paused, paused.clients) == ("looking into it", enrolled.clients)
    assert control.pause("")(enrolled).paused == "no reason given"
    assert control.resume(paused) == enrolled


def test_a_change_is_made_again_on_top_of_somebody_else_s(tmp_path, monkeypatch):
    mailbox = found_enrolled(tmp_path, "ab")
    others = iter("xy")
    write = FolderMailbox.write_control

    def interrupted(self, data, *, expected):
        if (name := next(others, None)) is not None:  # somebody enrols a client between our look and our write
            present = self.read_control()
            assert write(self, control.enrol([name])(Control.from_json(present)).to_json(), expected=present)
        return write(self, data, expected=expected)

    monkeypatch.setattr(FolderMailbox, "write_control", interrupted)
    changed = change_control(mailbox, control.pause("now"))
    assert set(changed.clients) == set("abxy")
    assert read_control(mailbox) == changed
    assert changed.paused == "now"


def test_nothing_is_lost_when_many_write_at_once(tmp_path):
    mailbox = found_enrolled(tmp_path, "ab")
    names = [f"c{number}" for number in range(12)]
    threads = [
        threading.Thread(target=change_control, args=(FolderMailbox(tmp_path, durable=False), control.enrol([name])))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read_control(mailbox).clients) == {"a", "b", *names}


def test_one_who_never_gets_through_is_told(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    monkeypatch.setattr(FolderMailbox, "write_control", lambda self, data, *, expected: False)
    with pytest.raises(MailboxError, match=r"was changed by somebody else 50 times in a row\. Try again later"):
        change_control(mailbox, control.pause("now"))


def test_a_change_that_changes_nothing_writes_nothing(tmp_path, monkeypatch):
    mailbox = found_enrolled(tmp_path, "ab")
    monkeypatch.setattr(FolderMailbox, "write_control", None)
    assert set(change_control(mailbox, control.enrol(["a"])).clients) == {"a", "b"}


def test_a_write_on_top_of_something_else_is_refused(tmp_path):
    mailbox = found_enrolled(tmp_path, "ab")
    present = mailbox.read_control()
    assert not mailbox.write_control(b"{}", expected=None)
    assert not mailbox.write_control(b"{}", expected=present + b" ")
    assert mailbox.read_control() == present


# Selection


def test_selection_depends_on_seed_and_round_alone():
    enrolled = Control(clients={name: Enrolment() for name in "hgfedcba"})
    again = Control.from_json(enrolled.to_json())
    drawn = [enrolled.select(round, 3, 4) for round in range(40)]
    assert drawn == [again.select(round, 3, 4) for round in range(40)]
    assert all(list(names) == sorted(set(names)) and len(names) == 4 for names in drawn)
    assert drawn != [enrolled.select(round, 4, 4) for round in range(40)]
    turns = [sum(name in names for names in drawn) for name in "abcdefgh"]
    assert min(turns) >= 10  # 20 on average


@pytest.mark.parametrize(("clients", "count"), [(None, 2), ("abc", None), ("abc", 3), ("abc", 4)])
def test_all_are_asked_where_there_is_nothing_to_draw(clients, count):
    enrolled = None if clients is None else {name: Enrolment() for name in clients}
    assert Control(clients=enrolled).select(0, 0, count) is None

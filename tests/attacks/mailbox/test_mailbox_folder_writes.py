"""Whoever owns a mailbox's folder plants links there: an honest client writes nothing outside, and deletes nothing."""

import contextlib
import errno
import os

import pytest
from light import LightClient, found
from light_updates import ones, post
from planting import KINDS

from fedfstq_hf.errors import MailboxError, UpdateConflictError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.control import change_control, pause
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE
from fedfstq_hf.federation.server.coordinator import Coordinator

pytestmark = pytest.mark.timeout(20)


@pytest.fixture
def victim(tmp_path):
    """A folder of the client's own, with a key and what looks like leftovers."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "authorized_keys").write_bytes(b"key")
    (home / "a.safetensors").write_bytes(b"model")
    (home / storage.temporary_name("a.safetensors")).write_bytes(b"half")
    (home / "000000").mkdir()
    (home / "000000" / storage.temporary_name("a.safetensors")).write_bytes(b"half")
    before = contents(home)
    yield home
    assert contents(home) == before


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("place", ["updates", "updates/000000", "refinements", "refinements/000000"])
def test_a_message_goes_into_the_mailbox_whatever_leads_elsewhere(tmp_path, victim, place):
    mailbox = found(tmp_path / "box")
    link = mailbox.path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    refinement = place.startswith("refinements")
    mailbox.post_update(0, "a", b"message", refinement=refinement)
    assert not link.is_symlink()
    (ref,) = mailbox.list_updates(0, refinements=refinement)
    assert mailbox.read_update(ref, max_bytes=99) == b"message"


@pytest.mark.parametrize("name", ["a.safetensors", "authorized_keys", "new"])
def test_a_link_in_place_of_the_message(tmp_path, victim, name):
    mailbox = found(tmp_path / "box")
    path = mailbox.path / "updates/000000/a.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(victim / name)
    mailbox.post_update(0, "a", b"message")
    assert path.read_bytes() == b"message"
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_lies_in_place_of_the_message_or_its_folder(tmp_path, kind):
    for place in ("updates/000000/a.safetensors", "updates/000000"):
        mailbox = found(tmp_path / place.replace("/", "-"))
        path = mailbox.path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if place.endswith("a.safetensors") or "folder" not in kind or "link" in kind:
            KINDS[kind](path)
        mailbox.post_update(0, "a", b"message")
        assert (mailbox.path / "updates/000000/a.safetensors").read_bytes() == b"message"


def test_another_message_is_still_a_conflict(tmp_path):
    mailbox = found(tmp_path)
    mailbox.post_update(0, "a", b"message")
    for other in (b"another", b"message and more", b"m"):
        with pytest.raises(UpdateConflictError):
            mailbox.post_update(0, "a", other)
    mailbox.post_update(0, "a", b"message")


def test_somebody_who_always_puts_it_back_is_refused_in_the_end(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    path = tmp_path / "updates/000000/a.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")
    original, times = storage.set_aside, []

    def again(target, *, below):
        times.append(original(target, below=below))
        path.symlink_to("nowhere")

    monkeypatch.setattr(storage, "set_aside", again)
    with pytest.raises(MailboxError):
        mailbox.post_update(0, "a", b"message")
    assert len(times) == 3


@pytest.mark.parametrize("place", ["metrics", "metrics/000000", "metrics/000000/x.json"])
def test_metrics_go_into_the_mailbox(tmp_path, victim, place):
    mailbox = found(tmp_path / "box")
    link = mailbox.path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "authorized_keys" if place.endswith("json") else victim)
    mailbox.post_metric(0, "x", {"eval_loss": 1.0})
    assert mailbox.read_metrics() == {0: {"x": {"eval_loss": 1.0}}}


@pytest.mark.parametrize("place", ["attachments", "attachments/a", f"attachments/a/{SALIENCY_FILE}"])
def test_attachments_go_into_the_mailbox(tmp_path, victim, place):
    mailbox = found(tmp_path / "box")
    link = mailbox.path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "authorized_keys" if place.endswith(SALIENCY_FILE) else victim)
    mailbox.post_attachment("a", SALIENCY_FILE, b"table")
    assert mailbox.read_attachment("a", SALIENCY_FILE, max_bytes=9) == b"table"


@pytest.mark.parametrize("name", ["round.json", "adapter_model.safetensors", "spec.json"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "link to a file"])
def test_a_client_reads_no_round_through_a_link_and_waits_for_no_pipe(tmp_path, name, kind):
    mailbox = found(tmp_path)
    path = tmp_path / "rounds/000000" / name
    path.unlink()
    KINDS[kind](path)
    with pytest.raises(MailboxError):
        mailbox.read(0, name)
    with pytest.raises(MailboxError):
        LightClient(mailbox, "a", None).step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_file_that_is_none_is_refused_and_not_taken_for_missing(tmp_path, kind):
    """Without one anybody may take part."""
    mailbox = found(tmp_path)
    KINDS[kind](tmp_path / "control.json")
    with pytest.raises(MailboxError):
        mailbox.read_control()


@pytest.mark.parametrize("target", ["authorized_keys", "new"])
@pytest.mark.parametrize("name", ["control.json", ".control.lock", "README.md", "rounds/.lock"])
def test_a_coordinator_writes_through_no_link_at_the_root(tmp_path, victim, name, target):
    mailbox = found(tmp_path / "box")
    path = mailbox.path / name
    path.unlink(missing_ok=True)
    path.symlink_to(victim / target)
    for name in "ab":
        post(mailbox, name, ones(1))
    for act in (
        lambda: change_control(mailbox, pause("lunch")),
        lambda: Coordinator(mailbox, card=lambda facts: {"README.md": b"card"}).serve(once=True),
    ):
        with contextlib.suppress(MailboxError):  # refusing is as good
            act()


def test_generation_code_goes_into_the_mailbox(tmp_path, victim):
    mailbox = found(tmp_path / "box")
    (mailbox.path / "custom_generate").symlink_to(victim)
    mailbox.refresh_root(lambda read: {"custom_generate/generate.py": b"code"})
    assert (mailbox.path / "custom_generate/generate.py").read_bytes() == b"code"


def test_leftovers_are_removed_through_no_link(tmp_path, victim):
    mailbox = found(tmp_path / "box")
    leftover = storage.temporary_name("a.safetensors")
    (mailbox.path / "updates/000000").mkdir(parents=True)
    (mailbox.path / "updates/000000" / leftover).symlink_to(victim)
    (mailbox.path / "rounds" / storage.temporary_name("000001")).symlink_to(victim)
    (mailbox.path / storage.temporary_name("README.md")).symlink_to(victim)
    mailbox.post_update(0, "a", b"message")
    mailbox.refresh_root()
    assert os.listdir(mailbox.path / "updates/000000") == ["a.safetensors"]


# File systems without hard links


def without_links(monkeypatch, number=errno.EPERM):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", fail)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_a_message_is_posted_once_too(tmp_path, monkeypatch, number):
    without_links(monkeypatch, number)
    mailbox = FolderMailbox(tmp_path)
    mailbox.post_update(0, "a", b"message")
    mailbox.post_update(0, "a", b"message")
    with pytest.raises(UpdateConflictError):
        mailbox.post_update(0, "a", b"another")
    (ref,) = mailbox.list_updates(0)
    assert mailbox.read_update(ref, max_bytes=9) == b"message"
    assert [name for name in os.listdir(tmp_path / "updates/000000") if ".tmp" in name] == []


def test_without_hard_links_a_federation_runs(tmp_path, monkeypatch):
    without_links(monkeypatch)
    mailbox = found(tmp_path / "box")
    clients = [LightClient(mailbox, name, tmp_path / name) for name in "ab"]
    coordinator = Coordinator(mailbox)
    while not coordinator.finished:
        for client in clients:
            client.step()
        coordinator.serve(once=True)
    assert [entry.client_id for entry in coordinator.record.accepted] == ["a", "b"]

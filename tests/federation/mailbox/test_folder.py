"""The folder mailbox: atomic rounds, at most one message per client and round, clear errors."""

import errno
import json
import os
import shutil
import threading

import pytest
from failing_disk import fail_at
from light import found, make_spec

from fedfstq_hf.errors import MailboxError, RoundConflictError, UpdateConflictError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.mailbox.protocol import Mailbox, UpdateRef

FILES = {"round.json": b"{}", "adapter_model.safetensors": b"adapter", "adapter_config.json": b"config"}


def all_names(path):
    return sorted(
        str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file() and entry.name != ".lock"
    )


def test_it_is_a_mailbox(tmp_path):
    assert isinstance(FolderMailbox(tmp_path), Mailbox)
    assert isinstance(open_mailbox(f"file://{tmp_path}"), FolderMailbox)
    with pytest.raises(
        MailboxError, match=r"No mailbox serves ftp:// addresses .* give hf://ORG/REPO or the path of a folder"
    ):
        open_mailbox("ftp://somewhere/else")


def test_an_empty_or_missing_folder_holds_no_round(tmp_path):
    assert FolderMailbox(tmp_path).head() is None
    assert FolderMailbox(tmp_path / "missing").head() is None
    FolderMailbox(tmp_path / "missing").refresh_root()
    assert not (tmp_path / "missing").exists()


def test_a_file_is_no_mailbox(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MailboxError, match="cannot be read as a mailbox"):
        FolderMailbox(tmp_path / "file").head()


def test_publish_and_read(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.publish(0, FILES)
    mailbox.publish(1, FILES | {"round.json": b"[]"})
    assert mailbox.head() == 1
    assert mailbox.read(1, "round.json") == b"[]"
    with pytest.raises(MailboxError, match=r"has no file x in round 1\. Expected .* `fedfstq init"):
        mailbox.read(1, "x")


def test_of_two_publishers_one_wins_and_its_round_is_whole(tmp_path):
    barrier, outcomes = threading.Barrier(2), []

    def publish(content):
        mailbox = FolderMailbox(tmp_path)
        barrier.wait()
        try:
            mailbox.publish(0, dict.fromkeys(FILES, content))
            outcomes.append(content)
        except RoundConflictError:
            outcomes.append(None)

    for number in range(10):
        barrier.reset()
        outcomes.clear()
        threads = [threading.Thread(target=publish, args=(name,)) for name in (b"one", b"two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [outcome for outcome in outcomes if outcome]
        assert len(winners) == 1, number
        mailbox = FolderMailbox(tmp_path)
        assert {mailbox.read(0, name) for name in FILES} == set(winners)
        assert all_names(tmp_path / "rounds") == sorted(f"000000/{name}" for name in FILES)
        shutil.rmtree(tmp_path / "rounds/000000")


def test_publishing_cleans_up_after_a_killed_coordinator(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.publish(0, FILES)
    half = tmp_path / "rounds" / storage.temporary_name("000001")
    half.mkdir()
    (half / "round.json").write_bytes(b"{")
    assert mailbox.head() == 0
    mailbox.publish(1, FILES)
    assert not half.exists()


def test_the_root_follows_the_newest_round_and_is_repaired(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.publish(0, FILES)
    mailbox.refresh_root()
    mailbox.publish(1, FILES | {"adapter_model.safetensors": b"newer"})
    (tmp_path / storage.temporary_name("adapter_model.safetensors")).write_bytes(b"half")
    mailbox.refresh_root()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"newer"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"dama")
    mailbox.refresh_root()
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == b"newer"
    assert len([name for name in all_names(tmp_path) if "/" not in name]) == 2


def test_an_update_is_posted_once(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.post_update(0, "b", b"message of b")
    mailbox.post_update(0, "a", b"message")
    mailbox.post_update(0, "a", b"message")
    assert mailbox.list_updates(0) == [UpdateRef("a", 0, 7), UpdateRef("b", 0, 12)]
    assert mailbox.read_update(UpdateRef("a", 0, 7), max_bytes=7) == b"message"
    assert mailbox.list_updates(1) == []
    with pytest.raises(
        UpdateConflictError, match=r"second process running under the same client_id\? Give each client"
    ):
        mailbox.post_update(0, "a", b"another")
    assert mailbox.read_update(UpdateRef("a", 0, 7), max_bytes=7) == b"message"


def test_updates_under_way_and_foreign_files_are_not_listed(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.post_update(0, "a", b"message")
    folder = tmp_path / "updates" / "000000"
    (folder / storage.temporary_name("c.safetensors")).write_bytes(b"half")
    (folder / "notes.txt").write_bytes(b"")
    (folder / "bad name.safetensors").write_bytes(b"")
    assert [ref.client_id for ref in mailbox.list_updates(0)] == ["a"]


def test_posting_cleans_up_after_the_same_client_only(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    mailbox.post_update(0, "a", b"message")
    folder = tmp_path / "updates" / "000000"
    mine, other = (folder / storage.temporary_name(f"{name}.safetensors") for name in ("b", "c"))
    mine.write_bytes(b"half")
    other.write_bytes(b"half")
    mailbox.post_update(0, "b", b"message")
    assert not mine.exists()
    assert other.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", ".hidden", "-x", "a" * 65, "a b", "a\n", "ä"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path, name):
    mailbox = FolderMailbox(tmp_path)
    with pytest.raises(MailboxError, match="cannot name a client or an evaluation set: use 1 to 64"):
        mailbox.post_update(0, name, b"message")
    with pytest.raises(MailboxError, match="cannot name a client"):
        mailbox.post_metric(0, name, {})
    with pytest.raises(MailboxError, match="cannot name a client"):
        mailbox.read_update(UpdateRef(name, 0, 7), max_bytes=7)
    assert all_names(tmp_path) == []


def test_metrics_replace_earlier_ones_of_their_source(tmp_path):
    mailbox = FolderMailbox(tmp_path)
    assert mailbox.read_metrics() == {}
    mailbox.post_metric(3, "held-out", {"eval_loss": 2.0})
    mailbox.post_metric(3, "held-out", {"eval_loss": 1.5})
    mailbox.post_metric(3, "other", {"exact_match": 0.5})
    mailbox.post_metric(5, "held-out", {"eval_loss": 1.0})
    assert mailbox.read_metrics() == {
        3: {"held-out": {"eval_loss": 1.5}, "other": {"exact_match": 0.5}},
        5: {"held-out": {"eval_loss": 1.0}},
    }


def test_metrics_that_are_none_are_left_out_and_named(tmp_path, caplog):
    mailbox = FolderMailbox(tmp_path)
    mailbox.post_metric(3, "held-out", {})
    mailbox.post_metric(3, "other", {"eval_loss": 1.0})
    (tmp_path / "metrics/000003/held-out.json").write_text("[1, 2]")
    assert mailbox.read_metrics() == {3: {"other": {"eval_loss": 1.0}}}
    assert "metrics/000003/held-out.json" in caplog.text


@pytest.mark.parametrize(("call", "number"), [("mkdir", 0), ("fsync", 0), ("fsync", 1), ("fsync", 2), ("rename", 0)])
def test_a_full_disk_during_publish_loses_nothing(tmp_path, monkeypatch, call, number):
    mailbox = FolderMailbox(tmp_path)
    mailbox.publish(0, FILES)
    before = all_names(tmp_path)
    with monkeypatch.context() as patch:
        fail_at(patch, call, number)
        with pytest.raises(MailboxError, match="Free some space and start again: nothing was lost"):
            mailbox.publish(1, FILES)
    assert all_names(tmp_path) == before
    assert os.listdir(tmp_path / "rounds").count("000001") == 0
    assert mailbox.head() == 0
    mailbox.publish(1, FILES)
    assert mailbox.head() == 1


@pytest.mark.parametrize(("call", "number"), [("mkdir", 0), ("fsync", 2), ("link", 0)])
def test_a_full_disk_during_post_loses_nothing(tmp_path, monkeypatch, call, number):
    mailbox = FolderMailbox(tmp_path)
    mailbox.publish(0, FILES)
    with monkeypatch.context() as patch:
        fail_at(patch, call, number)
        with pytest.raises(MailboxError, match="No space left on device"):
            mailbox.post_update(0, "a", b"message")
    assert mailbox.list_updates(0) == []
    assert [name for name in all_names(tmp_path) if name.startswith("updates")] == []
    mailbox.post_update(0, "a", b"message")
    assert [ref.client_id for ref in mailbox.list_updates(0)] == ["a"]


def test_a_read_only_disk_gives_one_clear_line(tmp_path, monkeypatch):
    fail_at(monkeypatch, "mkdir", 0, errno.EROFS)
    with pytest.raises(MailboxError, match=r"Could not create .*: Read-only file system"):
        FolderMailbox(tmp_path / "new").publish(0, FILES)


def test_a_second_federation_is_refused(tmp_path):
    found(tmp_path)
    with pytest.raises(RoundConflictError, match=r"already holds a federation\. Give a new address, or go on with"):
        found(tmp_path)


def test_round_zero_holds_spec_and_record(tmp_path):
    mailbox = found(tmp_path)
    assert json.loads(mailbox.read(0, "spec.json"))["schema"] == make_spec().schema
    assert json.loads(mailbox.read(0, "round.json"))["round"] == 0
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == mailbox.read(0, "adapter_model.safetensors")

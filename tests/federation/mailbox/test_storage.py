"""Durable files: whole or absent, whatever fails and whoever else writes."""

import errno
import os
import signal
import subprocess
import time

import pytest
from failing_disk import fail_at
from filelock import lock_descriptor

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import storage


def names(folder):
    return sorted(os.listdir(folder))


def test_replace_sets_new_content(tmp_path):
    storage.replace_file(tmp_path / "a", b"one")
    storage.replace_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert names(tmp_path) == ["a"]


def test_create_never_overwrites(tmp_path):
    assert storage.create_file(tmp_path / "a", b"one")
    assert not storage.create_file(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_create_folder_never_overwrites(tmp_path):
    assert storage.create_folder(tmp_path / "r", {"x": b"1", "y": b"2"})
    assert not storage.create_folder(tmp_path / "r", {"x": b"3"})
    assert names(tmp_path) == ["r"]
    assert (tmp_path / "r" / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("write", "call", "number"),
    [
        ("replace_file", "fsync", 0),
        ("replace_file", "replace", 0),
        ("create_file", "fsync", 0),
        ("create_file", "link", 0),
        ("create_folder", "mkdir", 0),
        ("create_folder", "fsync", 0),
        ("create_folder", "fsync", 1),
        ("create_folder", "rename", 0),
    ],
)
def test_a_full_disk_leaves_nothing_and_then_works_again(tmp_path, monkeypatch, write, call, number):
    content = {"x": b"1"} if write == "create_folder" else b"one"
    with monkeypatch.context() as patch:
        fail_at(patch, call, number)
        with pytest.raises(MailboxError, match=r"Nothing was published\. Free some space and start again"):
            getattr(storage, write)(tmp_path / "a", content)
    assert names(tmp_path) == []
    getattr(storage, write)(tmp_path / "a", content)
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write", ["replace_file", "create_file", "create_folder"])
def test_a_failing_last_sync_does_not_claim_that_nothing_was_written(tmp_path, monkeypatch, write):
    content = {"x": b"1"} if write == "create_folder" else b"one"
    with monkeypatch.context() as patch:
        fail_at(patch, "fsync", 2 if write == "create_folder" else 1, errno.EIO)
        with pytest.raises(MailboxError, match="was written, but could not be made safe"):
            getattr(storage, write)(tmp_path / "a", content)
    assert names(tmp_path) == ["a"]


def test_a_really_full_disk(tmp_path):
    """A tmpfs of 64 kB; the kernel fails the write itself, in the middle of a file."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        storage.replace_file(small / "a", b"old")
        for write, content in (
            (storage.replace_file, bytes(200_000)),
            (storage.create_file, bytes(200_000)),
            (storage.create_folder, {"x": b"1", "y": bytes(200_000)}),
        ):
            with pytest.raises(MailboxError, match="No space left on device"):
                write(small / ("a" if write is storage.replace_file else "b"), content)
            assert names(small) == ["a"]
            assert (small / "a").read_bytes() == b"old"
        storage.replace_file(small / "a", bytes(20_000))
        assert storage.create_folder(small / "b", {"x": bytes(20_000)})
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_leftovers_go_and_everything_else_stays(tmp_path):
    (tmp_path / storage.temporary_name("a.safetensors")).write_bytes(b"half")
    (tmp_path / storage.temporary_name("b.safetensors")).write_bytes(b"half")
    folder = tmp_path / storage.temporary_name("000001")
    folder.mkdir()
    (folder / "x").write_bytes(b"half")
    (tmp_path / "kept").write_bytes(b"whole")
    (tmp_path / ".tmp-of-somebody-else").write_bytes(b"whole")
    storage.remove_leftovers(tmp_path, "a.safetensors")
    assert len(names(tmp_path)) == 4
    storage.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".tmp-of-somebody-else", "kept"]


def test_leftovers_of_a_client_whose_name_begins_like_another_stay(tmp_path):
    (tmp_path / storage.temporary_name("a.safetensors-1.safetensors")).write_bytes(b"half")
    storage.remove_leftovers(tmp_path, "a.safetensors")
    assert len(names(tmp_path)) == 1


def test_make_folder_names_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MailboxError, match=r"Could not create .*file/sub"):
        storage.make_folder(tmp_path / "file" / "sub")


def test_durable_writes_are_synced_and_others_are_not(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor))
    storage.replace_file(tmp_path / "a", b"", durable=False)
    storage.create_file(tmp_path / "b", b"", durable=False)
    storage.create_folder(tmp_path / "c", {"x": b""}, durable=False)
    storage.make_folder(tmp_path / "d" / "e", durable=False)
    assert synced == []
    storage.replace_file(tmp_path / "a", b"")  # the file, its folder
    assert len(synced) == 2
    storage.create_folder(tmp_path / "f", {"x": b"", "y": b""})  # two files, their folder, its parent
    assert len(synced) == 6
    storage.make_folder(tmp_path / "g" / "h")
    assert len(synced) == 8


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path):
    path = tmp_path / ".lock"
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with storage.locked(path):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(read, 1)
    with open(path, "ab") as file:
        assert not lock_descriptor(file.fileno(), blocking=False)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with storage.locked(path):
        pass
    os.close(read)
    os.close(write)

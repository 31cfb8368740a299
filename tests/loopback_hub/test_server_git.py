"""Object names of the loopback Hub against git itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from datetime import UTC, datetime

import pytest

from tests.loopback_hub.objects import File, git_oid, lfs_pointer, make_commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def test_blobs_trees_and_commits_are_named_as_git_names_them(tmp_path):
    contents = {"a": b"1", "a.b/c": b"2", "a.b/d/e": b"", "a-b": b"\0", "z/y": lfs_pointer("0" * 64, 3)}
    date = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    files = {path: File(git_oid("blob", content), len(content)) for path, content in contents.items()}
    first = make_commit(files, (), "title", "", "ann", date)
    second = make_commit(files, (first.oid,), "title", "a longer\nmessage", "ann", date)

    identity = {"NAME": "ann", "EMAIL": "ann@users.noreply.localhost", "DATE": f"{int(date.timestamp())} +0000"}
    variables = {f"GIT_{who}_{name}": value for who in ("AUTHOR", "COMMITTER") for name, value in identity.items()}
    settings = {"GIT_DIR": str(tmp_path / ".git"), "GIT_WORK_TREE": str(tmp_path), "GIT_CONFIG_GLOBAL": os.devnull}

    def git(*arguments):
        environment = os.environ | variables | settings
        done = subprocess.run(
            ["git", *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    git("add", ".")
    tree = git("write-tree")
    assert first.folders[""] == tree
    assert first.folders["a.b"] == git("rev-parse", f"{tree}:a.b")
    assert first.oid == git("commit-tree", tree, "-m", "title")
    assert second.oid == git("commit-tree", tree, "-p", first.oid, "-m", "title", "-m", "a longer\nmessage")

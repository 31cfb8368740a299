"""Importing: without `fcntl`, which not every system has, and the rooms of the federation in one direction only."""

import ast
import subprocess
import sys
from pathlib import Path

import fedfstq_hf

PACKAGE = Path(fedfstq_hf.__file__).parent
EVERYTHING = """
import importlib, os, pkgutil, sys
sys.modules["fcntl"] = None
import filelock  # it asks for fcntl itself, and does without
for flag in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC"):
    delattr(os, flag)
import fedfstq_hf
for module in pkgutil.walk_packages(fedfstq_hf.__path__, "fedfstq_hf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("all", "fedfstq_hf.federation.storage" in sys.modules)
"""


def test_no_module_needs_fcntl():
    done = subprocess.run([sys.executable, "-c", EVERYTHING], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.stdout.splitlines()[-1:] == ["all True"], done.stderr[-2000:]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_what_a_mailbox_is_made_of_is_known_to_the_module_that_opens_it_alone():
    kinds = ("fedfstq_hf.federation.mailbox.hub", "fedfstq_hf.federation.mailbox.folder")
    federation = PACKAGE / "federation"
    found = {
        path.relative_to(federation).as_posix()
        for path in federation.rglob("*.py")
        if "hub" not in path.parts and any(name.startswith(kinds) for name in imports(path))
    }
    assert found == {"mailbox/open.py"}


def test_the_federation_knows_neither_trainer_nor_reports_nor_commands():
    above = tuple(f"fedfstq_hf.{name}" for name in ("trainer", "training", "reporting", "cli", "simulation", "sharing"))
    for path in (PACKAGE / "federation").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(above)], path


def test_client_and_server_do_not_know_each_other():
    federation = PACKAGE / "federation"
    for room, other in (("client", "server"), ("server", "client"), ("mailbox", "client"), ("mailbox", "server")):
        for path in (federation / room).rglob("*.py"):
            assert not [name for name in imports(path) if name.startswith(f"fedfstq_hf.federation.{other}")], path

"""What one client can leave in a folder mailbox beside, or instead of, its message."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path


def folder(path: Path) -> None:
    path.mkdir()


def full_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_a_file(path: Path) -> None:
    secret = path.parent / f".secret-{path.name}"
    secret.write_bytes(b"secret")
    path.symlink_to(secret)


def link_to_a_folder(path: Path) -> None:
    elsewhere = path.parent / f".elsewhere-{path.name}"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "precious").write_bytes(b"precious")
    path.symlink_to(elsewhere)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def no_bytes(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path], None]] = {
    kind.__name__.replace("_", " "): kind
    for kind in (
        folder,
        full_folder,
        dangling_link,
        link_to_itself,
        link_to_a_file,
        link_to_a_folder,
        link_to_a_device,
        pipe,
        bound_socket,
    )
}
"""What is no plain file; `path` must not exist."""

FILES: dict[str, Callable[[Path], None]] = {kind.__name__.replace("_", " "): kind for kind in (no_bytes, noise, sparse)}


def odd_names(place: Path) -> None:
    """Files whose names no client has."""
    for name in (
        b"\xff\xfe.safetensors",
        b"a b.safetensors",
        b"\x1b[31mred.safetensors",
        b".safetensors",
        b"-.safetensors",
    ):
        with open(os.path.join(os.fsencode(place), name), "wb") as file:
            file.write(b"x")

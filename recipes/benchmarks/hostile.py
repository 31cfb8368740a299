"""What the two fuzzers of a federation share: odd JSON, odd bytes, odd files, and a watch over a process."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

CANARY = "fedfstq_canary"
"""A module that nothing may import; its name is put wherever a config may name code."""
SECRET = "secret.jsonl"
"""A file that nothing may read; its path is put wherever a mailbox may name a file."""
OUTSIDE = "outside"
HANG_SECONDS = 60
MAX_TEXT = 4_000_000
"""Characters of JSON that a repeated list grows to, about: more would be the fuzzer's own memory."""

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 16, 255, 2**15, 10**5, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**30, -(10**30), 0.0,
    -0.0, 0.5, 1e-9, 1.0, 1.5, 1e9, 1e30, 1e308, -1e308, 5e-324, float("nan"), float("inf"), -float("inf"), True,
    False,
)  # fmt: skip
TEXTS: tuple[str, ...] = (
    "", "a", "demo", "gpt2", CANARY, f"{CANARY}.module", f"{CANARY}:thing", "none", "null", "all-linear", "auto",
    "NaN", "1e999", "/etc/passwd", "/tmp/fedfstq-loot", "../../../../tmp/fedfstq-loot", "~/.ssh/id_rsa",
    "file:///etc/passwd", "http://127.0.0.1:9/x", "hf://evil/run", "evil/loot", "hf_ATTACKERS_TOKEN", "{{7*7}}",
    "%s%s%n", "$\\frac{", "x" * 300, "y" * 100_000, "(a+)+$", "(.*)*x", "^((a|aa)+)+$", "(?=a)*", "[",
    "\x1b[2J\x1b]0;owned\x07", "\u202e\ud800\x00", "1e9bpp", "99999999999GB", "0.1bpp", "auto:0.05bpp..96kB",
    "ramp:1bpp..0bpp", "round:1e308bpp", "5s@0bps", "-3kB", "<script>", "---\nlicense: evil\n---", "fp32",
    "fstq", "paper", "topk", "SGD", "LBFGS", "adafactor", "galore_adamw", "cosine", "LORA", "XLORA", "PREFIX_TUNING",
    "VERA", "pissa", "loftq", "eva", "lora_only", "unbiased", "hard", "kept",
)  # fmt: skip
KEYS: tuple[str, ...] = (
    "push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "output_dir", "report_to", "deepspeed", "fsdp",
    "optim", "optim_args", "optim_target_modules", "resume_from_checkpoint", "logging_dir", "dataloader_num_workers",
    "torch_compile", "auto_mapping", "megatron_core", "megatron_config", "loftq_config", "eva_config", "corda_config",
    "layer_replication", "runtime_config", "target_parameters", "trainable_token_indices", "modules_to_save",
    "revision", "path", "columns", "repo", "__class__", "__init__", "trust_remote_code", "id", "format", CANARY,
)  # fmt: skip


_DEEP = "stands for lists in lists, deeper than Python's own stack"


def odd_value(draw: random.Random, secret: str, depth: int = 0) -> Any:
    """A number, text, list or mapping that a careless reader trips over."""
    kind = draw.random()
    if kind < 0.4:
        return draw.choice(NUMBERS)
    if kind < 0.8:
        return secret if draw.random() < 0.1 else draw.choice(TEXTS)
    if kind < 0.85:
        return None
    if kind < 0.87:
        return draw.choice((_nested(5), _nested(40), _DEEP))
    if depth > 2:
        return []
    count = draw.choice((0, 1, 2, 3, 2000 if depth == 0 else 4))
    if kind < 0.94:
        return [odd_value(draw, secret, depth + 1) for _ in range(count)]
    return {draw.choice(KEYS + TEXTS): odd_value(draw, secret, depth + 1) for _ in range(min(count, 20))}


def mutate_json(draw: random.Random, value: Any, secret: str) -> Any:
    """A copy with one to four values changed, dropped, added, swapped or repeated."""
    root = {"": copy.deepcopy(value)}
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        holder, key = draw.choice(list(_slots(root)))
        match draw.randrange(8):
            case 0 if isinstance(holder, dict) and holder is not root:
                holder.pop(key)
            case 1 if isinstance(holder[key], dict):
                holder[key][draw.choice(KEYS + TEXTS)] = odd_value(draw, secret)
            case 2:
                other, name = draw.choice(list(_slots(root)))
                holder[key] = copy.deepcopy(other[name])
            case 3 if isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
                holder[key] = _nudged(draw, holder[key])
            case 4 if isinstance(holder[key], list) and holder[key]:
                times = draw.choice((2, 100, 5000))
                holder[key] = holder[key] * min(times, max(2, MAX_TEXT // len(dump(holder[key]))))
            case _:
                holder[key] = odd_value(draw, secret)
    return root[""]


def dump(value: Any) -> bytes:
    """JSON as a hostile writer has it: NaN, lone surrogates and any depth pass."""
    deep = "[" * 20_000 + "]" * 20_000
    try:
        text = json.dumps(value).replace(json.dumps(_DEEP), deep)
    except MemoryError:  # lists of lists that several changes have repeated: more than the fuzzer itself may hold
        text = deep
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """Flipped, cut, repeated, inserted or replaced bytes."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(out) + 1)
        match draw.randrange(7):
            case 0 if out:
                out[min(place, len(out) - 1)] ^= 1 << draw.randrange(8)
            case 1:
                del out[place:]
            case 2:
                out[place:place] = draw.randbytes(draw.choice((1, 8, 200)))
            case 3:
                out[place : place + 8] = draw.choice((0, 1, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
            case 4:
                out[:8] = draw.choice((0, 1, 10**6, 2**40, 2**64 - 1)).to_bytes(8, "little")
            case 5 if out:
                out *= draw.choice((2, 3))
            case _:
                found = list(re.finditer(rb"[0-9]+", bytes(out[:2000])))
                if found:
                    at = draw.choice(found)
                    out[at.start() : at.end()] = str(draw.choice((0, 1, 4, 10**5, 2**31, 2**63, -1))).encode()
    return bytes(out)


def write(path: Path, data: bytes, below: Path) -> None:
    """Write a file of the hostile party's; where something odd was put in its way before, nothing happens."""
    folders = [folder for folder in path.parents if folder.is_relative_to(below)]
    if any(folder.is_symlink() or (folder.exists() and not folder.is_dir()) for folder in folders):
        return
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.chmod(0o600)
    path.write_bytes(data)


def plant(draw: random.Random, path: Path, data: bytes, secret: Path) -> str:
    """Put something odd where a file is expected; returns what."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
        if path.exists():
            return "left"
    except OSError:  # something odd was put there before
        return "left"
    kind = draw.choice(
        (
            "file",
            "folder",
            "full folder",
            "fifo",
            "link to a secret",
            "dangling link",
            "link to itself",
            "device",
            "unreadable",
        )
    )
    match kind:
        case "file":
            path.write_bytes(mutate_bytes(draw, data))
        case "folder":
            path.mkdir()
        case "full folder":
            path.mkdir()
            (path / "x").write_bytes(data)
        case "fifo":
            os.mkfifo(path)
        case "link to a secret":
            path.symlink_to(secret)
        case "dangling link":
            path.symlink_to(path.parent / "nowhere" / "at-all")
        case "link to itself":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.write_bytes(data)
            path.chmod(0)
    return kind


class Watch:
    """Notes what a process does that joining a federation must never make it do. There is one for each process.

    Args:
        secret: no byte of this file may be read.

    Attributes:
        outside: a folder beside it that links of a mailbox lead to, and that nothing may write.
    """

    def __init__(self, secret: Path) -> None:
        self.outside = secret.with_name(OUTSIDE)
        self.outside.mkdir()
        (self.outside / "kept").write_text("kept")
        self.secret = os.path.realpath(secret)
        self.problems: list[str] = []
        self._writable: list[re.Pattern[str]] = []
        self._hostile: str | None = None
        self._on = False
        sys.addaudithook(self._hook)

    @contextmanager
    def over(self, writable: Sequence[str], hostile: Path, here: Path) -> Iterator[list[str]]:
        """Within it, what the process must not do is noted in the list that it yields.

        Args:
            writable: patterns; a write to a path that none of them matches whole is noted.
            hostile: no code in this folder may run.
            here: an empty folder to work in. Python does not tell which folder a bare name is opened in; if it is this
                one, something lies there afterwards.
        """
        self.problems = []
        self._writable, self._hostile = [re.compile(pattern) for pattern in writable], str(hostile)
        outside = self._outside()
        with contextlib.chdir(here):
            self._on = True
            try:
                yield self.problems
            finally:
                self._on = False
        self.problems += [f"{name} was written into the working folder" for name in os.listdir(here)]
        if self._outside() != outside:
            self.problems.append(f"{self.outside} was changed")

    def _outside(self) -> list[tuple[str, bytes]]:
        return sorted((str(path), path.read_bytes()) for path in self.outside.rglob("*") if path.is_file())

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        found: str | None = None
        if event == "open":
            found = self._opened(*arguments)
        elif event in _PATHS:
            for path, folder in _PATHS[event]:
                place = arguments[folder] if folder is not None and folder < len(arguments) else -1
                found = found or self._written(arguments[path], place)
        elif event in _FORBIDDEN or (event == "import" and str(arguments[0]).startswith(CANARY)):
            found = f"{event} {arguments!r:.200}"
        elif event == "exec":
            code = arguments[0]
            if isinstance(code, CodeType) and self._hostile and code.co_filename.startswith(self._hostile):
                found = f"code of {code.co_filename} was run"
        if found is not None:
            self.problems.append(found)

    def _opened(self, path: Any, mode: Any, flags: Any) -> str | None:
        writes = any(letter in (mode or "") for letter in "wax+") or (flags or 0) & (
            os.O_WRONLY | os.O_RDWR | os.O_CREAT
        )
        if writes:
            return self._written(path)
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.realpath(os.fsdecode(path)) == self.secret:
            return f"{os.fsdecode(path)} was read"
        return None

    def _written(self, path: Any, folder: Any = -1) -> str | None:
        """`folder`: descriptor that a relative path starts from; -1 where there is none, or it is not told."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return None  # a descriptor, whose opening was looked at
        given = os.fsdecode(path)
        if isinstance(folder, int) and folder >= 0:
            given = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), given)
        elif given not in ("", ".", "..") and "/" not in given:
            return None  # opened in a folder that Python does not tell: see `Watch.over`
        given = os.path.abspath(given)
        real = os.path.join(os.path.realpath(os.path.dirname(given)), os.path.basename(given))
        if real.startswith("/dev/null") or any(pattern.fullmatch(real) for pattern in self._writable):
            return None
        return f"{real} was written or removed"


# event -> places of its paths, and of the descriptors that these are relative to, in its arguments
_PATHS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.mkdir": ((0, 2),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "shutil.rmtree": ((0, None),),
    "shutil.move": ((0, None), (1, None)),
    "shutil.copyfile": ((1, None),),
}
_FORBIDDEN = frozenset(
    {
        "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "socket.connect",
        "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto", "pickle.find_class",
        "ctypes.dlopen",
    }
)  # fmt: skip


class Hang(BaseException):
    """A case ran longer than `HANG_SECONDS`; no `except Exception` swallows it."""


@contextmanager
def limited(seconds: int = HANG_SECONDS) -> Iterator[None]:
    """Raises `Hang` in the main thread after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _slots(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        holder = stack.pop()
        for key in list(holder) if isinstance(holder, dict) else range(min(len(holder), 50)):
            yield holder, key
            if isinstance(holder[key], (dict, list)):
                stack.append(holder[key])


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def _nudged(draw: random.Random, value: float) -> float:
    return draw.choice((value + 1, value - 1, -value, value * 2, value * 1000, value * 10**9, value / 2, value / 10**6))

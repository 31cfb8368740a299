"""What several commands share: `--key value` overrides, an address, exit codes, quiet libraries."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.text import printable

OVERRIDABLE = {"allow_extra_args": True, "ignore_unknown_options": True}
INTERRUPTED = 130

Patience = Annotated[
    float, typer.Option(help="Seconds to go on asking a mailbox that does not answer, at the first look.")
]
ONE_SHOT = 30.0
MailboxAddress = Annotated[str, typer.Argument(help="Address of a federation: hf://ORG/REPO or a folder.")]


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`["--a.b", "1", "--c=2"]` as `{"a.b": "1", "c": "2"}`.

    Raises:
        ConfigError: an argument is no option, or has no value.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or len(key) == 2:
            raise ConfigError(
                f"Cannot make sense of {key!r}; expected --KEY VALUE, such as --training.learning_rate 1e-3."
            )
        name, equals, value = key[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: type --{name} VALUE.")
            value = rest.pop(0)
        overrides[_key(name)] = value
    return overrides


def _key(name: str) -> str:
    """Keys have no dashes, and people type them all the same; names of methods may have them."""
    parts = name.split(".")
    own = 1 if parts[0] == "methods" and len(parts) > 1 else None
    return ".".join(part if place == own else part.replace("-", "_") for place, part in enumerate(parts))


class _Visible(logging.Formatter):
    """Shows control characters escaped: a message may quote what others wrote, and this goes to a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line, 4000) for line in super().format(record).split("\n"))


def quieten() -> None:
    """Keep libraries' chatter out of the output; our own log goes to stderr."""
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Visible("%(message)s"))
    for noisy in ("httpx", "httpx2", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # peft's business
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

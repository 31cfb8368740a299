"""`FedFSTQConfig`: a client's own settings. What the whole federation shares lies in its mailbox and wins."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.methods import LocalSwitches
from fedfstq_hf.text import unknown

CONFIG_FILE = "fedfstq_config.json"
_CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class FedFSTQConfig(LocalSwitches):
    """Settings of a federated Trainer, passed beside `TrainingArguments`.

    With a `mailbox`, `train()` takes part in the federation there: its spec says rounds, local steps and method, and of
    the switches here (`methods.LocalSwitches`) the two budgets count alone. Without one, `train()` trains locally and
    `FedFSTQTrainer.pack_update()` returns the message.
    """

    mailbox: str | None = field(
        default=None, metadata={"help": "Address of the federation: hf://ORG/REPO, or a folder."}
    )
    client_id: str = field(
        default="client",
        metadata={"help": "Name of this client, unique in the federation: 1 to 64 letters, digits, '.', '_' or '-'."},
    )
    state_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of this client's private state: residual, pending message, token sensitivities, places in "
            "checkpoints. When not given, OUTPUT_DIR.fedfstq beside the output folder, from where nothing is uploaded."
        },
    )
    signing_key: str | None = field(
        default=None,
        metadata={"help": "Key file that signs this client's messages; `fedfstq keys new KEYFILE` makes one."},
    )
    repo: str | None = field(
        default=None,
        metadata={
            "help": "Hub repo this client writes its messages to, where it is not ORG/RUN-CLIENT; nothing that the "
            "mailbox says changes that. ORG/RUN-mailbox agrees to a public mailbox that all clients write to."
        },
    )
    poll_seconds: float = field(default=2.0, metadata={"help": "Mean seconds between two looks at the mailbox."})
    wait_seconds: float | None = field(
        default=None, metadata={"help": "Give up after waiting that long for a round; for ever when not given."}
    )
    share_saliency: bool = field(
        default=False,
        metadata={
            "help": "Let the federation publish, in aggregate, how sensitive the loss is to each token; says something "
            "about the words in the data. Sent once, and only if the federation asks for it."
        },
    )
    num_examples: int | None = field(
        default=None,
        metadata={
            "help": "Weight of this client in the mean; when not given the length of train_dataset, or of a stream the "
            "rows that a round saw."
        },
    )
    local_steps: int | None = field(
        default=None, metadata={"help": "Local optimizer steps per round; a mailbox's spec wins."}
    )
    refresh_steps: int = field(
        default=10, metadata={"help": "Token sensitivity is read off every that many local steps (the paper's H)."}
    )
    rho: float = field(
        default=0.9, metadata={"help": "Decay of the token and adapter Fisher averages (the paper's rho)."}
    )

    def __post_init__(self) -> None:
        if not isinstance(self.client_id, str) or not _CLIENT_ID.fullmatch(self.client_id):
            raise ConfigError(
                f"client_id {self.client_id!r} is not 1 to 64 letters, digits, '.', '_' or '-' starting with a letter "
                "or digit."
            )
        if self.local_steps is not None and self.local_steps < 1:
            raise ConfigError(f"local_steps must be at least 1, not {self.local_steps!r}.")
        if self.num_examples is not None and self.num_examples < 1:
            raise ConfigError(f"num_examples must be at least 1, not {self.num_examples!r}.")
        if self.refresh_steps < 1:
            raise ConfigError(f"refresh_steps must be at least 1, not {self.refresh_steps!r}.")
        if not 0 <= self.rho < 1:
            raise ConfigError(f"rho must lie in [0, 1), not {self.rho!r}.")
        object.__setattr__(self, "codec_options", dict(self.codec_options))
        self.check_switches()
        if self.poll_seconds <= 0:
            raise ConfigError(f"poll_seconds must be positive, not {self.poll_seconds!r}.")
        if self.wait_seconds is not None and self.wait_seconds < 0:
            raise ConfigError(f"wait_seconds must be at least 0, or None to wait for ever; not {self.wait_seconds!r}.")
        if self.repo is not None:
            from fedfstq_hf.federation.mailbox.protocol import (
                checked_repo,  # not at the top: it imports the Hub's client
            )

            checked_repo(self.repo)
        for name in ("uplink_budget", "refinement_budget"):
            if (budget := getattr(self, name)) is not None:
                from fedfstq_hf.codec.budget import check_budget  # not at the top: it imports torch

                check_budget(budget, refinement=name == "refinement_budget")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write `fedfstq_config.json` into `folder`; returns its path."""
        path = Path(folder) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> FedFSTQConfig:
        """Read `fedfstq_config.json` from `folder`."""
        path = Path(folder) / CONFIG_FILE
        if not path.is_file():
            raise ConfigError(
                f"{path} does not exist. Write it with FedFSTQConfig(...).save_pretrained({str(folder)!r})."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path} is not JSON: {error}. Write it with FedFSTQConfig(...).save_pretrained."
            ) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object of settings, not {values!r:.40}.")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FedFSTQConfig:
        """From a plain dict; an unknown key is refused with the nearest valid one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(unknown("setting", key, sorted(known)))
        return cls(**values)

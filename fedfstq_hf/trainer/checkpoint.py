"""A client's private state on disk: its folder, and what a Trainer checkpoint needs besides to go on within a round.

The folder lies where the Trainer never uploads from. Beside the client's session it holds a file for each checkpoint:
the averages over steps, the losses of the round so far, and as JSON in its metadata which step of which round of which
federation it is. The residual is not in it: it lies in the session, which changes between rounds only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.client.participation import Assignment
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE
from fedfstq_hf.federation.spec import FederationSpec

logger = logging.getLogger(__name__)

SUFFIX = ".fedfstq"
START = "start"
_FOLDER = "checkpoints"
_STATE = ".safetensors"
_FORMAT = 3


def state_folder(state_dir: str | None, output_dir: str) -> Path:
    """`state_dir`, or the folder `OUTPUT_DIR.fedfstq` beside the output folder where none is given.

    A link counts as what it points to, so that the same output folder by another name has the same state.

    Raises:
        ConfigError: nothing lies beside the output folder, as it is the root of the file system.
    """
    if state_dir is not None:
        return Path(state_dir)
    folder = Path(output_dir).resolve()
    if not folder.name:
        raise ConfigError(
            f"No folder can lie beside output_dir={output_dir!r}, to hold this client's private state. Type "
            "FedFSTQConfig(state_dir=FOLDER), or another output_dir."
        )
    return folder.with_name(folder.name + SUFFIX)


def make_state_folder(folder: Path) -> None:
    """Create it where it is missing.

    Raises:
        ConfigError: that cannot be done there.
    """
    try:
        storage.make_folder(folder)
    except MailboxError as error:
        raise ConfigError(
            f"{error} It is for this client's private state: type FedFSTQConfig(state_dir=FOLDER) with another folder."
        ) from error


def check_not_uploaded(state_dir: str | None, output_dir: str) -> None:
    """Refuse a state folder in an output folder that is pushed to the Hub.

    Raises:
        ConfigError: saying what to type.
    """
    if state_dir is None:
        return
    folder, uploaded = Path(state_dir).resolve(), Path(output_dir).resolve()
    if folder.is_relative_to(uploaded):
        raise ConfigError(
            f"state_dir={state_dir!r} lies in output_dir={output_dir!r}, and push_to_hub=True uploads from there: the "
            "state holds the sensitivities of this client's tokens and updates that were not sent. Type "
            f"FedFSTQConfig(state_dir={str(uploaded) + SUFFIX!r}), or leave state_dir out."
        )


@dataclass(frozen=True)
class Place:
    """Where training stood when a checkpoint was taken.

    Attributes:
        client_id: whose.
        global_step: of the Trainer.
        local_step: steps done of the round; of the whole training where there is no federation.
        federation: id of its spec; None for local training.
        round: None between two rounds.
        adapter_sha256: of the adapter that the round started from.
        checkpoint_sha256: tells the checkpoint that this is the state of, wherever its folder lies now.
        metrics: the federation's figures that are logged with every row.
    """

    client_id: str
    global_step: int
    local_step: int
    federation: str | None = None
    round: int | None = None
    adapter_sha256: str | None = None
    checkpoint_sha256: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint's folder with its place and tensors."""

    folder: str
    place: Place
    tensors: dict[str, Tensor]

    def within(self, assignment: Assignment) -> bool:
        """Whether it was taken in the middle of this very round."""
        return self.place.round == assignment.round and self.place.adapter_sha256 == assignment.adapter_sha256

    def leads_to(self, assignment: Assignment | None, spec: FederationSpec) -> bool:
        """Whether its log and step counter are those of this client before the assignment, or in the middle of it."""
        if assignment is None:  # the federation is finished: its log may be read on
            return self.place.federation == spec.id
        if assignment.global_step is None:
            return False
        mine = (self.place.federation, self.place.client_id) == (spec.id, assignment.session.client_id)
        done = self.place.local_step if self.within(assignment) else 0
        return mine and self.place.global_step <= assignment.global_step + done

    @property
    def start(self) -> Tensor | None:
        """The adapter that local training started from, (num_params,)."""
        return self.tensors.get(START)


class CheckpointStates:
    """The state files of one trainer's checkpoints: `FOLDER/checkpoints/checkpoint-N.safetensors`.

    Args:
        folder: the client's state folder.
        output_dir: of the trainer; holds its checkpoint folders.
    """

    def __init__(self, folder: Path, output_dir: str) -> None:
        self._root = folder / _FOLDER
        self._given_dir, self._output_dir = output_dir, Path(output_dir).resolve()

    def save(self, checkpoint: str | Path, place: Place, tensors: Mapping[str, Tensor]) -> None:
        """Write the state of a checkpoint, and delete those whose checkpoint folders are gone.

        Args:
            checkpoint: its folder, already written.
        """
        place = dataclasses.replace(place, checkpoint_sha256=_sha256(checkpoint))
        metadata = {"fedfstq": json.dumps({"format": _FORMAT, **dataclasses.asdict(place)}, sort_keys=True)}
        path = self.path(checkpoint)
        make_state_folder(path.parent)
        storage.replace_file(path, save(dict(tensors), metadata=metadata), durable=False)
        for state in self._root.rglob(f"*{_STATE}"):
            if not (self._output_dir / state.relative_to(self._root).with_suffix("")).is_dir():
                state.unlink(missing_ok=True)

    def find(self, checkpoint: str | Path) -> Saved | None:
        """The state of a checkpoint; None, with a warning, where there is none or only another version's.

        Where the checkpoint lies in the output folder of another trainer, its state may lie beside that.

        Raises:
            ConfigError: it is damaged.
        """
        own = self.path(checkpoint)
        parent = Path(checkpoint).resolve().parent
        places = [own, state_folder(None, str(parent)) / _FOLDER / own.name] if parent.name else [own]
        for path in places:
            saved = _load(path, str(checkpoint))
            if saved is not None and saved.place.checkpoint_sha256 == _sha256(checkpoint):
                return saved
        logger.warning(
            "%s has no state of this package: %s is of another checkpoint or version, or not there. What was averaged "
            "over its steps is lost; in a federation the round at hand starts anew.",
            checkpoint,
            own,
        )
        return None

    def asked_for(self, resume_from_checkpoint: str | bool | None) -> Saved | None:
        """The state of the checkpoint that `Trainer.train(resume_from_checkpoint)` means; None where there is none."""
        if not resume_from_checkpoint:
            return None
        if isinstance(resume_from_checkpoint, str):
            return self.find(resume_from_checkpoint)
        folder = get_last_checkpoint(self._given_dir) if self._output_dir.is_dir() else None
        return None if folder is None else self.find(folder)

    def path(self, checkpoint: str | Path) -> Path:
        """Where the state of a checkpoint folder is written to."""
        folder = Path(checkpoint).resolve()
        inside = folder.is_relative_to(self._output_dir)
        name = folder.relative_to(self._output_dir) if inside else Path(folder.name)
        return self._root / name.with_name(name.name + _STATE)


def _load(path: Path, checkpoint: str) -> Saved | None:
    """Read a state file; None where there is none, or another version's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            fields: dict[str, Any] = json.loads(file.metadata()["fedfstq"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if fields.pop("format") != _FORMAT:
            return None
        return Saved(checkpoint, Place(**fields), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}). Resume from another checkpoint, or without resume_from_checkpoint: the "
            "round then starts anew."
        ) from error


def _sha256(checkpoint: str | Path) -> str:
    """What tells a checkpoint from others of the same name, wherever it lies: its adapter and its log."""
    files = [Path(checkpoint) / name for name in (ADAPTER_FILE, TRAINER_STATE_NAME)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files if path.is_file())).hexdigest()

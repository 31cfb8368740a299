"""What a Trainer checkpoint needs besides model, optimizer, schedule and random numbers to go on within a round.

One file for each checkpoint: the averages over steps, the losses of the round so far, and as JSON in its metadata which
step of which round of which federation it is. It lies in the client's state folder, as a checkpoint folder may be
uploaded. The residual is not in it: it lies in the client's session, which changes between rounds only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.client import Assignment
from fedfstq_hf.federation.mailbox import ADAPTER_FILE
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.trainer.gradient_hooks import StepObserver
from fedfstq_hf.trainer.methods.fedbat import Binarisation
from fedfstq_hf.trainer.private_state import make_state_folder, state_folder

logger = logging.getLogger(__name__)

_BINARISATION = "binarisation."
_FOLDER = "checkpoints"
_SUFFIX = ".safetensors"
_FORMAT = 2


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
        if assignment is None or assignment.global_step is None:
            return False
        mine = (self.place.federation, self.place.client_id) == (spec.id, assignment.session.client_id)
        done = self.place.local_step if self.within(assignment) else 0
        return mine and self.place.global_step <= assignment.global_step + done

    def restore(
        self, observer: StepObserver, device: torch.device | None = None, binarisation: Binarisation | None = None
    ) -> list[Tensor]:
        """Set averages and step sizes; returns, on `device`, the losses of the round's micro-batches so far."""
        observer.load_state_dict(self.tensors)
        if binarisation is not None:
            binarisation.load_state(self._named(_BINARISATION))
        return list(self.tensors["losses"].to(device).unbind())

    def _named(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    @property
    def start(self) -> Tensor | None:
        """The adapter that local training started from, (num_params,)."""
        return self.tensors.get("start")


class CheckpointStates:
    """The state files of one trainer's checkpoints: `FOLDER/checkpoints/checkpoint-N.safetensors`.

    Args:
        folder: the client's state folder.
        output_dir: of the trainer; holds its checkpoint folders.
    """

    def __init__(self, folder: Path, output_dir: str) -> None:
        self._root = folder / _FOLDER
        self._output_dir = Path(output_dir).resolve()

    def save(
        self,
        checkpoint: str | Path,
        place: Place,
        observer: StepObserver,
        *,
        losses: Sequence[Tensor],
        start: Tensor | None,
        binarisation: Binarisation | None = None,
    ) -> None:
        """Write the state of a checkpoint, and delete those whose checkpoint folders are gone.

        Args:
            checkpoint: its folder, already written.
            losses: of the micro-batches of the round so far, scalars.
            start: the adapter that local training started from, (num_params,).
            binarisation: of the round, where its update is trained in binary form.
        """
        tensors = {"losses": torch.stack(list(losses)).cpu() if losses else torch.zeros(0), **observer.state_dict()}
        if start is not None:
            tensors["start"] = start
        if binarisation is not None:
            tensors |= {f"{_BINARISATION}{key}": value.cpu() for key, value in binarisation.state().items()}
        place = dataclasses.replace(place, checkpoint_sha256=_sha256(checkpoint))
        metadata = {"fedfstq": json.dumps({"format": _FORMAT, **dataclasses.asdict(place)}, sort_keys=True)}
        path = self.path(checkpoint)
        make_state_folder(path.parent)
        storage.replace_file(path, save(tensors, metadata=metadata), durable=False)
        for state in self._root.rglob(f"*{_SUFFIX}"):
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

    def path(self, checkpoint: str | Path) -> Path:
        """Where the state of a checkpoint folder is written to."""
        folder = Path(checkpoint).resolve()
        inside = folder.is_relative_to(self._output_dir)
        name = folder.relative_to(self._output_dir) if inside else Path(folder.name)
        return self._root / name.with_name(name.name + _SUFFIX)


def find_state(
    resume_from_checkpoint: str | bool | None, output_dir: str | None, states: CheckpointStates
) -> Saved | None:
    """The state of the checkpoint that `Trainer.train(resume_from_checkpoint)` means; None where there is none."""
    if not resume_from_checkpoint:
        return None
    if isinstance(resume_from_checkpoint, str):
        return states.find(resume_from_checkpoint)
    exists = output_dir is not None and Path(output_dir).is_dir()
    folder = get_last_checkpoint(output_dir) if exists else None
    return None if folder is None else states.find(folder)


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

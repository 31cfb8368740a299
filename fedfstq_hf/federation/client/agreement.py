"""What a client is asked to take part in, in plain words; and what it agreed to, kept beside its state.

A mailbox can be changed by whoever may write it, also between two reads. So a client reads the spec and the adapter's
configuration once, agrees to those very bytes, and refuses others from then on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import MailboxError, no_federation
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, SPEC_FILE, Mailbox
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import MethodSettings
from fedfstq_hf.text import parse_object, printable

AGREEMENT_FILE = "agreement.json"
MAX_CONFIG_BYTES = 1 << 18
_MAX_FILE_BYTES = 1 << 20
_FORMAT = 1
_PARTS = {"spec": SPEC_FILE, "adapter_config": ADAPTER_CONFIG_FILE}
_SHOWN_CHANGES = 10


@dataclass(frozen=True)
class Terms:
    """What a mailbox asks of its clients, as it was read.

    Attributes:
        address: of the mailbox, as the client wrote it.
        spec: parsed from `spec_bytes`.
        spec_bytes, adapter_config_bytes: the two files of round 0.
        adapter_config: parsed from `adapter_config_bytes`.
    """

    address: str
    spec: FederationSpec
    spec_bytes: bytes
    adapter_config: Mapping[str, Any]
    adapter_config_bytes: bytes


def read_terms(mailbox: Mailbox, address: str) -> Terms:
    """Read what the federation in a mailbox asks, once.

    Raises:
        MailboxError: there is no federation, or what it asks cannot be read or is out of bounds.
    """
    if mailbox.head() is None:
        raise no_federation(address)
    spec_bytes, config_bytes = mailbox.read(0, SPEC_FILE), mailbox.read(0, ADAPTER_CONFIG_FILE)
    config = parse_object(config_bytes, f"The mailbox's {ADAPTER_CONFIG_FILE}", max_bytes=MAX_CONFIG_BYTES)
    return Terms(address, FederationSpec.from_json(spec_bytes), spec_bytes, config, config_bytes)


def summary(spec: FederationSpec, address: str) -> list[str]:
    """What a client of that federation does, a line for each thing, safe to print."""
    training, defaults = spec.training, spec.client_defaults
    method = spec.method
    options = "".join(f", {name} {value}" for name, value in sorted(method.codec_options.items()))
    rate = f" at learning rate {training['learning_rate']}" if "learning_rate" in training else ""
    batches = " and ".join(
        f"{what} of {defaults[name]}"
        for name, what in (("per_device_train_batch_size", "batches"), ("gradient_accumulation_steps", "accumulation"))
        if name in defaults
    )
    lines = [
        f"Federation {spec.name!r} at {address}, id {spec.id}",
        f"Base model: {spec.model}, unless your settings name another place for it",
        f"Training: up to {spec.rounds} rounds of {spec.local_steps} steps with "
        f"{training.get('optim', 'your optimizer')}{rate}, objective {method.objective}",
        f"Suggested: {batches}; your own training settings go first" if batches else "Batches: as your settings say",
        f"Data: the file, its columns and their format are yours to name; an example is cut to "
        f"{spec.data.get('max_length', 256)} tokens",
        f"Messages: codec {method.codec}{options}, {_budget(method)}; never more than {spec.max_message_bytes} bytes",
        "Readable by: whoever can read the mailbox; an update says something about the data it was made from"
        if spec.sealing_key is None
        else f"Readable by: the holder of the key {spec.sealing_key} only; an update says something about your data",
        "Signatures: required, by a key that was enrolled for you" if spec.signatures else "Signatures: not required",
        "Token sensitivities (they say which words occur): asked for; sent only if your settings say share_saliency"
        if spec.share_saliency
        else "Token sensitivities (they say which words occur): not asked for",
    ]
    return [printable(line, 500) for line in lines]


def is_agreed(folder: str | os.PathLike[str], terms: Terms) -> bool:
    """Whether the client with that state folder has agreed to these terms; False where it has agreed to none yet.

    Raises:
        MailboxError: it has agreed to others; names what differs.
    """
    path = Path(folder) / AGREEMENT_FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise MailboxError(f"The agreement {path} cannot be read: {error.strerror or error}.") from error
    kept = parse_object(data, f"The agreement {path}", max_bytes=_MAX_FILE_BYTES)
    current = _content(terms)
    if all(kept.get(f"{part}_sha256") == current[f"{part}_sha256"] for part in _PARTS):
        return True
    changes = [printable(change, 200) for change in _changes(kept, current)]
    more = f"\n  and {len(changes) - _SHOWN_CHANGES} more" if len(changes) > _SHOWN_CHANGES else ""
    listed = "".join(f"\n  {change}" for change in changes[:_SHOWN_CHANGES])
    raise MailboxError(
        f"{printable(terms.address)} asks something else than what this client agreed to:{listed}{more}\n"
        f"Nothing was sent. Ask who runs the federation why. To agree to it anew, type: rm {path}\n"
        "For another federation, give this client an output_dir of its own."
    )


def agree(folder: str | os.PathLike[str], terms: Terms, *, durable: bool = True) -> None:
    """Keep what the client agreed to; later terms must be the same.

    Raises:
        MailboxError: it has agreed to others meanwhile, or the file cannot be written.
    """
    if is_agreed(folder, terms):
        return
    storage.make_folder(Path(folder), durable=durable)
    data = (json.dumps(_content(terms), indent=1, sort_keys=True) + "\n").encode()
    if not storage.create_file(Path(folder) / AGREEMENT_FILE, data, durable=durable):
        is_agreed(folder, terms)  # another process was first


def _content(terms: Terms) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "address": terms.address,
        "federation": terms.spec.id,
        "spec": json.loads(terms.spec_bytes),
        "spec_sha256": hashlib.sha256(terms.spec_bytes).hexdigest(),
        "adapter_config": dict(terms.adapter_config),
        "adapter_config_sha256": hashlib.sha256(terms.adapter_config_bytes).hexdigest(),
    }


def _changes(kept: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[str]:
    """The fields that differ; of a part whose fields do not, that its file does."""
    for part, file in _PARTS.items():
        if kept.get(f"{part}_sha256") == current[f"{part}_sha256"]:
            continue
        before, after = _flat(kept.get(part)), _flat(current[part])
        names = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
        yield from (f"{file}: {name} is {after.get(name)!r}, agreed was {before.get(name)!r}" for name in names)
        if not names:
            yield f"{file} is written in another way"


def _flat(fields: object, prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name; empty where there are none."""
    flat: dict[str, Any] = {}
    for name, value in fields.items() if isinstance(fields, dict) else ():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def _budget(method: MethodSettings) -> str:
    first = "of any size" if method.uplink_budget is None else f"of {method.uplink_budget} each unless you set a budget"
    second = "" if method.refinement_budget is None else f", and a second one of {method.refinement_budget}"
    return first + second

"""A compressed adapter as files: what is in them, and what is checked when they are read.

| file | content |
|---|---|
| `adapter_packed.safetensors` | the LoRA matrices, one message (codec/message.py) with the start's sha256 as base |
| `adapter_packed.json` | format version, base fingerprint, seed of the start or null, sha256 of the other files |
| `adapter_config.json` | PEFT's configuration |
| `adapter_exact.safetensors` | tensors that are no LoRA matrices, if any: magnitudes, biases, whole modules |
| `adapter_model.safetensors` | if asked for: the same adapter for plain PEFT |
| `README.md` | the card |

The first four are what loading needs, and what a budget counts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig

from fedfstq_hf.adapters.allow_list import check_own
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, MessageError
from fedfstq_hf.federation import storage
from fedfstq_hf.sharing.trained import CONFIG_FILE, PACKED_KIND, WEIGHTS_FILE
from fedfstq_hf.text import parse_object, read_in

MESSAGE_FILE = "adapter_packed.safetensors"
FACTS_FILE = "adapter_packed.json"
EXACT_FILE = "adapter_exact.safetensors"
CARD_FILE = "README.md"
ALLOWED = (MESSAGE_FILE, FACTS_FILE, CONFIG_FILE, EXACT_FILE, WEIGHTS_FILE, CARD_FILE)
"""Every file that this package puts into a shared adapter's repo or folder."""

FORMAT = 1
MAX_JSON_BYTES = 1 << 18
_HEX = re.compile(r"[0-9a-f]{64}")
# Written even where they have their default: they decide what the adapter does, and a default may change.
_ALWAYS = ("base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "task_type")
# Facts about where it was made, which PEFT fills in again.
_NEVER = ("auto_mapping", "inference_mode", "peft_version")


@dataclass(frozen=True)
class Facts:
    """What a reader has to know besides PEFT's configuration. seed: None where all of the adapter is in the message."""

    base: dict[str, Any]
    seed: int | None
    num_params: int
    sha256: dict[str, str]
    made_by: str = ""

    def to_json(self) -> bytes:
        """Canonical JSON with format version."""
        fields = {"format": FORMAT, **asdict(self)}
        return (json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Facts:
        """Inverse of `to_json`. Raises MessageError on anything else."""
        fields = parse_object(data, FACTS_FILE, max_bytes=MAX_JSON_BYTES, error=MessageError)
        version = fields.get("format")
        if version != FORMAT:
            raise MessageError(
                f"{FACTS_FILE} has format version {version!r:.20}, this package reads version {FORMAT}; if it is "
                "newer, type: pip install --upgrade fedfstq_hf"
            )
        facts = cls(
            fields.get("base"),  # type: ignore[arg-type]  # looked at below
            fields.get("seed"),
            fields.get("num_params"),  # type: ignore[arg-type]
            fields.get("sha256"),  # type: ignore[arg-type]
            str(fields.get("made_by", "")),
        )
        good = (
            isinstance(facts.base, dict)
            and (facts.seed is None or (type(facts.seed) is int and 0 <= facts.seed < 2**63))
            and type(facts.num_params) is int
            and isinstance(facts.sha256, dict)
            and all(name in ALLOWED and _HEX.fullmatch(str(digest)) for name, digest in facts.sha256.items())
            and {MESSAGE_FILE, CONFIG_FILE} <= set(facts.sha256)
        )
        if not good:
            raise MessageError(f"{FACTS_FILE} has fields of the wrong kind; it was not written by this package")
        return facts


@dataclass(frozen=True)
class CompressedAdapter:
    """A compressed adapter and what was measured while it was made.

    files: name -> content, what loading needs. plain: `adapter_model.safetensors` for plain PEFT, where asked for.
    before, after: metric -> value of the adapter as trained and as compressed, where measured. plain_bytes: size of
    the adapter as PEFT saves it. error: weighted squared error of the products B A, as a share of themselves. effect:
    how far the model's outputs are off, as a share of what the adapter changes; None where that was not measured.
    divergences: from the trained adapter's predictions on the calibration examples, nats per target token: `coded`, and
    `refined` after so many steps of refinement (the same where that brought nothing).
    errors: likewise of divergence plus loss, which refinement lowers; empty without refinement.
    """

    files: dict[str, bytes]
    card: str
    num_params: int
    plain_bytes: int
    error: float
    seeded: bool
    effect: float | None = None
    refine_steps: int = 0
    divergences: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    plain: bytes | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that loading needs."""
        return sum(len(data) for data in self.files.values())

    @property
    def bits_per_param(self) -> float:
        """Bits of all files that loading needs, per number of the adapter."""
        return 8 * self.num_bytes / self.num_params

    def all_files(self) -> dict[str, bytes]:
        """Everything that is uploaded or saved."""
        plain = {} if self.plain is None else {WEIGHTS_FILE: self.plain}
        return {**self.files, **plain, CARD_FILE: self.card.encode()}

    def save(self, folder: str | Path) -> None:
        """Write a new folder, at once or not at all.

        Raises:
            ConfigError: it exists and is not empty, or cannot be written. Nothing in it was touched.
        """
        path = Path(folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file() or not storage.create_folder(path, self.all_files()):
                raise ConfigError(f"{path} exists already and was left alone. Give another folder, or remove it first.")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error}") from error

    def __str__(self) -> str:
        parts = [f"{name} {len(data):,}" for name, data in self.files.items()]
        lines = [
            f"{self.num_params:,} parameters in {self.num_bytes:,} bytes ({self.bits_per_param:.3f} bits per "
            f"parameter, {self.plain_bytes / self.num_bytes:.1f}x below {self.plain_bytes:,}): {', '.join(parts)}",
            "outputs of the model "
            + ("were not compared" if self.effect is None else f"off by {self.effect:.4f} of what the adapter changes"),
            "coded as a change from a seeded start" if self.seeded else "coded whole",
        ]
        if "refined" in self.divergences:
            lines.append(
                f"{self.refine_steps} steps of refinement: loss plus divergence from the trained adapter's predictions "
                f"{self.errors['coded']:.5f} before, {self.errors['refined']:.5f} after (calibration set)"
            )
        lines += [f"{name}: {self.before[name]:.4f} before, {self.after[name]:.4f} after" for name in self.after]
        return "\n".join(lines)


def check_digest(name: str, data: bytes, digest: str) -> None:
    """Raise MessageError unless a file has the sha256 that the facts say."""
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise MessageError(
            f"{name} has sha256 {found[:12]}..., {FACTS_FILE} says {digest[:12]}...: it is damaged, cut short or from "
            "another version. Get the files again, all of one commit."
        )


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """One file of a compressed adapter in a folder.

    Raises:
        MessageError: it is missing, a link out of the folder, or larger than `max_bytes`.
    """
    expected = "the folder of a compressed adapter, as `fedfstq compress ADAPTER --out FOLDER` writes it"
    return read_in(folder, name, max_bytes, MessageError, expected)


def compact_config(config: Mapping[str, Any], *, packed: bool = False) -> bytes:
    """`adapter_config.json` with what differs from PEFT's defaults, in few bytes; PEFT reads it.

    packed: there is no file beside it that PEFT could load. The kind is then none that PEFT knows, so that its error
    names this package.

    Raises:
        AdapterMismatchError: a setting cannot be written as JSON, or nobody would believe it.
    """
    defaults = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if key not in _NEVER and (key in _ALWAYS or value != defaults.get(key))
    }
    kept["inference_mode"] = True
    try:
        data = (json.dumps(kept, sort_keys=True, separators=(",", ":")) + "\n").encode()
    except TypeError as error:
        raise AdapterMismatchError(f"The adapter's configuration cannot be written as JSON: {error}") from error
    check_own(data)
    return data.replace(b'"peft_type":"LORA"', f'"peft_type":"{PACKED_KIND}"'.encode()) if packed else data


def as_lora(data: bytes) -> bytes:
    """The configuration that was packed, as PEFT knows it."""
    return data.replace(PACKED_KIND.encode(), b"LORA")

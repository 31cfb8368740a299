"""Compressed adapters on the Hub and in folders: `push_compressed_adapter`, `load_compressed_adapter`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedfstq_hf.adapter import base_fingerprint, check_same_base
from fedfstq_hf.adapters import allow_list
from fedfstq_hf.adapters.size import make_config
from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, MailboxError, MessageError
from fedfstq_hf.federation.adapter_file import dump, load_tensors
from fedfstq_hf.federation.mailbox.hub.http import Outcome, Patience, diagnose
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, additions
from fedfstq_hf.federation.storage import create_folder
from fedfstq_hf.reporting.card.merge import decode, merge_card
from fedfstq_hf.sharing.coding import initial_state, state_sha256
from fedfstq_hf.sharing.compress import compress_adapter
from fedfstq_hf.sharing.packed import (
    ALLOWED,
    CARD_FILE,
    EXACT_FILE,
    FACTS_FILE,
    MAX_JSON_BYTES,
    MESSAGE_FILE,
    CompressedAdapter,
    Facts,
    as_lora,
    check_digest,
    read_file,
)
from fedfstq_hf.sharing.trained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    TrainedAdapter,
    labels_for,
    skeleton,
    trained_adapter,
)
from fedfstq_hf.text import printable

_SCHEME = "hf://"
_PROBE, _OLD_ROWS = "embedding_probe", 12  # of 16 rows, evenly apart
_PATIENCE = 300.0
_MAX_CARD_BYTES = 1 << 20
_MESSAGE_ROOM = 4096  # beyond 4 bytes per parameter: the message's header
Read = Callable[[str, int], bytes]
"""Reads one of the files, of at most so many bytes."""


def push_compressed_adapter(
    model_or_path: nn.Module | str | Path,
    repo_id: str,
    budget: str | int = "2bpp",
    *,
    private: bool | None = None,
    token: str | None = None,
    patience: float = _PATIENCE,
    **options: Any,
) -> CompressedAdapter:
    """Compress an adapter (`compress_adapter`, which takes the other options) and publish it in one commit.

    Only the files listed in packed.py are uploaded. Earlier ones that are no longer part of it are deleted in the same
    commit; other files of the repo, and what people wrote in its card, stay.

    Args:
        repo_id: `org/name`; made if it is not there.
        private: of a repo that is made; None: the account's default.
        patience: seconds for which a request that fails for the moment is repeated.

    Raises:
        MailboxError: the Hub refuses; the message says what to do. Nothing was published.
        FedFSTQError: as `compress_adapter` does.
    """
    repo = open_repo(repo_id, token, patience)
    about = {**(options.pop("about", None) or {}), "repo_id": repo.repo_id}
    made = compress_adapter(model_or_path, budget, about=about, **options)
    publish(made, repo, private=private)
    return made


def save_compressed_adapter(
    model_or_path: nn.Module | str | Path, folder: str | Path, budget: str | int = "2bpp", **options: Any
) -> CompressedAdapter:
    """`push_compressed_adapter` into a new folder.

    Raises:
        ConfigError: the folder exists and is not empty; it is left alone.
        FedFSTQError: as `compress_adapter` does.
    """
    if Path(folder).is_file() or (Path(folder).is_dir() and any(Path(folder).iterdir())):
        raise ConfigError(f"{folder} exists already and was left alone. Give another folder, or remove it first.")
    made = compress_adapter(model_or_path, budget, **options)
    made.save(folder)
    return made


def load_compressed_adapter(
    base_model: nn.Module,
    repo_id_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    patience: float = _PATIENCE,
) -> PeftModel:
    """A base model with a compressed adapter from the Hub or a folder, ready for inference.

    Every file is held against the sha256 in the facts, and capped in size before it is read.

    Raises:
        AdapterMismatchError: the adapter is for another base model.
        MessageError: a file is missing, damaged or too large.
        MailboxError: the Hub does not answer, or refuses.
    """
    return expand(base_model, *_opened(repo_id_or_folder, revision, token, patience))


def expand_adapter(
    repo_id_or_folder: str | Path,
    folder: str | Path,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    patience: float = _PATIENCE,
) -> None:
    """A compressed adapter as the plain one that PEFT loads, in a new folder. Needs the base's configuration alone.

    Args:
        repo_id_or_folder: the compressed adapter.
        folder: where the plain one goes.
        base_model: Hub id or folder of the base; what the adapter names when None.

    Raises:
        ConfigError: the folder is there already, or the base's configuration cannot be read.
        FedFSTQError: as `load_compressed_adapter`, but that weights of the base are not looked at.
    """
    facts, read = _opened(repo_id_or_folder, revision, token, patience)
    config_bytes, fields = _read_config(facts, read)
    name = base_model or fields.get("base_model_name_or_path")
    if not name:
        raise ConfigError("The adapter names no base model; type --base-model NAME.")
    adapter = skeleton(str(name), fields, facts.num_params, facts.base.get("vocab_size"))
    state = {key: tensor.float() for key, tensor in _decode(adapter, facts, read).items()}
    files = {CONFIG_FILE: config_bytes, WEIGHTS_FILE: dump(state)}
    if not create_folder(Path(folder), files):
        raise ConfigError(f"{folder} exists already and was left alone. Give another folder, or remove it first.")


def _opened(
    repo_id_or_folder: str | Path, revision: str | None, token: str | None, patience: float
) -> tuple[Facts, Read]:
    """A compressed adapter's facts, and what reads its other files, all of one commit."""
    if Path(repo_id_or_folder).is_dir():
        folder = Path(repo_id_or_folder)
        facts = Facts.from_json(read_file(folder, FACTS_FILE, MAX_JSON_BYTES))
        return facts, lambda name, max_bytes: read_file(folder, name, max_bytes)
    repo = open_repo(str(repo_id_or_folder), token, patience)
    first = repo.read(FACTS_FILE, revision=revision or "main", max_bytes=MAX_JSON_BYTES)
    if first is None:
        raise MessageError(
            f"{repo.repo_id} has no {FACTS_FILE}; expected a compressed adapter, as `fedfstq compress` publishes it. A "
            "plain one loads with PeftModel.from_pretrained."
        )
    commit = first.commit or revision or "main"

    def read(name: str, max_bytes: int) -> bytes:
        file = repo.read(name, revision=commit, max_bytes=max_bytes)
        if file is None:
            raise MessageError(f"{repo.repo_id} has no {name}, which its {FACTS_FILE} names; publish it again.")
        return file.data

    return Facts.from_json(first.data), read


def publish(made: CompressedAdapter, repo: HubRepo, *, private: bool | None = None) -> str:
    """Commit a compressed adapter's files, and those alone, to a repo; returns the commit's id."""
    api = repo.api
    repo.call("create", lambda: api.create_repo(repo.repo_id, private=private, exist_ok=True))
    files = made.all_files()
    present = {entry.path for entry in repo.list("")}
    if CARD_FILE in present:
        card = repo.read(CARD_FILE, max_bytes=_MAX_CARD_BYTES)
        if card is not None:
            files[CARD_FILE] = merge_card(made.card, decode(card.data)).encode()
    gone = [name for name in ALLOWED if name in present and name not in files]
    pending: list[CommitOperationAdd | CommitOperationDelete] = []

    def request() -> str:
        if not pending:
            pending.extend(additions(files))
            pending.extend(CommitOperationDelete(name) for name in gone)
        try:
            return repo.commit_once(pending, f"Compressed adapter, {made.bits_per_param:.2f} bits per parameter")
        except Exception as error:
            # after a busy answer the same upload is sent again; after a lost one it is asked anew what is there
            if diagnose(error).outcome is not Outcome.BUSY:
                pending.clear()
            raise

    return repo.call("publish the adapter in", request)


def open_repo(repo_id: str, token: str | None = None, patience: float = _PATIENCE) -> HubRepo:
    """A repo by `ORG/NAME` or `hf://ORG/NAME`; nothing is asked of the Hub yet.

    Raises:
        MailboxError: that is no repo's id.
    """
    name = repo_id.removeprefix(_SCHEME)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise MailboxError(
            f"{repo_id!r} is neither a folder here nor the id of a repo on the Hub ({error}). "
            "Give a folder, or ORG/NAME."
        ) from None
    return HubRepo(name, HfApi(token=token, library_name="fedfstq_hf"), Patience(patience))


def expand(base_model: nn.Module, facts: Facts, read: Read) -> PeftModel:
    """The base with the adapter, for inference. It is wrapped in place, as PEFT does; on errors left as it was.

    Raises:
        AdapterMismatchError: the base is another one, or already has an adapter.
        MessageError: a file is damaged, not for this adapter, or asks for what is not believed (allow_list.py).
    """
    if isinstance(base_model, PeftModel):
        raise AdapterMismatchError("The base model already has an adapter; give the plain base (model.unload()).")
    _, fields = _read_config(facts, read)
    remedy = f"Load {_base_name(fields)}."
    training = base_model.training
    try:
        # the base that the file names is not looked up: the adapter's is the one given here
        config = make_config(base_model, fields | {"base_model_name_or_path": None}, inference_mode=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that are replaced a moment later
            model = get_peft_model(base_model, config)
    except Exception as error:  # PEFT raises what comes its way
        raise AdapterMismatchError(
            f"The adapter does not fit this base model: {printable(error, 400)} {remedy}"
        ) from error
    try:
        _check_base(*_compared(model, facts.base), remedy)
        adapter = trained_adapter(model)
        state = _decode(adapter, facts, read)
        set_peft_model_state_dict(model, state, adapter_name=adapter.name)
    except BaseException:
        model.unload()
        base_model.train(training)
        raise
    model.eval()
    return model


def _read_config(facts: Facts, read: Read) -> tuple[bytes, dict[str, Any]]:
    """The adapter's configuration, for PEFT, and its believed fields."""
    data = read(CONFIG_FILE, allow_list.MAX_BYTES)
    check_digest(CONFIG_FILE, data, facts.sha256[CONFIG_FILE])
    return as_lora(data), allow_list.parse(as_lora(data), CONFIG_FILE, MessageError, ("LORA",))


def _decode(adapter: TrainedAdapter, facts: Facts, read: Read) -> dict[str, Tensor]:
    if facts.num_params != adapter.num_params:
        labels = labels_for(adapter, facts.num_params)
        advice = "load the base that it was made for" if labels is None else f"load the base with num_labels={labels}"
        raise AdapterMismatchError(
            f"The compressed adapter has {facts.num_params} parameters, its configuration makes {adapter.num_params} "
            f"on this base model; {advice}."
        )
    data = read(MESSAGE_FILE, 4 * adapter.num_params + _MESSAGE_ROOM)
    check_digest(MESSAGE_FILE, data, facts.sha256[MESSAGE_FILE])
    header, payload = message.unpack(data)
    shapes = {name: tuple(adapter.parameters[name].shape) for name in sorted(adapter.paired())}
    reference = initial_state(shapes, adapter.pairs, adapter.config, facts.seed)
    schema = Schema.from_state_dict(reference)
    if schema.fingerprint != header.schema:
        raise AdapterMismatchError(
            f"The compressed adapter's tensors (schema {header.schema[:12]}) are not those that its configuration "
            f"makes on this base model ({schema.fingerprint[:12]}); load the base that it was made for."
        )
    if state_sha256(reference) != header.base:
        raise AdapterMismatchError(
            f"The start that seed {facts.seed} gives here has another sha256 than the one that the adapter was coded "
            f"against. It is drawn by torch's CPU generator (here torch {torch.__version__}), which must give the same "
            f"numbers as where the file was made ({printable(facts.made_by or FACTS_FILE)})."
        )
    try:
        codec = get_codec(header.codec, **header.params)
    except ConfigError as error:
        raise MessageError(f"{MESSAGE_FILE} needs a codec that cannot be made here: {error}") from error
    vector = codec.decode(payload, schema).to_dense() + schema.flatten(reference)
    if not bool(torch.isfinite(vector).all()):
        raise MessageError(f"{MESSAGE_FILE} decodes to values that are not finite")
    return {**schema.unflatten(vector), **_exact(adapter, facts, read)}


def _exact(adapter: TrainedAdapter, facts: Facts, read: Read) -> dict[str, Tensor]:
    beside = adapter.beside()
    expected = {name: adapter.parameters[name] for name, first in beside.items() if name == first}
    if not expected and EXACT_FILE not in facts.sha256:
        return {}
    if EXACT_FILE not in facts.sha256:
        raise MessageError(f"{FACTS_FILE} names no {EXACT_FILE}, but the adapter has {next(iter(expected))}")
    room = sum(4 * p.numel() + 1024 for p in expected.values()) + _MESSAGE_ROOM
    data = read(EXACT_FILE, room)
    check_digest(EXACT_FILE, data, facts.sha256[EXACT_FILE])
    header = _MESSAGE_ROOM + sum(256 + 6 * len(name) for name in expected)
    state = load_tensors(data, EXACT_FILE, max_header=header, error=MessageError)
    shapes: Mapping[str, Any] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(p.shape) for name, p in expected.items()}:
        raise MessageError(f"{EXACT_FILE} holds other tensors than the adapter has besides its LoRA matrices")
    return {name: state[first].to(expected[first].dtype) for name, first in beside.items()}


def _compared(model: PeftModel, theirs: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Fingerprints of the base here and there, without what the adapter replaces.

    Embeddings that it brings along whole may have new rows, the last ones, that started from random numbers here.
    """
    mine = base_fingerprint(model)
    kept = [module.original_module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    whole = any(isinstance(module, nn.Embedding) for module in kept)
    if not whole or not isinstance(theirs.get(_PROBE), list):
        return mine, theirs
    return {**mine, _PROBE: mine[_PROBE][:_OLD_ROWS]}, {**theirs, _PROBE: theirs[_PROBE][:_OLD_ROWS]}


def _check_base(mine: Mapping[str, Any], theirs: Mapping[str, Any], remedy: str) -> None:
    for key, expected in theirs.items():
        if key == "vocab_size" and mine.get(key) != expected:
            remedy += f" If its vocabulary was resized: base.resize_token_embeddings({printable(expected, 20)})."
        if key != _PROBE and mine.get(key) != expected:
            raise AdapterMismatchError(
                f"This adapter was made for another base model: {printable(key, 80)} is {expected!r:.80} there and "
                f"{mine.get(key)!r:.80} here. {remedy}"
            )
    try:
        check_same_base(mine, theirs, "")
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"This adapter was made for another base model: its embeddings differ. {remedy}"
        ) from error


def _base_name(fields: Mapping[str, Any]) -> str:
    return f"the base model {printable(fields.get('base_model_name_or_path') or 'that it was made for')}"

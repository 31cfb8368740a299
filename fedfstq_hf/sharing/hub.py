"""Compressed adapters on the Hub and in folders: `push_compressed_adapter`, `load_compressed_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from torch import nn

from fedfstq_hf.errors import ConfigError, MailboxError, MessageError
from fedfstq_hf.federation.mailbox.hub.http import Outcome, Patience, diagnose
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, additions
from fedfstq_hf.reporting.card.merge import decode, merge_card
from fedfstq_hf.sharing.compress import compress_adapter
from fedfstq_hf.sharing.expand import expand
from fedfstq_hf.sharing.packed import (
    ALLOWED,
    CARD_FILE,
    FACTS_FILE,
    MAX_JSON_BYTES,
    CompressedAdapter,
    Facts,
    read_file,
)

_SCHEME = "hf://"
_PATIENCE = 300.0
_MAX_CARD_BYTES = 1 << 20


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
    if Path(repo_id_or_folder).is_dir():
        folder = Path(repo_id_or_folder)
        facts = Facts.from_json(read_file(folder, FACTS_FILE, MAX_JSON_BYTES))
        return expand(base_model, facts, lambda name, max_bytes: read_file(folder, name, max_bytes))
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

    return expand(base_model, Facts.from_json(first.data), read)


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

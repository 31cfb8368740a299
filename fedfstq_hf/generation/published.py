"""What a repo or folder publishes beside an adapter for token reduction: saliency, tokenizer and `generate()` code."""

from __future__ import annotations

import logging
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id

from fedfstq_hf.adapters.allow_list import MAX_BYTES
from fedfstq_hf.errors import AdapterMismatchError, ConfigError
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE
from fedfstq_hf.generation.saliency import FILE_NAME, Saliency, tokenizer_fingerprint, unpack
from fedfstq_hf.generation.saliency import MAX_BYTES as MAX_SALIENCY_BYTES
from fedfstq_hf.generation.scorers import Combined, QueryAttention, Scorer, TokenTable
from fedfstq_hf.text import file_in, parse_object, printable

logger = logging.getLogger(__name__)
_told: set[str] = set()

HUB_PATH = "custom_generate/generate.py"
"""Where transformers looks in a repo for code that replaces its own `generate()`."""
QUERY_WEIGHT = 0.9
"""Share of the query-aware scorer in the combination with a published table."""


def published_file(repo: str, name: str) -> Path | None:
    """A file of a folder or Hub repo (`org/name` or `hf://org/name`); None if the repo has no such file.

    Raises ConfigError for a link that leads out of the folder, huggingface_hub's errors if the repo cannot be reached
    or does not exist.
    """
    if _is_folder(repo):
        return file_in(Path(repo), name, ConfigError)
    if not _is_hub_id(repo.removeprefix("hf://")):
        raise ConfigError(f"there is no folder {repo}, and no repo of the Hub is called so; type ORG/NAME or a folder")
    try:
        return Path(hf_hub_download(repo.removeprefix("hf://"), name))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def published_tokenizer(repo: str) -> Any:
    """The repo's own tokenizer, else that of the base its adapter names; None if there is neither."""
    from transformers import AutoTokenizer

    own = published_file(repo, "tokenizer_config.json")
    if own is not None:
        return AutoTokenizer.from_pretrained(repo.removeprefix("hf://"), trust_remote_code=False)
    adapter = published_file(repo, ADAPTER_CONFIG_FILE)
    if adapter is None:
        return None
    what = f"{ADAPTER_CONFIG_FILE} of {repo}"
    fields = parse_object(_read(adapter, MAX_BYTES), what, max_bytes=MAX_BYTES, error=AdapterMismatchError)
    base = fields.get("base_model_name_or_path")
    if not base or not isinstance(base, str) or not (_is_folder(repo) or _is_hub_id(base)):
        return None
    try:
        return AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError):  # the base is somewhere else by now; whoever needs a tokenizer says so
        return None


def _is_folder(repo: str) -> bool:
    return not repo.startswith("hf://") and Path(repo).is_dir()


def _is_hub_id(name: str) -> bool:
    """Whether a repo of the Hub names another, and not a folder of this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _read(path: Path, max_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def published_scorer(repo: str, tokenizer: Any, model: Any = None) -> Scorer:
    """Query-aware scores combined with the published table; without one, the former alone, which is logged once.

    Raises AdapterMismatchError for a table of another tokenizer or base, ConfigError where neither can be checked.
    """
    path = published_file(repo, FILE_NAME)
    if path is None:
        if repo not in _told:
            _told.add(repo)
            logger.warning("%s publishes no %s; token reduction uses the query-aware scorer alone", repo, FILE_NAME)
        return QueryAttention()
    saliency = unpack(_read(path, MAX_SALIENCY_BYTES))
    check_saliency(saliency, tokenizer, model)
    return Combined([QueryAttention(), TokenTable(saliency.scores())], [QUERY_WEIGHT, 1.0 - QUERY_WEIGHT])


def check_saliency(saliency: Saliency, tokenizer: Any, model: Any = None) -> None:
    """Raise AdapterMismatchError unless the table is for this tokenizer, and for this base if `model` is given."""
    if tokenizer is None:
        raise ConfigError(
            "a saliency file speaks of token ids; pass the tokenizer: from_pretrained(..., tokenizer=...)"
        )
    mine = tokenizer_fingerprint(tokenizer)
    if mine != saliency.tokenizer:
        raise AdapterMismatchError(
            f"{FILE_NAME} is for tokenizer {printable(saliency.tokenizer[:12])} with {saliency.vocab_size} ids, this "
            f"tokenizer is {mine[:12]} with {len(tokenizer)}; use the base model's own tokenizer, or "
            "scorer=QueryAttention()"
        )
    if model is None or not saliency.base:
        return
    config = model.config.get_text_config(decoder=True)
    theirs = {name: saliency.base.get(name) for name in ("model_type", "hidden_size", "num_hidden_layers")}
    ours = {"model_type": model.config.model_type} | {name: getattr(config, name) for name in list(theirs)[1:]}
    wrong = {name: value for name, value in theirs.items() if value is not None and value != ours[name]}
    if wrong:
        raise AdapterMismatchError(
            f"{FILE_NAME} belongs to a base with {printable(wrong)}, this model has {ours}; load the adapter's own "
            "base model"
        )


def custom_generate_source() -> str:
    """The `custom_generate/generate.py` to publish beside an adapter, for users without this package.

    It imports torch and transformers only. They run it with `trust_remote_code=True`, so it is code that whoever can
    write to the repo chooses. Recommend it with `revision=` and the full sha of a commit only. Users of this package
    need it not: `TokenReducer.from_pretrained` reads numbers from the repo, and runs no code of it.
    """
    return resources.files("fedfstq_hf.generation").joinpath(HUB_PATH).read_text(encoding="utf-8")

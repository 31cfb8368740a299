"""Saliency of a federation: what a client sends of its token sensitivities, and what is published of all clients'."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fedfstq_hf.errors import DataError, MessageError
from fedfstq_hf.generation.probe import Probe, ProbeFit
from fedfstq_hf.generation.published import HUB_PATH, custom_generate_source
from fedfstq_hf.generation.saliency import FILE_NAME, Saliency, aggregate, pack, tokenizer_fingerprint, unpack
from fedfstq_hf.sensitivity import TokenSensitivity

logger = logging.getLogger(__name__)

MIN_CLIENTS = 3
"""Nothing is published of fewer clients, and an id that fewer of them saw is published as one never seen.

With two, either could take its own table away and read the other's.
"""


def client_saliency(
    state: Mapping[str, Tensor],
    *,
    rho: float,
    tokenizer: Any,
    model: Any,
    probe: Mapping[str, Tensor] | None = None,
) -> bytes | None:
    """A client's token table for the coordinator: scores, counts in coarse steps, and the probe if one was fitted.

    Args:
        state: of `TokenSensitivity`.
        rho: of its average.
        tokenizer: whose ids these are.
        model: base or PEFT model, to say whose embeddings the gradients are of.
        probe: state of a `ProbeFit`; None or empty for a table alone.

    Returns:
        A saliency file; None where no token was seen yet.
    """
    table = TokenSensitivity(len(state["count"]), rho)
    table.load_state_dict(state)
    config = model.config.get_text_config(decoder=True)
    base = {
        "model_type": model.config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
    }
    try:
        fitted = _solve(probe, int(config.hidden_size)) if probe else None
        return pack(Saliency.from_sensitivity(table, tokenizer_fingerprint(tokenizer), base, fitted))
    except DataError:
        return None


def _solve(state: Mapping[str, Tensor], hidden_size: int) -> Probe:
    fit = ProbeFit(hidden_size, layer=int(state["layer"]))
    fit.load_state_dict(state)
    return fit.solve()


def join_saliency(files: Sequence[tuple[bytes, float]]) -> dict[str, bytes]:
    """What is published beside the adapter: one saliency file, and `generate()` code for users without this package.

    Args:
        files: what clients sent, with their weights. What cannot be read, or is of another tokenizer or base than
            most, is left out.

    Returns:
        Path -> content at the root of the published repo.

    Raises:
        DataError: fewer than `MIN_CLIENTS` files are usable: theirs would not be an aggregate.
    """
    tables: list[tuple[Saliency, float]] = []
    for data, weight in files:
        try:
            tables.append((unpack(data), weight))
        except (MessageError, DataError) as error:
            logger.warning("A client's token sensitivities are left out: %s", error)
    kinds = Counter(_kind(table) for table, weight in tables if weight > 0)
    most = kinds.most_common(1)[0][0] if kinds else None
    kept = [(table, weight) for table, weight in tables if weight > 0 and _kind(table) == most]
    if len(kept) < MIN_CLIENTS:
        raise DataError(
            f"Token sensitivities of {len(kept)} clients are usable, out of {len(files)} that were sent; fewer than "
            f"{MIN_CLIENTS} would show what single clients have seen."
        )
    joined = aggregate([t for t, _ in kept], [w for _, w in kept], min_clients=MIN_CLIENTS)
    return {FILE_NAME: pack(joined), HUB_PATH: custom_generate_source().encode()}


def _kind(table: Saliency) -> tuple[object, ...]:
    return (table.tokenizer, table.vocab_size, tuple(sorted((name, str(value)) for name, value in table.base.items())))

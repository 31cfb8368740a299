"""The card of a federation as its coordinator asks for it: from the facts of a round to the files at the root."""

from __future__ import annotations

from collections.abc import Mapping

from fedfstq_hf.federation.server.publication import CardMaker, RoundFacts
from fedfstq_hf.reporting.card import root_files

_HUB = "hf://"


def card_maker(address: str, *, description: str | None = None) -> CardMaker:
    """What makes the card of the federation at `address`.

    Args:
        description: Markdown for a new card; in one that is there already, the text above our part stays as it is.
    """
    repo_id = address.removeprefix(_HUB) if address.startswith(_HUB) else None

    def make(facts: RoundFacts) -> Mapping[str, bytes]:
        return root_files(
            facts.spec,
            facts.record,
            facts.history,
            facts.metrics,
            adapter_config=facts.adapter_config,
            repo_id=repo_id,
            extra={"description": description},
            existing=facts.existing_card,
        )

    return make

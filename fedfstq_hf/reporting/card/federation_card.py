"""The model card of a federation's repo, rendered from `model_card_template.md`, and the files that go with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.server.publication import CardMaker, RoundFacts
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card import facts
from fedfstq_hf.reporting.card.facts import Measurement, finite, newest, quality_vs_uplink
from fedfstq_hf.reporting.card.markup import TASKS, code, hub_id, one_line, paragraphs
from fedfstq_hf.reporting.card.merge import decode, merge_card
from fedfstq_hf.text import printable_traceback

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
PLOT_FILE = "quality_vs_uplink.png"
TEMPLATE_FILE = "model_card_template.md"
TAGS = ("peft", "lora", "federated-learning", "fedfstq", "gradient-compression")
MAX_MEASUREMENTS = 20

_UNNAMED = "Federated LoRA adapter"
_HUB = "hf://"


def template_path() -> Path:
    """The template: in a source checkout at its root, in an installed package under `_templates/`."""
    package = Path(str(resources.files("fedfstq_hf")))
    for path in (package / "_templates" / TEMPLATE_FILE, package.parent / TEMPLATE_FILE):
        if path.is_file():
            return path
    raise ConfigError(
        f"This installation has no {package / '_templates' / TEMPLATE_FILE}. Install fedfstq_hf again from its wheel, "
        "or with `pip install -e .` in a checkout."
    )


def card_maker(address: str, *, description: str | None = None) -> CardMaker:
    """What makes the card of the federation at `address`, and the plot that it shows.

    Args:
        description: Markdown for a new card; in one that is there already, the text above our part stays as it is.
    """
    repo_id = address.removeprefix(_HUB) if address.startswith(_HUB) else None
    return lambda published: card_files(published, repo_id=repo_id, description=description)


def card_files(published: RoundFacts, *, repo_id: str | None, description: str | None = None) -> dict[str, bytes]:
    """The card and, where there is something to plot, the plot that it shows, by file name.

    The same arguments give the same bytes. The card is always UTF-8. What a person wrote in the card that is there
    stays, see `merge_card`. Where the plot cannot be drawn, the card comes without it.
    """
    plots: dict[str, bytes] = {}
    alt = None
    try:
        history = [row for row in published.history if row.round <= published.record.round]
        chart = quality_vs_uplink(history, finite(published.metrics, up_to=published.record.round))
        if chart is not None:
            plots, alt = {PLOT_FILE: chart.png()}, chart.alt
    except Exception as error:  # whatever a library finds odd about what was posted
        logger.warning("The card has no plot:\n%s", printable_traceback(error))
    card = render_card(published, repo_id=repo_id, description=description, alt=alt)
    if published.existing_card is not None:
        card = merge_card(card, decode(published.existing_card))
    return {CARD_FILE: card.encode()} | plots


def render_card(
    published: RoundFacts, *, repo_id: str | None, description: str | None = None, alt: str | None = None
) -> str:
    """The text of `README.md` for a published round. What is not known is left out, down to its heading.

    Args:
        published: history and metrics count up to its round; metrics that are not finite numbers are left out.
        repo_id: of the repo on the Hub; None for a folder.
        alt: what the plot shows, in words; None for a card without it.
    """
    spec, record, adapter_config = published.spec, published.record, published.adapter_config
    history = [row for row in published.history if row.round <= record.round]
    metrics = finite(published.metrics, up_to=record.round)
    measurements = newest(metrics, history, record.round)
    task, auto_class = TASKS.get(str(adapter_config.get("task_type") or "CAUSAL_LM"), (None, "AutoModel"))
    title = one_line(spec.name) or _UNNAMED
    lines, round_metric, rounds_note = facts.rounds(history, metrics)
    card = ModelCard.from_template(
        _card_data(spec, measurements, task, repo_id.split("/")[-1] if repo_id else title),
        template_path=str(template_path()),
        title=title,
        description=paragraphs(description),
        introduction=facts.introduction(spec, record, history),
        loading=facts.loading(spec.model, repo_id, auto_class),
        loading_note=facts.loading_note(spec.model),
        measurements=[_measurement_line(entry) for entry in measurements[:MAX_MEASUREMENTS]],
        more_measurements=max(0, len(measurements) - MAX_MEASUREMENTS),
        measured_first=any(entry.first is not None for entry in measurements),
        plot=PLOT_FILE if alt else None,
        plot_text=_alt(alt),
        totals=facts.totals(history),
        rounds=lines,
        round_metric=round_metric,
        rounds_note=rounds_note,
        rollbacks=facts.rollbacks(history),
        training=facts.training(spec, record, adapter_config),
        refusals=facts.refusals(history),
        fate=facts.fate(history),
    )
    return f"{str(card).rstrip()}\n"


def _card_data(
    spec: FederationSpec, measurements: Sequence[Measurement], task: str | None, model_name: str
) -> ModelCardData:
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=one_line(entry.source) or "",
            dataset_name=one_line(entry.source) or "",
            metric_type=one_line(entry.name) or "",
            metric_name=f"{one_line(entry.name)} after round {entry.round}",
            metric_value=float(f"{entry.value:.6g}"),
        )
        for entry in measurements[:MAX_MEASUREMENTS]
    ]
    return ModelCardData(
        base_model=hub_id(spec.model),
        library_name="peft",
        pipeline_tag=task,
        tags=list(TAGS),
        model_name=model_name if results else None,
        eval_results=results or None,
    )


def _alt(text: str | None) -> str:
    """Words within the brackets of an image."""
    return (one_line(text) or "Quality").translate({ord("["): "(", ord("]"): ")"})


def _measurement_line(entry: Measurement) -> dict[str, str | None]:
    return {
        "source": code(entry.source),
        "name": code(entry.name),
        "first": "–" if entry.first is None else facts.figure(entry.first),
        "value": facts.figure(entry.value),
        "round": str(entry.round),
    }

"""The model card of a federation's repo, rendered from `model_card_template.md`, and the files that go with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.federation.publication import CardMaker, RoundFacts
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card import facts
from fedfstq_hf.reporting.card.markup import code, hub_id, language_codes, license_id, one_line, paragraphs, texts
from fedfstq_hf.reporting.card.measurements import Measurement, Metrics, finite, main_metric, newest
from fedfstq_hf.reporting.card.merge import decode, merge_card
from fedfstq_hf.reporting.card_plot import curves, quality_vs_uplink
from fedfstq_hf.text import printable_traceback

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
PLOT_FILE = "quality_vs_uplink.png"
TEMPLATE_FILE = "model_card_template.md"
TAGS = ("peft", "lora", "federated-learning", "fedfstq", "gradient-compression")
MAX_MEASUREMENTS = 20

_UNNAMED = "Federated LoRA adapter"
# PEFT's task type -> the Hub's task, transformers' class; an adapter without a task type is one for causal models here.
_TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


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


def render_card(
    spec: FederationSpec,
    record: RoundRecord,
    history: Sequence[HistoryRow],
    metrics: Metrics,
    *,
    adapter_config: Mapping[str, Any],
    repo_id: str | None,
    extra: Mapping[str, Any] | None = None,
    existing: str | bytes | None = None,
    with_plot: bool = True,
) -> str:
    """The text of `README.md` for a published round. What is not known is left out, down to its heading.

    Args:
        record: of the round that is published with the card.
        history: rows up to that round.
        metrics: round -> source -> name -> value, as posted; values that are not finite numbers are left out.
        adapter_config: PEFT's, as a mapping.
        repo_id: of the repo on the Hub; None for a folder.
        extra: what only the founder knows, each optional: `datasets`, `language` and `tags` (one or several),
            `license`, `description` (Markdown). Ids that the Hub would refuse are left out.
        existing: the card that is in the repo. What a person wrote there stays, see `card_merge.merge_card`: text
            outside our two markers, and metadata other than base_model, library_name and model-index. Where the markers
            were deleted, the whole text is the person's, and only those three keys are kept up to date.
        with_plot: whether the plot is shown, where there is something to plot.
    """
    extra = extra or {}
    history = [row for row in history if row.round <= record.round]
    metrics = finite(metrics, up_to=record.round)
    measurements = newest(metrics, history, record.round)
    datasets = [name for name in texts(extra.get("datasets")) if hub_id(name)]
    task, auto_class = _TASKS.get(str(adapter_config.get("task_type") or "CAUSAL_LM"), (None, "AutoModel"))
    title = one_line(spec.name) or _UNNAMED
    lines, round_metric, rounds_note = facts.rounds(history, metrics)
    card = ModelCard.from_template(
        _card_data(spec, extra, datasets, measurements, task, repo_id.split("/")[-1] if repo_id else title),
        template_path=str(template_path()),
        title=title,
        description=paragraphs(extra.get("description")),
        introduction=facts.introduction(spec, record, history),
        loading=facts.loading(spec.model, repo_id, auto_class),
        loading_note=facts.loading_note(spec.model),
        measurements=[_measurement_line(entry) for entry in measurements[:MAX_MEASUREMENTS]],
        more_measurements=max(0, len(measurements) - MAX_MEASUREMENTS),
        measured_first=any(entry.first is not None for entry in measurements),
        plot=PLOT_FILE if with_plot and curves(history, metrics) else None,
        plot_text=f"{_alt(main_metric(metrics))} against cumulative uplink bytes of all clients",
        totals=facts.totals(history),
        rounds=lines,
        round_metric=round_metric,
        rounds_note=rounds_note,
        rollbacks=facts.rollbacks(history),
        training=facts.training(spec, record, adapter_config, datasets),
        refusals=facts.refusals(history),
        fate=facts.fate(history),
    )
    rendered = f"{str(card).rstrip()}\n"
    return rendered if existing is None else merge_card(rendered, decode(existing))


def root_files(
    spec: FederationSpec,
    record: RoundRecord,
    history: Sequence[HistoryRow],
    metrics: Metrics,
    *,
    adapter_config: Mapping[str, Any],
    repo_id: str | None,
    extra: Mapping[str, Any] | None = None,
    existing: str | bytes | None = None,
) -> dict[str, bytes]:
    """The card and, where there is something to plot, the plot that it shows, by file name.

    Arguments are those of `render_card`; the same ones give the same bytes. The card is always UTF-8. Where the plot
    cannot be drawn, the card comes without it.
    """
    rows = [row for row in history if row.round <= record.round]
    plot, drawn = None, True
    try:
        plot = quality_vs_uplink(rows, finite(metrics, up_to=record.round))
    except Exception as error:  # whatever a library finds odd about what was posted
        logger.warning("The card has no plot:\n%s", printable_traceback(error))
        drawn = False
    text = render_card(
        spec,
        record,
        history,
        metrics,
        adapter_config=adapter_config,
        repo_id=repo_id,
        extra=extra,
        existing=existing,
        with_plot=drawn,
    )
    return {CARD_FILE: text.encode()} | ({PLOT_FILE: plot} if plot is not None else {})


def _card_data(
    spec: FederationSpec,
    extra: Mapping[str, Any],
    datasets: list[str],
    measurements: Sequence[Measurement],
    task: str | None,
    model_name: str,
) -> ModelCardData:
    languages = language_codes(extra.get("language"))
    license, license_name = license_id(extra.get("license"))
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
        datasets=datasets or None,
        language=(languages if len(languages) > 1 else languages[0]) if languages else None,
        library_name="peft",
        license=license,
        license_name=license_name,
        pipeline_tag=task,
        tags=[*TAGS, *texts(extra.get("tags"))],
        model_name=model_name if results else None,
        eval_results=results or None,
    )


def _alt(name: str | None) -> str:
    """A metric's name within the brackets of an image."""
    return (one_line(name) or "Quality").translate({ord("["): "(", ord("]"): ")"})


def _measurement_line(entry: Measurement) -> dict[str, str | None]:
    return {
        "source": code(entry.source),
        "name": code(entry.name),
        "first": "–" if entry.first is None else facts.figure(entry.first),
        "value": facts.figure(entry.value),
        "round": str(entry.round),
    }


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

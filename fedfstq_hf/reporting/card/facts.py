"""What stands in the tables and sentences of a model card: bytes, rounds, refusals, training, metrics, how to load it.

Of posted metrics only finite numbers count, and as results only those that hold for the published adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

from fedfstq_hf.federation.history import HistoryRow, merge_reasons
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card.markup import code, hub_id, one_line, texts
from fedfstq_hf.reporting.chart import Axis, Chart, Level, Line
from fedfstq_hf.reporting.units import format_bytes, format_ratio, tick_bytes

MAX_ROUNDS = 20
"""Rows of the table of rounds; of more rounds than these an even sample is shown, the first and the last among them."""
_MAX_ROLLBACKS = 5
_MAX_MODULES = 12
_EMBEDDED_MODEL = "demo"
MAIN_METRIC = "eval_loss"
_METRICS = {"eval_loss": "Held-out loss (nats per token)", "exact_match": "Exact match on held-out examples"}
_MAX_SOURCES = 6

Cells = dict[str, str]
"""A row of a table by the names of its columns."""
Metrics = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Round -> source, which names an evaluation set -> metric -> value."""


def introduction(spec: FederationSpec, record: RoundRecord, history: Sequence[HistoryRow]) -> str:
    """What this repository holds, in two or three sentences."""
    what = f"A LoRA adapter for {base}" if (base := base_model_text(spec.model)) else "A LoRA adapter"
    used = sum(row.accepted for row in history)
    state = "the federation is finished" if record.finished else "the federation goes on"
    made = f", after {used:,} updates of clients" if used else ", before the first update"
    return (
        f"{what}, trained by federated learning: clients train on data that stay with them and send compressed "
        f"changes, which a coordinator averages. This is round {record.round} of {spec.rounds}{made}; {state}."
    )


def base_model_text(model: str) -> str | None:
    """The base model with a link where it lies on the Hub; of a folder no more than its name."""
    if model == _EMBEDDED_MODEL:
        return "the demo model embedded in fedfstq_hf"
    if identifier := hub_id(model):
        return f"[{identifier}](https://huggingface.co/{identifier})"
    return code(_folder_name(model))


def loading(model: str, repo_id: str | None, auto_class: str) -> str:
    """Python that loads base and adapter with transformers and peft alone."""
    lines = ["from peft import PeftModel", f"from transformers import {auto_class}, AutoTokenizer", ""]
    if model == _EMBEDDED_MODEL:
        lines = ["from fedfstq_hf.demo import model_path", *lines, "base = str(model_path())"]
    else:
        base = hub_id(model) or f"path/to/{one_line(_folder_name(model)) or 'base-model'}"
        lines.append(f"base = {json.dumps(base, ensure_ascii=False)}")
    adapter = json.dumps(repo_id or "path/to/this/folder", ensure_ascii=False)
    return "\n".join(
        [
            *lines,
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f"model = PeftModel.from_pretrained({auto_class}.from_pretrained(base), {adapter})",
        ]
    )


def loading_note(model: str) -> str:
    """What must be installed for it."""
    if model == _EMBEDDED_MODEL:
        return "The adapter is a plain PEFT adapter; only the demo model needs fedfstq_hf."
    return "It needs only `pip install peft transformers`: the adapter is a plain PEFT adapter."


def totals(history: Sequence[HistoryRow]) -> list[Cells]:
    """Bytes of all rounds together; without rounds after the first there is nothing to add up."""
    after = [row for row in history if row.round > 0]
    if not after:
        return []
    count = _count(len(after), "round")
    up = [(row.uplink_bytes, row.dense_uplink_bytes) for row in after]
    down = [(row.downlink_bytes, row.dense_downlink_bytes) for row in history]
    lines = []
    for what, pairs in ((f"uplink, all clients, {count}", up), (f"downlink, one client that follows {count}", down)):
        sent, dense = map(sum, zip(*pairs, strict=True))
        factor = format_ratio(dense / sent) if sent and dense else "–"
        lines.append({"what": what, "sent": format_bytes(sent), "dense": format_bytes(dense), "factor": factor})
    return lines


def rounds(history: Sequence[HistoryRow], metrics: Metrics) -> tuple[list[Cells], str | None, str | None]:
    """Lines of the table of rounds, the metric of its last column, and a note where it shows a sample."""
    if not any(row.round > 0 for row in history):
        return [], None, None
    name = main_metric(metrics)
    # The source that measured most rounds: a mean over changing sources would jump with them.
    source, values = max(series(metrics, name).items(), key=lambda item: len(item[1])) if name else ("", {})
    last, shown = len(history) - 1, list(history)
    if last >= MAX_ROUNDS:
        shown = [history[round(number * last / (MAX_ROUNDS - 1))] for number in range(MAX_ROUNDS)]
    lines = [
        {
            "round": str(row.round),
            "accepted": f"{row.accepted:,}",
            "refused": f"{row.refused:,}",
            "late": f"{row.late:,}",
            **{
                link: format_bytes(getattr(row, f"{link}_bytes"))
                for link in ("uplink", "dense_uplink", "downlink", "dense_downlink")
            },
            "metric": figure(values[row.round]) if row.round in values else "–",
        }
        for row in shown
    ]
    notes = []
    if len(shown) < len(history):
        notes.append(f"{len(shown)} of {len(history):,} rounds are shown; the totals count all.")
    column = code(name) if any(row.round in values for row in shown) else None
    if column and (origin := code(source)):
        notes.append(f"The last column was measured on {origin}.")
    return lines, column, " ".join(notes) or None


def rollbacks(history: Sequence[HistoryRow]) -> list[str]:
    """A sentence for each of the last rollbacks."""
    restored = [row for row in history if row.restored_from is not None]
    return [
        f"Round {row.round} is a rollback: it published the adapter of round {row.restored_from} again."
        for row in restored[-_MAX_ROLLBACKS:]
    ]


def refusals(history: Sequence[HistoryRow]) -> list[Cells]:
    """Reasons and how many updates were refused for each, the most frequent first."""
    lines = [(one_line(reason), count) for reason, count in merge_reasons(history).items()]
    return [{"reason": reason.replace("|", "/"), "count": f"{count:,}"} for reason, count in lines if reason and count]


def fate(history: Sequence[HistoryRow]) -> str | None:
    """What became of the updates that arrived; None while there are none."""
    used, refused, late, clipped, unused = (
        sum(getattr(row, name) or 0 for row in history)
        for name in ("accepted", "refused", "late", "clipped", "refinements_unused")
    )
    arrived = used + refused + late
    if not arrived:
        return None
    text = f"Of {_count(arrived, 'update')} that arrived, {used:,} {_were(used)} used"
    if refused:
        text += f", {refused:,} refused"
    if late:
        text += f", {late:,} too late for their round"
    if clipped:
        text += (
            f". {_count(clipped, 'update')} {_were(clipped)} scaled down, the norm being far above the round's median"
        )
    if unused:
        text += f". {_count(unused, 'refinement')} {_were(unused)} late or refused, and not used"
    return f"{text}."


def training(spec: FederationSpec, record: RoundRecord, adapter_config: Mapping[str, Any]) -> list[Cells]:
    """How it was trained, one fact per line; what is not known has no line."""
    method, server = spec.method, spec.method.server.to_yaml()
    clients = f"at least {spec.min_clients}"
    if spec.clients_per_round is not None:
        clients += f", {spec.clients_per_round} clients are asked"
    facts = {
        "Base model": base_model_text(spec.model),
        "Rounds": f"{record.round} of {spec.rounds}",
        "Updates per round": clients,
        "Local training": _join(
            f"{_count(spec.local_steps, 'step')} of {code(spec.training.get('optim')) or 'the optimizer'} per round",
            _setting("learning rate", spec.training.get("learning_rate")),
            _setting("schedule", spec.training.get("lr_scheduler_type")),
            _setting("weight decay", spec.training.get("weight_decay")),
            f"{spec.optimizer_state} optimizer state in each round",
        ),
        "LoRA": _lora(adapter_config),
        "Codec": _join(
            code(method.codec), *(_setting(name, value) for name, value in sorted(method.codec_options.items()))
        ),
        **_budget("Uplink budget", method.uplink_budget),
        **(_budget("Refinement budget", method.refinement_budget) if method.refinement_budget is not None else {}),
        "Error feedback": f"what a message leaves out is carried to the next with decay {spec.feedback_decay:g}"
        if spec.feedback_decay
        else "off",
        "Server optimizer": _join(
            code(method.server.optimizer),
            *(_setting(name, value) for name, value in sorted(server.items()) if name != "optimizer"),
        ),
        "Clipping": f"updates with more than {method.clip:g} times the round's median norm are scaled down to it"
        if method.clip is not None
        else "off",
        "Software": code(f"fedfstq_hf {record.package_version}"),
    }
    return [{"what": what, "value": value} for what, value in facts.items() if value]


def figure(value: float) -> str:
    """A metric with four decimals, or three digits in exponent form where those would say nothing."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2e}"


def _budget(name: str, budget: str | int | None) -> dict[str, str | None]:
    """A line about a budget: of a message, or of a round's messages together."""
    value = "no limit" if budget is None else format_bytes(budget) if isinstance(budget, int) else code(budget)
    return {f"{name} per {'round' if str(budget).startswith('round:') else 'message'}": value}


def _lora(config: Mapping[str, Any]) -> str | None:
    modules = config.get("target_modules")
    names = texts(sorted(modules) if isinstance(modules, (set, frozenset)) else modules)
    shown = [text for text in map(code, names[:_MAX_MODULES]) if text]
    if len(names) > _MAX_MODULES:
        shown.append(f"{len(names) - _MAX_MODULES} more")
    return _join(
        _setting("rank", config.get("r")),
        _setting("alpha", config.get("lora_alpha")),
        _setting("dropout", config.get("lora_dropout")),
        f"on {', '.join(shown)}" if shown else None,
        "rank-stabilised scaling" if config.get("use_rslora") is True else None,
        "DoRA" if config.get("use_dora") is True else None,
    )


def _setting(name: str, value: object) -> str | None:
    """`name value` for a number, text or switch; None for zero, which stands for off, and for what is not plain."""
    if isinstance(value, bool):
        return f"{name} {'on' if value else 'off'}"
    text = code(value) if value else None
    return f"{name.replace('_', ' ')} {text}" if text else None


def _join(*parts: str | None) -> str | None:
    return ", ".join(part for part in parts if part) or None


def _folder_name(model: str) -> str:
    return PurePosixPath(model.replace("\\", "/")).name


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


@dataclass(frozen=True)
class Measurement:
    """What a source measured: `value` on the adapter of `round`, `first` (where known) on that of round 0."""

    source: str
    name: str
    round: int
    value: float
    first: float | None


def finite(
    metrics: Mapping[int, Mapping[str, Mapping[str, Any]]], up_to: int
) -> dict[int, dict[str, dict[str, float]]]:
    """The finite numbers among what was posted for rounds `0 ... up_to`, sorted; anyone may have posted anything."""
    clean: dict[int, dict[str, dict[str, float]]] = {}
    for round in sorted(round for round in metrics if 0 <= round <= up_to):
        for source, posted in sorted(metrics[round].items()):
            values = {
                name: float(value) for name, value in sorted(posted.items()) if one_line(name) and _is_finite(value)
            }
            if values and one_line(source):
                clean.setdefault(round, {})[source] = values
    return clean


def main_metric(metrics: Metrics) -> str | None:
    """`eval_loss` where it was posted, else the first name; None without metrics."""
    names = [name for by_source in metrics.values() for posted in by_source.values() for name in posted]
    return MAIN_METRIC if MAIN_METRIC in names else next(iter(names), None)


def series(metrics: Metrics, name: str) -> dict[str, dict[int, float]]:
    """Source -> round -> value of one metric."""
    curves: dict[str, dict[int, float]] = {}
    for round, by_source in metrics.items():
        for source, posted in by_source.items():
            if name in posted:
                curves.setdefault(source, {})[round] = posted[name]
    return dict(sorted(curves.items()))


def newest(metrics: Metrics, history: Sequence[HistoryRow], round: int) -> list[Measurement]:
    """Per source and metric the newest value on the adapter of `round` or one that it was made from.

    After a rollback the rounds that it undid are left out: their quality says nothing about what is published.
    """
    wanted = _ancestors(history, round)
    found: dict[tuple[str, str], Measurement] = {}
    for made in wanted:
        for source, posted in metrics.get(made, {}).items():
            for name, value in posted.items():
                first = metrics.get(0, {}).get(source, {}).get(name) if made else None
                found.setdefault((source, name), Measurement(source, name, made, value, first))
    return [found[key] for key in sorted(found)]


def quality_vs_uplink(history: Sequence[HistoryRow], metrics: Metrics) -> Chart | None:
    """The main metric against the bytes that the clients have sent so far: a line for each source, the first six.

    What stood before the first byte was sent is a level, since a log axis has no zero. None where there is nothing to
    draw: values of fewer than two rounds, or none after the first byte was sent.
    """
    name = main_metric(metrics)
    if name is None:
        return None
    sent = dict(zip([row.round for row in history], accumulate(row.uplink_bytes for row in history), strict=True))
    curves = {
        source: [(sent[round], value) for round, value in sorted(values.items()) if round in sent]
        for source, values in series(metrics, name).items()
    }
    known = {round for by_round in series(metrics, name).values() for round in by_round if round in sent}
    shown = {source: points for source, points in curves.items() if any(x > 0 for x, _ in points)}
    if len(known) < 2 or not shown:
        return None
    lines, levels = [], []
    for style, (source, points) in enumerate(list(shown.items())[:_MAX_SOURCES], start=1):
        lines.append(Line(source, style, [(x, y, 0.0) for x, y in points if x > 0]))
        levels += [Level(y, "before\ntraining", style) for x, y in points if x == 0][-1:]
    title = f"{_METRICS.get(name, name)} against cumulative uplink"
    alt = f"{name} against cumulative uplink bytes of all clients"
    x = Axis("cumulative uplink of all clients", log=True, text_of=tick_bytes)
    return Chart("quality_vs_uplink", title, alt, x, Axis(name, text_of="{:.5g}".format), lines, levels)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _ancestors(history: Sequence[HistoryRow], round: int) -> list[int]:
    """`round` and the rounds that it was made from, newest first."""
    restored = {row.round: row.restored_from for row in history if row.restored_from is not None}
    rounds = [round]
    while rounds[-1] > 0:
        before = rounds[-1] - 1
        rounds.append(min(restored.get(rounds[-1], before), before))
    return rounds

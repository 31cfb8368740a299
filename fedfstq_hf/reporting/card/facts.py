"""What stands in the tables and sentences of a model card: bytes, rounds, refusals, training, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from fedfstq_hf.federation.history import HistoryRow, merge_reasons
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card.markup import code, hub_id, one_line, texts
from fedfstq_hf.reporting.card.measurements import Metrics, main_metric, series
from fedfstq_hf.reporting.units import format_bytes, format_ratio

MAX_ROUNDS = 20
"""Rows of the table of rounds; of more rounds than these an even sample is shown, the first and the last among them."""
_MAX_ROLLBACKS = 5
_MAX_MODULES = 12
_EMBEDDED_MODEL = "demo"

Line = dict[str, str]


def introduction(spec: FederationSpec, record: RoundRecord, history: Sequence[HistoryRow]) -> str:
    """What this repository holds, in two or three sentences."""
    base = base_model_text(spec.model)
    what = f"A LoRA adapter for {base}" if base else "A LoRA adapter"
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


def totals(history: Sequence[HistoryRow]) -> list[Line]:
    """Bytes of all rounds together; without rounds after the first there is nothing to add up."""
    after = [row for row in history if row.round > 0]
    if not after:
        return []
    count = _count(len(after), "round")
    return [
        _total(
            f"uplink, all clients, {count}",
            sum(row.uplink_bytes for row in after),
            sum(row.dense_uplink_bytes for row in after),
        ),
        _total(
            f"downlink, one client that follows {count}",
            sum(row.downlink_bytes for row in history),
            sum(row.dense_downlink_bytes for row in history),
        ),
    ]


def rounds(history: Sequence[HistoryRow], metrics: Metrics) -> tuple[list[Line], str | None, str | None]:
    """Lines of the table of rounds, the metric of its last column, and a note where it shows a sample."""
    if not any(row.round > 0 for row in history):
        return [], None, None
    name = main_metric(metrics)
    source, values = _best_covered(metrics, name) if name else ("", {})
    shown = _sample(history)
    lines = [
        {
            "round": str(row.round),
            "accepted": f"{row.accepted:,}",
            "refused": f"{row.refused:,}",
            "late": f"{row.late:,}",
            "uplink": format_bytes(row.uplink_bytes),
            "dense_uplink": format_bytes(row.dense_uplink_bytes),
            "downlink": format_bytes(row.downlink_bytes),
            "dense_downlink": format_bytes(row.dense_downlink_bytes),
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


def refusals(history: Sequence[HistoryRow]) -> list[Line]:
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


def training(spec: FederationSpec, record: RoundRecord, adapter_config: Mapping[str, Any]) -> list[Line]:
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


def _total(what: str, sent: int, dense: int) -> Line:
    factor = format_ratio(dense / sent) if sent and dense else "–"
    return {"what": what, "sent": format_bytes(sent), "dense": format_bytes(dense), "factor": factor}


def _sample(history: Sequence[HistoryRow]) -> list[HistoryRow]:
    last = len(history) - 1
    if last < MAX_ROUNDS:
        return list(history)
    return [history[round(number * last / (MAX_ROUNDS - 1))] for number in range(MAX_ROUNDS)]


def _best_covered(metrics: Metrics, name: str) -> tuple[str, dict[int, float]]:
    """The source that measured most rounds, and its values: a mean over changing sources would jump with them."""
    return max(series(metrics, name).items(), key=lambda item: len(item[1]))


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

"""Reduces the rows of `metrics.jsonl` to `summary.json`: bytes and seconds until a target quality, and their ratios.

The tree `{target, methods, ratios}` stands three times with the same keys: at the top (mean over seeds), under `spread`
(sample standard deviation over seeds) and under `per_seed.<seed>`. A mean is null where any seed lacks the figure.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.federation import storage
from fedfstq_hf.reporting.units import format_bytes, format_figure, format_ratio

REFERENCE = "fedavg"
"""Numerator of the ratios: uncompressed federated averaging."""
COMPARED = "fstq"
"""Denominator of the ratios, so that larger is better for it."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TargetRule:
    """The quality at which `of` has made `fraction` of its own improvement over the whole run.

    It is reached at the first evaluation after round 0 that meets it and is followed by evaluations that meet it too,
    `consecutive` in all. Bytes and seconds count up to that first evaluation; one that no later evaluation confirms
    (the last one of a run) does not count.
    """

    of: str = REFERENCE
    fraction: float = 0.9
    consecutive: int = 2

    def describe(self, metric: str) -> str:
        """The rule in words, as it stands in `summary.json`."""
        return (
            f"the {metric} at which {self.of} has made {100 * self.fraction:g} % of its own improvement from before "
            f"training to its last round, per seed; evaluated every round; reached at the first of {self.consecutive} "
            "consecutive evaluations that hold it, bytes and seconds counted up to and including that round"
        )


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; a torn last line, as an interrupted run leaves it, is skipped."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number} is not JSON: {error}") from None
    return rows


def curves(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """Rows by method (in order of appearance) and seed, each list in the order of rounds 0, 1, 2, ... without gaps."""
    result: dict[str, dict[int, list[Row]]] = {}
    for row in rows:
        result.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row)
    if not result:
        raise DataError("there are no metric rows; expected one per method, seed and round")
    for method, by_seed in result.items():
        for seed, series in by_seed.items():
            series.sort(key=lambda row: int(row["round"]))
            if [row["round"] for row in series] != list(range(len(series))):
                raise DataError(
                    f"method {method}, seed {seed} has rounds {[row['round'] for row in series]}; expected 0, 1, 2, "
                    "... once each. Finish the run with --resume."
                )
    return result


def target_value(series: Sequence[Row], rule: TargetRule, *, higher_is_better: bool) -> float | None:
    """Target metric from the reference's rows of one seed; None where it did not improve."""
    first, last = metric_of(series[0]), metric_of(series[-1])
    if first is None or last is None or not (last > first if higher_is_better else last < first):
        return None
    return first + rule.fraction * (last - first)


def reached_at(series: Sequence[Row], target: float | None, rule: TargetRule, *, higher_is_better: bool) -> Row | None:
    """Row at which the target is reached by `rule`, or None."""
    if target is None:
        return None
    held = 0
    for index, row in enumerate(series[1:], start=1):
        value = metric_of(row)
        meets = value is not None and (value >= target if higher_is_better else value <= target)
        held = held + 1 if meets else 0
        if held == rule.consecutive:
            return series[index - rule.consecutive + 1]
    return None


def totals(series: Sequence[Row]) -> dict[str, Any]:
    """Where one run of a method ended: rounds, metric, and the bytes of all clients and rounds."""
    last = series[-1]
    return {
        "rounds": last["round"],
        "final_metric": metric_of(last),
        "uplink_bytes": last["cumulative_uplink_bytes"],
        "downlink_bytes": last["cumulative_downlink_bytes"],
    }


def total_bytes(row: Row) -> int:
    """Bytes of all clients in both directions up to a row."""
    return int(row["cumulative_uplink_bytes"] + row["cumulative_downlink_bytes"])


def to_target(
    series: Sequence[Row], target: float | None, rule: TargetRule, *, higher_is_better: bool
) -> dict[str, Any]:
    """Bytes of all clients and simulated seconds per link until `target` is reached by `rule`; null where it is not."""
    hit = reached_at(series, target, rule, higher_is_better=higher_is_better)
    return {
        "uplink_bytes_to_target": hit["cumulative_uplink_bytes"] if hit else None,
        "total_bytes_to_target": total_bytes(hit) if hit else None,
        "seconds_to_target": {link: hit["seconds"][link] if hit else None for link in series[-1]["seconds"]},
    }


def summarize(
    rows: Iterable[Row], *, metric: str, higher_is_better: bool, rule: TargetRule | None = None
) -> dict[str, Any]:
    """Return what goes into `summary.json`; the same (method, seed) pairs must be complete.

    Bytes are totals over all clients of a round, seconds are simulated. With one seed every spread is null.
    """
    rule = rule or TargetRule()
    by_method = curves(rows)
    seeds = sorted({seed for by_seed in by_method.values() for seed in by_seed})
    for method, by_seed in by_method.items():
        if missing := [seed for seed in seeds if seed not in by_seed]:
            raise DataError(f"method {method} has no rows for seeds {missing}; finish the run with --resume")
    per_seed = {str(seed): _one_seed(by_method, seed, rule, higher_is_better) for seed in seeds}
    trees = list(per_seed.values())
    return {
        "metric": metric,
        "higher_is_better": higher_is_better,
        **_merge(trees, mean_of),
        "target_rule": rule.describe(metric),
        "seeds": seeds,
        "spread": _merge(trees, spread_of),
        "per_seed": per_seed,
    }


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json` in one step: a reader sees the old file or the new one."""
    text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
    storage.replace_file(Path(path), text.encode(), durable=False)


def _one_seed(
    by_method: Mapping[str, Mapping[int, list[Row]]], seed: int, rule: TargetRule, higher_is_better: bool
) -> dict[str, Any]:
    target = None
    if rule.of in by_method:
        target = target_value(by_method[rule.of][seed], rule, higher_is_better=higher_is_better)
    methods = {}
    for name, by_seed in by_method.items():
        series = by_seed[seed]
        methods[name] = {**totals(series), **to_target(series, target, rule, higher_is_better=higher_is_better)}
    return {"target": target, "methods": methods, "ratios": _ratios(methods)}


def _ratios(methods: Mapping[str, Any]) -> dict[str, Any]:
    """Reference over compared. Where one of the two was not run, every ratio is null."""
    links = next(iter(methods.values()))["seconds_to_target"]
    if REFERENCE not in methods or COMPARED not in methods:
        return {"uplink_to_target": None, "total_to_target": None, "time_to_target": dict.fromkeys(links)}
    above, below = methods[REFERENCE], methods[COMPARED]
    return {
        "uplink_to_target": quotient(above["uplink_bytes_to_target"], below["uplink_bytes_to_target"]),
        "total_to_target": quotient(above["total_bytes_to_target"], below["total_bytes_to_target"]),
        "time_to_target": {
            link: quotient(above["seconds_to_target"][link], below["seconds_to_target"][link]) for link in links
        },
    }


def quotient(above: float | None, below: float | None) -> float | None:
    """The ratio; None where either is None or zero."""
    return above / below if above is not None and below else None


def _merge(trees: Sequence[Any], combine: Callable[[list[float]], float | None]) -> Any:
    """Combine equally shaped trees leaf by leaf; a leaf that is null in any of them is null."""
    if isinstance(trees[0], Mapping):
        return {key: _merge([tree[key] for tree in trees], combine) for key in trees[0]}
    return None if any(leaf is None for leaf in trees) else combine(list(trees))


def mean_of(values: list[float]) -> float:
    """Mean over seeds."""
    return values[0] if len(set(values)) == 1 else statistics.fmean(values)  # equal counts stay whole numbers


def spread_of(values: list[float]) -> float | None:
    """Sample standard deviation over seeds; None with one."""
    return statistics.stdev(values) if len(values) > 1 else None


def metric_of(row: Row) -> float | None:
    """The row's metric; NaN and infinity, as a diverged run leaves them, count as none."""
    value = row["metric"]
    return float(value) if value is not None and math.isfinite(value) else None


def render_summary(summary: Mapping[str, Any]) -> str:
    """The figures of `summary.json` that one looks at first."""
    metric, spread = summary["metric"], summary["spread"]
    width = max(len(name) for name in summary["methods"])
    lines = [f"{'method':<{width}}  final {metric:<18} uplink to target   both ways to target"]
    for name, figures in summary["methods"].items():
        final = format_figure(figures["final_metric"], spread["methods"][name]["final_metric"])
        uplink, both = (
            "not reached" if figures[key] is None else format_bytes(figures[key])
            for key in ("uplink_bytes_to_target", "total_bytes_to_target")
        )
        lines.append(f"{name:<{width}}  {final:<24} {uplink:<18} {both}")
    ratios = summary["ratios"]
    if ratios["uplink_to_target"] is not None:
        figure = format_ratio(ratios["uplink_to_target"], spread["ratios"]["uplink_to_target"])
        total = format_ratio(ratios["total_to_target"], spread["ratios"]["total_to_target"])
        lines.append(f"{COMPARED} reached the target with {figure} less uplink than {REFERENCE},")
        lines.append(f"  with {total} less traffic in both directions together")
        for link, ratio in ratios["time_to_target"].items():
            if ratio is not None:
                figure = format_ratio(ratio, spread["ratios"]["time_to_target"][link])
                lines.append(f"  and, on link {link}, {figure} sooner (simulated clock)")
    return "\n".join(lines)

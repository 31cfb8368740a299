"""Which runs are of one workload, and one set of curves out of all of them.

Runs are of one workload where their recipes agree in all but name, description, methods, seeds and target, and where
a seed measured the same before training in each. What is compared is then on the same data, split and plan.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.recipe import RecipeMethod
from fedfstq_hf.recipe.sections import Recipe
from fedfstq_hf.recipe.strict import plain
from fedfstq_hf.reporting.comparison.runs import Run
from fedfstq_hf.reporting.comparison.summary import Row

FREE = ("name", "description", "methods", "seeds", "target")
_SAME_START = 1e-5
_SAME_START_BF16 = 2e-4
"""Relative differences of the loss before training up to which two runs count as the same model and test set; the
arithmetic of another machine moves it less, a rounding to 8 bits included where the recipe has bfloat16."""
_MAX_DIFFERENCES = 6


@dataclass
class Method:
    """One line of a comparison: a method's settings, its rows by seed, and the folders that they came from.

    `label` is its `name` in the recipe; where another run has other settings under that name, what differs joins it.
    """

    name: str
    label: str
    settings: RecipeMethod
    series: dict[int, list[Row]] = field(default_factory=dict)
    sources: dict[int, Path] = field(default_factory=dict)


@dataclass
class Workload:
    """Runs that can be compared, in the order given; the first run's recipe names and describes them."""

    name: str
    recipe: Recipe
    runs: list[Run]
    methods: dict[str, Method]
    apart: list[str]
    """Why runs of earlier workloads are not in this one, a sentence each."""


def group_runs(runs: Sequence[Run]) -> list[Workload]:
    """Sort runs into workloads and merge the methods and seeds of each.

    Raises:
        DataError: two runs hold the same method and seed with different rows.
    """
    groups: list[list[Run]] = []
    for run in runs:
        group = next((group for group in groups if not _reasons(group, run)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    workloads: list[Workload] = []
    for number, group in enumerate(groups):
        recipe = group[0].recipe
        name = recipe.name
        while name in {workload.name for workload in workloads}:
            name = f"{recipe.name} ({number + 1})"
        apart = [_apart(workload, group[0]) for workload in workloads]
        workloads.append(Workload(name, recipe, group, _merge(group), apart))
    return workloads


def rounded_otherwise(workload: Workload) -> tuple[int, float, float] | None:
    """The seed whose runs differ most before training, with its lowest and highest loss; None where none differs.

    What differs is the arithmetic of the machines that they ran on.
    """
    starts: dict[int, list[float]] = {}
    for run in workload.runs:
        for seed, value in _starts(run).items():
            starts.setdefault(seed, []).append(value)
    ranges = [(max(v) - min(v), seed, min(v), max(v)) for seed, v in starts.items()]
    widest = max((r for r in ranges if r[0] > _SAME_START * abs(r[3])), default=None)
    return widest and widest[1:]


def settings_text(settings: RecipeMethod) -> str:
    """What differs from the defaults of a method: `codec fp32`, `codec topk, codec_options.value_bits 8, ...`."""
    default = flatten(plain(RecipeMethod()))
    given = flatten(plain(settings))
    changed = [
        f"{key.removeprefix('codec_options.')} {_show(value)}"
        for key, value in given.items()
        if default.get(key) != value and key != "codec"
    ]
    return ", ".join([f"codec {settings.codec}", *changed])


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; links by their names, other lists whole, empty mappings as nothing."""
    if isinstance(tree, Mapping):
        parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in tree.items()]
        return {key: value for part in parts for key, value in part.items()}
    if isinstance(tree, list) and tree and all(isinstance(item, Mapping) and "name" in item for item in tree):
        return flatten({item["name"]: {k: v for k, v in item.items() if k != "name"} for item in tree}, prefix)
    return {prefix: tree}


def _reasons(group: Sequence[Run], run: Run) -> list[str]:
    """Why `run` cannot be compared with the runs of `group`; empty where it can."""
    ours, theirs = (flatten({k: v for k, v in r.recipe.to_dict().items() if k not in FREE}) for r in (group[0], run))
    reasons = [
        f"{key} {_show(ours.get(key))} there, {_show(theirs.get(key))} here"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]
    tolerance = _SAME_START_BF16 if run.recipe.training.bf16 else _SAME_START
    starts = {seed: (value, other.folder) for other in reversed(group) for seed, value in _starts(other).items()}
    for seed, value in _starts(run).items():
        if not reasons and seed in starts and not math.isclose(value, starts[seed][0], rel_tol=tolerance):
            reasons.append(
                f"same recipe, but before training seed {seed} measures {starts[seed][0]:.6g} in {starts[seed][1]} and "
                f"{value:.6g} in {run.folder}: the files of model or data have changed in between"
            )
    return reasons


def _apart(earlier: Workload, run: Run) -> str:
    reasons = _reasons(earlier.runs, run)
    more = f"; and {len(reasons) - _MAX_DIFFERENCES} more" if len(reasons) > _MAX_DIFFERENCES else ""
    return f"Not compared with {earlier.name}: {'; '.join(reasons[:_MAX_DIFFERENCES])}{more}."


def _starts(run: Run) -> dict[int, float]:
    """Loss on the held-out examples before training by seed; the recipe's metric where the rows have no loss."""
    starts: dict[int, float] = {}
    for by_seed in run.series.values():
        for seed, rows in by_seed.items():
            value = rows[0].get("eval_loss", rows[0]["metric"])
            if value is not None and math.isfinite(value):
                starts.setdefault(seed, float(value))
    return starts


def _merge(runs: Sequence[Run]) -> dict[str, Method]:
    methods: dict[str, Method] = {}
    for run in runs:
        for name, settings in run.recipe.methods.items():
            if name not in run.series:
                continue
            method = _method_for(methods, name, settings)
            for seed, rows in run.series[name].items():
                known = method.series.get(seed)
                if known is not None:
                    _check_same(method, seed, rows, run)
                if known is None or len(rows) > len(known):
                    method.series[seed], method.sources[seed] = rows, run.folder
    return methods


def _method_for(methods: dict[str, Method], name: str, settings: RecipeMethod) -> Method:
    """The line for `name` with these settings; where the name is taken by others, what differs joins the label."""
    for method in methods.values():
        if (method.name, method.settings) == (name, settings):
            return method
    label = name
    if name in methods:
        first, own = (flatten(plain(item)) for item in (methods[name].settings, settings))
        keys = [key for key in dict.fromkeys([*first, *own]) if first.get(key) != own.get(key)]
        label = f"{name} ({', '.join(f'{key} {_show(own.get(key))}' for key in keys)})"
    return methods.setdefault(label, Method(name, label, settings))


def _check_same(method: Method, seed: int, rows: Sequence[Row], run: Run) -> None:
    """A copy of a run, or an earlier state of it, is the same run; anything else would be counted twice."""
    for known, new in zip(method.series[seed], rows, strict=False):
        keys = [key for key in dict.fromkeys([*known, *new]) if not _equal(known.get(key), new.get(key))]
        if keys:
            raise DataError(
                f"{method.sources[seed]} and {run.folder} both hold method {method.label}, seed {seed}, with different "
                f"rows (first in round {known['round']}: {keys[0]} {known.get(keys[0])} and {new.get(keys[0])}). "
                "Expected each method and seed from one run. Leave one of the two folders out, or run other seeds: "
                f"fedfstq simulate RECIPE --seeds '[{seed + 1}]'"
            )


def _equal(one: Any, other: Any) -> bool:
    return bool(one == other) or (one != one and other != other)  # NaN is equal to nothing, itself included


def _show(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"

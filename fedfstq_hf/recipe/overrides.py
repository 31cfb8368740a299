"""Changes to a recipe from the command line: `training.learning_rate=1e-3`, or short names for the commonest."""

import copy
from collections.abc import Mapping
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.strict import parse_yaml, unknown_key
from fedfstq_hf.text import nearest

ALIASES = {
    "data": "data.path",
    "format": "data.format",
    "clients": "federation.clients",
    "clients_per_round": "federation.clients_per_round",
    "rounds": "federation.rounds",
    "alpha": "federation.alpha",
    "dropout": "federation.dropout",
    "local_steps": "training.local_steps",
    "learning_rate": "training.learning_rate",
    "metric": "evaluation.metric",
}
_TEXT = ("model", "data.path", "data.subset", "name", "description")


def apply_overrides(mapping: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    """Return a copy of a recipe's raw mapping with `overrides` set in it.

    Keys are dotted paths or `ALIASES`; text values are read as YAML. `methods=fedavg,fstq` and `links=a,b` pick by
    name, and `seeds=3` asks for three seeds. A method that the recipe does not have cannot be changed or picked.
    """
    result: dict[str, Any] = copy.deepcopy(dict(mapping))
    picked: list[str] | None = None
    for key, value in overrides.items():
        path = ALIASES.get(key, key)
        if path not in mapping and (near := nearest(path, ALIASES, cutoff=0.8)):
            raise ConfigError(f"unknown key {key!r}; did you mean {near!r}, which stands for {ALIASES[near]}?")
        if path == "methods":
            picked = _names(value)
        elif path == "links" and isinstance(value, str) and not value.lstrip().startswith(("[", "{")):
            result["links"] = _names(value)
        else:
            _set(result, path, _parse(path, value))
    if picked is not None:
        methods = result.get("methods", {})
        for name in picked:
            if name not in methods:
                raise unknown_key(name, methods, "methods")
        result["methods"] = {name: methods[name] for name in picked}
    return result


def _names(value: object) -> list[str]:
    items = value.strip("[] ").split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items:
        raise ConfigError(f"expected names separated by commas, such as fedavg,fstq; got {value!r}")
    return [str(item).strip() for item in items]


def _parse(path: str, value: object) -> object:
    if not isinstance(value, str) or path in _TEXT:
        return value
    return parse_yaml(value, f"override {path}={value}")


def _set(mapping: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split(".")
    node: Any = mapping
    for depth, name in enumerate(parents):
        where = ".".join(parents[: depth + 1])
        if depth == 1 and parents[0] == "methods" and name not in node:
            raise unknown_key(name, node, "methods")
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {path}: {where} is {child!r}, not a section; type --{where} VALUE")
        node = child
    node[last] = value

"""Recipes by name or path, changed by `training.learning_rate=1e-3` or short names for the commonest, and swept.

The shipped ones lie under `recipes/` in a source checkout, under `_recipes/` in an installed package.
"""

import copy
import itertools
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.sections import Recipe
from fedfstq_hf.recipe.strict import parse_yaml, unknown_key
from fedfstq_hf.text import nearest, unknown

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


def recipes_folder() -> Path:
    """Folder of the shipped recipes; raises `ConfigError` where an installation lacks them."""
    package = Path(str(resources.files("fedfstq_hf")))
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir() and any(folder.glob("*.yaml")):
            return folder
    raise ConfigError(f"this installation has no recipes in {package / '_recipes'}; give the path of a .yaml file")


def list_recipes() -> list[str]:
    """Names of the shipped recipes, sorted; `find_recipe` takes each of them."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Path of a recipe: `name` itself where that file exists, else the shipped recipe of that name."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give the .yaml file in it")
    if path.suffix in (".yaml", ".yml") and len(path.parts) > 1 and path.parts[0] != "recipes":
        raise ConfigError(f"there is no recipe file {path}; `fedfstq recipes ls` lists those of the package")
    # `recipes/fed_med.yaml`, as one types it in a checkout, finds the shipped one from anywhere.
    stem = path.with_suffix("") if path.suffix in (".yaml", ".yml") else path
    shipped = stem.relative_to("recipes") if stem.parts[:1] == ("recipes",) else stem
    known = list_recipes()
    if shipped.as_posix() in known:
        return recipes_folder() / f"{shipped.as_posix()}.yaml"
    raise ConfigError(f"{unknown('recipe', str(name), known)} The path of a .yaml file works too.")


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Load a recipe and apply `overrides` (see `apply_overrides`); whatever it does not know raises `ConfigError`."""
    path = find_recipe(name_or_path)
    where = f"recipe {path.name}"
    mapping: Any = parse_yaml(path.read_text(encoding="utf-8"), where)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} must be a mapping with keys such as name and methods, got {type(mapping).__name__}")
    return Recipe.from_dict(apply_overrides(mapping, overrides or {}), where)


def sweep_points(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """(label, recipe) for every combination of the values in `recipe.sweep`; one without a label where it has none.

    A label is such as `dropout=0.3`; with several settings `clients=50,alpha=1.0`.
    """
    keys = list(recipe.sweep)
    points = []
    for values in itertools.product(*recipe.sweep.values()):
        changes = dict(zip(keys, values, strict=True))
        label = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in changes.items())
        mapping = apply_overrides(replace(recipe, sweep={}).to_dict(), changes)
        mapping["name"] = f"{recipe.name}, {label}" if label else recipe.name
        points.append((label, Recipe.from_dict(mapping, f"recipe {recipe.name}, {label}")))
    return points


def without_swept(recipe: Recipe, overrides: dict[str, str]) -> Recipe:
    """The recipe with what `overrides` set taken out of its sweep: a setting that was typed is that setting."""
    typed = {ALIASES.get(key, key) for key in overrides}
    kept = {key: values for key, values in recipe.sweep.items() if ALIASES.get(key, key) not in typed}
    return replace(recipe, sweep=kept)

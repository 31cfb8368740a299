"""Finds recipes by name or path: in a source checkout under `recipes/`, in an installed package under `_recipes/`."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.overrides import apply_overrides
from fedfstq_hf.recipe.schema import Recipe
from fedfstq_hf.recipe.strict import parse_yaml
from fedfstq_hf.text import unknown


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

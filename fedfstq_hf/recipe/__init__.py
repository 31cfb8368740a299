"""Recipes: a whole comparison in one YAML file, read strictly, changed from the command line, found by name."""

from fedfstq_hf.methods import MethodSettings, ServerSettings
from fedfstq_hf.recipe.check import validate
from fedfstq_hf.recipe.library import ALIASES, apply_overrides, find_recipe, list_recipes, load_recipe, recipes_folder
from fedfstq_hf.recipe.sections import (
    EvaluationSettings,
    FederationSettings,
    LoraSettings,
    Recipe,
    RecipeMethod,
    TargetSettings,
    TrainingSettings,
)
from fedfstq_hf.recipe.strict import build, parse_yaml, plain

__all__ = [
    "ALIASES",
    "EvaluationSettings",
    "FederationSettings",
    "LoraSettings",
    "MethodSettings",
    "Recipe",
    "RecipeMethod",
    "ServerSettings",
    "TargetSettings",
    "TrainingSettings",
    "apply_overrides",
    "build",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "parse_yaml",
    "plain",
    "recipes_folder",
    "validate",
]

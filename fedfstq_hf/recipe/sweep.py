"""A recipe that runs several times with one setting changed: `sweep: {federation.dropout: [0.0, 0.3, 0.7]}`."""

import itertools
from dataclasses import replace

from fedfstq_hf.recipe.overrides import ALIASES, apply_overrides
from fedfstq_hf.recipe.schema import Recipe


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

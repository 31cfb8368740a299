"""Checks a recipe against the installed libraries: the slow part of `fedfstq recipes validate`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedfstq_hf.errors import ConfigError, FedFSTQError
from fedfstq_hf.methods import feedback_decay
from fedfstq_hf.recipe.sections import Recipe, RecipeMethod, TimeCap


def validate(recipe: Recipe) -> list[str]:
    """Raise `ConfigError` with all that is wrong with `recipe` beyond types and ranges; return what is only notable.

    Asks the libraries themselves: each codec is built with its options, each budget is parsed, each server optimizer is
    constructed, and the `lora` and `training` sections are handed to peft and transformers. Nothing is downloaded.
    """
    problems: list[str] = []

    def attempt(where: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (FedFSTQError, TypeError, ValueError, ImportError) as error:
            problems.append(f"{where}: {error}")

    for name, method in recipe.methods.items():
        attempt(f"methods.{name}.codec", partial(_check_codec, method))
        attempt(f"methods.{name}.uplink_budget", partial(_check_budget, method))
        attempt(f"methods.{name}.server", partial(_check_server, method))
        attempt(f"methods.{name}.downlink", partial(_check_downlink, method))
        attempt(f"methods.{name}.refinement_budget", partial(_check_refinement_budget, method))
        attempt(f"methods.{name}.uplink_cap", partial(_check_cap, recipe, method.time_cap))
        attempt(f"methods.{name}.refinement_cap", partial(_check_cap, recipe, method.refinement_time_cap))
        if method.lora:
            attempt(f"methods.{name}.lora", partial(_check_lora, recipe.for_method(name)))
    attempt("lora", partial(_check_lora, recipe))
    attempt("training", partial(_check_training, recipe))
    attempt("data.path", partial(_check_path, recipe))
    if problems:
        raise ConfigError("\n".join([f"recipe {recipe.name} will not run:", *problems]))
    return _notes(recipe)


def _check_codec(method: RecipeMethod) -> None:
    from fedfstq_hf.codec import get_codec

    codec = get_codec(method.codec, **method.codec_options)
    feedback_decay(method.error_feedback, codec=codec.name, unbiased=codec.unbiased)


def _check_cap(recipe: Recipe, cap: TimeCap | None) -> None:
    names = [link.name for link in recipe.links]
    if cap is not None and cap.link not in names:
        raise ConfigError(f"{cap.link!r} is none of the recipe's links: {', '.join(names) or 'it has none'}")


def _check_budget(method: RecipeMethod) -> None:
    from fedfstq_hf.codec.budget import open_budget

    if method.uplink_budget is not None:
        open_budget(method.uplink_budget, 1_000_000)


def _check_refinement_budget(method: RecipeMethod) -> None:
    from fedfstq_hf.codec.budget import open_refinement_budget

    open_refinement_budget(method.refinement_budget, 1_000_000)


def _check_downlink(method: RecipeMethod) -> None:
    from fedfstq_hf.codec.budget import parse_budget

    if method.downlink is not None:
        for budget in (method.downlink.keyframe, method.downlink.step):
            if budget is not None:
                parse_budget(budget, 1_000_000)


def _check_server(method: RecipeMethod) -> None:
    from fedfstq_hf.federation.aggregation import check_server

    check_server(method.server.to_yaml())


def _check_lora(recipe: Recipe) -> None:
    from peft import LoraConfig

    LoraConfig(**recipe.lora.peft_kwargs())


def _check_training(recipe: Recipe) -> None:
    from transformers import TrainingArguments

    keywords = recipe.training.trainer_kwargs()
    # Whether this machine can do bf16 is not the recipe's fault.
    TrainingArguments(output_dir="unused", report_to="none", **{**keywords, "bf16": False})


def _check_path(recipe: Recipe) -> None:
    if recipe.data.path.endswith((".jsonl", ".json")) and not Path(recipe.data.path).is_file():
        raise ConfigError(f"there is no file {recipe.data.path}")


def _notes(recipe: Recipe) -> list[str]:
    """What runs, but may not be meant."""
    if recipe.target.of in recipe.methods:
        return []
    return [
        f"target.of: {recipe.target.of!r} is not among the methods ({', '.join(recipe.methods)}), "
        "so there will be no target and no ratios"
    ]

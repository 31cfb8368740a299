"""`TrainingArguments` in a federation: which are refused, and its values in their place while it lasts."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.util import find_spec
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.spec import BITSANDBYTES_OPTIMIZERS, SCHEDULE_FREE_OPTIMIZERS

logger = logging.getLogger(__name__)


def check_arguments(args: Any) -> None:
    """Refuse `TrainingArguments` that have no meaning in a federation.

    Raises:
        ConfigError: saying what to do instead.
    """
    if args.load_best_model_at_end:
        raise ConfigError(
            "load_best_model_at_end=True would put this client's best checkpoint in the place of the federation's "
            "adapter. Leave it out; `fedfstq evaluate` measures published rounds, `fedfstq rollback` goes back to one."
        )
    for package, names in (("bitsandbytes", BITSANDBYTES_OPTIMIZERS), ("schedulefree", SCHEDULE_FREE_OPTIMIZERS)):
        if args.optim in names and find_spec(package) is None:
            raise ConfigError(f"The optimizer {args.optim} needs {package}. Type: pip install {package}")


def signature_with_federation(trainer: type, mixin: type) -> inspect.Signature:
    """That of the Trainer class behind the mixin, with the mixin's argument: others look arguments up by name."""
    behind = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    makers = [vars(kind)["__init__"] for kind in behind if "__init__" in vars(kind)]
    signatures = [list(inspect.signature(make).parameters.values())[1:] for make in makers]
    named = [[one for one in found if one.kind is one.POSITIONAL_OR_KEYWORD] for found in signatures]
    federation = inspect.signature(vars(mixin)["__init__"]).parameters["federation"]
    return inspect.Signature([*max(named[:3], key=len, default=[]), federation])


def typed(args: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as `args` holds its own: a name becomes a member of the enum, a whole number a float.

    Raises:
        ConfigError: a value is of another type, or a name that this version of transformers does not know.
    """
    return {name: _typed(name, value, getattr(args, name)) for name, value in values.items()}


def announce(args: Any, values: Mapping[str, Any]) -> None:
    """Log which arguments become others; as a warning where the user had chosen the one that gives way."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name, value in values.items():
        old = getattr(args, name)
        if old != value:
            level = logging.INFO if old == defaults.get(name) else logging.WARNING
            logger.log(level, "The federation sets %s=%r (was %r).", name, _plain(value), _plain(old))


@contextlib.contextmanager
def replaced(args: Any, **values: Any) -> Iterator[None]:
    """Within it, `args` holds these values; afterwards what it held before."""
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)


def _typed(name: str, value: Any, current: Any) -> Any:
    if isinstance(current, Enum):
        try:
            return type(current)(value)
        except ValueError:
            raise ConfigError(
                f"The federation sets {name}={value!r:.60}, which this version of transformers does not know. Install "
                "the version that the federation was founded with."
            ) from None
    if type(current) in (int, float):
        if type(value) not in (int, float):
            raise ConfigError(f"The federation sets {name}={value!r:.60}, where the Trainer expects a number.")
        return float(value) if isinstance(current, float) else value
    return value


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value

"""Builds dataclasses out of plain mappings and refuses whatever they do not declare.

Every error names the value by its dotted path, says what was expected and, for a key, which valid one is nearest.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.text import unknown

T = TypeVar("T")


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses duplicate keys and reads `1e-3` as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} stands twice in one mapping (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; a syntax error becomes a `ConfigError` that starts with `where`."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def unknown_key(key: object, valid: Iterable[str], where: str) -> ConfigError:
    """The error for a key that `where` does not have, with the nearest valid one."""
    return ConfigError(unknown("key", str(key), sorted(valid), f" in {where}"))


def build(cls: type[T], mapping: object, where: str) -> T:
    """Build dataclass `cls` from `mapping`, checking names, types and (through `__post_init__`) ranges.

    `where` is the dotted path that errors begin with. A class with a classmethod `from_yaml` reads itself.
    """
    if isinstance(mapping, cls):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values, got {_show(mapping)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise unknown_key(key, fields, where)
    values = {key: _coerce(value, hints[key], join(where, key)) for key, value in mapping.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{where} lacks the key {name!r}, which has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(join(where, str(error))) from None


def join(where: str, key: str) -> str:
    """`where` extended by `key`: `recipe x.yaml` and `data` make `recipe x.yaml: data`, further keys follow by dots."""
    return f"{where}: {key}" if " " in where and ": " not in where else f"{where}.{key}"


def plain(value: object) -> Any:
    """The inverse of `build`: dataclasses and tuples as dicts and lists that YAML and JSON can hold."""
    if hasattr(value, "to_yaml"):
        return value.to_yaml()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; ints pass for floats, nothing else is converted."""
    if hint is Any:
        return value
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _coerce_union(value, get_args(hint), where)
    if origin is typing.Literal:
        options = get_args(hint)
        if not isinstance(value, str) or value not in options:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, options))}, got {_show(value)}")
        return value
    if origin in (list, tuple):
        return _coerce_sequence(value, origin, get_args(hint), where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping of names to values, got {_show(value)}")
        return {str(key): _coerce(item, get_args(hint)[1], f"{where}.{key}") for key, item in value.items()}
    if hasattr(hint, "from_yaml"):
        return hint.from_yaml(value, where)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    return _coerce_scalar(value, hint, where)


def _coerce_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(value, option, where)
        except ConfigError as error:
            errors.append(str(error))
    if len(errors) == 1:
        raise ConfigError(errors[0])
    names = ["null" if option is type(None) else _SCALARS.get(option, "a list") for option in options]
    raise ConfigError(f"{where} must be {' or '.join(dict.fromkeys(names))}, got {_show(value)}")


def _coerce_sequence(value: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, got {_show(value)}")
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            raise ConfigError(f"{where} must be a list of {len(arguments)}, got {_show(value)}")
        pairs = enumerate(zip(value, arguments, strict=True))
        return tuple(_coerce(item, hint, f"{where}[{i}]") for i, (item, hint) in pairs)
    return origin(_coerce(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))


_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _coerce_scalar(value: Any, hint: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in _SCALARS and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ConfigError(f"{where} must be {_SCALARS[hint]}, got {_show(value)}")
    return value


def _show(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"

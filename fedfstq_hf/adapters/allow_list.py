"""Adapter configurations that somebody else wrote: the fields that are believed, and within which bounds.

PEFT does what a configuration says: it imports modules by name, reads files, changes the base, replicates its layers.
Here a field is listed, its value within bounds, or the configuration is refused, before PEFT sees any of it. What is
empty or off, or a note about where the adapter was made, is harmless and left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.errors import AdapterMismatchError, FedFSTQError
from fedfstq_hf.text import parse_object, printable

MAX_BYTES = 1 << 18
"""Size of an `adapter_config.json`; those of thousands of modules listed by name are smaller."""
MAX_RANK = 4096
_MAX_NAMES = 2048
_MAX_PATTERNS = 240  # PEFT compiles one expression for each; Python keeps 512
_MAX_WIDTH = 1 << 20
_MAX_SEED = 2**63 - 1

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_KEY = re.compile(r"\^?(?:[A-Za-z0-9_-]|\\?\.){1,200}\$?")
# Notes about where the adapter was made; PEFT is never given them.
_NOTES = ("auto_mapping", "peft_version", "runtime_config")
# Fields that are not believed, as some PEFT wrote them where nobody set them.
_UNSET = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_TASKS = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


# Regular expressions for names of modules: a grammar whose matching cannot explode.
#
# PEFT matches `target_modules` and `exclude_modules` with Python's `re`, which backtracks: `(a+)+b` takes time that is
# exponential in the name's length. Allowed are characters, `.`, `\d`, `\.` and classes such as `[0-9]`, each with `*`,
# `+` or `?`, and groups of alternatives, `(q_proj|v_proj)`, that are neither nested nor repeated. The ways to match
# such a pattern can be counted from its text, and are bounded.
_MAX_PATTERN = 500
_MAX_WAYS = 64**3  # three of `*` or `+` on a name of 64 characters: about a millisecond a name
_OF_REPEAT = {None: 1, "?": 2, "*": 64, "+": 64}

_ATOM = r"(?:[A-Za-z0-9_-]|\.|\\[.d]|\[(?:[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_])+\])"
_PIECE = re.compile(
    rf"(?P<edge>[|^$])|\((?:\?:)?(?P<group>{_ATOM}+(?:\|{_ATOM}+)*)\)(?![*+?{{])"
    rf"|{_ATOM}(?:(?P<repeat>[*+?])\??)?(?![*+{{])"
)
_ATOMS = re.compile(_ATOM)
_DIGITS = frozenset("0123456789")


def is_bounded(pattern: str) -> bool:
    """Whether a pattern lies within the grammar, and has few enough ways to match a name."""
    if len(pattern) > _MAX_PATTERN:
        return False
    total, ways, place = 0, 1, 0
    while place < len(pattern):
        piece = _PIECE.match(pattern, place)
        if piece is None:
            return False
        place = piece.end()
        if piece["edge"] == "|":
            total, ways = total + ways, 1
        elif piece["group"]:
            ways *= _branching(piece["group"])
        else:
            ways *= _OF_REPEAT[piece["repeat"]]
    return total + ways <= _MAX_WAYS and _compiles(pattern)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:  # such as [z-a]
        return False
    return True


def _branching(group: str) -> int:
    """How many alternatives of a group can match at one place at most."""
    alternatives = [[_characters(atom) for atom in _ATOMS.findall(text)] for text in group.split("|")]
    return max(sum(_agree(one, other) for other in alternatives) for one in alternatives)


def _agree(one: list[frozenset[str] | None], other: list[frozenset[str] | None]) -> bool:
    return all(a is None or b is None or a & b for a, b in zip(one, other, strict=False))


def _characters(atom: str) -> frozenset[str] | None:
    """What an atom matches; None: anything."""
    if atom == ".":
        return None
    if atom == r"\d":
        return _DIGITS
    if not atom.startswith("["):
        return frozenset(atom[-1])
    inner = re.sub(r"(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), atom[1:-1])
    return frozenset(inner)


@dataclass(frozen=True)
class _Rule:
    expected: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int) -> _Rule:
    return _Rule(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def _real(low: float, high: float) -> _Rule:
    return _Rule(
        f"a number from {low:g} to {high:g}",
        lambda v: type(v) in (int, float) and math.isfinite(v) and low <= v <= high,
    )


def _one_of(*values: object) -> _Rule:
    # 1 == True, so types are compared as well
    return _Rule(f"one of {', '.join(map(str, values))}", lambda v: any(type(v) is type(x) and v == x for x in values))


def _listed(what: str, item: _Rule, longest: int) -> _Rule:
    return _Rule(
        f"a list of at most {longest} {what}",
        lambda v: type(v) is list and len(v) <= longest and all(item.holds(x) for x in v),
    )


def _mapped(item: _Rule) -> _Rule:
    return _Rule(
        f"at most {_MAX_PATTERNS} names of modules, each with {item.expected}",
        lambda v: (
            type(v) is dict
            and len(v) <= _MAX_PATTERNS
            and all(_KEY.fullmatch(key) and item.holds(x) for key, x in v.items())
        ),
    )


def _either(*rules: _Rule) -> _Rule:
    return _Rule(" or ".join(rule.expected for rule in rules), lambda v: any(rule.holds(v) for rule in rules))


def _optional(*rules: _Rule) -> _Rule:
    either = _either(*rules)
    return _Rule(f"null, or {either.expected}", lambda v: v is None or either.holds(v))


_flag = _one_of(True, False)
_name = _Rule("a name of letters, digits, _, - and .", lambda v: type(v) is str and bool(_NAME.fullmatch(v)))
_pattern = _Rule(
    f"a pattern of at most {_MAX_PATTERN} characters that is matched in bounded time, such as "
    r".*\.(q_proj|v_proj): no groups within groups, no repeated groups, at most three * or +",
    lambda v: type(v) is str and v != "" and is_bounded(v),
)
_names = _listed("names of modules", _name, _MAX_NAMES)
_layer = _whole(0, 100_000)
_token = _whole(0, 2**31)
_rank = _whole(1, MAX_RANK)
_alpha = _real(0, 1e6)
_share = _real(0, 0.999999)
_seed = _whole(0, _MAX_SEED)
_count = _whole(1, 10_000_000)
_tokens = _listed("token ids", _token, MAX_RANK)

_EVERY = {
    "base_model_name_or_path": _optional(_Rule("text", lambda v: type(v) is str and len(v) <= 1000)),
    "exclude_modules": _optional(_names, _pattern),
    "inference_mode": _flag,
    "layers_pattern": _optional(_name, _one_of(""), _listed("names", _name, 16)),
    "layers_to_transform": _optional(_layer, _listed("layers", _layer, _MAX_NAMES)),
    "modules_to_save": _optional(_listed("names of modules", _name, 64)),
    "peft_type": _Rule("text", lambda v: type(v) is str),
    "target_modules": _optional(_names, _pattern),
    "task_type": _optional(_one_of(*_TASKS)),
}
_INIT = {"init_weights": _flag}
_SHAPE = {"r": _rank, "fan_in_fan_out": _flag}
_LYCORIS = {
    "alpha": _alpha,
    "alpha_pattern": _mapped(_alpha),
    "init_weights": _flag,
    "module_dropout": _share,
    "r": _rank,
    "rank_dropout": _share,
    "rank_pattern": _mapped(_rank),
}
_no_bias = _one_of("none")

_FIELDS: dict[str, dict[str, _Rule]] = {
    "FOURIERFT": _INIT
    | {
        "bias": _no_bias,
        "fan_in_fan_out": _flag,
        "n_frequency": _count,
        "n_frequency_pattern": _mapped(_count),
        "random_loc_seed": _seed,
        "scaling": _real(-1e6, 1e6),
    },
    "IA3": {
        "fan_in_fan_out": _flag,
        "feedforward_modules": _optional(_names, _pattern),
        "init_ia3_weights": _flag,
    },
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS
    | {
        "decompose_both": _flag,
        "decompose_factor": _whole(-1, _MAX_WIDTH),
        "init_weights": _either(_flag, _one_of("lycoris")),
        "rank_dropout_scale": _flag,
    },
    "LORA": _SHAPE
    | {
        "alora_invocation_tokens": _optional(_tokens),
        "alpha_pattern": _mapped(_alpha),
        "bias": _one_of("none", "all", "lora_only"),
        "ensure_weight_tying": _flag,
        "init_lora_weights": _one_of(True, False, "gaussian", "orthogonal"),
        "lora_alpha": _alpha,
        "lora_bias": _flag,
        "lora_dropout": _share,
        "rank_pattern": _mapped(_rank),
        "trainable_token_indices": _optional(_tokens, _mapped(_tokens)),
        "use_dora": _flag,
        "use_rslora": _flag,
    },
    "OFT": _INIT
    | {
        "bias": _one_of("none", "all", "oft_only"),
        "block_share": _flag,
        "coft": _flag,
        "eps": _real(0, 1),
        "fan_in_fan_out": _flag,
        "module_dropout": _share,
        "num_cayley_neumann_terms": _whole(1, 64),
        "oft_block_size": _whole(0, _MAX_WIDTH),
        "r": _whole(0, _MAX_WIDTH),
        "use_cayley_neumann": _flag,
    },
    "RANDLORA": _INIT
    | _SHAPE
    | {
        "bias": _no_bias,
        "projection_prng_key": _seed,
        "randlora_alpha": _alpha,
        "randlora_dropout": _share,
        "save_projection": _flag,
        "sparse": _flag,
        "very_sparse": _flag,
    },
    "UNILORA": _INIT
    | _SHAPE
    | {
        "bias": _no_bias,
        "init_theta_d_bound": _real(0, 1e3),
        "proj_seed": _seed,
        "save_indices": _flag,
        "theta_d_length": _count,
        "unilora_dropout": _share,
    },
    "VERA": _INIT
    | _SHAPE
    | {
        "bias": _no_bias,
        "d_initial": _real(-1e3, 1e3),
        "projection_prng_key": _seed,
        "save_projection": _flag,
        "vera_dropout": _share,
    },
}

KINDS = tuple(_FIELDS)
"""Kinds of adapters, PEFT's names."""


def parse(data: bytes, what: str, error: type[FedFSTQError], kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """The believed fields of an `adapter_config.json`.

    Args:
        what: names the file in errors.
        error: what is raised.
        kinds: of adapters, of `KINDS`.

    Raises:
        error: it is no JSON object within bounds, or sets something that is not believed; nothing was made of it.
    """
    fields = parse_object(data, what, max_bytes=MAX_BYTES, error=error)
    try:
        return believed(fields, kinds)
    except AdapterMismatchError as refused:
        raise error(f"{what} cannot be read: {refused}") from refused


def believed(fields: Mapping[str, Any], kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """The fields of a configuration, as JSON has them, that are listed here; harmless ones are left out.

    Raises:
        AdapterMismatchError: naming the first field that is neither listed nor harmless, or out of its bounds.
    """
    kind = fields.get("peft_type")
    if type(kind) is not str or kind not in kinds:
        raise AdapterMismatchError(f"peft_type is {_shown(kind)}; expected one of {', '.join(kinds)}.")
    rules, kept = _EVERY | _FIELDS[kind], {}
    for name, value in fields.items():
        if name in rules:
            if not rules[name].holds(value):
                raise AdapterMismatchError(f"{name} is {_shown(value)}; expected {rules[name].expected}.")
            kept[name] = value
        elif value and name not in _NOTES and not _is_unset(kind, name, value):
            raise AdapterMismatchError(
                f"{printable(name, 60)} is {_shown(value)}; it is not among the settings that are taken from somebody "
                f"else's {kind} adapter. Leave it out."
            )
    return kept


def check_own(config: bytes) -> None:
    """Refuse an `adapter_config.json` of one's own that others would refuse to read.

    Raises:
        AdapterMismatchError: saying why.
    """
    try:
        parse(config, "It", AdapterMismatchError)
    except AdapterMismatchError as refused:
        raise AdapterMismatchError(f"Nobody else would load an adapter with this configuration. {refused}") from refused


def _is_unset(kind: str, name: str, value: object) -> bool:
    """Whether a field has its default, here or where it was written, so that leaving it out changes nothing."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    field = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)].__dataclass_fields__.get(name)
    return _UNSET.get(name) == value or (field is not None and field.default == value)


def _shown(value: object) -> str:
    return printable(repr(value), 80)

"""Brings a newly rendered model card together with the one in the repo, in which a person may have written anything."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

OWNED_KEYS = ("base_model", "library_name", "model-index")
"""Metadata that is always ours; every other key is left as it was found."""

_BEGIN = re.compile(r"^[ \t]*<!--\s*fedfstq:begin\b[^>]*-->", re.MULTILINE)
_END = re.compile(r"^[ \t]*<!--\s*fedfstq:end\b[^>]*-->", re.MULTILINE)
_SET_ASIDE = "<!-- This metadata could not be read by the coordinator, which moved it here. -->"
_MAX_DEPTH = 20  # the time to read YAML grows with the square of its depth
_MAX_HEADER = 40_000  # characters; and of its length
_YAML_ERRORS = (yaml.YAMLError, ValueError, OverflowError, RecursionError)  # an impossible date is a ValueError


def decode(card: str | bytes) -> str:
    """The text of a card in any encoding: UTF-8, UTF-16 with its mark, or else byte for byte as Latin-1.

    Of a `str` with surrogates, as decoding with `surrogateescape` leaves them, the bytes behind it are taken.
    """
    try:
        data = card.encode("utf-8", "surrogateescape") if isinstance(card, str) else card
    except UnicodeEncodeError:  # half of a surrogate pair stands for no byte and no character
        data = str(card).encode("utf-8", "replace")
    for encoding in ("utf-8-sig", "utf-16") if data.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig",):
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    return data.decode("latin-1")


def merge_card(rendered: str, existing: str) -> str:
    """`rendered` with all that a person wrote in `existing`.

    - Text outside the two markers stays; what stands between them is taken from `rendered`.
    - Metadata that exist stay, with their order and comments, except `OWNED_KEYS`: those are taken from `rendered`
      where it has them. Missing keys are added.
    - Without a pair of markers the whole text is the person's and stays; of the metadata only `OWNED_KEYS` are set. A
      card without any text is filled.
    - Metadata that cannot be read (broken, too long, no mapping, a key twice, aliases, results in no valid form) move
      into a code block below the text: the Hub refuses a card that has such.
    """
    newline = "\r\n" if 2 * existing.count("\r\n") > existing.count("\n") else "\n"
    block = REGEX_YAML_BLOCK.search(existing)
    header, body = (block.group(2), existing[block.end() :]) if block else ("", existing)
    ours, our_body = _split(rendered)
    region, our_region = _region(body), _region(our_body)
    if region and our_region:
        body = body[: region.start] + our_body[our_region].replace("\n", newline) + body[region.stop :]
    elif body.strip():
        ours = {key: value for key, value in ours.items() if key in OWNED_KEYS}
    else:
        body = our_body.replace("\n", newline)
    header = header.replace("\r\n", "\n")
    fields = _read(header)
    if fields is None:
        body = _set_aside(body, header, newline)
        header, fields = "", {}
    elif not _is_index(fields.get("model-index")) and "model-index" not in ours:
        body = _set_aside(body, _dump({"model-index": fields["model-index"]}), newline)
        ours["model-index"] = None
    changes = {
        key: value for key, value in ours.items() if key not in fields or (key in OWNED_KEYS and value != fields[key])
    }
    header = _change(header, fields, changes).replace("\n", newline)
    gap = "" if block or body.startswith(("\n", "\r")) else newline
    return f"---{newline}{header}{newline}---{newline}{gap}{body}"


def _split(rendered: str) -> tuple[dict[str, Any], str]:
    block = REGEX_YAML_BLOCK.search(rendered)
    if block is None:
        raise ValueError("The rendered card has no metadata; its template must begin with ---, card_data, ---.")
    return yaml.safe_load(block.group(2)), rendered[block.end() :]


def _region(body: str) -> slice | None:
    """From a begin marker to the first end marker that follows one, both included."""
    first = _BEGIN.search(body)
    end = first and _END.search(body, first.end())
    if not first or not end:
        return None
    begins = [first, *_BEGIN.finditer(body, first.end(), end.start())]
    return slice(begins[-1].start(), end.end())


def _read(header: str) -> dict[Any, Any] | None:
    """The metadata, or None where the Hub would not read them, or a change of one key could change another.

    None, too, for more than a person writes: reading them would hold up the round.
    """
    if len(header) > _MAX_HEADER:
        return None
    try:
        depth = 0
        for event in yaml.parse(header, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            marked = isinstance(event, yaml.DocumentStartEvent) and event.explicit
            if marked or depth > _MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                return None
        fields = yaml.safe_load(header)
        keys = [key.value for key, _ in _entries(header)]
    except _YAML_ERRORS:
        return None
    if fields is None:
        return {}
    return fields if isinstance(fields, dict) and len(set(keys)) == len(keys) else None


def _entries(header: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Key and value nodes of the top mapping."""
    node = yaml.compose(header, Loader=yaml.SafeLoader)
    return node.value if isinstance(node, yaml.MappingNode) else []


def _is_index(value: object) -> bool:
    if not value:
        return True
    try:
        model_index_to_eval_results(value)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def _change(header: str, fields: Mapping[Any, Any], changes: Mapping[str, Any]) -> str:
    """The YAML text with the changed keys; the rest line by line as it was, if that can be done. None removes a key."""
    wanted = {key: value for key, value in {**fields, **changes}.items() if key not in changes or value is not None}
    lines, todo = header.split("\n") if header.strip() else [], dict(changes)
    for key, value in reversed(_entries(header)):
        if key.value in todo:
            start, end = key.start_mark.line, value.end_mark.line + (value.end_mark.column > 0)
            while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
                end -= 1  # a comment above the next key belongs to that one
            lines[start:end] = _lines(key.value, todo.pop(key.value))
    for name, value in todo.items():
        lines += _lines(name, value)
    text = "\n".join(lines)
    return text if _read(text) == wanted else _dump(wanted)


def _lines(key: str, value: Any) -> list[str]:
    return [] if value is None else _dump({key: value}).split("\n")


def _dump(fields: Mapping[Any, Any]) -> str:
    return yaml.dump(fields, sort_keys=False, allow_unicode=True).strip()


def _set_aside(body: str, text: str, newline: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    text = re.sub("fedfstq:(begin|end)", r"fedfstq: \1", text)  # here they are no markers
    lines = [_SET_ASIDE, "", f"{fence}yaml", *text.strip("\n").split("\n"), fence, ""]
    return body.rstrip() + 2 * newline + newline.join(lines)

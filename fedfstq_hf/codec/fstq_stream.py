"""The payload of codec `fstq` (the table stands there): components and coordinates to bytes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import MessageError
from . import components, coordinates
from .components import Component
from .coordinates import Coordinates, Float32
from .entropy import Bits, Reader, Writer, uniform
from .quantization import Float64
from .schema import Schema
from .selection import Chosen
from .support import Int64, Layout
from .update import SparseUpdate

_KINDS = 16
_FORMS = 1 + len(coordinates.LEVELS)


@dataclass(frozen=True)
class Written:
    """A payload, and the coordinates that it adds to its components."""

    payload: bytes
    indices: Int64
    values: Float64


def write(schema: Schema, layout: Layout, found: Sequence[Component], chosen: Chosen | None) -> Written:
    """Payload of components, in tensor order, and chosen coordinates."""
    if not found and chosen is None:
        return Written(b"", np.zeros(0, dtype=np.int64), np.zeros(0))
    writer = Writer()
    form = 0 if chosen is None else 1 + coordinates.LEVELS.index(chosen.levels)
    writer.put([form + (_FORMS if found else 0)], uniform(_KINDS))
    tail: list[npt.NDArray[np.bool_]] = [components.write(writer, schema, found)] if found else []
    indices, values = np.zeros(0, dtype=np.int64), np.zeros(0)
    if chosen is not None:
        indices = chosen.indices
        values, negative = coordinates.write(writer, layout, indices, chosen.values, chosen.weight, chosen.levels)
        tail.append(negative)
    return Written(writer.finish(tail=np.concatenate(tail)), indices, values)


def read(payload: bytes, schema: Schema) -> SparseUpdate:
    """Inverse of `write`. Raises MessageError on any malformed payload."""
    found, single, signs = _parse(payload, schema)
    if not found:
        values = single.places.room()
        for part, exact in single.values(signs):
            values[part.first : part.last] = exact
        return single.places.update(values)
    base = components.assemble(schema, found)
    vector = base.numpy()
    for part, exact in single.values(signs):
        vector[part.start : part.end][single.places.mask(part)] += exact
    return SparseUpdate(schema.num_params, None, base)


def parse(payload: bytes, schema: Schema) -> tuple[list[Component], Int64, Float32]:
    """Components, and coordinates with their values, of a payload. Raises MessageError if it is malformed."""
    found, single, signs = _parse(payload, schema)
    values = [exact for _, exact in single.values(signs)]
    return found, single.places.indices(), np.concatenate([np.zeros(0, dtype=np.float32), *values])


def _parse(payload: bytes, schema: Schema) -> tuple[list[Component], Coordinates, Bits]:
    """Components, coordinates, and the latter's signs."""
    layout = Layout.of(schema)
    if not payload:
        return [], coordinates.none(layout), Bits(b"")
    reader = Reader(payload)
    kind = int(reader.get(1, uniform(_KINDS))[0])
    if not 1 <= kind < 2 * _FORMS:
        raise MessageError(f"fstq payload is of kind {kind}; this version reads 1 to {2 * _FORMS - 1}")
    with_factors, form = divmod(kind, _FORMS)
    found = components.read(reader, schema) if with_factors else []
    single = coordinates.read(reader, layout, coordinates.LEVELS[form - 1]) if form else coordinates.none(layout)
    signs = reader.finish(tail=components.num_signs(found) + single.places.count)
    return components.signed(found, signs), single, signs


def update(schema: Schema, base: Tensor | None, indices: Int64, values: Float64) -> SparseUpdate:
    """Coordinates on top of `base` (num_params,), which is used up, or on their own."""
    places, exact = torch.from_numpy(indices), torch.from_numpy(values.astype(np.float32))
    if base is None:
        return SparseUpdate(schema.num_params, places, exact)
    base[places] += exact
    return SparseUpdate(schema.num_params, None, base)

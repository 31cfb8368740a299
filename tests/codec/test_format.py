"""docs/format.md is what the code does: golden files, read with a second decoder that was written from the page."""

import hashlib
import json
import math
import struct
from pathlib import Path

import pytest
import torch

from fedfstq_hf.codec import Schema, codec_names, get_codec, message
from fedfstq_hf.federation import keys
from tests.codec import reference_coder as reference
from tests.codec.golden.make import FEDERATION, KEYS, SCHEMA, expected, messages

GOLDEN = Path(__file__).parent / "golden"
FILES = sorted(GOLDEN.glob("v1/*.safetensors"))
DOCS = Path(__file__).parents[2] / "docs"
SHAPES = [spec.shape for spec in SCHEMA.tensors]
CONCENTRATIONS = [1, 1.5, 2.25, 3.5, 5, 7.5, 11, 16, 24, 36, 56, 90, 160, 400, 2000, 1e6]
MANTISSA = [1, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081]


def test_every_codec_has_a_golden_file():
    assert {path.stem.split("-")[0] for path in FILES} >= {name.replace("-", "_") for name in codec_names()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden_files_decode_to_what_they_always_did(path):
    header, payload = message.unpack(path.read_bytes())
    dense = get_codec(header.codec, **header.params).decode(payload, SCHEMA).to_dense()
    assert hashlib.sha256(dense.numpy().astype("<f4").tobytes()).hexdigest() == expected()[path.stem]


@pytest.mark.parametrize("stem", ["fp16", "fp32", "fp32-signed", "qsgd", "topk", "topk-16", "topk-4"])
def test_golden_files_are_what_is_written_today(stem):
    # the other encoders round differently on other machines, or leave bytes to zstandard
    assert (GOLDEN / "v1" / f"{stem}.safetensors").read_bytes() == messages()[stem]


def test_the_signed_golden_file_verifies():
    opened = message.unpack_signed((GOLDEN / "v1" / "fp32-signed.safetensors").read_bytes())
    keys.verify(KEYS.verify_key, FEDERATION, opened.digest, opened.signature)


def test_the_sealed_golden_file_opens():
    sealed = (GOLDEN / "v1" / "sealed.bin").read_bytes()
    assert keys.unseal(KEYS, sealed) == (GOLDEN / "v1" / "fp32-signed.safetensors").read_bytes()


def test_the_container_by_the_page():
    data = (GOLDEN / "v1" / "fp32-signed.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    outer, payload = json.loads(data[8 : 8 + length]), data[8 + length :]
    assert outer["payload"] == {"dtype": "U8", "shape": [len(payload)], "data_offsets": [0, len(payload)]}
    text = outer["__metadata__"]["fstq"]
    *fields, hashes = json.loads(text)
    alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
    raw = b""
    for i in range(0, len(hashes), 5):
        number = 0
        for letter in hashes[i : i + 5]:
            number = 85 * number + alphabet.index(letter)
        raw += number.to_bytes(4, "big")
    assert len(raw) == 160
    rows = [[spec.name, list(spec.shape), spec.dtype] for spec in SCHEMA.tensors]
    assert raw[32:64] == hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).digest()
    head = text[: text.rindex(',"')] + "]"
    assert raw[64:96] == hashlib.sha256(b"fedfstq message\n" + head.encode() + raw[:64] + payload).digest()
    assert fields[:2] == [1, 3]


class Layout:
    """Columns of a tensor, by the page: lists of coordinates."""

    def __init__(self):
        self.columns, self.strided, self.owner = [], [], []
        start = 0
        for tensor, shape in enumerate(SHAPES):
            size = math.prod(shape)
            rows = shape[0]
            width = size // rows
            if rows < 2 or width < 2:
                height = next(h for h in (16, 8, 4, 2, 1) if size % h == 0)
                columns = [[c * height + j for j in range(height)] for c in range(size // height)]
            elif rows <= width:
                height = next(h for h in range(min(rows, 32), 0, -1) if rows % h == 0)
                columns = [
                    [k * height * width + c + j * width for j in range(height)]
                    for k in range(rows // height)
                    for c in range(width)
                ]
            else:
                height = next(h for h in range(min(width, 32), 0, -1) if width % h == 0)
                columns = [[c * height + j for j in range(height)] for c in range(size // height)]
            self.strided.append(rows >= 2 and width >= 2 and rows <= width)
            self.columns += [[start + i for i in column] for column in columns]
            self.owner += [tensor] * len(columns)
            start += size


def read_support(reader):
    """Ascending coordinates, and how many of each tensor."""
    layout = Layout()
    concentration = CONCENTRATIONS[reader.get(reference.uniform(16))]
    classes = [0] * len(SHAPES)
    for kind in (True, False):
        model = reference.Adaptive(48)
        for tensor in range(len(SHAPES)):
            if layout.strided[tensor] == kind:
                classes[tensor] = model.get(reader)
    counts = []
    for column, tensor in zip(layout.columns, layout.owner, strict=True):
        i, height = classes[tensor], len(column)
        density = math.ldexp(0.9 * 0.7071067811865476 if i % 2 else 0.9, -(i // 2))
        a, b = density * concentration, (1.0 - density) * concentration
        weights = [1.0]
        for c in range(height):
            weights.append(weights[-1] * (height - c) * (c + a) / ((c + 1) * (height - c - 1 + b)))
        counts.append(reader.get(reference.table(weights)))
    chosen = []
    for height in sorted({len(column) for column in layout.columns}):
        used = [c for c, column in enumerate(layout.columns) if len(column) == height and counts[c]]
        left = {c: counts[c] for c in used}
        for j in range(height):
            now = [c for c in used if left[c] == height - j]
            for r in range(1, height - j):
                model = reference.table([height - j - r, r])
                now += [c for c in used if left[c] == r and reader.get(model)]
            for c in now:
                chosen.append(layout.columns[c][j])
                left[c] -= 1
    sent = [0] * len(SHAPES)
    bounds = [sum(math.prod(shape) for shape in SHAPES[: t + 1]) for t in range(len(SHAPES))]
    owners = [next(t for t, bound in enumerate(bounds) if i < bound) for i in sorted(chosen)]
    for tensor in owners:
        sent[tensor] += 1
    return sorted(chosen), owners, sent


def payload_of(stem):
    return message.unpack((GOLDEN / "v1" / f"{stem}.safetensors").read_bytes())[1]


def dense_of(stem):
    header, payload = message.unpack((GOLDEN / "v1" / f"{stem}.safetensors").read_bytes())
    return get_codec(header.codec).decode(payload, SCHEMA).to_dense().tolist()


def float32(value):
    return torch.tensor(value, dtype=torch.float64).float().item()


def test_paper_by_the_page():
    reader = reference.ReferenceReader(payload_of("paper"))
    indices, owners, sent = read_support(reader)
    widths_model = reference.table([reader.get(reference.uniform(64)) for _ in range(3)])
    widths = [(2, 4, 16)[reader.get(widths_model)] for _ in indices]
    largest = {}
    for tensor in range(len(SHAPES)):
        if sent[tensor]:
            raw = bytes(reader.get(reference.uniform(256)) for _ in range(4))
            largest[tensor] = struct.unpack("<f", raw)[0]
    dense = [0.0] * SCHEMA.num_params
    for width in (2, 4, 16):
        top = 2 ** (width - 1) - 1
        for i, tensor, mine in zip(indices, owners, widths, strict=True):
            if mine == width:
                dense[i] = float32((reader.get(reference.uniform(2**width)) - top) * largest[tensor] / top)
    assert reader.tail(0) == []
    assert dense == dense_of("paper")


def test_fedpaq_by_the_page():
    payload = payload_of("fedpaq")
    levels, norm = payload[0], torch.tensor(struct.unpack("<f", payload[1:5])[0])
    reader = reference.ReferenceReader(payload[5:])
    model = reference.table([reader.get(reference.uniform(65536)) for _ in range(2 * levels + 1)])
    symbols = torch.tensor([reader.get(model) - levels for _ in range(SCHEMA.num_params)])
    assert reader.tail(0) == []
    assert (symbols.float() / levels * norm).tolist() == dense_of("fedpaq")


def test_sparseloco_by_the_page():
    payload = payload_of("sparseloco-coded")
    form, k = payload[0], int.from_bytes(payload[1:3], "little")
    levels = struct.unpack(f"<{4 * len(SHAPES)}f", payload[3 : 3 + 16 * len(SHAPES)])
    reader = reference.ReferenceReader(payload[3 + 16 * len(SHAPES) :])
    weights = [1.0]
    for _ in range(4095):
        weights.append(weights[-1] * (4096 - k) / 4096)
    gaps, places, start = reference.table(weights), [], 0
    for tensor, shape in enumerate(SHAPES):
        size = math.prod(shape)
        for chunk in range(0, size, 4096):
            place = -1
            for _ in range(math.ceil(k * min(4096, size - chunk) / 4096)):
                place += 1 + reader.get(gaps)
                places.append((start + chunk + place, tensor))
        start += size
    numbers = reference.table([reader.get(reference.uniform(64)) for _ in range(4)])
    dense = [0.0] * SCHEMA.num_params
    for i, tensor in places:
        dense[i] = levels[4 * tensor + reader.get(numbers)]
    assert (form, reader.tail(0)) == (2, [])
    assert dense == dense_of("sparseloco-coded")


def grid(point):
    """A magnitude of the grid."""
    return float32(math.ldexp(float32(MANTISSA[point % 8]), point // 8 - 80))


@pytest.mark.parametrize("page", ["format.md", "codecs.md"])
@pytest.mark.parametrize("name", codec_names())
def test_the_docs_have_every_codec(page, name):
    assert f"`{name}`" in (DOCS / page).read_text()


def test_the_schema_of_the_golden_files():
    assert Schema.from_state_dict(SCHEMA.unflatten(torch.zeros(SCHEMA.num_params))) == SCHEMA


def hash_of(seed, i):
    h = i ^ seed
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize("stem", ["fstq", "fstq-blind", "fstq-all"])
def test_fstq_by_the_page(stem):
    reader = reference.ReferenceReader(payload_of(stem))
    seed, steps = 0, 0
    for _ in range(4):
        seed = seed * 256 + reader.get(reference.uniform(256))
    for _ in range(4):
        steps = steps * 256 + reader.get(reference.uniform(256))
    model = reference.Adaptive(1025)
    symbols = [model.get(reader) for _ in SHAPES]
    path = list(reader.tail(steps))
    sent = []
    start = 0
    for shape, symbol in zip(SHAPES, symbols, strict=True):
        size = math.prod(shape)
        sent += [(i, grid(symbol - 1)) for i in range(start, start + size) if symbol]
        start += size
    streams = -(-steps // 1024)
    dense = [0.0] * SCHEMA.num_params
    for j, (i, magnitude) in enumerate(sent):
        row, step = divmod((j + seed) % len(sent), steps)
        register = [path[step - k * streams] if step >= k * streams else 0 for k in range(9)]
        middle = (93 * (row % 128 + 1) + 11) % 128
        looked_at = [0, *(k for k in range(1, 8) if middle >> (k - 1) & 1), 8]
        minus = (sum(register[k] for k in looked_at) + hash_of(seed, i)) % 2
        dense[i] = -magnitude if minus else magnitude
    assert dense == dense_of(stem)

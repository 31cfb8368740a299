"""Mutated messages against every decoder: none may crash, hang or decode to anything but a sane update.

Needs the extra `secure`; a million cases take about 5 minutes on one CPU core. Prints a table and exits with 1 if it
found something. Run:

    python recipes/benchmarks/fuzz.py                                    # a million cases
    python recipes/benchmarks/fuzz.py --cases 20000 --seed 1 --codecs fstq,paper --findings found/

Half of the cases are messages mutated as they travel: container, signature and digest must refuse every one. The other
half are payloads mutated first and packed again with a valid digest, as a hostile client would: the decoder itself must
refuse them with MessageError, or decode to finite values at ascending coordinates of the adapter. The adapter is small,
so that cases are fast; what decoders allocate is measured on a larger one in tests/attacks/test_memory.py.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

from fedfstq_hf.codec import Codec, Schema, SparseUpdate, codec_names, get_codec, message
from fedfstq_hf.errors import BudgetError, MessageError
from fedfstq_hf.federation import keys

HANG_SECONDS = 10
KEYS, FEDERATION = keys.KeyPair(bytes(32)), "fuzzed"
SHAPES = {"q.lora_A": (4, 48), "q.lora_B": (32, 4), "v": (9,)}
# valid payloads are made with these options besides the defaults
OPTIONS: dict[str, list[dict[str, object]]] = {
    "fedpaq": [{"levels": 1}],
    "fstq": [{"bits": 1.0}, {"fisher_weighted": False}],
    "qsgd": [{"bits": 2, "bucket": 64}, {"bits": 8}],
    "sparseloco": [{"entropy_coded": True}, {"packed": False, "top_k": 600}],
    "topk": [{"value_bits": 16, "density": 0.2}, {"value_bits": 4, "density": 0.1}],
}
NUMBERS = [0, 1, 2, 0x7F, 0xFF, 0x100, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 3.4e38, 1e-45]


@dataclass
class Target:
    """One codec under attack: valid payloads to start from, and what became of the cases."""

    name: str
    codec: Codec
    schema: Schema
    payloads: list[bytes]
    messages: list[bytes]
    counts: dict[str, int] = field(default_factory=lambda: {"container": 0, "refused": 0, "decoded": 0})
    slowest: float = 0.0


@dataclass(frozen=True)
class Finding:
    """A case that ended otherwise than it may."""

    codec: str
    data: bytes
    problem: str


def make_update(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(delta, fisher) of the small adapter."""
    generator = torch.Generator().manual_seed(seed)
    delta = {name: 1e-3 * torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    fisher = {name: torch.randn(*shape, generator=generator).pow(4) for name, shape in SHAPES.items()}
    return delta, fisher


def make_target(name: str) -> Target:
    """A codec with valid payloads: all its options, with and without a budget, dense and sparse updates."""
    payloads: list[bytes] = []
    schema = Schema.from_state_dict(make_update(0)[0])
    for seed, options in enumerate([{}, *OPTIONS.get(name, [])]):
        codec = get_codec(name, **options)
        delta, fisher = make_update(seed)
        sparse = {key: value * (value.abs() > 1.5e-3) for key, value in delta.items()}
        payloads += [codec.encode(delta, fisher).payload, codec.encode(sparse, fisher).payload]
        with contextlib.suppress(BudgetError):  # its size cannot be chosen
            payloads += [codec.encode(delta, fisher, max_bytes=size).payload for size in (40, 90)]
    payloads = sorted({payload for payload in payloads if payload})
    sign = keys.signer(KEYS, FEDERATION)
    messages = [
        message.pack(make_header(name, schema), payload, sign=sign if number % 2 else None)
        for number, payload in enumerate(payloads)
    ]
    return Target(name, get_codec(name), schema, payloads, messages)


def make_header(name: str, schema: Schema) -> message.Header:
    """The header that a client would write."""
    return message.Header(3, "mallory", 10, "00" * 32, schema.fingerprint, name)


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """`data` after one to a few random edits; `others` is what parts are spliced in from."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        here, kind = rng.randrange(len(mutated) + 1), rng.randrange(10)
        if kind <= 1 and here < len(mutated):
            mutated[here] ^= 1 << rng.randrange(8)
        elif kind == 2:
            mutated[here : here + 1] = rng.randbytes(1)
        elif kind == 3:
            del mutated[here : here + rng.randrange(1, 9)]
        elif kind == 4:
            mutated[here:here] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 5:
            del mutated[here:]
        elif kind == 6:
            width = rng.choice((1, 2, 4, 8))
            mutated[here : here + width] = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 7:
            mutated[here : here + 4] = struct.pack("<f", rng.choice(FLOATS))
        elif kind == 8:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            mutated[here:] = other[start:]
        else:
            end = here + rng.randrange(1, 64)
            mutated[here:here] = mutated[here:end]
    return bytes(mutated)


def problem_of(update: SparseUpdate, schema: Schema) -> str | None:
    """What is wrong with a decoded update, if anything."""
    values, indices = update.values, update.indices
    if update.num_params != schema.num_params or values.dtype != torch.float32:
        return f"{update.num_params} coordinates of {values.dtype}"
    if not bool(torch.isfinite(values).all()):
        return "values are not finite"
    if indices is None:
        return None if values.shape == (schema.num_params,) else f"dense values of shape {tuple(values.shape)}"
    if indices.dtype != torch.int64 or values.shape != indices.shape or indices.dim() != 1:
        return f"{tuple(values.shape)} values at {tuple(indices.shape)} indices of {indices.dtype}"
    inside = not indices.numel() or (int(indices[0]) >= 0 and int(indices[-1]) < schema.num_params)
    ascending = bool((indices[1:] > indices[:-1]).all())
    return None if inside and ascending else "indices do not ascend within the adapter"


def attack(target: Target, rng: random.Random, everything: list[bytes], sealed: bool) -> Finding | None:
    """One case. sealed: give the mutated payload a valid digest; else mutate a message as it travels."""
    if not sealed:
        source = rng.choice(target.messages)
        data = mutate(source, rng, everything)
        if data == source:
            return None
        try:
            opened = message.unpack_signed(data)
            if opened.signature is not None:
                keys.verify(KEYS.verify_key, FEDERATION, opened.digest, opened.signature)
        except MessageError:
            target.counts["container"] += 1
            return None
        except Exception as error:
            return Finding(target.name, data, f"{type(error).__name__}: {error}")
        # splicing can give another message whole, which is not an attack
        return None if data in everything else Finding(target.name, data, "an altered message was accepted")
    start = rng.randrange(8)
    payload = (
        rng.randbytes(rng.randrange(200)) if start == 0 else rng.choice(everything if start == 1 else target.payloads)
    )
    data = message.pack(make_header(target.name, target.schema), mutate(payload, rng, everything))
    began = time.perf_counter()
    try:
        update = target.codec.decode(message.unpack(data)[1], target.schema)
    except MessageError:
        target.counts["refused"] += 1
        return None
    except Exception as error:
        return Finding(target.name, data, f"{type(error).__name__}: {error}")
    finally:
        target.slowest = max(target.slowest, time.perf_counter() - began)
    target.counts["decoded"] += 1
    problem = problem_of(update, target.schema)
    return Finding(target.name, data, problem) if problem else None


def run(targets: list[Target], cases: int, seed: int) -> Iterator[Finding | None]:
    """Attack the codecs in turn; yields after every case. Alarms must be handled: see `guarded`."""
    rng = random.Random(seed)
    everything = [item for target in targets for item in (*target.payloads, *target.messages)]
    for case in range(cases):
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        try:
            finding = attack(targets[case // 2 % len(targets)], rng, everything, sealed=case % 2 == 1)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        yield finding


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within it, a case that takes too long ends in TimeoutError."""
    before = signal.signal(signal.SIGALRM, _too_slow)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"no answer within {HANG_SECONDS} s")


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, print the table; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codecs", default=",".join(codec_names()), help="comma-separated; all when not given")
    parser.add_argument("--findings", type=Path, help="folder for the messages that were found")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    findings: list[Finding] = []
    targets = [make_target(name) for name in options.codecs.split(",")]
    began, memory, case = time.perf_counter(), 0, 0
    with guarded():
        for case, finding in enumerate(run(targets, options.cases, options.seed), start=1):
            if finding:
                findings.append(finding)
                print(f"FOUND {finding.codec}: {finding.problem}")
            if case == min(2000, options.cases):
                memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if time.perf_counter() - began > options.seconds:
                break
            if case % 50_000 == 0:
                print(f"{case:>9} cases, {case / (time.perf_counter() - began):.0f} per second", file=sys.stderr)
    seconds = time.perf_counter() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    print(f"{'codec':<16} {'container':>10} {'refused':>10} {'decoded':>10} {'slowest ms':>11}")
    for t in targets:
        print(
            f"{t.name:<16} {t.counts['container']:>10} {t.counts['refused']:>10} {t.counts['decoded']:>10} "
            f"{1000 * t.slowest:>11.1f}"
        )
    print(
        f"{case} cases of seed {options.seed} in {seconds:.0f} s ({case / seconds:.0f} per second), "
        f"peak resident memory {grown:+.1f} MiB after the first 2000 cases; {len(findings)} findings"
    )
    if options.findings:
        options.findings.mkdir(parents=True, exist_ok=True)
        for number, finding in enumerate(findings):
            (options.findings / f"{number:04}-{finding.codec}.bin").write_bytes(finding.data)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

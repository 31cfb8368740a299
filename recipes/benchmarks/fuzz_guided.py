"""Coverage-guided fuzzing of every decoder with atheris, beside the mutations of `fuzz.py`.

Needs `pip install atheris` and the extra `secure`. Runs until `-runs` or `-max_total_time` (libFuzzer's options), and
stops with a traceback and a `crash-...` file at the first payload that a decoder neither refuses with MessageError nor
decodes to a sane update. Run:

    python recipes/benchmarks/fuzz_guided.py -max_total_time=300
    python recipes/benchmarks/fuzz_guided.py crash-0123abcd          # one case again

The first byte of an input chooses the codec, the rest is its payload. Starts from the valid payloads of all codecs.
Code under `torch` and the entropy coder's compiled part is not instrumented.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedfstq_hf.codec"]):
    from fuzz import make_target, problem_of

    from fedfstq_hf.codec import codec_names
    from fedfstq_hf.errors import MessageError

    # within, since codecs are imported when they are first asked for
    TARGETS = [make_target(name) for name in codec_names()]


def attack(data: bytes) -> None:
    """One input."""
    if not data:
        return
    target = TARGETS[data[0] % len(TARGETS)]
    try:
        update = target.codec.decode(data[1:], target.schema)
    except MessageError:
        return
    problem = problem_of(update, target.schema)
    if problem is not None:
        raise RuntimeError(f"{target.name}: {problem}")


def main() -> None:
    """Fuzz from a corpus of valid payloads."""
    with tempfile.TemporaryDirectory() as folder:
        for number, target in enumerate(TARGETS):
            for index, payload in enumerate(target.payloads):
                (Path(folder) / f"{target.name}-{index}").write_bytes(bytes([number]) + payload)
        given = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
        atheris.Setup([*sys.argv, *([] if given else [folder])], attack)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

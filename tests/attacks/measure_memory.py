"""Peak resident memory of each decoder on the densest payload there is; prints JSON. Linux only. Run:

    python tests/attacks/measure_memory.py          # an adapter of 16 matrices, 16 x 4096 each
    python tests/attacks/measure_memory.py 4

The peak of the process is reset through /proc before each decoding, so that allocations outside Python count too.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

# large blocks are mapped afresh and given back at once: none hides in memory that was freed before
if os.environ.get("MALLOC_MMAP_THRESHOLD_") != "65536":
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch

from fedfstq_hf.codec import Schema, codec_names, get_codec
from fedfstq_hf.errors import MessageError

# options under which a codec sends as many coordinates as its format allows
DENSEST = {
    "fstq": {"bits": 1.0},
    "paper": {"shares": (0.4, 0.3, 0.3)},
    "qsgd": {"bits": 8, "bucket": 8},
    "sparseloco": {"top_k": 1024},
    "topk": {"density": 0.25},
}


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def peak_of(codec, payload: bytes, schema: Schema) -> int:
    """Bytes of resident memory that decoding adds at its peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    try:
        update = codec.decode(payload, schema)
        del update
    except MessageError:
        pass
    return status("VmHWM") - before


def elsewhere(make: Callable[[], bytes]) -> bytes:
    """What `make` returns in another process: memory that encoding freed would stay in the heap, to be used again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send_bytes(make()))
    process.start()
    data = receiver.recv_bytes()
    process.join()
    return data


def main() -> None:
    """Measure every codec on a dense payload and on 50 bytes of noise; multiples of the adapter in float32."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    matrices = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    delta = {f"{i}.lora_A": torch.randn(16, 4096, generator=generator) for i in range(matrices)}
    schema, size = Schema.from_state_dict(delta), 4 * 16 * 4096 * matrices
    small = {"a": torch.randn(16, 64, generator=generator)}
    peaks = {}
    for name in codec_names():
        codec = get_codec(name, **DENSEST.get(name, {}))
        payload = elsewhere(lambda c=codec: c.encode(delta).payload)
        codec.decode(codec.encode(small).payload, Schema.from_state_dict(small))  # tables and imports
        dense = peak_of(codec, payload, schema)
        noise = peak_of(codec, random.Random(0).randbytes(49) + b"\1", schema)
        peaks[name] = [dense / size, noise / size]
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()

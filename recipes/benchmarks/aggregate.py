"""What a coordinator costs: its memory against the number of clients, and its time against that of decoding alone.

    python recipes/benchmarks/aggregate.py memory --clients 10 100 1000
    python recipes/benchmarks/aggregate.py time --clients 100 --params 42e6

Messages are codec `fstq` at 0.1 bits per parameter, one payload under many client ids; the mailbox is a folder. Memory
is the peak resident size of a process that closes one round, minus that of one which has only imported the package.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedfstq_hf.codec import CodecContext, Schema, get_codec, message
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec

ROWS = 4096
RANK = 16


def main() -> None:
    """Read the options and print one line of JSON per measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "time", "close", "idle"))
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--params", type=float, default=1e6)
    parser.add_argument("--bpp", type=float, default=0.1)
    parser.add_argument("--mailbox", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what in ("close", "idle"):
        if options.what == "close":
            Coordinator(FolderMailbox(options.mailbox, durable=False)).close_round()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    for clients in options.clients:
        with tempfile.TemporaryDirectory(prefix="fedfstq-aggregate-") as folder:
            mailbox, payload, schema = fill(Path(folder), clients, int(options.params), options.bpp)
            figures = {"clients": clients, "params": schema.num_params, "message_bytes": len(payload)}
            if options.what == "memory":
                figures["peak_mib"] = round(peak(folder) / 1024, 1)
            else:
                figures |= timed(mailbox, payload, schema, clients)
            print(json.dumps(figures), flush=True)


def fill(folder: Path, clients: int, num_params: int, bpp: float) -> tuple[FolderMailbox, bytes, Schema]:
    """A federation in `folder` with one message of each client; also their common payload and the schema."""
    matrices = max(num_params // (2 * ROWS * RANK), 1)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index in range(matrices):
        state[f"layers.{index:03d}.lora_A.weight"] = torch.zeros(RANK, ROWS)
        state[f"layers.{index:03d}.lora_B.weight"] = torch.zeros(ROWS, RANK)
    schema = Schema.from_state_dict(state)
    spec = FederationSpec(
        name="aggregate",
        model="none",
        base_fingerprint={},
        schema=schema.fingerprint,
        rounds=2,
        local_steps=1,
        max_message_bytes=10**9,
        min_clients=clients,
    )
    mailbox = FolderMailbox(folder, durable=False)
    record = found_federation(mailbox, spec, adapter_file.dump(state), b"{}\n")
    delta = {name: torch.randn(tensor.shape, generator=generator) * 1e-3 for name, tensor in state.items()}
    encoded = get_codec("fstq").encode(delta, max_bytes=int(bpp * schema.num_params / 8))
    for index in range(clients):
        header = message.Header(0, f"c{index:05d}", 10, record.adapter_digest, schema.fingerprint, "fstq", {})
        mailbox.post_update(0, header.client_id, message.pack(header, encoded.payload))
    return mailbox, encoded.payload, schema


def peak(folder: str) -> int:
    """Peak resident size in KiB of closing the round, above that of an idle coordinator process."""
    sizes = []
    for what in ("close", "idle"):
        command = [sys.executable, __file__, what, "--mailbox", folder]
        sizes.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return sizes[0] - sizes[1]


def timed(mailbox: FolderMailbox, payload: bytes, schema: Schema, clients: int) -> dict[str, float]:
    """Seconds of decoding all messages, of closing the round, and their ratio."""
    codec = get_codec("fstq")
    codec.decode(payload, schema, CodecContext())
    started = time.perf_counter()
    for _ in range(clients):
        codec.decode(payload, schema, CodecContext())
    decoding = time.perf_counter() - started
    coordinator = Coordinator(mailbox)
    started = time.perf_counter()
    coordinator.close_round()
    closing = time.perf_counter() - started
    return {"decode_s": round(decoding, 2), "close_s": round(closing, 2), "ratio": round(closing / decoding, 2)}


if __name__ == "__main__":
    main()

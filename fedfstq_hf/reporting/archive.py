"""Results: the finished runs of one workload in one small file, `WORKLOAD.jsonl.zst`, which `fedfstq report` reads.

Each line is one run as JSON: `run` (METHOD/seed-S, or POINT/METHOD/seed-S of a sweep), `recipe`, `ledger` (the command,
the commit, minutes, cores, device) and `rows`, those of its `metrics.jsonl`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard

from fedfstq_hf.errors import DataError
from fedfstq_hf.reporting.summary import read_rows

SUFFIX = ".jsonl.zst"
_LEVEL = 19
_MAX_BYTES = 10**9  # of one archive, decompressed
_FIELDS = {"run": str, "recipe": dict, "ledger": dict, "rows": list}


def read_archive(path: Path) -> list[dict[str, Any]]:
    """The runs in an archive, in its order.

    Raises:
        DataError: it cannot be read as one.
    """
    try:
        data = path.read_bytes()
        if not 0 < zstandard.frame_content_size(data) <= _MAX_BYTES:
            raise ValueError(f"it says that it holds {zstandard.frame_content_size(data)} bytes")
        runs = [json.loads(line) for line in zstandard.ZstdDecompressor().decompress(data).decode().splitlines()]
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read as an archive of runs: {error}") from None
    for number, run in enumerate(runs, start=1):
        if not isinstance(run, dict) or any(not isinstance(run.get(key), kind) for key, kind in _FIELDS.items()):
            raise DataError(f"{path}, line {number} is no run; expected an object with {', '.join(_FIELDS)}.")
    return runs


def add_to_archive(path: Path, folders: Mapping[str, Path]) -> Path:
    """Put finished runs into an archive, beside those that are in it or in the place of an earlier one of their name.

    Args:
        path: the archive; made where there is none.
        folders: name of the run -> its folder, as the ledger of the evaluation left it.
    """
    runs = {run["run"]: run for run in read_archive(path)} if path.exists() else {}
    for name, folder in folders.items():
        runs[name] = {
            "run": name,
            "recipe": json.loads((folder / "recipe.json").read_text(encoding="utf-8")),
            "ledger": json.loads((folder / "ledger.json").read_text(encoding="utf-8")),
            "rows": read_rows(folder / "metrics.jsonl"),
        }
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(_compressed(runs[name] for name in sorted(runs)))
    os.replace(partial, path)
    return path


def _compressed(runs: Iterable[Mapping[str, Any]]) -> bytes:
    """The same runs give the same bytes."""
    text = "".join(json.dumps(run, sort_keys=True, separators=(",", ":")) + "\n" for run in runs)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(text.encode())

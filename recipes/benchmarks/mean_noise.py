"""What a round's mean carries of its messages' noise, and how far its weights are from FedAvg's.

Run: `python recipes/benchmarks/mean_noise.py RUN...`, with folders of runs such as `OUT/runs/fstq-timed/seed-0` of
`fedfstq simulate ... --out OUT`. For an unbiased codec with few bits (`fstq`), whose squared norms are
mostly noise; others' norms say nothing about it. Means over the rounds, for runs of one recipe side by side:

- noise: sum_k w_k^2 n_k^2 over the accepted messages, with their weights w_k and norms n_k
- by examples, by bytes: the same, had the messages those weights
- off: sum_k (w_k - p_k)^2, with p_k the share of the examples: what the mean of nearly orthogonal updates of one length
  is off by, as a share of their squared length

Where a federation has refinements, a second line is about these.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE
from fedfstq_hf.federation.record import AcceptedUpdate, RoundRecord

COLUMNS = ("noise", "by examples", "by bytes", "off")


def shares(values: Sequence[float]) -> list[float]:
    """The values over their sum."""
    total = sum(values)
    return [value / total for value in values]


def figures(entries: Sequence[AcceptedUpdate]) -> dict[str, float]:
    """The columns of one round."""
    squares = [entry.norm**2 for entry in entries]
    own = [entry.weight for entry in entries]
    examples = shares([entry.num_examples for entry in entries])
    size = shares([entry.num_bytes for entry in entries])

    def noise(weights: Sequence[float]) -> float:
        return sum(w * w * square for w, square in zip(weights, squares, strict=True))

    off = sum((w - p) ** 2 for w, p in zip(own, examples, strict=True))
    return dict(zip(COLUMNS, (noise(own), noise(examples), noise(size), off), strict=True))


def main() -> None:
    """Read the folders named on the command line and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, each with a mailbox")
    options = parser.parse_args()
    print("".join(f"{name:>13}" for name in COLUMNS), " rounds  run")
    for run in options.runs:
        paths = sorted(run.glob(f"mailbox/rounds/*/{RECORD_FILE}"))
        records = [RoundRecord.from_json(path.read_bytes()) for path in paths]
        first = [figures(record.accepted) for record in records if record.accepted]
        second = [figures(record.refinements) for record in records if record.refinements]
        if not first:
            raise SystemExit(f"{run} holds no mailbox with rounds; give a folder such as OUT/runs/fstq-timed/seed-0.")
        for rows, what in ((first, run), (second, f"{run}, refinements")):
            if rows:
                print(
                    "".join(f"{fmean(row[name] for row in rows):13.4f}" for name in COLUMNS), f"{len(rows):>7}  {what}"
                )


if __name__ == "__main__":
    main()

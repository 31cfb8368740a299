"""Runs the cases of a fuzzer side by side, within time and memory, and prints how they ended."""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

Outcome = tuple[dict[str, int], list[str]]
"""How many cases ended how, and the problems found."""
_BATCH = 200


def limit_memory(growth: int) -> None:
    """Let this process map at most `growth` bytes more than it has now: whoever wants more gets a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + growth
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def run_all(batch: Callable[[str, int, int], Outcome], given: argparse.Namespace) -> int:
    """Run cases side by side, print how they ended and what was found; the exit code.

    Args:
        given: what `arguments` returned.
        batch: `batch(folder, first, count)` runs in a worker process. It writes the number of the case at hand into
            `folder/FIRST.case`, so that a case that kills its process is found.
    """
    first, cases, workers = given.first, given.cases, given.workers
    ends: Counter[str] = Counter()
    problems: list[str] = []
    start = time.monotonic()
    where = "/dev/shm" if Path("/dev/shm").is_dir() else None
    todo = [(at, min(_BATCH, first + cases - at)) for at in range(first, first + cases, _BATCH)]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=where) as root, tqdm(total=cases, unit="case") as bar:
        while todo:
            again: list[tuple[int, int]] = []
            with ProcessPoolExecutor(workers, mp_context=context) as pool:
                futures = {pool.submit(batch, root, at, count): (at, count) for at, count in todo}
                for future in as_completed(futures):
                    at, count = futures[future]
                    try:
                        found, bad = future.result()
                    except BrokenProcessPool:
                        again.append((at, count))
                        continue
                    except CancelledError:
                        continue
                    if given.minutes is not None and time.monotonic() - start > 60 * given.minutes:
                        for waiting in futures:  # those that run come to their end
                            waiting.cancel()
                    ends.update(found)
                    problems += bad
                    bar.update(count)
                    bar.set_postfix(problems=len(problems))
            todo = []
            for at, count in sorted(again):
                note = Path(root) / f"{at}.case"
                if not note.exists():
                    todo.append((at, count))
                    continue
                died = int(note.read_text())  # perhaps of another's death: one more try, alone
                note.unlink()
                with ProcessPoolExecutor(1, mp_context=context) as pool:
                    try:
                        found, bad = pool.submit(batch, root, died, 1).result()
                    except BrokenProcessPool:
                        found, bad = {"PROBLEM": 1}, [f"case {died}: PROBLEM it killed the process"]
                ends.update(found)
                problems += bad
                bar.update(died - at + 1)  # cases of the batch before it were run, and their ends lost
                ends["not told apart: in a batch that died"] += died - at
                if at + count > died + 1:
                    todo.append((died + 1, at + count - died - 1))
    for end, number in ends.most_common():
        print(f"{number:9,}  {end}")
    print(f"{bar.n:,} cases in {time.monotonic() - start:.0f} s; {len(problems)} problems")
    if bar.n < cases:
        print(f"The time was over. Go on: --first {first + bar.n} --cases {cases - bar.n}")
    for text in problems[: given.show]:
        print(text)
    return 1 if problems else 0


def run_batch(run: Callable[[int], str], root: str, first: int, count: int) -> Outcome:
    """A worker's share of `run_all`: how many cases ended how, and the problems found."""
    ends: Counter[str] = Counter()
    problems: list[str] = []
    note = Path(root) / f"{first}.case"
    for seed in range(first, first + count):
        note.write_text(str(seed))
        try:
            end = run(seed)
        except Exception as error:  # of the fuzzer itself: reported with its number, as any other
            end = f"PROBLEM the case could not be run: {type(error).__name__}: {error!s:.300}"
        if end.startswith("PROBLEM"):
            problems.append(f"case {seed}: {end}")
            end = "PROBLEM"
        ends[end] += 1
    note.unlink()
    return ends, problems


def arguments(doc: str | None) -> argparse.Namespace:
    """The options that both fuzzers have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case; a case is a function of it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, help="begin no batch of cases after so many; go on by --first")
    parser.add_argument("--show", type=int, default=20, help="problems to print")
    return parser.parse_args()

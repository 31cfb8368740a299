"""Mutants: what the tests notice of small faults put into the code that others' messages go through.

Each mutant of `mutant_list.py` replaces one text of one file; the tests named beside it are run on a copy of the tree.
A mutant is killed where a test fails. Prints the survivors and exits with 1 if less than 95 % of those that change
anything are killed, with 2 if the list does not fit the tree. About 20 minutes with two processes. Run:

    python recipes/benchmarks/mutants.py --workers 2
    python recipes/benchmarks/mutants.py --only 12            # one of them, by its number, with the tests' output
    python recipes/benchmarks/mutants.py --only 7,message.py  # that one, and those of a file
    python recipes/benchmarks/mutants.py --check              # only whether the list fits the tree

A run that was ended goes on where it stood, as long as the tree is the same (`--fresh` begins anew).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from mutant_list import EQUIVALENT, MUTANTS

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("fedfstq_hf", "tests", "recipes", "docs", "pyproject.toml", "README.md", "model_card_template.md")
LEAST_KILLED = 0.95
LEAST_SECONDS, TIMES_SLOWER = 60.0, 6.0  # a mutant is given up, and counts as killed, after the larger of the two
FAILED, INTERRUPTED = 1, 2  # exit codes of pytest; the second is that of tests that cannot even be imported


@dataclass(frozen=True)
class Mutant:
    """A text in a file of the package, what stands there instead, and the tests that should notice.

    `reason` says why nobody can notice; None where somebody should.
    """

    number: int
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str | None = None

    @property
    def title(self) -> str:
        """One line for the table."""
        return f"{self.number:4} {self.file}: {_short(self.old)} -> {_short(self.new)}"


class TreeError(Exception):
    """The list does not fit the tree, or the tests fail on the tree itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants that the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--only", help="numbers of mutants and ends of files' names, with commas")
    parser.add_argument("--check", action="store_true", help="only say whether the list fits the tree")
    parser.add_argument("--fresh", action="store_true", help="forget what an earlier run of this tree found")
    options = parser.parse_args(arguments)
    try:
        mutants = [mutant for mutant in listed() if chosen(mutant, options.only)]
        if not mutants:
            raise TreeError(f"--only {options.only}: no mutant has that number or file")
        check(mutants)
        if options.check:
            print(f"{len(mutants)} mutants fit the tree")
            return 0
        return report(mutants, run(mutants, options))
    except TreeError as error:
        print(error, file=sys.stderr)
        return 2


def listed() -> list[Mutant]:
    """All mutants of the list, numbered from 1."""
    mutants: list[Mutant] = []
    for reasoned, groups in ((False, MUTANTS), (True, EQUIVALENT)):
        for file, tests, changes in groups:
            for old, new, *reason in changes:
                number = len(mutants) + 1
                mutants.append(Mutant(number, file, old, new, tests, reason[0] if reasoned else None))
    return mutants


def chosen(mutant: Mutant, only: str | None) -> bool:
    """Whether `--only` means this mutant."""
    wanted = () if only is None else only.split(",")
    return only is None or any(
        int(part) == mutant.number if part.isdigit() else mutant.file.endswith(part) for part in wanted
    )


def check(mutants: Sequence[Mutant], root: Path = ROOT) -> None:
    """Raise TreeError unless every text occurs exactly once and every test file exists."""
    faults = []
    for mutant in mutants:
        path = root / "fedfstq_hf" / mutant.file
        count = path.read_text().count(mutant.old) if path.is_file() else 0
        if count != 1:
            faults.append(f"{mutant.title}\n     occurs {count} times; expected once. Mend the list.")
        if mutant.old == mutant.new:
            faults.append(f"{mutant.title}\n     changes nothing.")
        faults += [f"{mutant.title}\n     {test} is no file" for test in mutant.tests if not (root / test).is_file()]
    if faults:
        raise TreeError("\n".join(faults))


def run(mutants: Sequence[Mutant], options: argparse.Namespace) -> dict[int, str]:
    """Number to outcome: `killed`, `timed out`, `survived` or `equivalent`."""
    outcomes = {mutant.number: "equivalent" for mutant in mutants if mutant.reason is not None}
    state = Path(tempfile.gettempdir()) / f"fedfstq-mutants-{tree_digest()[:16]}.json"
    known = {} if options.fresh or not state.exists() else json.loads(state.read_text())
    # by what they are, so that a longer list does not shift them
    changes = {mutant.number: repr((mutant.file, mutant.old, mutant.new)).encode() for mutant in mutants}
    keys = {number: hashlib.sha256(change).hexdigest()[:16] for number, change in changes.items()}
    verbose = options.only is not None and options.only.isdigit()
    if not verbose:
        outcomes |= {number: known[key] for number, key in keys.items() if key in known}
    left = [mutant for mutant in mutants if mutant.number not in outcomes]
    if not left:
        return outcomes
    with copies(options.workers) as trees, ThreadPoolExecutor(options.workers) as pool:
        limits = seconds_allowed(left, trees, pool)
        jobs = {pool.submit(outcome_of, mutant, limits[mutant.tests], trees, verbose): mutant for mutant in left}
        for done, job in enumerate(as_completed(jobs), start=1):
            mutant = jobs[job]
            outcomes[mutant.number] = known[keys[mutant.number]] = job.result()
            state.write_text(json.dumps(known))
            print(f"[{done}/{len(left)}] {outcomes[mutant.number]:9} {mutant.title}", flush=True)
    return outcomes


def tree_digest() -> str:
    """Of the code and the tests: what was found holds for these alone."""
    digest = hashlib.sha256()
    for folder in ("fedfstq_hf", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Path]]:
    """As many copies of the tree as are worked on at a time."""
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        for number in range(count):
            tree = Path(folder) / str(number)
            for name in COPIED:
                source = ROOT / name
                if source.is_dir():
                    shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
                else:
                    shutil.copy(source, tree / name)
            trees.put(tree)
        yield trees


def seconds_allowed(
    mutants: Sequence[Mutant], trees: SimpleQueue[Path], pool: ThreadPoolExecutor
) -> dict[tuple[str, ...], float]:
    """For each choice of tests; raises TreeError where they fail without a mutant."""

    def measured(tests: tuple[str, ...]) -> float:
        tree = trees.get()
        try:
            start = time.monotonic()
            code, output = pytest(tree, tests, 900.0)
            if code != 0:
                raise TreeError(f"without any mutant {' '.join(tests)} fail (exit code {code}):\n{output[-3000:]}")
            return max(LEAST_SECONDS, TIMES_SLOWER * (time.monotonic() - start))
        finally:
            trees.put(tree)

    choices = sorted({mutant.tests for mutant in mutants})
    return dict(zip(choices, pool.map(measured, choices), strict=True))


def outcome_of(mutant: Mutant, seconds: float, trees: SimpleQueue[Path], verbose: bool) -> str:
    """Put the mutant into a copy, run its tests, and take it out again."""
    tree = trees.get()
    path = tree / "fedfstq_hf" / mutant.file
    original = path.read_text()
    try:
        path.write_text(original.replace(mutant.old, mutant.new))
        code, output = pytest(tree, mutant.tests, seconds)
    finally:
        path.write_text(original)
        trees.put(tree)
    if verbose:
        print(output)
    if code is None:
        return "timed out"
    if code not in (0, FAILED, INTERRUPTED):
        raise TreeError(f"{mutant.title}: pytest itself failed (exit code {code}):\n{output[-3000:]}")
    return "survived" if code == 0 else "killed"


def pytest(tree: Path, tests: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit code and output; None where the time was over.

    No bytecode is written: that of a text of the same length, changed within the same second, would be taken as good.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(tree / ".hypothesis"),
    }
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
    return process.returncode, output


def report(mutants: Sequence[Mutant], outcomes: dict[int, str]) -> int:
    """Print what became of them; 1 where too many survive."""
    for mutant in mutants:
        if outcomes[mutant.number] == "survived":
            print(f"survived   {mutant.title}\n     tests: {' '.join(mutant.tests)}")
        elif outcomes[mutant.number] == "equivalent":
            print(f"equivalent {mutant.title}\n     {mutant.reason}")
    counted = [outcome for outcome in outcomes.values() if outcome != "equivalent"]
    killed = len(counted) - counted.count("survived")
    rate = killed / len(counted) if counted else 1.0
    equivalent, by_time = len(outcomes) - len(counted), counted.count("timed out")
    print(f"{killed} of {len(counted)} killed ({100 * rate:.1f} %; {by_time} by their time), {equivalent} equivalent")
    return 0 if rate >= LEAST_KILLED else 1


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")


if __name__ == "__main__":
    sys.exit(main())

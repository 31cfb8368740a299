"""Many recipes, each method and seed a run of its own in a folder of its own: what is done, what is missing, and why.

```
ROOT/RECIPE/[POINT/]METHOD/seed-S/   one run of `Simulation`, and `ledger.json` once it has finished
```

A run depends on its method's settings, its seed and the shared sections alone, so a method or seed added to a recipe
leaves finished runs as they are. A ledger that was killed goes on in the middle of the run that it was in.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import storage
from fedfstq_hf.recipe import Recipe
from fedfstq_hf.recipe.library import sweep_points
from fedfstq_hf.simulation.runner import RECIPE_FILE, Simulation, same_settings

LEDGER_FILE = "ledger.json"
_LOCK_FILE = "lock"


@dataclass(frozen=True)
class Entry:
    """One run: `recipe` has one method and one seed; `name` is that of the whole recipe, `point` of its sweep."""

    recipe: Recipe
    name: str
    point: str
    folder: Path

    @property
    def method(self) -> str:
        """Its only method."""
        return next(iter(self.recipe.methods))

    @property
    def seed(self) -> int:
        """Its only seed."""
        return self.recipe.seeds[0]

    def __str__(self) -> str:
        return " ".join(part for part in (self.name, self.point, self.method, f"seed {self.seed}") if part)

    def state(self) -> str:
        """`done`, `missing`, `begun`, or `other settings`: what lies there is not a run of this recipe."""
        try:
            marker = json.loads((self.folder / RECIPE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "missing"
        if not same_settings(marker, self.recipe):
            return "other settings"
        return "done" if (self.folder / LEDGER_FILE).exists() else "begun"

    def minutes(self) -> float | None:
        """What the run took, where it is done."""
        path = self.folder / LEDGER_FILE
        return float(json.loads(path.read_text(encoding="utf-8"))["minutes"]) if path.exists() else None


def entries(recipes: Mapping[str, Recipe], root: Path) -> list[Entry]:
    """All runs of `recipes` (by name), seed by seed: the first seed of every recipe and method comes first."""
    found: list[tuple[int, int, Entry]] = []
    for place, (name, recipe) in enumerate(recipes.items()):
        for point, settings in sweep_points(recipe):
            for rank, seed in enumerate(settings.seeds):
                for method, own in settings.methods.items():
                    folder = root / name / point / method / f"seed-{seed}"
                    single = replace(settings, methods={method: own}, seeds=(seed,))
                    found.append((rank, place, Entry(single, name, point, folder)))
    return [entry for _, _, entry in sorted(found, key=lambda item: item[:2])]


def estimate(missing: Entry, known: Iterable[Entry]) -> float | None:
    """Minutes that a run will take: the mean of its recipe's finished runs; None where there is none."""
    times = [minutes for entry in known if entry.name == missing.name and (minutes := entry.minutes()) is not None]
    return sum(times) / len(times) if times else None


def run_missing(
    listed: Sequence[Entry], root: Path, *, command: str, workers: int = 2, progress: bool = True
) -> Iterator[tuple[Entry, str]]:
    """Run what is not done, one run after the other; yields each run and how it ended: `done` or what was wrong.

    Raises:
        ConfigError: another process works in `root`.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root):
        for entry in listed:
            state = entry.state()
            if state == "done":
                continue
            if state == "other settings":
                yield entry, f"holds a run of other settings; to run it again: rm -r {entry.folder}"
                continue
            started = time.monotonic()
            try:
                Simulation(
                    entry.recipe, entry.folder, resume=True, progress=progress, command=command, workers=workers
                ).run()
            except Exception as error:  # the others still have their turn
                yield entry, f"{type(error).__name__}: {error}"
                continue
            _close(entry, command, (time.monotonic() - started) / 60, resumed=state == "begun", workers=workers)
            yield entry, "done"


def _close(entry: Entry, command: str, minutes: float, *, resumed: bool, workers: int) -> None:
    """Write down that the run is done and how it was made, then drop what only resuming needs."""
    facts: dict[str, Any] = {
        "command": command,
        "commit": commit(),
        "minutes": round(minutes, 2),
        "resumed": resumed,
        "workers": workers,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }
    storage.replace_file(entry.folder / LEDGER_FILE, (json.dumps(facts, indent=1) + "\n").encode())
    run = entry.folder / "runs" / entry.method / f"seed-{entry.seed}"
    for part in ("clients", "sent", "mailbox/updates"):
        shutil.rmtree(run / part, ignore_errors=True)


def commit() -> str | None:
    """The commit of the checkout that the package lies in, `+` for one with changes; None where there is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


class _alone:
    """Holds the lock of a ledger's folder; the system lets go of it when the process ends, however it ends."""

    def __init__(self, root: Path) -> None:
        self._path = root / _LOCK_FILE

    def __enter__(self) -> None:
        self._file = open(self._path, "w")
        if not lock_descriptor(self._file.fileno(), blocking=False):
            self._file.close()
            raise ConfigError(f"Another process runs the ledger in {self._path.parent}. Wait for it, or end it.")

    def __exit__(self, *exception: object) -> None:
        self._file.close()

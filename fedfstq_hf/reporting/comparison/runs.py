"""Runs of `fedfstq simulate`, read for a comparison: folders, and archives, each of which holds runs in one file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zstandard

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.recipe.sections import Recipe
from fedfstq_hf.reporting.comparison.summary import Row, curves, read_rows

SUFFIX = ".jsonl.zst"
_MAX_BYTES = 10**9  # of one archive, decompressed
_EARLIER = "ee91c45"  # the last commit that reads archives whose methods have the fields of before
_FIELDS = {"run": str, "recipe": dict, "ledger": dict, "rows": list}
_RECIPE, _ROWS, _REPORT, _LEDGER = "recipe.json", "metrics.jsonl", "report.md", "ledger.json"
_EXPECTED = f"expected a folder that `fedfstq simulate` wrote, with {_RECIPE} and {_ROWS}"
_KEYS = (
    "method",
    "seed",
    "round",
    "metric",
    "uplink_bytes",
    "downlink_bytes",
    "cumulative_uplink_bytes",
    "cumulative_downlink_bytes",
    "seconds",
    "num_dropped",
)
_CLIENT_KEYS = ("compute_seconds", "clients", "client_compute_seconds", "client_air_bytes", "client_downlink_bytes")


@dataclass(frozen=True)
class Run:
    """What one run folder holds, or one line of an archive.

    Attributes:
        folder: as it was given; of a run in an archive the archive's path and the run's name in it.
        series: method -> seed -> rows of rounds 0, 1, 2, ... as far as the run came.
        command: the line that made it; None where the run has not finished and so has no report.
        version: of the package that founded its federations; None where their folders are gone.
        torn: the last line was cut short, as by a kill, and was left out.
    """

    folder: Path
    recipe: Recipe
    series: dict[str, dict[int, list[Row]]]
    command: str | None
    version: str | None
    torn: bool

    def rounds(self, method: str, seed: int) -> int | None:
        """Last round that has a row; None where there is none."""
        rows = self.series.get(method, {}).get(seed)
        return None if rows is None else int(rows[-1]["round"])


def read_runs(folders: Sequence[str | Path], methods: Sequence[str] | None = None) -> list[Run]:
    """Read each folder or archive once, in the order given.

    Args:
        folders: run folders, or archives (`*.jsonl.zst`).
        methods: of these methods only; None for all.

    Raises:
        ConfigError: no folder, one that holds no run, or no run of one of the methods.
        DataError: a run's files cannot be read, or it has no rows yet.
    """
    if not folders:
        raise ConfigError("There is no run to report on. Type: fedfstq report DIR..., each of `fedfstq simulate`.")
    distinct = {Path(folder).resolve(): Path(folder) for folder in reversed(folders)}
    runs: list[Run] = []
    for folder in reversed(distinct.values()):
        runs += _archived_runs(folder) if folder.name.endswith(SUFFIX) and folder.is_file() else [read_run(folder)]
    if methods is None:
        return runs
    known = sorted({method for run in runs for method in run.series})
    if missing := sorted(set(methods) - set(known)):
        raise ConfigError(f"No run is of method {missing[0]!r}. There are runs of {', '.join(known)}.")
    kept = [replace(run, series={name: run.series[name] for name in methods if name in run.series}) for run in runs]
    return [run for run in kept if run.series]


def _archived_runs(path: Path) -> list[Run]:
    runs = []
    for entry in read_archive(path):
        folder = path / entry["run"]
        try:
            recipe = Recipe.from_dict(entry["recipe"], f"{entry['run']}/{_RECIPE}")
        except ConfigError as error:
            raise ConfigError(
                f"{path} was written by an earlier version of this package ({str(error).partition(';')[0]}). Commit "
                f"{_EARLIER} reads it. Type: git checkout {_EARLIER} && fedfstq report {path}"
            ) from None
        series = _series(entry["rows"], recipe, folder)
        runs.append(Run(folder, recipe, series, _typed(str(entry["ledger"].get("command", ""))), None, torn=False))
    return runs


def read_run(folder: Path) -> Run:
    """Read one run folder; see `read_runs`."""
    if not all((folder / name).is_file() for name in (_RECIPE, _ROWS)):
        raise ConfigError(_nothing_there(folder))
    recipe = _read_recipe(folder / _RECIPE)
    try:
        # Counted first: what a run in progress appends in between is no torn line.
        num_lines = len((folder / _ROWS).read_text(encoding="utf-8").splitlines())
        rows = read_rows(folder / _ROWS)
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / _ROWS} is not text ({error}); {_EXPECTED}.") from None
    series = _series(rows, recipe, folder)
    return Run(folder, recipe, series, _find_command(folder), _find_version(folder), torn=num_lines > len(rows))


def _series(rows: Sequence[Row], recipe: Recipe, folder: Path) -> dict[str, dict[int, list[Row]]]:
    for number, row in enumerate(rows, start=1):
        _check_row(row, recipe, f"{folder / _ROWS}, line {number}")
    if not rows:
        raise DataError(
            f"{folder} holds a run without a single row yet; expected one per method, seed and round. Go on with it by "
            "`fedfstq simulate ... --resume`, or leave it out."
        )
    try:
        return curves(rows)
    except DataError as error:
        raise DataError(f"{folder / _ROWS}: {error}") from None


def _nothing_there(folder: Path) -> str:
    """The error for a folder without a run; where its subfolders hold some, it names them."""
    if not folder.exists():
        return f"There is no folder {folder}; {_EXPECTED}. Make one: fedfstq simulate quickstart --out {folder}"
    inside = sorted(path.parent for path in folder.glob(f"*/{_RECIPE}")) if folder.is_dir() else []
    if inside:
        return f"{folder} holds no run itself, but its folders do. Type: fedfstq report {' '.join(map(str, inside))}"
    if (folder / _RECIPE).is_file():
        return (
            f"{folder} holds a run that has not measured anything yet (no {_ROWS}). Go on with it by "
            "`fedfstq simulate ... --resume`, or leave it out."
        )
    return f"{folder} holds no run; {_EXPECTED}. Give the folder that was --out, or runs/RECIPE."


def _read_recipe(path: Path) -> Recipe:
    try:
        return Recipe.from_dict(json.loads(path.read_text(encoding="utf-8")), str(path))
    except ConfigError as error:
        raise ConfigError(f"{error} (a run of another version of this package?). Leave {path.parent} out.") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read ({error}); {_EXPECTED}.") from None


def _check_row(row: Any, recipe: Recipe, where: str) -> None:
    keys = _KEYS if not isinstance(row, dict) or row.get("round") == 0 else (*_KEYS, *_CLIENT_KEYS)
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}; expected a row as `fedfstq simulate` writes it.")
    if row["method"] not in recipe.methods:
        known = ", ".join(recipe.methods)
        raise DataError(f"{where} is of method {row['method']!r}; expected one of the recipe beside it: {known}.")
    links = [link.name for link in recipe.links]
    if sorted(row["seconds"]) != sorted(links):
        raise DataError(f"{where} has seconds on {sorted(row['seconds'])}; expected the recipe's links {links}.")


def _find_command(folder: Path) -> str | None:
    """The first code block of the run's own report, else what its ledger says, where a command was typed."""
    try:
        blocks = (folder / _REPORT).read_text(encoding="utf-8").split("```")
        command = blocks[1].strip() if len(blocks) > 2 else ""
    except (OSError, UnicodeDecodeError):
        command = _field(folder / _LEDGER, "command")
    return _typed(command)


def _typed(command: str) -> str | None:
    """A command line, None for anything else that stands in its place."""
    return command if command.startswith(("fedfstq simulate ", "python recipes/")) and "#" not in command else None


def _find_version(folder: Path) -> str | None:
    specs = folder.glob("runs/*/seed-*/mailbox/rounds/000000/spec.json")
    return " and ".join(sorted({_field(path, "package_version") for path in specs} - {""})) or None


def _field(path: Path, key: str) -> str:
    """A field of a JSON file, empty where it cannot be read."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


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

"""The ledger of the evaluation: runs whatever recipe, method and seed is missing, one at a time, in order of priority.

    python recipes/evaluation/run.py --list                            what is done, what is missing, minutes
    python recipes/evaluation/run.py --model FOLDER --data FOLDER      run what is missing; kill it at any time
    python recipes/evaluation/run.py main_fed_med --seeds 1            of one recipe
    python recipes/evaluation/run.py --quick --model ... --data ...    tiny versions of everything, for a look

Runs lie in runs/evaluation/RECIPE/[POINT/]METHOD/seed-S; `--results recipes/results` adds them to RECIPE.jsonl.zst and
writes RECIPE.json from it. The folder of --data holds fed_med.jsonl, fed_aya.jsonl and fed_code.jsonl. --model and
--data leave the recipes of the embedded demo alone.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from fedfstq_hf.cli.options import quieten
from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.recipe import Recipe, list_recipes, load_recipe
from fedfstq_hf.simulation.forkserver import warm_up

ORDER = (
    ("main_fed_med", "main_fed_aya", "main_fed_code"),
    ("silo_fed_med", "silo_fed_aya", "silo_fed_code"),
    ("methods_demo", "demo_ablation", "demo_alpha", "demo_clients", "demo_packet_loss", "demo_dropout"),
    ("codecs_fed_med", "objectives_fed_med", "objectives_fed_aya", "objectives_fed_code"),
)
"""Groups of recipes; in a group the first seed of all comes first, then the second."""

QUICK = {
    "federation.rounds": 2,
    "federation.clients_per_round": 2,
    "training.local_steps": 2,
    "data.test_limit": 16,
    "training.bf16": False,
    "seeds": 1,
}


def main() -> int:
    """Read the options and list or run; 1 where a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="of these recipes only; all when none is given")
    parser.add_argument("--list", action="store_true", help="show what is done and what is missing, and run nothing")
    parser.add_argument("--quick", action="store_true", help="tiny versions, in runs/evaluation-quick")
    parser.add_argument("--model", help="base model of the recipes that are not on the embedded demo")
    parser.add_argument("--data", type=Path, help="folder with fed_med.jsonl, fed_aya.jsonl, fed_code.jsonl, or a file")
    parser.add_argument("--methods", help="of these methods only, separated by commas")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--out", type=Path, help="folder of the runs")
    parser.add_argument(
        "--results", type=Path, help="add finished runs to RECIPE.jsonl.zst there, and write RECIPE.json"
    )
    parser.add_argument("--float32", action="store_true", help="for a processor without bfloat16 instructions")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    root = options.out or Path("runs/evaluation-quick" if options.quick else "runs/evaluation")
    try:
        return run(options, root)
    except FedFSTQError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, root: Path) -> int:
    """List or run; see `main`."""
    if not options.list:
        warm_up()
    quieten()
    from ledger import Entry, entries, estimate, run_missing
    from results import add_to_archive, write_result

    from fedfstq_hf.reporting.comparison.runs import SUFFIX
    from fedfstq_hf.simulation.runner import slow_bf16

    wanted = options.recipes or [name.removeprefix("evaluation/") for name in list_recipes()]
    groups = [[name for name in group if name in wanted] for group in ORDER]
    groups.append([name for name in options.recipes if not any(name in group for group in ORDER)])
    listed: list[Entry] = []
    for group in groups:
        listed += entries({name: load(name, options) for name in group}, root)
    command = shlex.join(["python", *sys.argv])
    failed = 0
    if options.list:
        for entry in listed:
            minutes = entry.minutes() if entry.state() == "done" else estimate(entry, listed)
            about = "" if entry.state() == "done" else "about "
            print(f"{entry.state():>14}  {f'{about}{minutes:.1f} min' if minutes else '? min':>15}  {entry}")
        missing = [entry for entry in listed if entry.state() != "done"]
        known = [minutes for entry in missing if (minutes := estimate(entry, listed)) is not None]
        done = len(listed) - len(missing)
        print(f"{done} of {len(listed)} done; the {len(known)} of known length take {sum(known):.0f} min")
    else:
        if slow := next((text for entry in listed if (text := slow_bf16(entry.recipe))), None):
            print(slow, file=sys.stderr)
        for entry, outcome in run_missing(listed, root, command=command, workers=options.workers):
            print(f"{entry}: {outcome}", flush=True)
            failed += outcome != "done"
    if options.results:
        for name in dict.fromkeys(entry.name for entry in listed):
            done = [entry.folder for entry in listed if entry.name == name and entry.state() == "done"]
            if done:
                archive = options.results / f"{name}{SUFFIX}"
                add_to_archive(archive, {folder.relative_to(root / name).as_posix(): folder for folder in done})
                print(f"wrote {archive} and {write_result(archive, options.results / f'{name}.json')}")
    return int(failed > 0)


def load(name: str, options: argparse.Namespace) -> Recipe:
    """The recipe `name` with what the options change."""
    overrides: dict[str, object] = {"seeds": options.seeds}
    if options.quick:
        overrides |= QUICK
    if options.float32:
        overrides["training.bf16"] = False
    path = f"evaluation/{name}" if f"evaluation/{name}" in list_recipes() else name
    recipe = load_recipe(path)
    if recipe.model != "demo" and options.model:
        overrides["model"] = options.model
    if recipe.data.path != "demo" and options.data:
        folder = options.data.is_dir()
        overrides["data"] = str(options.data / f"{recipe.data.format}.jsonl" if folder else options.data)
    if options.methods:
        known = [method for method in options.methods.split(",") if method in recipe.methods]
        overrides["methods"] = ",".join(known or recipe.methods)
    return load_recipe(path, overrides)


if __name__ == "__main__":
    sys.exit(main())

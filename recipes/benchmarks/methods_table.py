"""The table of switches in docs/methods.md, printed as Markdown from the rows of `fedfstq_hf/methods.py`.

Run: `python recipes/benchmarks/methods_table.py`, or with `--write` to put it into the page. Needs the installed
package; takes a second. `tests/recipe/test_docs.py` compares the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from fedfstq_hf.methods import LocalSwitches, MethodSettings, Row, default_of
from fedfstq_hf.ranges import LARGEST, Budget, Flag, Number, OneOf, Options, OrNone, Range, Text, Whole

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
BEGIN, END = "<!-- methods_table.py: begin -->\n", "<!-- methods_table.py: end -->"


def table() -> str:
    """All switches of a method, those that a client alone can have first, in the order of the code."""
    lines = ["| switch | default | values | what it does |", "|---|---|---|---|"]
    for item in dataclasses.fields(MethodSettings):
        row = item.metadata["help"]
        if isinstance(row, Row):
            default = json.dumps(default_of(MethodSettings, item.name))
            lines.append(f"| `{item.name}` | `{default}` | {_values(row.range)} | {row}{_conditions(row)} |")
        elif item.name == "downlink":
            lines.append(f"| `downlink` | `null` | [`exact` or keyframes](downlink.md#settings) | {row} |")
        else:
            lines.append(f"| `{item.name}` | SGD, `lr` 1 | [below](#server-optimizers) | {row} |")
    local = ", ".join(f"`{item.name}`" for item in dataclasses.fields(LocalSwitches))
    own = f"`FedFSTQConfig` has {local} too. In a federation its method wins; of these only the two budgets count."
    return "\n".join([*lines, "", own, ""])


def _conditions(row: Row) -> str:
    """Of a row: what it needs, and what excludes it."""
    where = f" at `{row.only}`" if row.only is not None else ""
    needs = f" Needs{where} `{row.needs.partition(':')[0]}`." if row.needs else ""
    excluded = ", ".join(f"`{name}`" for name in row.excludes)
    return needs + (f" Not{where} with {excluded}." if excluded else "")


def _values(range: Range) -> str:
    """Of a range, in words."""
    match range:
        case Number(low, high, above, below):
            least = f"above {low:g}" if above else f"from {low:g}"
            return least + (f" to {'below ' if below else ''}{high:g}" if high < LARGEST else "")
        case Whole(low, high):
            return f"whole, {low} to {high}"
        case OneOf(names):
            return ", ".join(f"`{name}`" for name in names)
        case OrNone(inner):
            return f"`null`; {_values(inner)}"
        case Flag():
            return "`true`, `false`"
        case Budget():
            return "[a budget](budgets.md)"
        case Options():
            return "[by codec](codecs.md)"
        case Text():
            return "[a codec](codecs.md)"
    raise TypeError(f"{range!r} has no words here; add them to methods_table.py")


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put it into docs/methods.md")
    if not parser.parse_args().write:
        print(table(), end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()

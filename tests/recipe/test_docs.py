"""The pages: links lead somewhere, names and files exist, methods.md has the table of switches; archives read."""

import importlib
import re
import runpy
from functools import reduce
from pathlib import Path

import pytest

from fedfstq_hf.reporting.comparison.runs import read_runs

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
LOGS = ("CHANGELOG.md", "experiments.md")  # they name what is gone
CURRENT = [page for page in PAGES if page.name not in LOGS]
LINK = re.compile(r"\]\((?!https?://|mailto:)([^)\s{]+)\)")
NAME = re.compile(r"\bfedfstq_hf(?:\.\w+)+")
FILE = re.compile(r"\b(?:fedfstq_hf|recipes|tests|docs)/[\w./-]+\.(?:py|md|yaml|jsonl\.zst|json)\b")


def _anchors(page):
    """As GitHub makes them of a page's headings."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower() for heading in headings}
    return {name.replace(" ", "-") for name in made} | set(re.findall(r'<a id="([^"]+)">', text))


def _resolve(found, part):
    """An attribute of an object or a submodule of a module."""
    try:
        return getattr(found, part)
    except AttributeError:
        return importlib.import_module(f"{found.__name__}.{part}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            assert anchor in _anchors(there), target


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    for name in sorted(set(NAME.findall(page.read_text(encoding="utf-8")))):
        reduce(_resolve, name.split(".")[1:], importlib.import_module("fedfstq_hf"))


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for name in sorted(set(FILE.findall(page.read_text(encoding="utf-8")))):
        placeholder = any(word in name for word in ("NAME", "WORKLOAD"))
        assert placeholder or (ROOT / name).exists(), name


def test_the_table_of_switches_is_that_of_the_code():
    script = runpy.run_path(str(ROOT / "recipes" / "benchmarks" / "methods_table.py"))
    assert script["BEGIN"] + script["table"]() + script["END"] in script["PAGE"].read_text(encoding="utf-8")


@pytest.mark.parametrize("archive", sorted(ROOT.glob("recipes/results/*.jsonl.zst")), ids=lambda path: path.name)
def test_archives_of_runs_can_still_be_read(archive):
    assert {run.recipe.name for run in read_runs([archive])} == {archive.name.partition(".")[0]}

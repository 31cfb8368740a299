"""The dependencies of pyproject.toml and the two files of pins that CI installs say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
TESTED = [
    Requirement(line)
    for line in [*PROJECT["dependencies"], *(line for name in ("test", "secure", "trl") for line in EXTRAS[name])]
]


def pins(file):
    return {
        canonicalize_name(name): Version(version)
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("requirement", [r for r in TESTED if r.name != PROJECT["name"]], ids=str)
def test_floors(requirement):
    (bound,) = requirement.specifier
    assert bound.operator == ">="
    name, floor = canonicalize_name(requirement.name), Version(bound.version)
    assert pins("constraints.txt")[name] >= floor
    if name != "torch":  # see constraints-lowest.txt
        assert pins("constraints-lowest.txt")[name] == floor


@pytest.mark.parametrize(
    ("package", "bounds"),
    [
        ("flwr==1.42.0", "certifi>=2026.10.19 typer>=0.13,<0.21 rich>=14,<15 packaging>=24,<26 click>=8,<9"),
        ("dp-accounting==0.6.0", "attrs>=22,<24 mpmath~=1.2 numpy>=1.21,<3"),
    ],
)
def test_pins_leave_room_for(package, bounds):
    pinned = pins("constraints.txt")
    for bound in map(Requirement, bounds.split()):
        assert pinned[canonicalize_name(bound.name)] in bound.specifier, f"{package} needs {bound}"

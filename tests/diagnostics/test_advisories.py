"""Known advisories: no version that pip may choose for us has one, and doctor names an installed one that does."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from datetime import date
from pathlib import Path

import pytest

from gptoughts.diagnostics.doctor.advisories import ADVISORIES, AS_OF, Advisory, advisory_findings
from gptoughts.diagnostics.doctor.diagnosis import diagnose
from gptoughts.diagnostics.doctor.packages import release
from gptoughts.hardware.machine import read
from gptoughts.hardware.packages import recorded_names

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("one", ADVISORIES, ids=lambda one: one.number)
def test_the_floors_of_pyproject_are_above_every_advisory(one: Advisory) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for extra in extras.values() for line in extra if re.split(r"[\[<>=]", line)[0] == one.package]
    floors = [found[1] for line in lines if (found := re.search(r">=([\d.]+)", line))]
    assert floors and len(floors) == len(lines)
    assert [floor for floor in floors if release(floor) < release(one.fixed)] == []
    assert one.package in recorded_names(), "doctor sees the package"
    assert re.fullmatch(r"CVE-\d{4}-\d{4,}", one.number)


def test_the_table_is_dated_and_newest_first() -> None:
    assert date.fromisoformat(AS_OF).year >= 2026
    for package in {one.package for one in ADVISORIES}:
        fixed = [release(one.fixed) for one in ADVISORIES if one.package == package]
        assert fixed == sorted(fixed, reverse=True)


def test_doctor_names_a_package_with_an_advisory_and_the_first_safe_version() -> None:
    machine = read(ROOT / "tests/machines/h100.json")
    old = dataclasses.replace(machine, packages={**machine.packages, "transformers": "5.2.0", "jinja2": "3.1.5"})
    found = {one.mend: one for one in diagnose(old, ROOT).findings}
    template, model = found["pip install 'jinja2>=3.1.6'"], found["pip install 'transformers>=5.10.0'"]
    assert "jinja2 3.1.5 has known advisories" in template.what and "CVE-2025-27516" in template.what
    assert re.findall(r"CVE-\d+-\d+", model.what) == ["CVE-2026-9856", "CVE-2026-5241", "CVE-2026-4372"]
    assert model.weight == "costs" and model.costs == "security" and AS_OF in model.source


@pytest.mark.parametrize(
    ("packages", "number"),
    [({"transformers": "5.5.0"}, 1), ({"torch": "2.9.1+cu128"}, 1), ({"torch": "2.10.0"}, 0), ({"jinja2": "3.2"}, 0),
     ({"torch": "nonsense"}, 0), ({"numpy": "0.1"}, 0), ({}, 0)],
)  # fmt: skip
def test_versions_with_and_without_an_advisory(packages: dict[str, str], number: int) -> None:
    assert sum(len(re.findall("CVE-", one.what)) for one in advisory_findings(packages)) == number

"""A wheel installed elsewhere, without torch, finds its profiles and recipes, plans, and says what training needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NO_NETWORK = ("NewConnectionError", "Name or service not known", "Temporary failure in name resolution", "No route to host")
BASE = ["click>=8.1", "nvidia-ml-py>=12", "pydantic>=2.7"]


def pip(*words: str | Path, python: Path = Path(sys.executable)) -> None:
    """Run pip; where there is no network the test is skipped, since nothing can be built or fetched."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode and any(sign in done.stderr for sign in NO_NETWORK):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    pip("wheel", "--no-deps", "--quiet", "--wheel-dir", folder, ROOT)
    return next(folder.glob("gptoughts-*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel and what the base install needs; no torch."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip("install", "--quiet", *BASE, python=python)
    pip("install", "--quiet", "--no-deps", wheel, python=python)
    return folder


def gptoughts(elsewhere: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The installed command, in a folder that is not the repository."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(elsewhere / "bin" / "gptoughts"), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=elsewhere, env=environment)


def wheel_holds_every_profile_and_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"gptoughts/profiles/{path.name}" for path in (ROOT / "profiles").glob("*.toml")}
    wanted |= {f"gptoughts/recipes/{path.name}" for path in (ROOT / "gptoughts" / "recipes").glob("*.toml")}
    assert wanted and wanted <= names


def lists_find_what_the_wheel_brought(elsewhere: Path) -> None:
    for verb, folder in (("profiles", ROOT / "profiles"), ("recipes", ROOT / "gptoughts" / "recipes")):
        done = gptoughts(elsewhere, verb)
        assert done.returncode == 0, done.stderr
        for path in folder.glob("*.toml"):
            assert path.stem in done.stdout


def layers_and_doctor_run_without_torch(elsewhere: Path) -> None:
    layers = gptoughts(elsewhere, "layers")
    assert layers.returncode == 0, layers.stderr
    assert "compile-blocks" in layers.stdout
    doctor = gptoughts(elsewhere, "doctor")
    assert "torch" in doctor.stdout
    assert "Traceback" not in doctor.stderr


def plans_for_a_machine_that_is_not_here(elsewhere: Path) -> None:
    machine = str(ROOT / "tests" / "machines" / "h100x8.json")
    done = gptoughts(elsewhere, "plan", "gpt2-124m", "--profile", "auto", "--machine", machine, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["profile"] == "hopper"


def train_says_what_to_install(elsewhere: Path) -> None:
    done = gptoughts(elsewhere, "train")
    assert done.returncode == 2
    assert "torch" in done.stderr and "pip install 'gptoughts[train]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_is_whole(tmp_path: Path) -> None:
    """One test, because the environment is what takes the time and workers share nothing."""
    wheel = build_wheel(tmp_path / "wheel")
    wheel_holds_every_profile_and_recipe(wheel)
    elsewhere = install(wheel, tmp_path / "venv")
    lists_find_what_the_wheel_brought(elsewhere)
    layers_and_doctor_run_without_torch(elsewhere)
    plans_for_a_machine_that_is_not_here(elsewhere)
    train_says_what_to_install(elsewhere)

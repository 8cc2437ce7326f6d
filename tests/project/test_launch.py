"""The scripts under launch/: their syntax, their help, which Python they take, and that arguments reach what they start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = sorted(path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
SCRIPTS = [*(f"launch/{name}" for name in LAUNCH), ".ci/run"]
SOURCED = ("launch/environment.sh", "launch/preset.sh", ".ci/run")
"""Scripts without a help page."""
TINY = {
    "model.depth": 1, "model.width": 32, "model.heads": 2, "data.tokenizer": "bytes", "data.sequence-length": 16,
    "train.global-batch": 2, "train.steps": 3, "eval.batches": 1, "sample.tokens": 4,
}  # fmt: skip


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An environment whose `python` writes its words into a file, says that everything is installed, and does nothing else."""
    binaries = tmp_path / "an environment" / "bin"
    binaries.mkdir(parents=True)
    script = f'#!/bin/sh\nprintf "%s\\n" "$OMP_NUM_THREADS" "$@" "-=-" >> "{tmp_path}/words"\nexit 0\n'
    for name in ("python", "lint-imports"):
        (binaries / name).write_text(script, encoding="utf-8")
        (binaries / name).chmod(0o755)
    return binaries.parent


def run(script: str, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script, with variables laid over this process's own."""
    known = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "CONDA_PREFIX", "OMP_NUM_THREADS")}
    command = [str(ROOT / script), *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=cwd, env=known | environment)


def calls(stand_in: Path) -> list[list[str]]:
    """The words of every call of the stand-in's `python`; the first is OMP_NUM_THREADS."""
    text = (stand_in.parent / "words").read_text(encoding="utf-8")
    return [call.split("\n") for call in text.removesuffix("\n-=-\n").split("\n-=-\n")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_reads_it(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", "-x", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in SOURCED])
def test_help_says_how_to_use_it_and_does_nothing_else(script: str, tmp_path: Path) -> None:
    done = run(script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ")
    assert script in done.stdout.splitlines()[0]
    assert not list(tmp_path.iterdir())


def test_quickstart_passes_its_words_on_from_any_folder(stand_in: Path, tmp_path: Path) -> None:
    done = run("launch/quickstart.sh", "gpt-1b", "--name", "two words", cwd=tmp_path, VIRTUAL_ENV=str(stand_in))
    assert done.returncode == 0, done.stderr
    assert calls(stand_in)[-1][1:] == ["-m", "gptoughts", "train", "gpt-1b", "--name", "two words"]


def test_test_runs_every_check_and_passes_flags_to_pytest(stand_in: Path) -> None:
    done = run("launch/test.sh", "-k", "bench and not slow", VIRTUAL_ENV=str(stand_in))
    assert done.returncode == 0, done.stderr
    ran = [" ".join(call[1:]) for call in calls(stand_in)]
    for check in ("-m ruff check .", "-m ruff format --check .", "-m mypy"):
        assert check in ran
    threads, *words = calls(stand_in)[-1]
    assert threads == "1"
    assert words[:3] == ["-m", "pytest", "-n"] and words[-2:] == ["-k", "bench and not slow"]
    assert "--all" not in words, "the default is the default tier"


def test_ci_runs_both_tiers(stand_in: Path) -> None:
    for script, words in (("launch/test.sh", ["--all", "-k", "bench"]), (".ci/run", ["-k", "bench"])):
        done = run(script, *words, VIRTUAL_ENV=str(stand_in))
        assert done.returncode == 0, done.stderr
        assert calls(stand_in)[-1][-3:] == ["--all", "-k", "bench"]


def test_torchrun_needs_a_number_of_ranks(tmp_path: Path) -> None:
    for words in ([], ["gpt-1b"], ["0"]):
        done = run("launch/torchrun.sh", *words, cwd=tmp_path)
        assert done.returncode == 2
        assert "usage" in done.stderr


def test_torchrun_starts_the_ranks(stand_in: Path) -> None:
    done = run("launch/torchrun.sh", "2", "quickstart", VIRTUAL_ENV=str(stand_in), OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stderr
    words = calls(stand_in)[-1]
    assert words[0] == "3", "what the user set stays"
    assert " ".join(words[1:]) == "-m gptoughts train quickstart --ranks 2"


def test_mpirun_starts_the_ranks(stand_in: Path, tmp_path: Path) -> None:
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.4" && exit 0\nprintf "%s\\n" "$@" > "{tmp_path}/mpi"\n',
        encoding="utf-8",
    )
    mpirun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run("launch/mpirun.sh", "4", "--hostfile", "hosts", "gpt-1b", "--name", "a b", VIRTUAL_ENV=str(stand_in), PATH=path)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "mpi").read_text(encoding="utf-8").splitlines()
    assert words[:4] == ["-np", "4", "--bind-to", "none"]
    assert words[-8:] == ["hosts", str(stand_in / "bin" / "python"), "-m", "gptoughts", "train", "gpt-1b", "--name", "a b"]
    for wrong in ([], ["gpt-1b"], ["0"]):
        assert run("launch/mpirun.sh", *wrong).returncode == 2


def test_an_old_python_is_named(tmp_path: Path) -> None:
    """Nothing on PATH is recent enough: one line, exit code 2, no half-made environment."""
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python"):
        (tmp_path / name).write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n', encoding="utf-8"
        )
        (tmp_path / name).chmod(0o755)
    text = f'cd "{tmp_path}"; . "{ROOT}/launch/environment.sh"; choose_environment'
    path = f"{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", text], check=False, capture_output=True, text=True, env={"PATH": path})
    assert done.returncode == 2
    assert done.stderr == "error: Python 3.11 or newer is required. Found Python 3.8.1.\n"
    assert not (tmp_path / ".venv").exists()


def test_an_address_that_does_not_answer_costs_seconds() -> None:
    text = f'PYTHON="{sys.executable}"; . "{ROOT}/launch/environment.sh"; reachable http://127.0.0.1:9/torch/'
    done = subprocess.run(["bash", "-c", text], check=False, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert done.stderr == ""


def installed_here(folder: Path) -> bool:
    """Whether the package is installed editable from `folder` with all that training needs."""
    return subprocess.run([sys.executable, str(folder / "launch" / "installed.py"), "train"], check=False).returncode == 0


def test_quickstart_trains_in_the_active_environment(tmp_path: Path) -> None:
    """The whole way with a tiny model: no installation where nothing is missing, losses, a sample, places."""
    if sys.prefix == sys.base_prefix or not installed_here(ROOT):
        pytest.skip("this checkout is not installed in a virtual environment with its train extra")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200, encoding="utf-8")
    tiny = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]
    words = ["--data.path", str(text), "--data.cache", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "a run"), *tiny]
    done = run("launch/quickstart.sh", *words, VIRTUAL_ENV=sys.prefix, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing" not in done.stdout
    assert "validation loss" in done.stdout and "unigram entropy" in done.stdout
    out = tmp_path / "a run"
    for name in ("plan.json", "evidence.json", "metrics.jsonl", "recipe.toml", "loss.png"):
        assert (out / name).is_file(), name
    assert json.loads((out / "plan.json").read_text(encoding="utf-8"))["profile"]
    assert list((out / "checkpoints").glob("step-*"))

"""`gptoughts verify-resume`: exact for every recipe and layer that claims it, and the layer that is not exact is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoughts.api import decide
from gptoughts.config.loader import load, recipe_names
from gptoughts.diagnostics import resume_check
from gptoughts.diagnostics.resume_check import Trial, compare, find_cause, verify
from gptoughts.errors import PlanError, RunError
from gptoughts.layers import CATALOG
from gptoughts.processes import kill_tree
from tests.support import warm
from tests.support.toy_files import make_toys, sizes

STATEFUL = Path(__file__).parents[1] / "support" / "stateful_plugin.py"
ON_TOYS = ["--data.path", "my-text.txt", "--data.tokenizer", "bytes"]
TINY = ["shakespeare-char", *sizes("shakespeare-char"), *ON_TOYS]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with everything that the recipes name, which is the current one."""
    here, before = tmp_path_factory.mktemp("toys"), Path.cwd()
    os.chdir(here)
    make_toys(here)
    yield here
    os.chdir(before)


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start trainings in forks of a process that has imported torch."""
    monkeypatch.setattr(resume_check, "module_words", lambda module: warm.command(environment=dict(os.environ)))


OPTIONS = {"offload-activations": {"offload.least_bytes": "1024"}}
"""What a layer needs to be active at this size."""


def trial_of(folder: Path, *words: str, layers: dict[str, str] | None = None, before: int = 4, after: int = 20) -> Trial:
    return Trial(words, layers or {}, before, after, folder)


def words_of(recipe: str) -> list[str]:
    """The command line that trains a recipe on the toys."""
    given = load(recipe).recipe
    more = sizes(recipe, ["--data.path"] if given.model.path else [])
    if given.objective == "masked-diffusion":
        more += ["--sample.tokens", "32"]
    if given.data.format == "chat":
        more += ["--data.path", "chat.jsonl", "--data.sequence-length", "64", "--model.path", "tiny"]
    elif given.data.format == "text":
        more += [
            "--data.path",
            "my-text.txt",
            *(["--model.path", "tiny"] if given.model.path else ["--data.tokenizer", "bytes"]),
        ]
    if given.model.kv_heads:
        more += ["--model.kv-heads", "1"]
    if given.model.family == "llada" and given.model.path:  # the published weights' own format; here from random ones
        more += [
            "--model.path",
            "none",
            "--model.depth",
            "1",
            "--model.width",
            "64",
            "--model.heads",
            "2",
            "--data.tokenizer",
            "tiny",
        ]
    return [recipe, *more, "--optim.warmup-steps", "2"]


def test_killed_and_resumed_is_exact(toys: Path, tmp_path: Path) -> None:
    told = list[str]()
    difference, unbroken = verify(trial_of(tmp_path, *TINY), told.append)
    assert difference.lines == () and difference.losses == 24 * 2 + 6 and difference.files == 3
    assert [line.split(":")[0] for line in told] == [
        "24 steps without a break", "killed after the checkpoint of step 4", "resumed to step 24"
    ]  # fmt: skip
    rows = (unbroken / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = next(number for number, row in enumerate(rows) if '"step": 9' in row and "train/loss" in row)
    rows[wrong] = rows[wrong].replace('"train/loss": ', '"train/loss": 1')
    (unbroken / "metrics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert "train/loss" in compare(trial_of(tmp_path, *TINY), unbroken, tmp_path / "plan-killed").lines[0]


def test_the_layer_whose_state_no_checkpoint_holds_is_named(toys: Path, tmp_path: Path) -> None:
    layers = {"matmul": "counting", "host": "system"}
    words = [*TINY, "--plugin", str(STATEFUL), "--numerics", "off"]
    trial = trial_of(tmp_path, *words, layers=layers)
    told = list[str]()
    difference, unbroken = verify(trial, told.append)
    assert "first at step 6: train/grad_norm" in difference.lines[0], difference
    assert any(line.startswith("model.safetensors: ") and "largest difference" in line for line in difference.lines)
    setting = decide(words[0], "auto", {}, layers, [str(STATEFUL)])
    found = find_cause(trial, setting, unbroken, told.append)
    assert found == "layer counting (slot matmul) is the cause: with ieee the training is exact"
    assert "two trainings without a kill: equal" in told


def test_a_training_that_cannot_start_or_ends_too_early_is_one_error(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"ended with exit code 2: .*no such file"):
        trial_of(tmp_path / "a", *TINY, "--data.path", "missing.txt").run("x")
    finished = trial_of(tmp_path / "b", *TINY)
    finished.run("x")
    with pytest.raises(RunError, match="had ended before it could be killed"):
        finished.kill("x")


def test_a_tree_of_processes_is_killed_with_all_its_groups() -> None:
    inner = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '300'], start_new_session=True); print(p.pid, flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", inner], stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())
        kill_tree(process.pid)
        assert process.wait(20) == -9
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not has_ended(grandchild):
        time.sleep(0.01)
    assert has_ended(grandchild)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.long
@pytest.mark.parametrize("recipe", sorted(recipe_names()))
def test_every_recipe_is_exact(toys: Path, tmp_path: Path, recipe: str) -> None:
    difference, _ = verify(trial_of(tmp_path, *words_of(recipe)), print)
    assert difference.lines == () and difference.losses > 24 and difference.files >= 3


def claimed() -> list[str]:
    return [name for name, layer in CATALOG.items() if layer.repeatable and not layer.baseline]


@pytest.mark.long
@pytest.mark.parametrize("name", claimed())
def test_every_layer_that_claims_it_is_exact(toys: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {CATALOG[name].slot: name, **OPTIONS.get(name, {})}
    words = [*TINY, "--model.depth", "2"]
    try:
        decide(words[0], "auto", {}, layers, ranks=2 if CATALOG[name].slot == "parallel" else 1)
    except PlanError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    ranks = ["--ranks", "2"] if CATALOG[name].slot == "parallel" else []
    if ranks:
        monkeypatch.undo()  # a fork's ranks are not children of the process that is killed
    difference, _ = verify(trial_of(tmp_path, *words, *ranks, layers=layers), print)
    assert difference.lines == ()

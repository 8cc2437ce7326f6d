"""A run that is killed, stopped or damaged goes on as if it had not been: the same losses to the last bit, the same files."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import warm
from tests.support.engines import NEEDS_INDUCTOR

STEPS = 40
TINY = (
    "train shakespeare-char --log.every 1 --eval.every 0 --eval.batches 1 --sample.tokens 4 --model.width 64 --model.heads 2 "
    f"--model.depth 2 --data.sequence-length 32 --train.steps {STEPS} --save.every 4 --save.keep 3"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(3)
    lines = ("".join(words.choice("abcdefgh ") for _ in range(60)) for _ in range(700))
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def command(text: Path, run: Path, *more: str) -> list[str]:
    data = ["--data.path", str(text / "text.txt"), "--data.cache", str(text / "cache")]
    return [sys.executable, "-m", "gptoughts", *TINY, *data, "--run-dir", str(run), *more]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def run(text: Path, place: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = warm.command(*command(text, place, *more)[3:], environment=environment())
    return subprocess.run(words, env=environment(), capture_output=True, text=True, check=False, timeout=300, cwd=text)


def run_cold(text: Path, place: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """As a user's shell starts it: with the plan of the processes that are killed, where no library is loaded before its variables are set."""
    return subprocess.run(
        command(text, place, *more), env=environment(), capture_output=True, text=True, check=False, timeout=300, cwd=text
    )


def losses(place: Path) -> dict[int, str]:
    """Step -> loss as hexadecimal float, of the last attempt that made the step."""
    from gptoughts.run.tracking.jsonl import read

    return {row["step"]: float(row["train/loss"]).hex() for row in read(place / "metrics.jsonl") if "train/loss" in row}


def hashes(place: Path, step: int = STEPS) -> dict[str, str]:
    folder = place / "checkpoints" / f"step-{step:06d}"
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    }


def step_reached(place: Path) -> int:
    try:
        return max(
            (json.loads(line)["step"] for line in (place / "metrics.jsonl").read_text().splitlines() if line.endswith("}")),
            default=0,
        )
    except FileNotFoundError:
        return 0


def kill_when(process: subprocess.Popen[Any], condition: Any) -> bool:
    """kill -9 as soon as `condition()`; whether the process was still alive then."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def test_killed_once_is_never_killed(text: Path, finished: Path, tmp_path: Path) -> None:
    """kill -9 in the middle; the slow tier kills more often, inside a checkpoint write and with compiled blocks."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(text, broken), env=environment(), cwd=text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert kill_when(process, lambda: step_reached(broken) >= 10)
    assert step_reached(broken) < STEPS
    ran = run_cold(text, broken)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "resuming from" in ran.stdout and ", bit for bit" in ran.stdout and "not bit for bit" not in ran.stdout
    assert losses(broken) == losses(finished)
    assert hashes(broken) == hashes(finished)
    assert not list((broken / "checkpoints").glob(".writing-*"))


@pytest.mark.slow
@NEEDS_INDUCTOR
def test_killed_three_times_is_never_killed(text: Path, tmp_path: Path) -> None:
    """kill -9 at seeded random times, at least once inside a checkpoint write, with prefetch on and compile forced."""
    forced = ("--layer.loader", "prefetch", "--layer.compile", "compile-blocks")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ran = run_cold(text, whole, *forced)
    assert ran.returncode == 0, ran.stderr[-3000:]
    chance = random.Random(20261)
    inside = 0
    targets = sorted(chance.sample(range(5, STEPS - 5), 2))
    for target in [*targets, None]:
        process = subprocess.Popen(
            command(text, broken, *forced), env=environment(), cwd=text, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if target is None:
            writing = broken / "checkpoints"
            assert kill_when(process, lambda: any(writing.glob(".writing-step-*/*.safetensors")))  # noqa: B023
        else:
            assert kill_when(process, lambda: step_reached(broken) >= target)  # noqa: B023
        inside += any((broken / "checkpoints").glob(".writing-step-*"))
    assert inside >= 1, "no kill fell into a checkpoint write"
    ran = run_cold(text, broken, *forced)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "resuming from" in ran.stdout
    assert ", bit for bit" in ran.stdout
    assert "not bit for bit" not in ran.stdout
    assert losses(broken) == losses(whole)
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
    assert hashes(broken) == hashes(whole)
    assert not list((broken / "checkpoints").glob(".writing-*"))
    attempts = {json.loads(line)["attempt"] for line in (broken / "metrics.jsonl").read_text().splitlines()}
    assert len(attempts) >= 3


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "finished"
    ran = run(text, place)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return place


def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / finished.name))


def test_what_a_run_leaves(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "checkpoints", "evidence.json", "goodput.json", "loss.png", "metrics.jsonl", "numerics.json", "plan.json", "recipe.toml", "run_id",
        "samples.jsonl", "system.jsonl",
    }  # fmt: skip
    steps = sorted(path.name for path in (finished / "checkpoints").glob("step-*"))
    assert steps[-3:] == ["step-000032", "step-000036", "step-000040"]
    assert not list(finished.rglob("*.pt")) + list(finished.rglob("*.bin")) + list(finished.rglob("*.pkl"))
    newest = finished / "checkpoints" / "step-000040"
    assert {path.name for path in newest.iterdir()} == {
        "manifest.json", "model.safetensors", "optimizer.safetensors", "plan.json", "recipe.toml", "state.json", "state.safetensors",
        "tokenizer",
    }  # fmt: skip
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss" in row for row in rows)
    assert (finished / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_complete_run_says_so_and_changes_nothing(text: Path, finished: Path, tmp_path: Path) -> None:
    place = copy(finished, tmp_path)
    before = (place / "metrics.jsonl").read_bytes(), hashes(place)
    ran = run(text, place)
    assert ran.returncode == 0
    assert "is complete at step 40" in ran.stdout
    assert ((place / "metrics.jsonl").read_bytes(), hashes(place)) == before


def test_a_damaged_newest_checkpoint_is_named_and_skipped(text: Path, finished: Path, tmp_path: Path) -> None:
    place = copy(finished, tmp_path)
    victim = place / "checkpoints" / "step-000040" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    ran = run(text, place)
    assert ran.returncode == 0, ran.stderr
    assert "step-000040: damaged, skipped: model.safetensors has another SHA-256 than when written" in ran.stdout
    assert "resuming from" in ran.stdout
    assert "step-000036" in ran.stdout
    assert hashes(place) == hashes(finished)
    assert losses(place) == losses(finished)


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "manifest"])
def test_every_kind_of_damage_is_told(finished: Path, tmp_path: Path, damage: str) -> None:
    from gptoughts.engine.checkpoint import integrity

    place = copy(finished, tmp_path) / "checkpoints" / "step-000040"
    victim = place / "optimizer.safetensors"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "empty":
        victim.write_bytes(b"")
    elif damage == "missing":
        victim.unlink()
    else:
        (place / "manifest.json").write_text("{", encoding="utf-8")
    why = integrity.damage(place)
    assert ("manifest.json is not readable" if damage == "manifest" else "optimizer.safetensors") in why
    assert integrity.newest(place.parent)[0] == place.parent / "step-000036"


def test_another_model_shape_is_refused(text: Path, finished: Path, tmp_path: Path) -> None:
    place = copy(finished, tmp_path)
    ran = run(text, place, "--model.width", "32")
    assert ran.returncode == 2
    assert "model.width: 64 | 32" in ran.stderr
    assert "--name with a new name" in ran.stderr
    assert hashes(place) == hashes(finished)


def test_another_plan_goes_on_and_says_old_and_new(text: Path, finished: Path, tmp_path: Path) -> None:
    place = copy(finished, tmp_path)
    ran = run(text, place, "--layer.attention", "math", "--train.steps", "42")
    assert ran.returncode == 0, ran.stderr
    assert "not bit for bit, because of (old | new):" in ran.stdout
    assert "layers.attention: ['sdpa', {'backend': 'auto'}] | ['math', {}]" in ran.stdout
    assert "recipe.train.steps: 40 | 42" in ran.stdout


def test_changed_shards_are_refused(text: Path, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    source = (text / "text.txt").read_text(encoding="utf-8")
    (other / "text.txt").write_text(source[::-1], encoding="utf-8")
    place = copy(finished, tmp_path)
    ran = run(other, place, "--train.steps", "44")
    assert ran.returncode == 2
    assert "changed since the checkpoint" in ran.stderr


def test_resume_never_refuses_to_overwrite(text: Path, finished: Path) -> None:
    ran = run(text, finished, "--resume", "never")
    assert ran.returncode == 2
    assert "would overwrite" in ran.stderr


def test_a_folder_in_use_is_refused(text: Path, finished: Path, tmp_path: Path) -> None:
    from gptoughts.run.tracking.run_dir import run_folder

    place = copy(finished, tmp_path)
    held = run_folder("x", str(place))
    held.lock()
    try:
        ran = run(text, place, "--train.steps", "50")
    finally:
        held.release()
    assert ran.returncode == 2
    assert f"run folder is in use. Found process {os.getpid()}" in ran.stderr


SIGNALS = [
    (signal.SIGINT, 130),
    (signal.SIGUSR1, 138),
    pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_ctrl_c_saves_and_says_how_to_go_on(text: Path, finished: Path, tmp_path: Path, number: int, code: int) -> None:
    place = tmp_path / "stopped"
    process = subprocess.Popen(
        command(text, place), env=environment(), cwd=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while step_reached(place) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    said, wrong = process.communicate(timeout=120)
    assert process.returncode == code, wrong
    assert "interrupted at step" in said
    assert f"--run-dir {shlex.quote(str(place))}" in said
    ran = run_cold(text, place)
    assert ran.returncode == 0, ran.stderr
    assert ", bit for bit" in ran.stdout and "not bit for bit" not in ran.stdout
    assert losses(place) == losses(finished)
    assert hashes(place) == hashes(finished)


def test_a_disk_that_is_full_loses_nothing(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write fails half-way: the error names the folder, the checkpoint before is whole, nothing half lies under a good name."""
    from gptoughts.engine.checkpoint import integrity
    from gptoughts.engine.checkpoint import store as checkpoint
    from gptoughts.engine.checkpoint.writer import Writer

    place = copy(finished, tmp_path) / "checkpoints"
    before = {path.name for path in place.glob("step-*")}

    def full(path: Path) -> None:
        if path.name == "state.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    writer = Writer(place, keep=3, keep_best=False)
    writer.save(checkpoint.Snapshot(41, {"model": {}}, {"state.json": "{}"}, {}))
    assert "No space left on device" in str(writer.failure()) and writer.kept() == "step-000040 stays"
    assert not list(place.glob(".writing-*")), "what was written is free again"
    assert {path.name for path in place.glob("step-*")} == before
    assert integrity.newest(place)[0] == place / "step-000040"

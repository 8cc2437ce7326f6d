"""Disks that are full, read-only or failing: training survives what it can, says so once, and loses nothing that was whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.faults.harness import STEPS, Runs, is_clean, same, steps_of


def test_failed_writes_of_every_kind_are_told_and_tried_again(runs: Runs, reference: Path, tmp_path: Path) -> None:
    faults = [
        "write:ENOSPC:.writing-step-000002:3:0", "sync:EIO:.writing-step-000004:0:0", "rename:EROFS:/step-000008:0:0",
        "write:EDQUOT:.writing-step-000010/.tmp:0:0", "write:SHORT:.writing-step-000012:0:0",
    ]  # fmt: skip
    ran = runs.run(tmp_path / "run", faults=faults)
    assert ran.returncode == 0 and is_clean(ran), ran.stderr
    reasons = {2: "No space left on device", 4: "Input/output error", 8: "Read-only file system", 10: "quota exceeded"}
    for step, reason in reasons.items():
        told = [line for line in ran.stdout.splitlines() if f"step {step}: writing the checkpoint failed" in line]
        assert len(told) == 1 and reason in told[0], ran.stdout
    assert "there is no earlier checkpoint" in ran.stdout and "step-000006 stays" in ran.stdout
    assert steps_of(tmp_path / "run") == [6, 12]
    assert same(tmp_path / "run", reference)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*-step-*"))


def test_after_too_many_failures_the_checkpoint_goes_elsewhere_and_the_run_goes_on_from_there(
    runs: Runs, reference: Path, tmp_path: Path
) -> None:
    place, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    variables = {"TMPDIR": str(temporary), "SCRATCH": ""}
    ran = runs.run(place, "--save.failures", "2", faults=["write:ENOSPC:run/checkpoints/.writing:0:0"], variables=variables)
    assert ran.returncode == 74 and is_clean(ran), ran.stderr
    assert ran.stderr.count("error: ") == 1 and "the checkpoint could not be written" in ran.stderr
    [rescued] = temporary.glob("gptoughts-*/step-*")
    assert rescued.name == "step-000006" and f"--resume {rescued}" in ran.stderr
    assert rescued.parent.stat().st_mode & 0o077 == 0
    ran = runs.run(place, "--resume", str(rescued), variables=variables)
    assert ran.returncode == 0, ran.stderr
    assert ", bit for bit" in ran.stdout and same(place, reference)


def test_a_last_checkpoint_that_nobody_takes_ends_with_one_message(runs: Runs, tmp_path: Path) -> None:
    ran = runs.run(tmp_path / "run", faults=["write:ENOSPC:step-000012/.tmp:0:0"], every=0)
    assert ran.returncode == 74 and is_clean(ran), ran.stderr
    assert "no other folder takes it; there is no earlier checkpoint" in ran.stderr and "Try: " in ran.stderr
    assert steps_of(tmp_path / "run") == []


def test_trackers_and_records_that_fail_do_not_stop_training(runs: Runs, reference: Path, tmp_path: Path) -> None:
    faults = ["write:EIO:metrics.jsonl:2:3", "write:ENOSPC:evidence:0:0", "write:ENOSPC:loss.tmp:0:0"]
    ran = runs.run(tmp_path / "run", faults=faults)
    assert ran.returncode == 0 and is_clean(ran), ran.stderr
    assert same(tmp_path / "run", reference), "rows that were not taken were written later"
    assert ran.stdout.count("a row could not be written") == 1
    assert ran.stdout.count("evidence.json: cannot be written: No space left") == 1
    assert ran.stdout.count("LossPlot failed") == 1


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
def test_output_that_cannot_be_written_does_not_stop_training(runs: Runs, reference: Path, tmp_path: Path, output: str) -> None:
    if output == "full disk":
        stream = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stream = os.pipe()
        os.close(reader)
    with os.fdopen(stream, "wb", buffering=0) as file:
        ran = runs.run(tmp_path / "run", stdout=file)
    assert ran.returncode == 0 and is_clean(ran), ran.stderr
    assert ran.stderr.count("output cannot be written") == 1
    assert same(tmp_path / "run", reference)


@pytest.mark.parametrize(
    ("faults", "variables", "named"),
    [
        (["mkdir:EROFS:new/run:0:0"], {}, "new/run: cannot be written (Read-only file system)"),
        (["write:ENOSPC:run/checkpoints/.probe:0:0"], {}, "new/run/checkpoints: cannot be written (No space left on device)"),
        ([], {"TMPDIR": "/no/such/folder"}, "TMPDIR: /no/such/folder cannot be written (No such file or directory)"),
        (["write:EDQUOT:cache/:0:0"], {}, "cannot be written (Disk quota exceeded)"),
    ],
)
def test_folders_are_tried_before_anything_long_starts(
    runs: Runs, tmp_path: Path, faults: list[str], variables: dict[str, str], named: str
) -> None:
    (tmp_path / "new").mkdir()
    cache = ["--data.cache", str(tmp_path / "cache")] if "cache" in str(faults) else []
    ran = runs.run(tmp_path / "new" / "run", *cache, faults=faults, variables=variables)
    assert ran.returncode == 2 and is_clean(ran)
    assert named in ran.stderr and "Try: " in ran.stderr and ran.stderr.count("error: ") == 1
    assert "step 1" not in ran.stdout


def test_a_checkpoint_that_cannot_be_read_is_named_and_kept(runs: Runs, reference: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(reference, tmp_path / "run"))
    ran = runs.run(place, faults=["read:EIO:checkpoints/step-000012/model:0:1"])
    assert ran.returncode == 0 and "is complete at step 12" in ran.stdout, "one failure is tried again"
    ran = runs.run(place, faults=["read:EIO:checkpoints/step-000012/model:0:3"])
    assert ran.returncode == 0 and is_clean(ran), ran.stderr
    assert "step-000012: unreadable, skipped: model.safetensors: Input/output error" in ran.stdout
    assert "resuming from" in ran.stdout and "step-000010" in ran.stdout
    assert same(place, reference)


def test_kills_at_every_point_of_a_write_change_no_bit(runs: Runs, reference: Path, tmp_path: Path) -> None:
    """One run, killed at the next point whenever it goes on."""
    place = tmp_path / "run"
    points = {
        "after the folder was made": "open:KILL:.writing-step-000002/:0:1",
        "in a file": "write:KILL:.writing-step-000004/.tmp:1:1",
        "before a sync": "sync:KILL:.writing-step-000006/state.safetensors:0:1",
        "before the rename": "rename:KILL:/step-000008:0:1",
        "before the pointer": "open:KILL:checkpoints/latest:4:1",
        "while an old one goes": "unlink:KILL:.dropped-:1:1",
        "in the log": f"write:KILL:metrics.jsonl:{STEPS - 2}:1",
    }
    died = []
    for name, fault in points.items():
        ran = runs.run(place, faults=[fault])
        died.append((name, ran.returncode))
        if ran.returncode == 0:
            break
    assert [code for _, code in died[:5]] == [-9] * 5, died
    ran = runs.run(place)
    assert ran.returncode == 0, ran.stderr
    assert same(place, reference)
    assert not list((place / "checkpoints").glob(".*-step-*"))


def test_weights_that_are_not_finite_are_never_saved(runs: Runs, tmp_path: Path) -> None:
    """The loss of the step is finite, its update is not."""
    far = [
        "--optim.learning-rate",
        "1e38",
        "--optim.warmup-steps",
        "0",
        "--optim.schedule",
        "constant",
        "--optim.clip-norm",
        "0",
    ]
    ran = runs.run(tmp_path / "run", *far, every=1)
    assert ran.returncode == 2 and is_clean(ran), ran.stderr
    assert "not finite; no checkpoint is written" in ran.stderr
    assert all(not (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").exists() for step in range(1, STEPS + 1))

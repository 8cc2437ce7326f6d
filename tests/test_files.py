"""Atomic writes: a reader sees the old file or the new one, and a failure leaves no temporary file."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from gptoughts import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_replaces_the_whole_file(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    for value in ({"a": 1}, {"b": "ä"}):
        files.write_json(path, value, durable)
        assert json.loads(path.read_text(encoding="utf-8")) == value and names(tmp_path) == ["a.json"]


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plot.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["plot.png"]
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "new.json", object())
    assert names(tmp_path) == ["plot.png"]


def test_a_write_into_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        files.write_text(tmp_path / "missing" / "a", "text")


def _hold(path: str, taken: object, release: object) -> None:
    files.wait_for_lock(os.open(path, os.O_RDONLY))
    taken.set()  # type: ignore[attr-defined]
    release.wait()  # type: ignore[attr-defined]


def test_a_lock_is_exclusive_until_its_process_ends(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    taken, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), taken, release))
    other.start()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert taken.wait(60)
        assert not files.try_lock(descriptor)
        release.set()
        files.wait_for_lock(descriptor)
        assert files.try_lock(descriptor)
    finally:
        release.set()
        other.join(60)
        os.close(descriptor)
    assert other.exitcode == 0


def test_the_cache_folder_follows_xdg(tmp_path: Path) -> None:
    assert files.cache_dir("data", environment={"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "gptoughts" / "data"
    assert files.cache_dir(environment={}) == Path.home() / ".cache" / "gptoughts"


def test_caches_go_to_scratch_and_never_to_a_disk_that_other_nodes_do_not_see(tmp_path: Path) -> None:
    scratch, local = tmp_path / "scratch", tmp_path / "local"
    scratch.mkdir(), local.mkdir()
    home = Path.home() / ".cache"
    both = {"SCRATCH": str(scratch), "SLURM_TMPDIR": str(local), "SLURM_JOB_NUM_NODES": "1"}
    cases: list[tuple[dict[str, str], Path]] = [
        ({}, home),
        (both, scratch),
        ({**both, "XDG_CACHE_HOME": "/x"}, Path("/x")),
        ({**both, "SCRATCH": str(tmp_path / "absent")}, local),
        ({**both, "SCRATCH": ""}, local),
        ({"SLURM_TMPDIR": str(local), "SLURM_JOB_NUM_NODES": "2"}, home),
        ({"SLURM_TMPDIR": str(local)}, home),
        ({"SCRATCH": "relative"}, home),
    ]
    for environment, root in cases:
        assert files.cache_dir("data", environment=environment) == root / "gptoughts" / "data"
        assert files.hub_home(environment) == root / "huggingface"
    assert files.hub_home({**both, "HF_HOME": "/hf"}) == Path("/hf")

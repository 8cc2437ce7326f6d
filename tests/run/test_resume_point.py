"""One rank reads and hashes the checkpoints; the others take what it found, or end without a word."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gptoughts.api import decide
from gptoughts.engine.checkpoint import integrity, store
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.errors import CheckpointError, RunError, ToldElsewhere
from gptoughts.run.resume import find_on_rank_0, fingerprint, read_point
from gptoughts.run.tracking.run_dir import RunFolder, run_id


def ranks(rank: int, failed: bool = False, name: str = "-") -> Ranks:
    """One of two ranks; `failed` and `name` are what rank 0 tells."""
    world = SimpleNamespace(rank=rank)
    return cast(Ranks, SimpleNamespace(first=rank == 0, world=world, any=lambda mine: mine or failed, texts=lambda mine: [mine if rank == 0 else name]))  # fmt: skip


def run_folder(place: Path) -> Any:
    return cast(RunFolder, SimpleNamespace(checkpoints=place))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    progress = {"step": 3, "tokens": 7, "seconds": 0.5, "cursor": {"samples": 1, "fingerprint": ""}}
    state = {
        "format": store.FORMAT,
        "run": {"progress": progress},
        "optimizer": {},
        "layers": {},
        "generators": {"numpy": [], "python": []},
    }
    snapshot = store.Snapshot(3, {"model": {}}, {"state.json": json.dumps(state)}, {})
    return store.write(snapshot, tmp_path)


def test_another_rank_reads_no_more_than_the_state(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, skipped = find_on_rank_0(run_folder(checkpoint.parent), "auto", ranks(0))
    assert first is not None and first.folder == checkpoint and skipped == []

    def hashes(folder: Path) -> tuple[str, str]:
        raise AssertionError("only rank 0 hashes the files")

    monkeypatch.setattr(integrity, "_check", hashes)
    with pytest.raises(AssertionError):
        find_on_rank_0(run_folder(checkpoint.parent), "auto", ranks(0))
    other, _ = find_on_rank_0(run_folder(checkpoint.parent), "auto", ranks(1, name=str(checkpoint)))
    assert other == first


@pytest.mark.parametrize("failures", [1, 2, integrity.ATTEMPTS])
def test_a_state_that_fails_between_check_and_use_is_tried_again_then_skipped(
    failures: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = checkpoint.parent / "step-000004"
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    snapshot = store.Snapshot(4, {"model": {}}, {"state.json": json.dumps(state)}, {})
    assert store.write(snapshot, checkpoint.parent) == newer
    monkeypatch.setattr(integrity, "PAUSE_SECONDS", 0.0)
    left, load = [failures], store.load_state

    def failing(folder: Path) -> dict[str, Any]:
        if folder == newer and left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error", str(folder / "state.json"))
        return load(folder)

    monkeypatch.setattr(store, "load_state", failing)
    point, skipped = find_on_rank_0(run_folder(checkpoint.parent), "auto", ranks(0))
    assert point is not None
    if failures < integrity.ATTEMPTS:
        assert point.folder == newer and skipped == []
        return
    assert point.folder == checkpoint and skipped == [f"{newer}: unreadable, skipped: state.json: Input/output error"]
    left[0] = failures
    with pytest.raises(CheckpointError, match=r"step-000004: cannot be resumed from: state.json: Input/output error"):
        find_on_rank_0(run_folder(checkpoint.parent), str(newer), ranks(0))
    left[0] = failures
    with pytest.raises(CheckpointError, match=r"rank 0 reads it, rank 1 does not. Found state.json: Input/output error"):
        find_on_rank_0(run_folder(checkpoint.parent), "auto", ranks(1, name=str(newer)))


def test_an_error_is_told_by_rank_0_alone(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="would overwrite checkpoints"):
        find_on_rank_0(run_folder(tmp_path), "never", ranks(0))
    with pytest.raises(ToldElsewhere):
        find_on_rank_0(run_folder(tmp_path), "never", ranks(1, failed=True))
    with pytest.raises(CheckpointError, match="rank 0 resumes from it, rank 1 does not see it"):
        find_on_rank_0(run_folder(tmp_path), "auto", ranks(1, name=str(tmp_path / "elsewhere")))


def test_nothing_to_resume_is_nothing_on_every_rank(tmp_path: Path) -> None:
    assert [find_on_rank_0(run_folder(tmp_path), "auto", ranks(rank)) for rank in (0, 1)] == [(None, []), (None, [])]


def test_trackers_are_no_part_of_what_a_resumed_run_must_have_in_common() -> None:
    one, other = (
        decide("quickstart", fields={"track.sinks": sinks, "track.project": sinks}) for sinks in ("plot", "tensorboard")
    )
    assert fingerprint(one.resolved, one.plan, 8) == fingerprint(other.resolved, other.plan, 8)


def test_a_run_keeps_its_name_at_trackers_and_a_branch_gets_its_own(tmp_path: Path) -> None:
    first, branch = (RunFolder(name, tmp_path / name, tmp_path / name / "checkpoints") for name in ("first", "branch"))
    for folder in (first, branch):
        folder.lock()
    saved = first.checkpoints / "step-000004"
    name = run_id(first, None, None)
    assert len(name) == 8 and run_id(first, None, None) == name, "killed before its first checkpoint"
    assert run_id(first, saved, name) == name and run_id(first, saved, None) == name, (
        "and with a checkpoint of an earlier version"
    )
    (first.out / "run_id").unlink()
    assert run_id(first, saved, name) == name, "the checkpoint knows it"
    other = run_id(branch, saved, name)
    assert other != name and run_id(branch, saved, name) == other
    for folder in (first, branch):
        folder.release()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"optimizer": {"values": 5, "groups": []}}, "optimizer.values or optimizer.made_by is not a mapping"),
        ({"optimizer": {"groups": []}}, "optimizer.values or"),
        ({"optimizer": {"values": {}, "made_by": 5}}, "optimizer.values or"),
        ({"optimizer": {"values": {}, "groups": 5}}, "optimizer.groups is not a list"),
        ({"optimizer": {"values": {}, "groups": [5]}}, "optimizer.groups is not a list"),
        ({"layers": {"probe": 5}}, "layers has an entry"),
    ],
)
def test_a_state_of_other_types_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], expected: str
) -> None:
    state = {"run": {}, "optimizer": {}, "layers": {}, "generators": {}, **changed}
    monkeypatch.setattr(store, "load_state", lambda folder: state)
    assert expected in str(read_point(tmp_path))

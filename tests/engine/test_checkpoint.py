"""No order of kills, damage and resuming leaves a run without its newest whole checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.checkpoint.integrity import damage, newest
from gptoughts.engine.checkpoint.store import Snapshot, all_steps, best, clean
from gptoughts.engine.checkpoint.writer import Writer


def snapshot(step: int, words: str = "") -> Snapshot:
    return Snapshot(step, {}, {"state.json": json.dumps({"format": 1, "step": step, "words": words})}, {})


def save(folder: Path, step: int, keep: int = 2, val_loss: float | None = None, keep_best: bool = True) -> None:
    writer = Writer(folder, keep, keep_best)
    writer.save(snapshot(step), val_loss)
    assert writer.failure() is None


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in all_steps(folder)]


def test_the_newest_are_kept_and_the_best(tmp_path: Path) -> None:
    for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, math.nan), (50, 2.1)):
        save(tmp_path, step, keep=2, val_loss=loss)
    assert steps(tmp_path) == [50, 40, 20]
    assert best(tmp_path) == ("step-000020", 2.0)
    assert (tmp_path / "latest").read_text().strip() == "step-000050"


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, val_loss=math.nan)
    assert best(tmp_path) is None
    save(tmp_path, 2, val_loss=3.0)
    assert best(tmp_path) == ("step-000002", 3.0)


def test_after_a_damaged_newest_what_is_written_next_stays(tmp_path: Path) -> None:
    for step in (150, 300):
        save(tmp_path, step)
    (tmp_path / "step-000300" / "state.json").write_text("{", encoding="utf-8")
    assert newest(tmp_path)[0] == tmp_path / "step-000150"
    save(tmp_path, 200, keep=1)
    assert newest(tmp_path) == (tmp_path / "step-000200", [])
    assert (tmp_path / "abandoned-step-000300").is_dir()


def test_after_going_back_in_a_run_its_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, keep=3)
    save(tmp_path, 150, keep=2)
    assert steps(tmp_path) == [150, 100]
    assert newest(tmp_path)[0] == tmp_path / "step-000150"
    assert {path.name for path in tmp_path.glob("abandoned-*")} == {"abandoned-step-000200", "abandoned-step-000300"}


def test_the_best_of_a_branch_that_was_left_does_not_bar_a_new_one(tmp_path: Path) -> None:
    save(tmp_path, 100, val_loss=3.0)
    save(tmp_path, 200, val_loss=1.0)
    save(tmp_path, 150, val_loss=2.0)
    assert best(tmp_path) == ("step-000150", 2.0)


@pytest.mark.parametrize("at", ["before", "between", "after"])
def test_a_kill_while_a_step_is_written_again_loses_neither(tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before, between and after the two renames that exchange the folders."""
    save(tmp_path, 7)
    rename, calls = Path.rename, []

    class Killed(BaseException):
        pass

    def dying(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if (at, len(calls)) in (("before", 1), ("between", 2)):
            raise Killed
        moved = rename(self, target)
        if at == "after" and len(calls) == 2:
            raise Killed
        return moved

    monkeypatch.setattr(Path, "rename", dying)
    with pytest.raises(Killed):
        checkpoint.write(snapshot(7, "again"), tmp_path)
    monkeypatch.setattr(Path, "rename", rename)
    clean(tmp_path)
    found = newest(tmp_path)[0]
    assert found == tmp_path / "step-000007"
    assert json.loads((found / "state.json").read_text())["words"] == ("again" if at == "after" else "")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    checkpoint.write(snapshot(7, "third"), tmp_path)
    assert json.loads((tmp_path / "step-000007" / "state.json").read_text())["words"] == "third"


def test_a_manifest_that_points_outside_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 3)
    manifest = tmp_path / "step-000003" / "manifest.json"
    held = json.loads(manifest.read_text())
    held["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    manifest.write_text(json.dumps(held))
    assert "outside the checkpoint" in damage(tmp_path / "step-000003")


def test_a_checkpoint_takes_known_files_of_a_tokenizers_folder_only(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    (source / "more").mkdir(parents=True)
    for name in ("tokenizer.json", "gptoughts_tokenizer.json", "id_rsa", "more/tokenizer.json"):
        (source / name).write_text(name)
    checkpoint._copy_folder(source, tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*")) == ["gptoughts_tokenizer.json", "tokenizer.json"]

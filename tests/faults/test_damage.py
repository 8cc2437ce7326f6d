"""Every file of a checkpoint, damaged in every way, is named and skipped for the checkpoint before; nothing is removed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.engine.checkpoint import integrity, store
from gptoughts.errors import CheckpointError
from gptoughts.run.resume import find
from gptoughts.run.tracking.run_dir import RunFolder

RUN = {"progress": {"step": 0, "tokens": 7, "seconds": 0.5, "cursor": {"samples": 1, "fingerprint": ""}}}


def write(
    folder: Path, step: int, weight: float = 1.0, infinite: bool = False, changed: Mapping[str, Any] | None = None
) -> Path:
    """Write a checkpoint as a run does, with a mask that is infinite where `infinite`."""
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
    tensors = {
        "model": {"w": torch.full((4, 4), weight), "mask": torch.full((3,), -math.inf if infinite else 0.0)},
        "optimizer": {"w/exp_avg": torch.full((4, 4), float(step))},
        "state": {"generator/torch": torch.arange(16, dtype=torch.uint8)},
    }
    run = {**RUN, "progress": {**RUN["progress"], "step": step}}
    content = {
        "format": store.FORMAT, "step": step, "buffers": ["mask"], "run": run, "optimizer": {}, "layers": {},
        "generators": {"numpy": [], "python": []}, **(changed or {}),
    }  # fmt: skip
    documents = {"state.json": json.dumps(content), "plan.json": "{}"}
    return store.write(store.Snapshot(step, tensors, documents, {"tokenizer": tokenizer}), folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "checkpoints"
    write(folder, 10)
    write(folder, 20)
    return folder


def found(folder: Path) -> tuple[Path, str]:
    """Return the checkpoint to resume from and the lines about others, as a run finds them."""
    point, skipped = find(RunFolder("run", folder.parent, folder), "auto")
    assert point is not None
    return point.folder, "\n".join(skipped)


def flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    path.write_bytes(bytes(data))


def swap(path: Path, older: Path) -> None:
    """Put the file of the checkpoint before in the place of this one, or another file where those two are equal."""
    checkpoint = older.with_name("step-000020")
    others = [older / path.relative_to(checkpoint), *(checkpoint / name for name in ("plan.json", "state.json"))]
    path.write_bytes(next(content for other in others if (content := other.read_bytes()) != path.read_bytes()))


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "first bit": lambda path, older: flip(path, 0.0),
    "middle bit": lambda path, older: flip(path, 0.5),
    "last bit": lambda path, older: flip(path, 1.0),
    "cut by a byte": lambda path, older: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path, older: path.write_bytes(b""),
    "zeros": lambda path, older: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path, older: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path, older: path.unlink(),
    "a folder": lambda path, older: replace_by_folder(path),
    "swapped": swap,
}
FILES = (
    "manifest.json", "model.safetensors", "optimizer.safetensors", "state.safetensors", "state.json", "plan.json",
    "tokenizer/tokenizer.json",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file(whole: Path, tmp_path: Path, name: str, damage: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    DAMAGES[damage](folder / "step-000020" / name, folder / "step-000010")
    path, lines = found(folder)
    assert path == folder / "step-000010"
    assert "step-000020: " in lines and "skipped" in lines
    assert {one.name for one in folder.glob("step-*")} == {"step-000010", "step-000020"}


@settings(max_examples=60)
@given(st.sampled_from(FILES), st.data())
def test_any_bytes_in_place_of_any_file(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path_factory.mktemp("any") / "checkpoints"))
    victim = folder / "step-000020" / name
    before = victim.read_bytes()
    start = data.draw(st.integers(0, len(before)))
    end = data.draw(st.integers(start, len(before)))
    after = before[:start] + data.draw(st.binary(max_size=40)) + before[end:]
    victim.write_bytes(after)
    path, lines = found(folder)
    if path.name == "step-000020":
        assert json.loads(after) == json.loads(before) if name == "manifest.json" else after == before
    else:
        assert "step-000020: " in lines
    shutil.rmtree(folder.parent)


NESTED = "[" * 100_000 + "]" * 100_000
FILE = '{"bytes": 1, "sha256": "00"}'
MANIFESTS = (
    "[]", "null", "{}", "5", '"files"', "", "\0", NESTED, '{"files": []}', '{"files": null}', '{"files": {}}', '{"files": {"x": null}}',
    '{"files": {"state.json": {}}}', '{"files": {"state.json": {"bytes": "9", "sha256": "00"}}}', '{"files": {"state.json": {"bytes": 1}}}',
    f'{{"files": {{"../x": {FILE}}}}}', f'{{"files": {{"/etc/passwd": {FILE}}}}}', f'{{"files": {{"a\\u0000b": {FILE}}}}}',
    f'{{"files": {NESTED}}}', f'{{"files": {{"model.safetensors": {FILE}}}}}', '{"files": {"state.json": {"bytes": true, "sha256": ""}}}',
)  # fmt: skip


@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_every_kind_of_manifest(whole: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    (folder / "step-000020" / "manifest.json").write_text(text, encoding="utf-8")
    path, lines = found(folder)
    assert path == folder / "step-000010" and "manifest.json" in lines


def test_a_tensor_file_that_the_manifest_does_not_list(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    manifest = folder / "step-000020" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["files"]["optimizer.safetensors"]
    manifest.write_text(json.dumps(content))
    path, lines = found(folder)
    assert path == folder / "step-000010" and "optimizer.safetensors is not in manifest.json" in lines


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "another step": ({"step": 30}, "of step 30"),
    "no run": ({"run": None}, "no mapping 'run'"),
    "a run of a list": ({"run": []}, "no mapping 'run'"),
    "no progress": ({"run": {}}, "field is missing"),
    "a cursor of a word": ({"run": {"progress": {**RUN["progress"], "cursor": "x"}}}, "field is missing"),
    "seconds of a word": ({"run": {"progress": {**RUN["progress"], "seconds": "x"}}}, "field is missing"),
    "no optimizer": ({"optimizer": None}, "no mapping 'optimizer'"),
    "no generators": ({"generators": {}}, "field is missing"),
    "circumstances of a list": ({"run": {**RUN, "circumstances": []}}, "circumstances"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_lacks_what_a_run_needs(tmp_path: Path, name: str) -> None:
    """The hashes are right: another program wrote it, or a defect."""
    changed, told = STATES[name]
    write(tmp_path / "checkpoints", 10)
    write(tmp_path / "checkpoints", 20, changed=changed)
    path, lines = found(tmp_path / "checkpoints")
    assert path.name == "step-000010" and told in lines


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither written nor read: a checkpoint of an earlier version, or of another program, may hold them."""
    write(tmp_path / "checkpoints", 10, infinite=True)  # a mask may be
    with pytest.raises(CheckpointError, match="model: w is not finite"):
        write(tmp_path / "checkpoints", 20, weight=value)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*step-*")] == ["step-000010"], "nothing of it is left"
    monkeypatch.setattr(store, "not_finite_of", lambda tensors, buffers: "")
    path = write(tmp_path / "checkpoints", 20, weight=value)
    assert integrity.damage(path) == "model: w is not finite"
    assert found(tmp_path / "checkpoints")[0].name == "step-000010"
    with pytest.raises(CheckpointError, match="step-000020: damaged: model: w is not finite"):
        find(RunFolder("run", tmp_path, tmp_path / "checkpoints"), str(path))


def test_without_any_whole_checkpoint_the_run_is_refused(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    for path in folder.glob("step-*"):
        (path / "manifest.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint to resume from\n  .*step-000020.*\n  .*step-000010"):
        find(RunFolder("run", tmp_path, folder), "auto")


@pytest.mark.parametrize(
    "text", ["5", "null", "[]", "{", "", '{"checkpoint": "../x", "val_loss": 1}', '{"checkpoint": "step-000010"}', NESTED]
)
def test_a_damaged_note_of_the_best_checkpoint_is_no_note(whole: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "checkpoints"))
    (folder / "best").write_text(text, encoding="utf-8")
    assert store.best(folder) is None


def test_a_link_in_a_folder_is_not_copied(tmp_path: Path) -> None:
    key = tmp_path / "id_rsa"
    key.write_text("secret", encoding="utf-8")
    tokenizer = tmp_path / "tokens"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").symlink_to(key)
    snapshot = store.Snapshot(1, {}, {"state.json": "{}"}, {"tokenizer": tokenizer})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link"):
        store.write(snapshot, tmp_path / "checkpoints")
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())


def test_only_the_files_of_a_tokenizer_are_copied(tmp_path: Path) -> None:
    names = ("tokenizer.json", "gptoughts_tokenizer.json", "id_rsa", "sub/more.json")
    (tmp_path / "tokens" / "sub").mkdir(parents=True)
    for name in names:
        (tmp_path / "tokens" / name).write_text("{}", encoding="utf-8")
    store._copy_folder(tmp_path / "tokens", tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*")) == sorted(names[:2])

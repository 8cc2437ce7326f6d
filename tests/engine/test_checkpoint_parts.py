"""Tensors split over the files of several ranks are read whole, or refused."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gptoughts.engine.checkpoint import integrity, store
from gptoughts.engine.checkpoint.parts import TensorFiles, file_name, metadata
from gptoughts.errors import CheckpointError


def write_parts(folder: Path, tensors: dict[str, torch.Tensor], cuts: dict[str, list[int]], ranks: int) -> None:
    """Write `tensors`, each cut at flat positions into consecutive parts for the ranks; empty parts are left out."""
    for rank in range(ranks):
        held, ranges = {}, {}
        for name, tensor in tensors.items():
            edges = [0, *sorted(cuts[name]), tensor.numel()]
            start, end = edges[rank], edges[rank + 1]
            if end > start:
                held[name], ranges[name] = tensor.reshape(-1)[start:end].clone(), (start, tuple(tensor.shape))
        save_file(held, folder / file_name("model", rank, ranks), metadata=metadata(ranges))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_parts_of_any_cut_are_read_as_the_whole(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(2, 5))
    shapes = data.draw(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=1, max_size=3))
    tensors = {f"t{number}": torch.randn(shape) for number, shape in enumerate(shapes)}
    cuts = {
        name: data.draw(st.lists(st.integers(0, tensor.numel()), min_size=ranks - 1, max_size=ranks - 1))
        for name, tensor in tensors.items()
    }
    folder = tmp_path_factory.mktemp("parts")
    write_parts(folder, tensors, cuts, ranks)
    files = TensorFiles(folder, "model")
    assert set(files.names()) == set(tensors)
    for name, tensor in tensors.items():
        assert files.shape(name) == tuple(tensor.shape)
        assert torch.equal(files.tensor(name), tensor)


def test_a_whole_tensor_in_one_file_needs_no_ranges(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path, "model")
    assert files.tensor("scalar").item() == 3.0
    assert files.tensor("empty").shape == (0, 4)


def two_parts(folder: Path, first: int, second: int, shape: tuple[int, ...] = (10,)) -> None:
    """Write two parts of "w", of five elements each, that claim to start at `first` and `second`."""
    for rank, start in enumerate((first, second)):
        save_file({"w": torch.ones(5)}, folder / file_name("model", rank, 2), metadata=metadata({"w": (start, shape)}))


@pytest.mark.parametrize(
    ("first", "second", "shape", "message"),
    [(0, 6, (11,), "a gap"), (0, 4, (10,), "overlapping"), (0, 5, (12,), "incomplete"), (1, 6, (11,), "a gap")],
)
def test_gaps_and_overlaps_are_errors(tmp_path: Path, first: int, second: int, shape: tuple[int, ...], message: str) -> None:
    two_parts(tmp_path, first, second, shape)
    with pytest.raises(CheckpointError, match=message):
        TensorFiles(tmp_path, "model").tensor("w")


def test_files_that_disagree_or_are_missing_are_errors(tmp_path: Path) -> None:
    two_parts(tmp_path, 0, 5)
    save_file({"w": torch.ones(5)}, tmp_path / file_name("model", 1, 2), metadata=metadata({"w": (5, (2, 5))}))
    with pytest.raises(CheckpointError, match="has shape"):
        TensorFiles(tmp_path, "model")
    (tmp_path / file_name("model", 1, 2)).unlink()
    with pytest.raises(CheckpointError, match="model is incomplete"):
        TensorFiles(tmp_path, "model")
    with pytest.raises(CheckpointError, match=r"no optimizer\.safetensors"):
        TensorFiles(tmp_path, "optimizer")
    save_file({"w": torch.ones(5)}, tmp_path / "model-00001-of-00001.safetensors", metadata={"parts": "[1"})
    (tmp_path / file_name("model", 0, 2)).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        TensorFiles(tmp_path, "model")


def snapshot(rank: int, step: int = 3) -> store.Snapshot:
    """What one of two ranks writes."""
    ranges = {"model": {"w": (5 * rank, (10,))}}
    documents = {} if rank else {"state.json": json.dumps({"format": store.FORMAT_PARTS})}
    return store.Snapshot(step, {"model": {"w": torch.full((5,), float(rank))}}, documents, {}, rank, 2, ranges)


def test_two_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    """The manifest covers the files of both; nothing of the protocol stays."""
    store.begin(tmp_path, 3, 2)
    other = threading.Thread(target=store.write_part, args=(snapshot(1), tmp_path))
    other.start()
    path = store.write(snapshot(0), tmp_path)
    other.join()
    assert integrity.damage(path) == ""
    assert sorted(file.name for file in path.iterdir()) == [
        "manifest.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "state.json",
    ]  # fmt: skip
    assert TensorFiles(path, "model").tensor("w").tolist() == [0.0] * 5 + [1.0] * 5
    (path / "model-00002-of-00002.safetensors").write_bytes(b"short")
    assert "model-00002-of-00002.safetensors" in integrity.damage(path)


def test_a_rank_that_cannot_write_its_part_is_named(tmp_path: Path) -> None:
    store.begin(tmp_path, 3, 2)
    broken = store.Snapshot(3, {"missing/folder": {"w": torch.ones(5)}}, {}, {}, 1, 2, {"missing/folder": {}})
    with pytest.raises(Exception, match="No such file"):
        store.write_part(broken, tmp_path)
    with pytest.raises(CheckpointError, match="rank 1 could not write its part"):
        store.write(snapshot(0), tmp_path)
    assert integrity.newest(tmp_path) == (None, [])


def test_a_checkpoint_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "touch", fail)
    with pytest.raises(OSError, match="Input/output error"):
        store.begin(tmp_path, 3, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_checkpoint_is_removed_while_another_rank_writes_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = store.begin(tmp_path, 3, 2)
    remove = os.rmdir

    def remove_late(*arguments: Any, **named: Any) -> None:
        with suppress(OSError):
            (temporary / "model-00002-of-00002.safetensors").touch()
        remove(*arguments, **named)

    def fail(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(store, "_fill", fail)
    monkeypatch.setattr(os, "rmdir", remove_late)
    with pytest.raises(OSError, match="Read-only"):
        store.write(snapshot(0), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_does_not_come_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PART_SECONDS", 0)
    store.begin(tmp_path, 3, 2)
    with pytest.raises(
        CheckpointError, match="rank 1 wrote no part in 0 s; is the folder on a file system that all nodes share"
    ):
        store.write(snapshot(0), tmp_path)

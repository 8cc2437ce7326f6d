"""Rows hold whole documents, each once; a model's loss on packed rows is the sum of its losses on the documents alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptoughts.config.loader import ModelConfig
from gptoughts.data.batches import IGNORED
from gptoughts.data.chat.packing import Document, build_arrays, fill_ratio, one_per_row, pack
from gptoughts.data.device import to_device
from gptoughts.data.table import Table
from gptoughts.engine.objectives.base import NextToken
from gptoughts.errors import DataError
from gptoughts.models.gpt.gpt import GPT

PAD = 1


def documents_of(lengths: list[int], seed: int = 0) -> list[Document]:
    """Random documents whose ids are never the padding's, about half of them learned."""
    draw = np.random.default_rng(seed)
    return [Document(draw.integers(2, 40, length).astype(np.uint16), draw.random(length) < 0.5) for length in lengths]


@settings(max_examples=150, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=80), width=st.integers(30, 50))
def test_each_document_lies_whole_in_one_row(lengths: list[int], width: int) -> None:
    for rows in (pack(lengths, width), one_per_row(lengths, width)):
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(row and sum(lengths[index] for index in row) <= width for row in rows)
    rows = pack(lengths, width)
    assert rows == pack(list(lengths), width)
    assert len(rows) >= -(-sum(lengths) // width)
    # Best fit: no two rows could be one.
    loads = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(loads) < 2 or loads[0] + loads[1] > width


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), width=st.integers(20, 40), seed=st.integers(0, 9))
def test_rows_say_what_is_learned_and_where_documents_begin(lengths: list[int], width: int, seed: int) -> None:
    documents = documents_of(lengths, seed)
    rows = pack(lengths, width)
    arrays = build_arrays(documents, rows, width, PAD, np.dtype(np.uint16))
    assert {array.shape for array in arrays.values()} == {(len(rows), width)}
    for row, members in enumerate(rows):
        ids, labels, positions = (arrays[name][row] for name in ("input_ids", "labels", "positions"))
        starts = np.flatnonzero(positions == 0).tolist()
        used = sum(lengths[index] for index in members)
        assert starts == np.cumsum([0, *(lengths[index] for index in members)]).tolist()[: len(starts)]
        assert len(starts) == len(members) + (used < width)
        for index, start in zip(members, starts, strict=False):
            document, end = documents[index], start + lengths[index]
            assert (ids[start:end] == document.ids).all() and positions[start:end].tolist() == list(range(end - start))
            learned = document.learned & (np.arange(end - start) > 0)
            assert (labels[start:end] == np.where(learned, document.ids.astype(np.int64), IGNORED)).all()
        assert (ids[used:] == PAD).all() and (labels[used:] == IGNORED).all()
        assert positions[used:].tolist() == list(range(width - used))
    assert fill_ratio(lengths, len(rows), width) == pytest.approx((arrays["input_ids"] != PAD).mean())


def test_a_document_that_fits_nowhere_is_an_error() -> None:
    for function in (pack, one_per_row):
        with pytest.raises(DataError, match=r"document: must have 1 to 8 tokens to fit a row\. Found 9"):
            function([3, 9], 8)


def test_packing_fills_rows() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 0.8, 2000).astype(int), 1, 1025).tolist()
    assert (
        fill_ratio(lengths, len(pack(lengths, 1025)), 1025) > 0.99 > fill_ratio(lengths, len(one_per_row(lengths, 1025)), 1025)
    )


# --- with a model


def model_of(dtype: torch.dtype, **values: object) -> GPT:
    """A small GPT."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"depth": 2, "width": 32, "heads": 4, "kv_heads": 2, **values})
    return GPT(config, 64, 64).to(dtype)


def loss_of(model: nn.Module, arrays: dict[str, np.ndarray], rows: slice = slice(None)) -> Tensor:
    """The objective's sum over some rows of a table's arrays, as a run computes it."""
    table = Table(arrays, "f")
    batch = table.rows(np.arange(len(table))[rows])
    return NextToken()(model, to_device(batch, torch.device("cpu")))


def gradients(model: nn.Module) -> Tensor:
    """All gradients in one row."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("values", [{}, {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False}])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6)])
def test_packed_is_the_sum_of_singles(values: dict[str, object], dtype: torch.dtype, tolerance: float) -> None:
    width = 33
    lengths = [5, 9, 14, 3, 21, 33, 2, 8, 17, 11]
    documents, model = documents_of(lengths), model_of(dtype, **values)
    several, one = pack(lengths, width), one_per_row(lengths, width)
    assert len(several) < len(one) and any(len(row) > 2 for row in several)
    alone = [build_arrays([document], [[0]], len(document.ids), PAD, np.dtype(np.uint16)) for document in documents]
    sums = sum(loss_of(model, {name: arrays[name] for name in ("input_ids", "labels")}) for arrays in alone)
    assert isinstance(sums, Tensor)
    sums.backward()
    expected = gradients(model)
    for rows in (several, one):  # Packed, then padded.
        arrays = build_arrays(documents, rows, width, PAD, np.dtype(np.uint16))
        model.zero_grad()
        loss = loss_of(model, arrays)
        loss.backward()
        assert abs(float((loss - sums).detach())) <= tolerance * float(sums.detach())
        assert float((gradients(model) - expected).norm()) <= tolerance * float(expected.norm()) * (
            1 if dtype == torch.float64 else 10
        )
        # Accumulated over micro-batches of one row, in any order.
        model.zero_grad()
        total = torch.zeros((), dtype=loss.dtype)
        for row in reversed(range(len(rows))):
            part = loss_of(model, arrays, slice(row, row + 1))
            part.backward()
            total += part.detach()
        assert abs(float((total - sums).detach())) <= tolerance * float(sums.detach())
        assert float((gradients(model) - expected).norm()) <= tolerance * float(expected.norm()) * (
            1 if dtype == torch.float64 else 10
        )


def test_the_sum_needs_the_positions() -> None:
    """The test above can fail: without positions the documents of a row see each other."""
    lengths = [5, 9, 14, 3]
    documents, model = documents_of(lengths), model_of(torch.float64)
    arrays = build_arrays(documents, pack(lengths, 33), 33, PAD, np.dtype(np.uint16))
    with_positions = float(loss_of(model, arrays).detach())
    without = float(loss_of(model, {name: arrays[name] for name in ("input_ids", "labels")}).detach())
    assert abs(with_positions - without) > 1e-3


def test_a_table_gives_what_models_take(tmp_path: Path) -> None:
    lengths = [5, 9, 14, 3]
    arrays = build_arrays(documents_of(lengths), pack(lengths, 20), 20, PAD, np.dtype(np.uint16))
    Table(arrays, "f").save(tmp_path / "t")
    table = Table.load(tmp_path / "t")
    batch = to_device(next(table.batches(2, 0))[0], torch.device("cpu"))
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    last = list(table.eval_batches(3))[-1]
    assert last["labels"].dtype == np.int64 and (last["labels"][-1] == IGNORED).all() and last["positions"][-1, 0] == 0
    assert torch.isfinite(NextToken()(model_of(torch.float32), to_device(last, torch.device("cpu"))))

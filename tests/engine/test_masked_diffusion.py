"""The masks follow the law, depend on seed and sample alone, and the loss has the expectation that an enumeration gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptoughts.config.recipe import DataConfig, DiffusionConfig, ModelConfig
from gptoughts.data.batches import Batches, eval_batches
from gptoughts.data.device import to_device
from gptoughts.data.text.shards import Index, Shard, Split, Stream
from gptoughts.data.tokenizers.tokenizer import ByteTokenizer, CharacterTokenizer, JsonTokenizer
from gptoughts.engine.objectives.masked_diffusion import (
    MaskedDiffusion,
    answer_padding,
    even_times,
    mask_token,
    require_unpacked,
    uniform,
)
from gptoughts.errors import ConfigError, DataError, RunError
from gptoughts.models.family import FAMILIES, initialize

MASK, EOT, IGNORED = 99, 98, -100
Batch = dict[str, np.ndarray]


def objective(seed: int = 1, learns: Any = "text", mask: int = MASK, **words: Any) -> MaskedDiffusion:
    return MaskedDiffusion(DiffusionConfig(**{"crop": 0.0, **words}), seed, mask, EOT, learns)


def text(rows: int, length: int, seed: int = 0) -> Batch:
    return {"input_ids": np.random.default_rng(seed).integers(0, 90, (rows, length + 1)).astype(np.uint16)}


def tensors(batch: Batch) -> dict[str, Tensor]:
    return to_device(batch, torch.device("cpu"))


class ByPattern(nn.Module):
    """A model whose cross-entropy at each place is any function of what is masked; one row of T masked places is one pattern."""

    def __init__(self, length: int, seed: int = 0) -> None:
        super().__init__()
        self.table = torch.rand(2**length, length, generator=torch.Generator().manual_seed(seed)) * 5

    def forward(self, input_ids: Tensor, labels: Tensor, reduction: str, positions: Tensor | None = None) -> Tensor:
        masked = input_ids == MASK
        pattern = (masked.long() * 2 ** torch.arange(masked.shape[1])).sum(dim=1)
        return (self.table[pattern] * (labels != IGNORED)).sum(dim=1)

    def over_all_orders(self) -> float:
        """Sum over places of the mean cross-entropy, each set size equally likely and each set of a size."""
        length, total = self.table.shape[1], 0.0
        for pattern in range(1, 2**length):
            members = [place for place in range(length) if pattern >> place & 1]
            total += self.table[pattern, members].sum().item() / (len(members) * comb(length, len(members)))
        return total


class Constant(nn.Module):
    """Two nats at every masked place, whatever is masked."""

    def forward(self, input_ids: Tensor, labels: Tensor, reduction: str, positions: Tensor | None = None) -> Tensor:
        return 2.0 * (labels != IGNORED).sum(dim=1)


# --- draws


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=8), st.integers(0, 2**70), st.integers(1, 20), st.integers(0, 20))
def test_a_draw_depends_on_seed_sample_and_place_alone(samples: list[int], seed: int, count: int, first: int) -> None:
    whole = uniform(seed, 1, np.array(samples), 0, first + count)
    assert ((whole >= 0) & (whole < 1)).all()
    for row, sample in enumerate(samples):
        assert np.array_equal(uniform(seed, 1, np.array([sample]), first, count)[0], whole[row, first:])
    assert not np.array_equal(uniform(seed + 1, 1, np.array(samples), 0, first + count), whole)
    assert not np.array_equal(uniform(seed, 2, np.array(samples), 0, first + count), whole)


def test_draws_are_uniform_and_do_not_go_together() -> None:
    values = uniform(3, 1, np.arange(20_000), 0, 8)
    for column in values.T:
        share, _ = np.histogram(column, bins=10, range=(0, 1))
        assert abs(share / 2000 - 1).max() < 0.12
    between = np.corrcoef(values.T) - np.eye(8)
    assert abs(between).max() < 0.04
    assert abs(np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]) < 0.04


def test_validation_times_are_even_whichever_samples_are_taken() -> None:
    for start in (0, 12_345):
        times = np.sort(even_times(1, start + np.arange(100)))
        assert abs(times - (np.arange(100) + 0.5) / 100).max() < 0.03


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 9), cut=st.integers(1, 8), length=st.integers(1, 30), seed=st.integers(0, 2**40), crop=st.booleans())
def test_masks_are_the_same_whatever_micro_batch_or_rank(rows: int, cut: int, length: int, seed: int, crop: bool) -> None:
    batch, samples = text(rows, length), np.arange(rows) + 1000
    mine = objective(seed, crop=float(crop))
    whole, cut = mine.prepare(batch, samples), min(cut, rows - 1)
    for part in (slice(0, cut), slice(cut, rows)):
        alone = mine.prepare({key: value[part] for key, value in batch.items()}, samples[part])
        for key in alone:
            assert np.array_equal(alone[key], whole[key][part]), key


# --- text


def test_p_follows_the_time_and_masks_follow_p() -> None:
    batch = objective(epsilon=0.25).prepare(text(4000, 50), np.arange(4000))
    level = batch["noise_level"].astype(float)
    assert level.min() >= 0.25 and level.max() < 1
    share, _ = np.histogram(level, bins=10, range=(0.25, 1))
    assert abs(share / 400 - 1).max() < 0.25
    masked = batch["input_ids"] == MASK
    z = (masked.sum(axis=1) - 50 * level) / np.sqrt(50 * level * (1 - level) + 1e-9)
    assert abs(z.mean()) < 0.06 and abs(z.std() - 1) < 0.06
    assert np.allclose(batch["row_scale"] * level, 1, atol=1e-6)


def test_labels_are_what_was_masked_unshifted() -> None:
    given_batch = text(50, 20)
    batch = objective().prepare(given_batch, np.arange(50))
    shown = given_batch["input_ids"][:, :20].astype(np.int64)
    masked = batch["input_ids"] == MASK
    assert batch["input_ids"].shape == batch["labels"].shape == (50, 20)
    assert np.array_equal(batch["labels"], np.where(masked, shown, IGNORED))
    assert np.array_equal(batch["input_ids"][~masked], shown[~masked])
    assert "positions" not in batch and (batch["row_weight"] == 20).all()
    assert given_batch["input_ids"].max() < MASK  # the stream's own memory was not written to


def test_a_mask_above_the_stored_dtype_is_held() -> None:
    batch = objective(mask=65_536).prepare(text(30, 20), np.arange(30))
    assert batch["input_ids"].max() == 65_536 and batch["input_ids"].dtype == np.int64


@pytest.mark.parametrize("epsilon", [1e-3, 0.5])
def test_the_loss_of_a_model_that_sees_nothing_does_not_depend_on_the_noise(epsilon: float) -> None:
    mine, rows, length = objective(epsilon=epsilon), 20_000, 8
    batch = mine.prepare(text(rows, length), np.arange(rows))
    losses = 2.0 * (batch["labels"] != IGNORED).sum(axis=1) * batch["row_scale"]
    for low in (epsilon, 0.5):
        chosen = losses[(batch["noise_level"] >= low) & (batch["noise_level"] < low + (1 - low) / 2)]
        assert abs(chosen.mean() - 2 * length) < 4 * chosen.std() / len(chosen) ** 0.5
    assert float(mine(Constant(), tensors(batch))) == pytest.approx(losses.sum(), rel=1e-4)


def test_the_expected_loss_is_that_over_all_orders() -> None:
    model, rows, length = ByPattern(4), 60_000, 4
    mine = objective(epsilon=1e-3)
    batch = tensors(mine.prepare(text(rows, length), np.arange(rows)))
    losses = model(batch["input_ids"], batch["labels"], "rows") * batch["row_scale"]
    error = losses.std().item() / rows**0.5
    assert error < 0.1
    assert abs(losses.mean().item() - model.over_all_orders()) < 4 * error
    assert float(mine(model, batch) / mine.weight(batch)) == pytest.approx(losses.mean().item() / length, rel=1e-4)


def test_a_row_without_a_mask_counts_and_adds_nothing() -> None:
    mine = objective()
    batch = mine.prepare(text(400, 3), np.arange(400))
    bare = (batch["labels"] == IGNORED).all(axis=1)
    assert 50 < bare.sum() < 200  # one in four: the integral of (1 - t)^3
    alone = tensors({key: value[bare] for key, value in batch.items()})
    assert float(mine(Constant(), alone)) == 0
    assert float(mine.weight(alone)) == 3 * bare.sum()
    assert mine.tokens(alone) == 3 * bare.sum()


def test_cropped_rows_have_any_length_and_a_tail_of_their_own() -> None:
    rows, length = 5000, 10
    mine = objective(crop=1.0)
    batch = mine.prepare(text(rows, length), np.arange(rows))
    kept = batch["row_weight"].astype(int)
    assert abs(np.bincount(kept, minlength=11)[1:] / 500 - 1).max() < 0.2 and kept.min() == 1
    place = np.arange(length)
    tail = place >= kept[:, None]
    assert (batch["labels"][tail] == IGNORED).all() and (batch["input_ids"][tail] != MASK).all()
    assert np.array_equal(batch["positions"], np.where(tail, place - kept[:, None], place))
    share = (objective(crop=0.01).prepare(text(rows, length), np.arange(rows))["row_weight"] < length).mean()
    assert 0.004 < share < 0.016  # one in a hundred, less those cropped to all of it


def test_a_crop_changes_neither_time_nor_masks_of_what_is_left() -> None:
    plain, cropped = (objective(crop=share).prepare(text(200, 10), np.arange(200)) for share in (0.0, 1.0))
    assert np.array_equal(plain["noise_level"], cropped["noise_level"])
    kept = np.arange(10) < cropped["row_weight"][:, None]
    assert np.array_equal(plain["labels"][kept], cropped["labels"][kept])


def test_validation_masks_stay_and_nothing_is_cropped() -> None:
    mine, batch = objective(crop=1.0), text(100, 10)
    first, second = (mine.prepare_validation(batch, np.arange(100)) for _ in range(2))
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert (first["row_weight"] == 10).all() and "positions" not in first
    assert not np.array_equal(first["labels"], mine.prepare(batch, np.arange(100))["labels"])


def stream_of(folder: Path, tokens: int) -> Stream:
    """A stream in which token i has the id i."""
    np.save(folder / "train_000000.npy", np.arange(tokens, dtype=np.uint16))
    shard = Shard("train_000000.npy", tokens, 0, tokens - 1, "", "", "")
    split = Split(tokens, 0, 0.0, (shard,))
    return Stream(folder, "train", Index("uint16", EOT + 1, EOT, {"hash": "x"}, {}, {}, {"train": split}))


@pytest.mark.parametrize("tokens", [95, 96, 97, 98])
def test_every_token_is_learned_once_an_epoch(tmp_path: Path, tokens: int) -> None:
    """But for the very last one, where it would begin a window of its own."""
    stream, length = stream_of(tmp_path, tokens), 8
    mine = objective(epsilon=1 - 1e-12, mask=60_000)  # everything is masked
    seen: list[int] = []
    for number, batch in enumerate(eval_batches(stream, length, 3)):
        masked = mine.prepare(batch, number * 3 + np.arange(3))
        seen += masked["labels"][masked["labels"] != IGNORED].tolist()
        assert masked["row_weight"].sum() == (masked["labels"] != IGNORED).sum()
    assert sorted(seen) == list(range(tokens - (tokens % length == 1)))


def test_an_epochs_end_is_padded_by_a_document_that_does_not_count(tmp_path: Path) -> None:
    batches = Batches(stream_of(tmp_path, 21), 8, 2, seed=0)
    mine = objective(mask=60_000, epsilon=1 - 1e-12)
    weights = []
    for batch, cursor in islice(iter(batches), 3):
        prepared = mine.prepare(batch, cursor.samples - 2 + np.arange(2))
        weights += prepared["row_weight"].tolist()
        assert (prepared["row_weight"] == (prepared["labels"] != IGNORED).sum(axis=1)).all()
        for row, weight in zip(prepared.get("positions", []), prepared["row_weight"], strict=False):
            assert row.tolist() == [*range(int(weight)), *range(8 - int(weight))]
    assert sorted(weights) == [5, 5, 8, 8, 8, 8]


def test_data_that_holds_the_mask_is_refused() -> None:
    batch = text(4, 8)
    batch["input_ids"][2, 3] = MASK
    with pytest.raises(DataError, match=r"sample 12: contains the mask token, 99\.\n  Try: another diffusion\.mask_token"):
        objective().prepare(batch, np.arange(10, 14))


def test_prompts_in_text_are_refused() -> None:
    batch = text(2, 8)
    batch["labels"] = batch["input_ids"].astype(np.int64)
    batch["labels"][0, 2] = IGNORED
    with pytest.raises(DataError, match=r"for conversations use data\.format chat, where the objective learns answers"):
        objective().prepare(batch, np.arange(2))


# --- answers


def chat(padded: bool = True) -> Batch:
    """Four rows of ten: a question of three, an answer of three, four of padding; two turns; no answer; an answer to the end."""
    ids = np.random.default_rng(0).integers(0, 90, (4, 10))
    labels, positions = np.full((4, 10), IGNORED), np.tile(np.arange(10), (4, 1))
    labels[0, 3:6] = ids[0, 3:6]
    positions[0] = [*range(6), *range(4)]
    labels[1, [2, 3, 7, 8]] = ids[1, [2, 3, 7, 8]]
    positions[1] = [*range(9), 0]
    positions[2] = [*range(4), *range(6)]
    labels[3, 5:] = ids[3, 5:]
    return {"input_ids": ids, "labels": labels, **({"positions": positions} if padded else {})}


def test_padding_becomes_ends_that_count() -> None:
    batch = chat()
    ids, labels, positions = answer_padding(batch["input_ids"], batch["labels"], batch["positions"], EOT)
    assert ids[0, 6:].tolist() == labels[0, 6:].tolist() == [EOT] * 4
    assert labels[0, :6].tolist() == batch["labels"][0, :6].tolist()
    assert (ids[1, 9], labels[1, 9]) == (EOT, EOT)
    assert np.array_equal(ids[2:], batch["input_ids"][2:]) and np.array_equal(labels[2:], batch["labels"][2:])
    assert np.array_equal(positions[[0, 1, 3]], np.tile(np.arange(10), (3, 1)))  # one document: the ends belong to the answer
    assert np.array_equal(positions[2], batch["positions"][2])


@given(st.integers(1, 250), st.integers(250, 400))
@settings(max_examples=40, deadline=None)
def test_ends_are_learned_up_to_a_multiple_and_the_rest_is_padding(length: int, width: int) -> None:
    """However long the rows are: else nearly all that is learned would be ends."""
    place = np.arange(width)[None]
    ids = np.where(place < length, 7, EOT)
    labels = np.where((place < length) & (place >= length // 2), 7, IGNORED)
    given_batch = {"input_ids": ids, "labels": labels, "positions": np.where(place < length, place, place - length)}
    batch = objective(epsilon=1 - 1e-12, learns="answers").prepare(given_batch, np.arange(1))  # everything is masked
    learned = batch["labels"][0] != IGNORED
    ends = int((batch["labels"][0] == EOT).sum())
    assert 1 <= ends <= 64 or length == width
    assert learned.sum() == length - length // 2 + ends and learned[: length + ends][length // 2 :].all()
    assert (length + ends) % 64 == 0 or length + ends == width
    if length + ends < width:
        assert np.flatnonzero(batch["positions"][0] == 0).tolist() == [0, length + ends]
        assert (batch["input_ids"][0, length + ends :] == EOT).all()
    else:
        assert "positions" not in batch


def test_prompts_are_never_masked_and_answers_are() -> None:
    mine, batch = objective(learns="answers"), chat()
    ids, labels, _ = answer_padding(batch["input_ids"], batch["labels"], batch["positions"], EOT)
    ever = np.zeros((4, 10), dtype=bool)
    unanswered = np.array([[False], [False], [True], [False]])
    for number in range(200):
        prepared = mine.prepare(batch, number * 4 + np.arange(4))
        masked = prepared["input_ids"] == MASK
        assert np.array_equal(prepared["labels"], np.where(masked, ids, IGNORED))
        assert np.array_equal(prepared["positions"], batch["positions"] * unanswered + np.arange(10) * ~unanswered)
        ever |= masked
    assert np.array_equal(ever, labels != IGNORED)


def test_an_answer_weighs_as_much_as_any_other() -> None:
    mine, batch = objective(learns="answers"), chat()
    many = {key: np.tile(value, (5000, 1)) for key, value in batch.items()}
    prepared = mine.prepare(many, np.arange(20_000))
    assert prepared["row_weight"].tolist() == [1, 1, 0, 1] * 5000  # a row without an answer counts for nothing
    losses = (2.0 * (prepared["labels"] != IGNORED).sum(axis=1) * prepared["row_scale"]).reshape(-1, 4)
    assert np.allclose(losses.mean(axis=0), [2, 2, 0, 2], atol=0.1)
    assert float(mine.weight(tensors(prepared))) == 15_000
    assert float(mine(Constant(), tensors(prepared))) == pytest.approx(losses.sum(), rel=1e-4)


def test_packed_conversations_are_refused() -> None:
    batch = chat()
    batch["labels"][0, 8] = 5
    with pytest.raises(DataError, match=r"one conversation per row. Found a row with several\.\n  Try: --data\.packing false"):
        objective(learns="answers").prepare(batch, np.arange(4))
    with pytest.raises(ConfigError, match=r"one conversation per row\.\n  Try: --data\.packing false"):
        require_unpacked(DataConfig(format="chat"))
    require_unpacked(DataConfig(format="chat", packing=False))
    require_unpacked(DataConfig())


# --- the mask


def bpe(*added: str) -> JsonTokenizer:
    vocab = {"a": 0, "b": 1, "[MASK]": 2, "<|endoftext|>": 3}
    tokens = [{"id": 4 + index, "content": name, "special": True} for index, name in enumerate(added)]
    spec = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": tokens}
    return JsonTokenizer(json.dumps(spec).encode(), "file", "the test")


def test_the_mask_is_the_tokenizers_or_a_row_more() -> None:
    assert mask_token(ByteTokenizer()) == (257, True)
    assert mask_token(CharacterTokenizer("abc")) == (4, True)
    assert mask_token(bpe()) == (4, True)  # an ordinary piece is not taken unasked
    assert mask_token(bpe("<x>", "<mask>", "<|mdm_mask|>")) == (6, False)
    assert mask_token(bpe("<x>"), "<x>") == (4, False)
    assert mask_token(bpe("<x>"), "[MASK]") == (2, False)
    with pytest.raises(ConfigError, match=r"not in the file tokenizer \(did you mean '<\|mdm_mask\|>'\?\). Found '<mdm_mask>'"):
        mask_token(bpe("<|mdm_mask|>"), "<mdm_mask>")
    with pytest.raises(
        ConfigError, match=r"not in the bytes tokenizer. Found \'<mask>\'\.\n  Try: leave diffusion\.mask_token unset"
    ):
        mask_token(ByteTokenizer(), "<mask>")


# --- with a model


@pytest.fixture
def model() -> nn.Module:
    config = ModelConfig(family="llada", depth=2, width=32, heads=4)
    built = FAMILIES["llada"].build(config, 100, 16)
    initialize(built, FAMILIES["llada"], config, 0)
    return built


@pytest.mark.parametrize("prepared", [(text, "text"), (chat, "answers")], ids=["text", "answers"])
def test_micro_batches_add_up(model: nn.Module, prepared: tuple[Callable[..., Batch], str]) -> None:
    make, learns = prepared
    mine = objective(learns=learns, crop=0.5)
    batch = tensors(mine.prepare(make(8, 16) if make is text else make(), np.arange(8 if make is text else 4)))
    parts = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(batch["labels"]))]
    whole = mine(model, batch)
    torch.testing.assert_close(sum(mine(model, part) for part in parts), whole, atol=1e-3, rtol=1e-5)
    assert sum(float(mine.weight(part)) for part in parts) == float(mine.weight(batch))


def test_meters_are_nats_per_masked_token_by_noise(model: nn.Module) -> None:
    mine = objective()
    assert mine.meters == {}
    for number in range(3):
        batch = tensors(mine.prepare(text(40, 16, number), number * 40 + np.arange(40)))
        mine(Constant(), batch)
    assert list(mine.meters) == [f"loss_t{index}" for index in range(10)]
    assert all(float(total / weight) == 2 for total, weight in mine.meters.values())
    assert sum(float(weight) for _, weight in mine.meters.values()) > 500
    for pair in mine.meters.values():
        for part in pair:
            part.zero_()  # as the log does
    batch = tensors(mine.prepare(text(40, 16), np.arange(40)))
    mine(model, batch)
    level, masked = batch["noise_level"], (batch["labels"] != IGNORED).sum(dim=1)
    for index, (total, weight) in enumerate(mine.meters.values()):
        rows = (level >= index / 10) & (level < (index + 1) / 10)
        assert int(weight) == int(masked[rows].sum())
        assert not total.requires_grad


def test_nothing_waits_for_the_device(model: nn.Module) -> None:
    """On meta, whatever asks for a value raises."""
    mine = objective(crop=1.0)
    batch = {key: value.to("meta") for key, value in tensors(mine.prepare(text(4, 16), np.arange(4))).items()}
    assert mine(model.to("meta"), batch).is_meta and mine.weight(batch).is_meta


def test_a_batch_without_masks_is_named(model: nn.Module) -> None:
    with pytest.raises(RunError, match="batch: no row_scale; masked diffusion needs batches from its `prepare`"):
        objective()(model, tensors(text(2, 16)))


def test_it_learns_a_text_and_cannot_cheat(model: nn.Module) -> None:
    """A letter that is repeated is learned; where nothing follows from anything, the loss stays at the entropy."""
    losses = {}
    for kind in ("repeated", "noise"):
        config = ModelConfig(family="llada", depth=2, width=32, heads=4)
        initialize(model, FAMILIES["llada"], config, 0)
        mine, optimizer = objective(epsilon=0.1), torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for step in range(60):
            random = np.random.default_rng(step)
            ids = random.integers(0, 8, (32, 17))
            if kind == "repeated":
                ids = np.repeat(ids[:, :1], 17, axis=1)
            batch = tensors(mine.prepare({"input_ids": ids.astype(np.uint16)}, step * 32 + np.arange(32)))
            loss = mine(model, batch) / mine.weight(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        masked = batch["labels"] != IGNORED
        with torch.no_grad():
            losses[kind] = float(model(batch["input_ids"], batch["labels"]) / masked.sum())
    assert losses["repeated"] < 0.6
    assert losses["noise"] > np.log(8) - 0.1

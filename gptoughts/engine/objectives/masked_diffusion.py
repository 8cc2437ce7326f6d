"""Masked diffusion (Nie et al. 2025, LLaDA): a bidirectional model predicts the masked tokens of a row.

Each row draws a time t from [0, 1) and masks each token independently with probability p = (1 - e) t + e. Its loss is the
cross-entropy over masked tokens divided by p, whose expectation over t and masks bounds the row's negative log-likelihood. Labels
are not shifted.

Draws are a hash of (seed, sample position, token index), independent of micro-batch, rank and resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gptoughts.config.recipe import DataConfig, DiffusionConfig, Recipe
from gptoughts.data.order import GOLDEN, mix, round_keys
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from gptoughts.engine.objectives.base import IGNORED, Batch, Objective
from gptoughts.errors import ConfigError, DataError, RunError, nearest

MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>", "<MASK>")
"""Names of mask tokens in tokenizers, LLaDA's first."""

END_MULTIPLE = 64
"""After an answer, end-of-text is learned up to the next multiple of this many tokens."""
BUCKETS = 10
TRAINING, VALIDATION = 1, 2  # random streams
TIME, CROP, LENGTH, TOKENS = 0, 1, 2, 3  # indices in a sample's stream; from TOKENS on one per token

HostBatch = dict[str, np.ndarray]


# --- random draws


def uniform(seed: int, stream: int, samples: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return numbers `first` to `first + count` of each sample's stream: float64 (samples, count), uniform in [0, 1)."""
    rows = mix(round_keys(seed, stream)[0] + samples.astype(np.uint64) * GOLDEN)
    places = np.arange(first + 1, first + count + 1, dtype=np.uint64) * GOLDEN
    return as_share(mix(rows[:, None] + places))


def as_share(values: np.ndarray) -> np.ndarray:
    """Convert the 53 high bits of uint64 to float64 in [0, 1)."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def even_times(seed: int, samples: np.ndarray) -> np.ndarray:
    """Return times that cover [0, 1) evenly for any consecutive samples: golden-ratio steps (Weyl 1916)."""
    return as_share(round_keys(seed, VALIDATION)[1] + samples.astype(np.uint64) * GOLDEN)


# --- mask token and padding


def mask_token(tokenizer: Tokenizer, name: str | None = None) -> tuple[int, bool]:
    """Return the mask token's id, and whether it is a new id that needs a row in the embedding.

    `name` is a token of the tokenizer. Without it the first of `MASK_NAMES` among the tokenizer's added tokens is used, else the id
    after its last one. An ordinary vocabulary entry is used only by `name`, because text may contain it.
    Raises ConfigError for a name that the tokenizer does not have.
    """
    added: dict[str, int] = {}
    pieces: dict[str, int] = {}
    if isinstance(tokenizer, JsonTokenizer):
        added = {token["content"]: int(token["id"]) for token in tokenizer.spec.get("added_tokens") or []}
        vocab = tokenizer.spec["model"]["vocab"]
        pieces = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    if name is not None:
        if name not in added and name not in pieces:
            raise ConfigError(
                f"diffusion.mask_token: not in the {tokenizer.kind} tokenizer{nearest(name, [*added, *pieces])}",
                found=repr(name),
                fix="leave diffusion.mask_token unset to add one",
            )
        return added.get(name, pieces.get(name, -1)), False
    known = next((added[word] for word in MASK_NAMES if word in added), None)
    return (tokenizer.vocab_size, True) if known is None else (known, False)


def require_unpacked(data: DataConfig) -> None:
    """Raise ConfigError for packed conversations: a row has one time, one answer length and one end."""
    if data.format == "chat" and data.packing:
        raise ConfigError("data.packing: masked diffusion needs one conversation per row", fix="--data.packing false")


def answer_padding(
    input_ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, eot_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (input_ids, labels, positions) with labeled end-of-text after each answer, in place of the first padding.

    This teaches the model where an answer ends. LLaDA pads to the longest row of a batch; this pads to the next multiple of
    END_MULTIPLE tokens, at least one, because a sample must not depend on its batch. The rest of a row stays padding; otherwise most
    labels would be end-of-text. Rows without an answer are unchanged. Raises DataError for a packed row.
    """
    beyond = (positions == 0).cumsum(axis=1) > 1
    labeled = labels != IGNORED
    if (labeled & beyond).any():
        raise DataError(
            "data.packing: masked diffusion needs one conversation per row",
            found="a row with several",
            fix="--data.packing false",
        )
    width = input_ids.shape[1]
    place, length = np.arange(width), width - beyond.sum(axis=1, keepdims=True)
    end = np.minimum((length // END_MULTIPLE + 1) * END_MULTIPLE, width)
    answered = labeled.any(axis=1, keepdims=True)
    filled = beyond & answered & (place < end)
    joined = np.where(place < end, place, place - end).astype(positions.dtype)
    return (
        np.where(filled, input_ids.dtype.type(eot_id), input_ids),
        np.where(filled, eot_id, labels),
        np.where(answered, joined, positions),
    )


# --- the objective


class MaskedDiffusion(Objective):
    """Masked diffusion objective. `learns` is "text" (every token, weighted by tokens) or "answers" (labeled tokens, weighted by rows).

    text      `input_ids` (rows, T+1); the first T are learned, the last begins the next window, so each token of a stream is learned
              once per epoch (except its last, where that begins a window). Optional `labels` mark where the stream ended.
    answers   `input_ids`, `labels` (rows, T); only labeled tokens are masked. `positions` mark padding, whose beginning becomes
              labeled end-of-text (`answer_padding`). A row's loss is divided by its number of labels.

    `meters` loss_t0 to loss_t9: nats per masked token of rows with p in [0, 0.1) to [0.9, 1]; their mean approximates the loss.
    """

    def __init__(
        self,
        diffusion: DiffusionConfig,
        seed: int,
        mask_id: int,
        eot_id: int,
        learns: Literal["text", "answers"] = "text",
    ) -> None:
        self.diffusion, self.seed, self.mask_id, self.eot_id, self.learns = diffusion, seed, mask_id, eot_id, learns
        self.meters: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums = self._counts = torch.zeros(0)

    def prepare(self, batch: Mapping[str, np.ndarray], samples: np.ndarray) -> HostBatch:
        """Mask a training batch. `samples` (rows,) are positions in the endless stream of samples.

        Raises DataError where the data contain the mask token, rows of text contain prompts, or rows of answers are packed.
        """
        time = uniform(self.seed, TRAINING, samples, TIME, 1)[:, 0]
        return self._prepare(batch, samples, TRAINING, time, self.diffusion.crop)

    def prepare_validation(self, batch: Mapping[str, np.ndarray], samples: np.ndarray) -> HostBatch:
        """Mask a validation batch: the same masks at every validation, evenly spread times, no cropping."""
        return self._prepare(batch, samples, VALIDATION, even_times(self.seed, samples), 0.0)

    def _prepare(
        self, batch: Mapping[str, np.ndarray], samples: np.ndarray, stream: int, time: np.ndarray, crop: float
    ) -> HostBatch:
        share = (1 - self.diffusion.epsilon) * time + self.diffusion.epsilon
        prepared: HostBatch = {}
        if self.learns == "text":
            input_ids, lengths = _text(batch)
            draws = uniform(self.seed, stream, samples, CROP, 2)
            cropped = 1 + (draws[:, LENGTH - CROP] * lengths).astype(np.int64)
            lengths = np.where((draws[:, 0] < crop) & (lengths > 0), cropped, lengths)
            place = np.arange(input_ids.shape[1])
            counted = place < lengths[:, None]
            if not counted.all():  # the rest of a row is a separate document
                prepared["positions"] = np.where(counted, place, place - lengths[:, None])
            scale, weight = 1 / share, lengths
        else:
            input_ids, counted, positions = self._answers(batch)
            if (positions == 0).sum() > len(positions):  # the rest of a row is a separate document
                prepared["positions"] = positions
            answer = counted.sum(axis=1)
            scale, weight = 1 / (share * np.maximum(answer, 1)), answer > 0
        if (input_ids == self.mask_id).any():
            row = int((input_ids == self.mask_id).any(axis=1).argmax())
            raise DataError(
                f"sample {samples[row]}: contains the mask token, {self.mask_id}", fix="another diffusion.mask_token"
            )
        masked = counted & (uniform(self.seed, stream, samples, TOKENS, input_ids.shape[1]) < share[:, None])
        wide = input_ids if self.mask_id <= np.iinfo(input_ids.dtype).max else input_ids.astype(np.int64)
        return prepared | {
            "input_ids": np.where(masked, wide.dtype.type(self.mask_id), wide),
            "labels": np.where(masked, input_ids.astype(np.int64), IGNORED),
            "noise_level": share.astype(np.float32),
            "row_scale": scale.astype(np.float32),
            "row_weight": weight.astype(np.float32),
        }

    def _answers(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        input_ids, labels = batch["input_ids"], batch["labels"]
        if "positions" not in batch:
            return input_ids, labels != IGNORED, np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
        input_ids, labels, positions = answer_padding(input_ids, labels, batch["positions"], self.eot_id)
        return input_ids, labels != IGNORED, positions

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the summed loss: each row's cross-entropy divided by p (answers: also by their length)."""
        if "row_scale" not in batch:
            raise RunError("batch: no row_scale; masked diffusion needs batches from its `prepare`", found=", ".join(batch))
        labels = batch["labels"]
        packed = {"positions": batch["positions"]} if "positions" in batch else {}
        sums = model(batch["input_ids"], labels=labels, reduction="rows", **packed)  # B
        self._measure(batch["noise_level"], sums.detach(), (labels != IGNORED).sum(dim=1))
        return (sums * batch["row_scale"]).sum()

    def _measure(self, noise_level: Tensor, sums: Tensor, masked: Tensor) -> None:
        if self._sums.device != sums.device or not self.meters:
            self._sums = torch.zeros(BUCKETS, device=sums.device)
            self._counts = torch.zeros(BUCKETS, device=sums.device)
            self.meters = {f"loss_t{index}": (self._sums[index], self._counts[index]) for index in range(BUCKETS)}
        bucket = (noise_level * BUCKETS).long().clamp(max=BUCKETS - 1)
        chosen = (bucket[:, None] == torch.arange(BUCKETS, device=sums.device)).float()  # sums in a fixed order on a GPU too
        self._sums += (chosen * sums[:, None]).sum(dim=0)
        self._counts += (chosen * masked[:, None]).sum(dim=0)

    def weight(self, batch: Batch) -> Tensor | float:
        """Return the number of tokens, masked or not; for answers the number of rows with an answer. Rows without a mask count."""
        return batch["row_weight"].sum()

    def label_weight(self, batch: Batch) -> Tensor | float | None:
        """Return the sum of 1 / p over masked tokens (answers: also by their length). Its expectation is `weight`."""
        return ((batch["labels"] != IGNORED).sum(dim=1) * batch["row_scale"]).sum()

    def tokens(self, batch: Batch) -> int:
        """Return rows times positions."""
        return batch["input_ids"].numel()


def _text(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return windows (rows, T) and how many tokens of each come from the stream."""
    input_ids = batch["input_ids"][:, :-1]
    rows, columns = input_ids.shape
    if "labels" not in batch:
        return input_ids, np.full(rows, columns, dtype=np.int64)
    real = batch["labels"][:, :-1] != IGNORED
    lengths = real.sum(axis=1)
    if (real != (np.arange(columns) < lengths[:, None])).any():
        raise DataError(
            "batch: ignored labels before learned ones; for conversations use data.format chat, where the objective learns answers"
        )
    return input_ids, lengths


def masked_diffusion(recipe: Recipe, tokenizer: Tokenizer, mask_id: int | None) -> MaskedDiffusion:
    """Return the objective of the task `masked-diffusion`. Raises ConfigError for packed conversations."""
    assert mask_id is not None
    require_unpacked(recipe.data)
    learns: Literal["text", "answers"] = "answers" if recipe.data.format == "chat" else "text"
    return MaskedDiffusion(recipe.diffusion, recipe.seed, mask_id, tokenizer.eot_id, learns)

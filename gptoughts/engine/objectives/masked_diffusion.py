"""Masked diffusion (Nie et al. 2025, LLaDA): some tokens of a row are masked, the model fills them in from both sides.

Each row draws a time t from [0, 1) and masks each of its tokens with probability p = (1 - e) t + e, for itself. Its loss is the
cross-entropy over masked tokens divided by p, whose expectation over t and masks bounds the row's negative log-likelihood. Nothing
is shifted: a masked token is predicted where it stands.

Draws are a hash of (seed, sample position, token index), so micro-batch, rank and resume change none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gptoughts.config.recipe import DataConfig, DiffusionConfig
from gptoughts.data.order import GOLDEN, mix, round_keys
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from gptoughts.engine.objectives.base import IGNORED, Batch, Objective
from gptoughts.errors import ConfigError, DataError, RunError, nearest

MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "[MASK]", "<mask>", "<MASK>")
"""What tokenizers call a token that stands for a masked one, LLaDA's own name first."""

END_MULTIPLE = 64
"""Behind an answer, end-of-text is learned up to the next multiple of this many tokens."""
BUCKETS = 10
TRAINING, VALIDATION = 1, 2  # streams of draws
TIME, CROP, LENGTH, TOKENS = 0, 1, 2, 3  # places in a sample's stream: one each, and from TOKENS on one per token

HostBatch = dict[str, np.ndarray]


# --- draws


def uniform(seed: int, stream: int, samples: np.ndarray, first: int, count: int) -> np.ndarray:
    """Numbers `first` to `first + count` of each sample's own stream: float64 (samples, count), uniform in [0, 1)."""
    rows = mix(round_keys(seed, stream)[0] + samples.astype(np.uint64) * GOLDEN)
    places = np.arange(first + 1, first + count + 1, dtype=np.uint64) * GOLDEN
    return as_share(mix(rows[:, None] + places))


def as_share(values: np.ndarray) -> np.ndarray:
    """The 53 high bits of uint64 as a float64 in [0, 1)."""
    return (values >> np.uint64(11)).astype(np.float64) * 2.0**-53


def even_times(seed: int, samples: np.ndarray) -> np.ndarray:
    """Times in [0, 1) that cover it evenly whichever run of samples is taken: steps of the golden ratio (Weyl 1916)."""
    return as_share(round_keys(seed, VALIDATION)[1] + samples.astype(np.uint64) * GOLDEN)


# --- what surrounds the objective


def mask_token(tokenizer: Tokenizer, name: str | None = None) -> tuple[int, bool]:
    """(id of the mask, whether it is a row that the tokenizer does not know and the embedding must have).

    `name` is the tokenizer's own token; without one its added tokens are searched for `MASK_NAMES`, and where there is none
    the id behind its last one is taken. An ordinary piece of the vocabulary is never taken unasked: text could hold it.
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
                f"diffusion.mask_token = {name!r} is no token of the {tokenizer.kind} tokenizer{nearest(name, [*added, *pieces])}; "
                "leave it out to add one"
            )
        return added.get(name, pieces.get(name, -1)), False
    known = next((added[word] for word in MASK_NAMES if word in added), None)
    return (tokenizer.vocab_size, True) if known is None else (known, False)


def require_unpacked(data: DataConfig) -> None:
    """Raise ConfigError where conversations share rows: a row has one time, one answer length and one end to learn."""
    if data.format == "chat" and data.packing:
        raise ConfigError("masked diffusion learns one conversation per row; type: --data.packing false")


def answer_padding(
    input_ids: np.ndarray, labels: np.ndarray, positions: np.ndarray, eot_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input_ids, labels, positions) whose rows have learned end-of-text behind the answer, where a document of padding stood.

    So the model learns where an answer ends, as in LLaDA, which fills up to the longest row of a batch; here to the next multiple
    of END_MULTIPLE tokens, at least one, because a sample must not depend on its batch. What is left of a row stays a document of
    padding: end-of-text up to a long row's end would be nearly all that is learned. Rows without an answer stay.
    Raises DataError for a packed row.
    """
    beyond = (positions == 0).cumsum(axis=1) > 1
    labeled = labels != IGNORED
    if (labeled & beyond).any():
        raise DataError("a row holds several conversations, masked diffusion learns one per row; type: --data.packing false")
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
    """The objective. `learns` "text": every token, weighted by tokens; "answers": labeled tokens, weighted by rows.

    text      `input_ids` rows x T+1, of which the first T are learned: the last is the first of the next window, so each token of
              a stream is learned once an epoch (but its very last, where that begins a window). `labels`, where given, say
              where the stream ended.
    answers   `input_ids`, `labels` rows x T: labeled tokens are masked, all others always shown. `positions` tell padding,
              the beginning of which becomes end-of-text that counts (`answer_padding`). A row's loss is divided by its labels.

    `meters` loss_t0 to loss_t9: nats per masked token of rows with p in [0, 0.1) to [0.9, 1]; their mean is near the loss.
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
        """A training batch with its masks; `samples` (rows,) are positions in the endless stream of samples.

        Raises DataError where the data itself holds the mask, rows of text hold prompts, or rows of answers are packed.
        """
        time = uniform(self.seed, TRAINING, samples, TIME, 1)[:, 0]
        return self._prepare(batch, samples, TRAINING, time, self.diffusion.crop)

    def prepare_validation(self, batch: Mapping[str, np.ndarray], samples: np.ndarray) -> HostBatch:
        """A validation batch: the same masks at every validation, times spread evenly, nothing cropped."""
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
            if not counted.all():  # the rest of a row is a document of its own
                prepared["positions"] = np.where(counted, place, place - lengths[:, None])
            scale, weight = 1 / share, lengths
        else:
            input_ids, counted, positions = self._answers(batch)
            if (positions == 0).sum() > len(positions):  # the rest of a row is a document of its own
                prepared["positions"] = positions
            answer = counted.sum(axis=1)
            scale, weight = 1 / (share * np.maximum(answer, 1)), answer > 0
        if (input_ids == self.mask_id).any():
            row = int((input_ids == self.mask_id).any(axis=1).argmax())
            raise DataError(
                f"sample {samples[row]} holds the mask itself, token {self.mask_id}; set another diffusion.mask_token"
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
        """The micro-batch's loss: for each row cross-entropy over p (answers: also over their length), summed."""
        if "row_scale" not in batch:
            raise RunError("masked diffusion was given a batch without masks: its `prepare` belongs between data and loader")
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
        chosen = (bucket[:, None] == torch.arange(BUCKETS, device=sums.device)).float()  # adds in one order on a GPU too
        self._sums += (chosen * sums[:, None]).sum(dim=0)
        self._counts += (chosen * masked[:, None]).sum(dim=0)

    def weight(self, batch: Batch) -> Tensor | float:
        """Tokens of the rows, masked or not; for answers the rows that have one. A row that drew no mask counts."""
        return batch["row_weight"].sum()

    def tokens(self, batch: Batch) -> int:
        """Rows times positions."""
        return batch["input_ids"].numel()


def _text(batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Windows rows x T, and how many of their tokens the stream had."""
    input_ids = batch["input_ids"][:, :-1]
    rows, columns = input_ids.shape
    if "labels" not in batch:
        return input_ids, np.full(rows, columns, dtype=np.int64)
    real = batch["labels"][:, :-1] != IGNORED
    lengths = real.sum(axis=1)
    if (real != (np.arange(columns) < lengths[:, None])).any():
        raise DataError(
            "rows hold tokens that are not learned before some that are; for conversations the objective learns answers"
        )
    return input_ids, lengths

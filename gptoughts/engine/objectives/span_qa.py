"""Extractive question answering: classify the answer's first and last token among the row's tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from gptoughts.engine.objectives.base import IGNORED, Batch, HostBatch, Objective
from gptoughts.errors import DataError


def span_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return start and end logits (B, T) each in float32; minus infinity at padding."""
    mask = batch["mask"].bool()
    logits = model(batch["input_ids"].long(), token_types=batch["token_types"].long(), mask=mask).float()  # B T 2
    start, end = logits.masked_fill(~mask[:, :, None], float("-inf")).unbind(-1)
    return start, end


class QuestionAnswering(Objective):
    """Cross-entropy over the row for both ends of the answer (Devlin et al. 2019, section 4.2).

    Batches hold `input_ids`, `token_types`, `mask` (B, T) and `starts`, `ends` (B, inclusive; -100 in rows of padding).
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean of both cross-entropies in nats, summed over the rows that are not padding."""
        start, end = span_scores(model, batch)
        losses = functional.cross_entropy(start, batch["starts"], ignore_index=IGNORED, reduction="sum")
        losses = losses + functional.cross_entropy(end, batch["ends"], ignore_index=IGNORED, reduction="sum")
        return losses / 2

    def weight(self, batch: Batch) -> Tensor | float:
        """Return the number of rows that are not padding."""
        return (batch["starts"] != IGNORED).sum().float()

    def tokens(self, batch: Batch) -> int:
        """Return rows times positions, padding included."""
        return batch["input_ids"].numel()

    def prepare(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """Return the batch unchanged. Raises DataError for an answer outside its row, which on a device ends the process or has loss 0."""
        starts, ends, mask = (np.asarray(batch[name]) for name in ("starts", "ends", "mask"))
        filled = (starts == IGNORED) & (ends == IGNORED)
        held = (starts >= 0) & (starts <= ends) & (ends < mask.sum(axis=1))
        wrong = np.flatnonzero(~filled & ~held)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"sample {int(samples[row])}: the answer is not inside its {int(mask[row].sum())} tokens",
                found=f"tokens {int(starts[row])} to {int(ends[row])}",
                fix="0 to 0 for a window without the answer",
            )
        return batch


def question_answering(recipe: Any, tokenizer: Any, mask_id: int | None) -> QuestionAnswering:
    """Return the objective of the task `question-answering`."""
    return QuestionAnswering()

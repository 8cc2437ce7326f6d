"""Extractive question answering: the first and the last token of the answer, each a choice among the row's tokens."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from gptoughts.engine.objectives.base import IGNORED, Batch, HostBatch, Objective
from gptoughts.errors import DataError


def span_scores(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Scores of every token as the answer's first and as its last, B T each, in float32; padding has minus infinity."""
    mask = batch["mask"].bool()
    logits = model(batch["input_ids"].long(), token_types=batch["token_types"].long(), mask=mask).float()  # B T 2
    start, end = logits.masked_fill(~mask[:, :, None], float("-inf")).unbind(-1)
    return start, end


class QuestionAnswering(Objective):
    """Both ends of the answer by cross-entropy over the row (Devlin et al. 2019, section 4.2).

    Batches hold `input_ids`, `token_types`, `mask` (all B T) and `starts`, `ends` (B, inclusive; -100 in rows that only fill up).
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean of both cross-entropies in nats, summed over the rows that count."""
        start, end = span_scores(model, batch)
        losses = functional.cross_entropy(start, batch["starts"], ignore_index=IGNORED, reduction="sum")
        losses = losses + functional.cross_entropy(end, batch["ends"], ignore_index=IGNORED, reduction="sum")
        return losses / 2

    def weight(self, batch: Batch) -> Tensor | float:
        """Number of rows that count."""
        return (batch["starts"] != IGNORED).sum().float()

    def tokens(self, batch: Batch) -> int:
        """Rows times positions, padding included."""
        return batch["input_ids"].numel()

    def prepare(self, batch: HostBatch, samples: np.ndarray) -> HostBatch:
        """The batch as it is. Raises DataError for an answer outside its row, which a device would end the process for, or call 0."""
        starts, ends, mask = (np.asarray(batch[name]) for name in ("starts", "ends", "mask"))
        filled = (starts == IGNORED) & (ends == IGNORED)
        held = (starts >= 0) & (starts <= ends) & (ends < mask.sum(axis=1))
        wrong = np.flatnonzero(~filled & ~held)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"sample {int(samples[row])}: the answer's tokens {int(starts[row])} to {int(ends[row])} do not lie in its "
                f"{int(mask[row].sum())} tokens; give 0 to 0 where a window does not hold the answer"
            )
        return batch

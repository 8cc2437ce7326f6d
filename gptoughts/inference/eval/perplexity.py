"""Mean loss over a validation split: sum of losses divided by number of labels, over all ranks."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import torch

from gptoughts.data.device import to_device
from gptoughts.engine.engine import Engine
from gptoughts.errors import DataError


def mean_loss(engine: Engine, batches: Iterable[dict[str, Any]]) -> tuple[float, int]:
    """Return the loss in nats per label and the number of labels. Restores the model's mode. Raises DataError without labels."""
    model, was_training = engine.bare, engine.bare.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with torch.no_grad(), engine.eval_context():
        for host_batch in batches:
            engine.report("evaluation")
            batch = to_device(host_batch, engine.device)
            for micro_batch in engine.micro_batches(batch):
                total[0] += engine.objective(model, micro_batch).double()
                total[1] += engine.objective.weight(micro_batch)
    model.train(was_training)
    loss_sum, weight = engine.ranks.sum(total).tolist()
    if weight == 0:
        raise DataError("validation split: no labels")
    return loss_sum / weight, int(weight)


def perplexity(loss: float) -> float | None:
    """Return the perplexity of a mean loss in nats; None where it exceeds the range of a float."""
    return math.exp(loss) if loss < math.log(sys.float_info.max) else None

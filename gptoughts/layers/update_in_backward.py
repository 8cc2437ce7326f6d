"""Each weight is updated as soon as its gradient is complete, and the gradient is freed: gradients never exist all at once.

Saves the memory of all gradients but the largest, 4 bytes per trained weight. Excludes everything that needs all gradients at once:
clipping by norm, accumulation over micro-batches, fp16's skipped steps, averaging over ranks. The norm is still logged. Weights after a
step are bit-identical to those of `after-clip`. Llama-3.2-3B on an A100 with recomputation: 24.9 to 23.1 GiB, 7,210 to 7,309 tok/s
(torchtune's README). Source: Lv et al. 2023, LOMO; torch's tutorial on optimizer steps in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from gptoughts.console import bytes_in_words
from gptoughts.errors import LayerError
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unsupported,
)
from gptoughts.planning.memory_fit import SOURCE, current_budget, memory_of_rank

MEMORY_SHARE = 0.05  # of the device; smaller gradients are not worth the restrictions
NAME = "in-backward"
LEFT = f"{NAME}: gradients left"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """One micro-batch, one process, AdamW, no clipping, and gradients that take a relevant share of memory."""
    optim = case.recipe.optim
    if case.recipe.train.bad_step == "skip":
        yield unsupported("train.bad_step = skip needs the whole gradient before the first update", "--train.bad-step stop")
    if optim.name != "adamw":
        yield unsupported(f"needs AdamW, optim.name is {optim.name}")
    if optim.clip_norm > 0:
        yield unsupported(
            f"optim.clip_norm = {optim.clip_norm:g} needs all gradients before the first update", "--optim.clip-norm 0"
        )
    if case.forward_sequences < case.rank_sequences:
        yield unsupported(
            f"micro-batches of {case.forward_sequences} of {case.rank_sequences} sequences: gradients would be freed before they are "
            "complete",
            "--layer.microbatch whole",
        )
    if case.world.world_size > 1:
        yield unsupported("ranks average gradients after they are freed", "--layer.update after-clip")
    budget, have = current_budget(case), memory_of_rank(case)
    if budget is None:
        yield slower("model size unknown before the data is read", "size of the gradients unknown")
    elif have is not None and budget.gradients < MEMORY_SHARE * have:
        yield slower(f"gradients take {bytes_in_words(budget.gradients)} of {bytes_in_words(have)}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """One gradient at a time."""
    return replace(budget, gradients=budget.largest * 4)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Update each parameter in a gradient hook; `clip` returns the norm from the hooks, `step` does nothing."""
    import torch

    updates, before = _Updates(engine), engine.repeatable
    engine.repeatable = False  # repeating a batch would update weights twice

    def clip() -> Any:
        norms, updates.norms = updates.norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=engine.device)

    def step() -> bool:
        engine.counters.call_counts[LEFT] += sum(parameter.grad is not None for parameter in engine.parameters())
        return True

    with ExitStack() as stack:
        stack.callback(setattr, engine, "repeatable", before)
        for group in engine.optimizer.param_groups:
            for parameter in group["params"]:
                stack.callback(parameter.register_post_accumulate_grad_hook(updates.of(group)).remove)
        stack.callback(engine.replace("clip", clip))
        stack.callback(engine.replace("step", step))
        stack.callback(engine.wrap_context("grad_sync", _only_one))
        yield


class _Updates:
    """Update hooks, and the gradient norms they record on the device."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.norms = engine, list[Any]()

    def of(self, group: dict[str, Any]) -> Callable[[Any], None]:
        """Return the hook for parameters of `group`, which runs once a gradient is complete, tied uses included."""
        import torch

        from gptoughts.engine.optim.param_groups import step_one

        def update(parameter: Any) -> None:
            self.norms.append(torch.linalg.vector_norm(parameter.grad.detach()))
            step_one(self.engine.optimizer, group, parameter)
            parameter.grad = None
            self.engine.counters.call_counts[NAME] += 1

        return update


def _only_one(last: bool) -> AbstractContextManager[None]:
    if not last:
        raise LayerError(
            f"update={NAME}: several micro-batches per update, and the first alone would update the weights",
            fix="--layer.update after-clip, or --layer.microbatch whole",
        )
    return nullcontext()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one update per parameter in the backward, no gradient left after it, and changed weights."""
    from gptoughts.engine.optim.factory import covered

    known, given = covered(engine.optimizer) if engine.optimizer else (0, 0)
    done, left = trace.call_counts.get(NAME, 0), trace.call_counts.get(LEFT, 0)
    figures = {"updates": done, "parameters": given, "left": left}
    if not done or done != known or left:
        return inactive(f"{done} updates of {given} parameters in the backward, {left} gradients left after it", **figures)
    if not trace.weights_moved:
        return inactive(f"{done} updates in the backward, no weight changed", **figures)
    return active(f"{done} updates of {given} parameters in the backward, no gradient left after it", **figures)


LAYER = Layer(
    name=NAME,
    slot="update",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("grad_sync",),
    replaces=("clip", "step"),
    memory_rank=50,
    clashes={
        "ddp": "ranks average gradients after they are freed",
        "fp16": "its scaler may skip an update, which it knows only after the whole backward",
        "auto": "it may split an update into micro-batches, and gradients would be freed before they are complete",
    },
)

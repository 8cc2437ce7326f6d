"""Each weight is updated the moment its gradient is complete and the gradient is freed: gradients never exist all at once.

Saves the memory of all gradients, four bytes a trained weight, but for the largest. It costs what needs all gradients at one time: clipping
by their norm, accumulation over micro-batches, fp16's skipped steps, averaging over ranks. The norm is still logged. Weights after a
step are bit for bit those of the plain order. Llama-3.2-3B on an A100 with recomputation: 24.9 to 23.1 GiB, 7,210 to 7,309 tok/s
(torchtune's README). Source of the idea: Lv et al. 2023, LOMO; torch's tutorial on optimizer steps in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from gptoughts.planning.memory_fit import SOURCE, counted, memory_of_rank

MEMORY_SHARE = 0.05  # of the device; below that the gradients are not worth the order of things
LEFT = "in-backward: gradients left"


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """One micro-batch, one process, AdamW, no clipping; and gradients that weigh something."""
    optim = case.recipe.optim
    if optim.name != "adamw":
        yield unsupported(f"updates one weight at a time, which is written for AdamW; optim.name is {optim.name}")
    if optim.clip_norm > 0:
        yield unsupported(
            f"optim.clip_norm = {optim.clip_norm:g} needs all gradients before the first weight moves", "--optim.clip-norm 0"
        )
    if case.forward_sequences < case.rank_sequences:
        yield unsupported(
            f"an update has micro-batches of {case.forward_sequences} of {case.rank_sequences} sequences, and gradients would be freed "
            "before they are whole",
            "--layer.microbatch whole",
        )
    if case.world.world_size > 1:
        yield unsupported("ranks average gradients after the backward, when these are gone", "--layer.update after-clip")
    budget, have = counted(case), memory_of_rank(case)
    if budget is None:
        yield slower("not all sizes of the model are known before its data is read", "gradients cannot be weighed")
    elif have is not None and budget.gradients < MEMORY_SHARE * have:
        yield slower(f"gradients take {bytes_in_words(budget.gradients)} of {bytes_in_words(have)}", SOURCE)


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """One gradient at a time."""
    return replace(budget, gradients=budget.largest * 4)


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """A hook on every parameter that updates it; clip tells the norm that the hooks saw, step has nothing left to do."""
    import torch

    updates, before = _Updates(engine), engine.repeatable
    engine.repeatable = False  # a batch that is taken again would move weights twice
    hooks = [
        parameter.register_post_accumulate_grad_hook(updates.of(group))
        for group in engine.optimizer.param_groups
        for parameter in group["params"]
    ]

    def clip() -> Any:
        norms, updates.norms = updates.norms, []
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros((), device=engine.device)

    def step() -> bool:
        engine.counters.call_counts[LEFT] += sum(parameter.grad is not None for parameter in engine.parameters())
        return True

    undo = [engine.replace("clip", clip), engine.replace("step", step), engine.wrap_context("grad_sync", _only_one)]
    try:
        yield
    finally:
        engine.repeatable = before
        for back in undo:
            back()
        for hook in hooks:
            hook.remove()


class _Updates:
    """Updates parameters one by one and keeps the norms of their gradients, on the device, until the step asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.norms = engine, list[Any]()

    def of(self, group: dict[str, Any]) -> Callable[[Any], None]:
        """The hook for parameters of `group`: once a parameter's gradient is complete, tied uses and all."""
        import torch

        from gptoughts.engine.optim.param_groups import step_one

        def update(parameter: Any) -> None:
            self.norms.append(torch.linalg.vector_norm(parameter.grad.detach()))
            step_one(self.engine.optimizer, group, parameter)
            parameter.grad = None
            self.engine.counters.call_counts["in-backward"] += 1

        return update


def _only_one(last: bool) -> AbstractContextManager[None]:
    if not last:
        raise LayerError(
            "update=in-backward: this update has several micro-batches, and the first would move the weights alone\n"
            "  try: --layer.update after-clip, or --layer.microbatch whole"
        )
    return nullcontext()


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """One update per parameter during the backward, no gradient left after it, and weights that moved."""
    from gptoughts.engine.optim.factory import covered

    known, given = covered(engine.optimizer) if engine.optimizer else (0, 0)
    done, left = trace.call_counts.get("in-backward", 0), trace.call_counts.get(LEFT, 0)
    figures = {"updates": done, "parameters": given, "left": left}
    if not done or done != known or left:
        return inactive(f"{done} updates of {given} parameters in the backward, {left} gradients left after it", **figures)
    if not trace.weights_moved:
        return inactive(f"{done} updates in the backward, and no weight moved", **figures)
    return active(f"{done} updates of {given} parameters in the backward, no gradient left after it", **figures)


LAYER = Layer(
    name="in-backward",
    slot="update",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    wraps=("grad_sync",),
    replaces=("clip", "step"),
    clashes={
        "ddp": "ranks average gradients after the backward, when these are gone",
        "fp16": "its scaler may have to skip the update, and knows only when all gradients are there",
        "fit": "it may split an update into micro-batches, and gradients would be freed before they are whole",
    },
)

"""Build a recipe's optimizer as one object with one list of groups, one state and one step.

muon and both apollos update the matrices inside the repeated blocks; AdamW updates everything else: embeddings, head, norms, biases, and
weights with three dimensions such as fused experts. lion and ademamix come from the package pytorch-optimizer, schedule-free from
its authors' schedulefree (docs/decisions.md has the reasons, also for our own apollo).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gptoughts.config.loader import OptimConfig, Recipe
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.apollo import Apollo
from gptoughts.engine.optim.low_bit import adamw_in_eight_bits, sparsely_graded
from gptoughts.engine.optim.param_groups import adamw_over, by_decay, groups, trained
from gptoughts.errors import ConfigError

Implementation = Literal["plain", "fused", "torchao", "bitsandbytes"]
"""Plain operators per parameter; torch's fused kernel; or a package with 8-bit state. All but the first are for AdamW only."""
ONLY_ADAMW = {
    "fused": "torch fuses AdamW only",
    "torchao": "8-bit state is for AdamW only",
    "bitsandbytes": "8-bit state is for AdamW only",
}

TRAINED = "trained"
"""State key of schedule-free's trained weights while the model holds their average."""


@dataclass(frozen=True)
class _Request:
    """Arguments of `optimizer`."""

    model: nn.Module
    config: OptimConfig
    implementation: Implementation
    blocks: tuple[nn.Module, ...]
    seed: int
    updates: int | None

    @property
    def adamw(self) -> dict[str, bool]:
        """Implementation arguments of torch's AdamW."""
        return {"fused": True} if self.implementation == "fused" else {"fused": False, "foreach": False}


def optimizer(
    model: nn.Module,
    config: OptimConfig,
    implementation: Implementation,
    blocks: Iterable[nn.Module] = (),
    seed: int = 0,
    updates: int | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of `config` over every trainable parameter of `model`.

    blocks   the model's repeated blocks (`engine.blocks`), whose matrices muon and apollo update
    seed     of apollo's projections
    updates  length of the run, over which ademamix raises alpha and beta3

    Raises ConfigError where the model has no parameter for the optimizer, or where its package is missing.
    """
    if implementation in ONLY_ADAMW and config.name != "adamw":
        raise ConfigError(f"optim.name: {ONLY_ADAMW[implementation]}", found=config.name, fix="--layer.optimizer plain")
    return _MAKERS[config.name](_Request(model, config, implementation, tuple(blocks), seed, updates))


@contextmanager
def attached(engine: Engine, implementation: Implementation) -> Iterator[None]:
    """Attach the recipe's optimizer to `engine`. Inside `eval_context` the model holds the weights for evaluation.

    Afterwards the engine has the optimizer from before, and the model keeps the weights for evaluation.
    """
    recipe = engine.recipe
    before = engine.optimizer
    made = optimizer(engine.bare, recipe.optim, implementation, engine.blocks.values(), recipe.seed, known_updates(recipe))
    engine.attach(made)
    averages = hasattr(made, "eval")
    undo = engine.wrap_context("eval_context", lambda: averaged(made)) if averages else None
    try:
        yield
    finally:
        if undo is not None:
            made.eval()  # type: ignore[attr-defined]
            undo()
        engine.optimizer = before


def known_updates(recipe: Recipe) -> int | None:
    """Return the length of the run in updates; None where it is given in epochs or hours."""
    train = recipe.train
    if train.tokens is not None:
        return math.ceil(train.tokens / (train.global_batch * recipe.data.sequence_length))
    return train.steps


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Let the model hold schedule-free's averaged weights inside the block, and exactly the trained ones after it.

    The package converts back arithmetically, which changes last bits, so an additional validation would change training. The trained
    weights are therefore copied to the optimizer's state: a checkpoint taken inside holds both, and one restored inside keeps them.
    Costs the memory of the weights once, while there are no gradients.
    """
    if not optimizer.param_groups[0]["train_mode"]:
        yield
        return
    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            state[TRAINED] = parameter.detach().clone()
        optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, state in optimizer.state.items():
                if TRAINED in state:
                    parameter.copy_(state.pop(TRAINED))


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters as one: one list of groups, one state, one step."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """Run one update of every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            # Assigned each time, because load_state_dict replaces these containers.
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            start += count
            part.step()
        return loss


def hidden_matrices(model: nn.Module, blocks: Iterable[nn.Module], name: str) -> list[nn.Parameter]:
    """Return trainable 2-D weights inside `blocks` that are not shared with an embedding or a module outside.

    Selected by place and identity, so it works for native, pretrained and adapted models. Raises ConfigError if there is none.
    """
    inside = {id(module) for block in blocks for module in block.modules()}
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if id(module) not in inside or isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    found = [
        parameter
        for parameter in _unique(parameter for block in blocks for parameter in block.parameters())
        if parameter.requires_grad and parameter.dim() == 2 and id(parameter) not in elsewhere
    ]
    if not found:
        raise ConfigError(
            f"optim.name: {name} needs trained matrices inside the model's repeated blocks",
            found=f"none in {len(inside)} modules",
            fix="--optim.name adamw",
        )
    return found


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _with_adamw(request: _Request, part: torch.optim.Optimizer, matrices: list[nn.Parameter]) -> CombinedOptimizer:
    """Combine `part`, which updates `matrices`, with AdamW for all other parameters."""
    taken = {id(parameter) for parameter in matrices}
    rest = by_decay((parameter for parameter in trained(request.model) if id(parameter) not in taken), request.config)
    return CombinedOptimizer([part, adamw_over(rest, request.config, **request.adamw)] if rest else [part])


def _adamw(request: _Request) -> torch.optim.Optimizer:
    if request.implementation in ("torchao", "bitsandbytes"):
        made = groups(request.model, request.config)
        return adamw_in_eight_bits(made, request.config, request.implementation, sparsely_graded(request.model))
    return adamw_over(groups(request.model, request.config), request.config, **request.adamw)


def _muon(request: _Request) -> torch.optim.Optimizer:
    """Build torch's Muon (Jordan et al. 2024), scaled to the size of AdamW's updates (Liu et al. 2025).

    An orthogonalized update has entries of about 1 / sqrt(larger side); times 0.2 sqrt(larger side) they have the usual size of
    AdamW's, so that one rate, schedule and decay serve both.
    """
    trained(request.model)
    matrices, config = hidden_matrices(request.model, request.blocks, "muon"), request.config
    part = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return _with_adamw(request, part, matrices)


def _apollo(request: _Request) -> torch.optim.Optimizer:
    return _low_rank(request, request.config.rank, scale=1.0, per="channel")


def _apollo_mini(request: _Request) -> torch.optim.Optimizer:
    return _low_rank(request, 1, scale=128.0, per="tensor")


def _low_rank(request: _Request, rank: int, scale: float, per: Literal["channel", "tensor"]) -> torch.optim.Optimizer:
    trained(request.model)
    matrices, config = hidden_matrices(request.model, request.blocks, request.config.name), request.config
    names = {id(parameter): name for name, parameter in request.model.named_parameters()}
    part = Apollo(
        {names[id(matrix)]: matrix for matrix in matrices},
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        rank=rank,
        scale=scale,
        per=per,
        gap=config.projection_gap,
        seed=request.seed,
    )
    return _with_adamw(request, part, matrices)


def _lacks(name: str, package: str) -> ConfigError:
    return ConfigError(f"optim.name: {name} needs the package {package}", fix="pip install 'gptoughts[optimizers]'")


def _library(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        if error.name != "pytorch_optimizer":
            raise
        raise _lacks(name, "pytorch-optimizer") from None
    return pytorch_optimizer


def _lion(request: _Request) -> torch.optim.Optimizer:
    """Build Lion (Chen et al. 2023). Each weight moves by the full rate, so use a third to a tenth of AdamW's."""
    config = request.config
    return _library("lion").Lion(
        groups(request.model, config), lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=False
    )


def _ademamix(request: _Request) -> torch.optim.Optimizer:
    """Build AdEMAMix (Pagliardini et al. 2024). alpha and beta3 rise over the whole run; without that it diverges early."""
    config = request.config
    if request.updates is None:
        raise ConfigError(
            "optim.name: ademamix raises alpha and beta3 over the run and needs its length in updates",
            fix="--train.steps N or --train.tokens N",
        )
    return _library("ademamix").AdEMAMix(
        groups(request.model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2, config.beta3),
        weight_decouple=True,
        alpha=config.alpha,
        t_alpha_beta3=request.updates,
        eps=config.epsilon,
        foreach=False,
    )


def _schedule_free(request: _Request) -> torch.optim.Optimizer:
    """Build schedule-free AdamW (Defazio et al. 2024), without its own warmup: the recipe's schedule has one."""
    try:
        import schedulefree
    except ModuleNotFoundError as error:
        if error.name != "schedulefree":
            raise
        raise _lacks("schedule-free", "schedulefree") from None
    config = request.config
    made = schedulefree.AdamWScheduleFree(
        groups(request.model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        foreach=False,
    )
    made.train()
    return made


_MAKERS: dict[str, Callable[[_Request], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "apollo": _apollo,
    "apollo-mini": _apollo_mini,
    "ademamix": _ademamix,
    "schedule-free": _schedule_free,
}


def covered(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Return the numbers of parameters with optimizer state and of all its parameters."""
    given: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(1 for parameter in given if optimizer.state.get(parameter)), len(given)

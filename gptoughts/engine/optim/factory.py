"""The optimizers that a recipe can name, each as one object with one list of groups, one state and one step.

muon and the apollos treat the matrices inside the repeated blocks in their own way and leave everything else to AdamW: embeddings,
head, norms, biases, and weights with three dimensions such as fused experts. lion and ademamix come from the package pytorch-optimizer,
schedule-free from its authors' schedulefree (docs/decisions.md says why, and why apollo is written here).
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
from gptoughts.engine.optim.schedule_and_groups import adamw_over, by_decay, groups, trained
from gptoughts.errors import ConfigError

Implementation = Literal["plain", "fused", "torchao", "bitsandbytes"]
"""One parameter and one operator at a time; torch's fused kernel; or a package that stores the state in eight bits. All but the first
are for AdamW only."""
ONLY_ADAMW = {
    "fused": "torch fuses AdamW only",
    "torchao": "its state has eight bits for AdamW only",
    "bitsandbytes": "its state has eight bits for AdamW only",
}

TRAINED = "trained"
"""Where schedule-free keeps the weights that it trains while the model holds their average."""


@dataclass(frozen=True)
class _Asked:
    """What an optimizer is made from."""

    model: nn.Module
    config: OptimConfig
    implementation: Implementation
    blocks: tuple[nn.Module, ...]
    seed: int
    updates: int | None

    @property
    def adamw(self) -> dict[str, bool]:
        """How torch's AdamW is to compute."""
        return {"fused": True} if self.implementation == "fused" else {"fused": False, "foreach": False}


def optimizer(
    model: nn.Module,
    config: OptimConfig,
    implementation: Implementation,
    blocks: Iterable[nn.Module] = (),
    seed: int = 0,
    updates: int | None = None,
) -> torch.optim.Optimizer:
    """The optimizer that `config` names, over every parameter of `model` that wants a gradient.

    blocks   the model's repeated blocks (`engine.blocks`), which tell muon and apollo what is hidden
    seed     of apollo's projections
    updates  length of the run, over which ademamix raises its slow average

    Raises ConfigError where the model has nothing that the optimizer is for, or where its package is missing.
    """
    if implementation in ONLY_ADAMW and config.name != "adamw":
        raise ConfigError(f"optim.name = {config.name}: {ONLY_ADAMW[implementation]}\n  try: --layer.optimizer plain")
    return _MAKERS[config.name](_Asked(model, config, implementation, tuple(blocks), seed, updates))


@contextmanager
def attached(engine: Engine, implementation: Implementation) -> Iterator[None]:
    """Give `engine` its recipe's optimizer. What evaluates, samples or saves inside `eval_context` sees the weights it stands for.

    Afterwards the engine has the optimizer it had before, and the model keeps the weights that evaluation saw.
    """
    recipe = engine.recipe
    before = engine.optimizer
    made = optimizer(engine.bare, recipe.optim, implementation, engine.blocks.values(), recipe.seed, known_updates(recipe))
    engine.optimizer = made
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
    """Length of the run in updates, where the recipe alone tells it: not in epochs, and not by the clock."""
    train = recipe.train
    if train.tokens is not None:
        return math.ceil(train.tokens / (train.global_batch * recipe.data.sequence_length))
    return train.steps


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """The model holds schedule-free's averaged weights inside, and to the last bit those that it trains afterwards.

    The package goes back by arithmetic, which moves last bits, and then a validation more or less would be another training. So the
    trained weights are kept, in the optimizer's state: a checkpoint that is taken inside holds both, and one that is restored inside
    leaves them in place. Costs the memory of the weights once, at a time when there are no gradients.
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


class Together(torch.optim.Optimizer):
    """Several optimizers over parameters of their own as one: one list of groups, one state, one step."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> Any:
        """One update by every part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for part in self.parts:
            count = len(part.param_groups)
            # Handed over anew each time: whoever loads a state replaces these containers.
            part.param_groups, part.state = self.param_groups[start : start + count], self.state
            start += count
            part.step()
        return loss


def hidden_matrices(model: nn.Module, blocks: Iterable[nn.Module], name: str) -> list[nn.Parameter]:
    """Trained weights with two dimensions inside `blocks` that no embedding and nothing outside the blocks holds.

    Told by place and identity, so that it holds for native, pretrained and adapted models alike. Raises ConfigError where there is none.
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
            f"optim.name = {name}: is for matrices inside a model's repeated blocks, and {len(inside)} modules in blocks hold none "
            "that is trained\n  try: --optim.name adamw"
        )
    return found


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(parameter): parameter for parameter in parameters}.values())


def _with_adamw(asked: _Asked, part: torch.optim.Optimizer, matrices: list[nn.Parameter]) -> Together:
    """`part`, which updates `matrices`, and AdamW for everything else."""
    taken = {id(parameter) for parameter in matrices}
    rest = by_decay((parameter for parameter in trained(asked.model) if id(parameter) not in taken), asked.config)
    return Together([part, adamw_over(rest, asked.config, **asked.adamw)] if rest else [part])


def _adamw(asked: _Asked) -> torch.optim.Optimizer:
    if asked.implementation in ("torchao", "bitsandbytes"):
        made = groups(asked.model, asked.config)
        return adamw_in_eight_bits(made, asked.config, asked.implementation, sparsely_graded(asked.model))
    return adamw_over(groups(asked.model, asked.config), asked.config, **asked.adamw)


def _muon(asked: _Asked) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) as torch has it, scaled to the size of AdamW's updates (Liu et al. 2025).

    An orthogonalized update has entries of about 1 / sqrt(larger side); times 0.2 sqrt(larger side) they are as large as AdamW's
    usually are, so that one rate, one schedule and one decay serve both.
    """
    trained(asked.model)
    matrices, config = hidden_matrices(asked.model, asked.blocks, "muon"), asked.config
    part = torch.optim.Muon(
        matrices,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return _with_adamw(asked, part, matrices)


def _apollo(asked: _Asked) -> torch.optim.Optimizer:
    return _low_rank(asked, asked.config.rank, scale=1.0, per="channel")


def _apollo_mini(asked: _Asked) -> torch.optim.Optimizer:
    return _low_rank(asked, 1, scale=128.0, per="tensor")


def _low_rank(asked: _Asked, rank: int, scale: float, per: Literal["channel", "tensor"]) -> torch.optim.Optimizer:
    trained(asked.model)
    matrices, config = hidden_matrices(asked.model, asked.blocks, asked.config.name), asked.config
    names = {id(parameter): name for name, parameter in asked.model.named_parameters()}
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
        seed=asked.seed,
    )
    return _with_adamw(asked, part, matrices)


def _lacks(name: str, package: str) -> ConfigError:
    return ConfigError(
        f"optim.name = {name}: needs the package {package}, not installed\n  try: pip install 'gptoughts[optimizers]'"
    )


def _library(name: str) -> Any:
    try:
        import pytorch_optimizer
    except ModuleNotFoundError as error:
        if error.name != "pytorch_optimizer":
            raise
        raise _lacks(name, "pytorch-optimizer") from None
    return pytorch_optimizer


def _lion(asked: _Asked) -> torch.optim.Optimizer:
    """Lion (Chen et al. 2023): every weight moves by the rate, so the rate wants to be a third to a tenth of AdamW's."""
    config = asked.config
    return _library("lion").Lion(
        groups(asked.model, config), lr=config.learning_rate, betas=(config.beta1, config.beta2), foreach=False
    )


def _ademamix(asked: _Asked) -> torch.optim.Optimizer:
    """AdEMAMix (Pagliardini et al. 2024); alpha and beta3 rise over the whole run, without which it diverges early."""
    config = asked.config
    if asked.updates is None:
        raise ConfigError(
            "optim.name = ademamix: raises alpha and beta3 over the run and must know its length in updates\n"
            "  try: --train.steps N or --train.tokens N"
        )
    return _library("ademamix").AdEMAMix(
        groups(asked.model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2, config.beta3),
        weight_decouple=True,
        alpha=config.alpha,
        t_alpha_beta3=asked.updates,
        eps=config.epsilon,
        foreach=False,
    )


def _schedule_free(asked: _Asked) -> torch.optim.Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024). The recipe's own warm-up raises the rate, so the package has none to do."""
    try:
        import schedulefree
    except ModuleNotFoundError as error:
        if error.name != "schedulefree":
            raise
        raise _lacks("schedule-free", "schedulefree") from None
    config = asked.config
    made = schedulefree.AdamWScheduleFree(
        groups(asked.model, config),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        foreach=False,
    )
    made.train()
    return made


_MAKERS: dict[str, Callable[[_Asked], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "lion": _lion,
    "apollo": _apollo,
    "apollo-mini": _apollo_mini,
    "ademamix": _ademamix,
    "schedule-free": _schedule_free,
}


def covered(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Parameters that the optimizer has a memory of, and all that it was given."""
    given: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(1 for parameter in given if optimizer.state.get(parameter)), len(given)

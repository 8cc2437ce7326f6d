"""Numbers of eight bits by the packages that have them. The only file that imports torchao; bitsandbytes comes from `models.quantized`.

AdamW's two moments are stored as 8-bit codes with one scale per 256 values (Dettmers et al. 2022, 8-bit Optimizers via Block-wise
Quantization). What a checkpoint holds of them are the codes and the scales, as plain tensors.

Weights whose gradient is zero for most of their entries keep moments of 32 bits. A second moment far below its block's largest is stored as
zero; where the gradient is zero at the next update, too, the first moment is divided by epsilon alone. Seen here: after four updates at a
rate of 1e-3, embeddings of a tiny BERT stood 3.9 from where float32 moments leave them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gptoughts.config.loader import OptimConfig
from gptoughts.engine.optim.param_groups import Group
from gptoughts.errors import CheckpointError, LayerError
from gptoughts.models.adapters.nf4 import bitsandbytes_package
from gptoughts.models.torch_internals import child_table, share_parameters

Package = Literal["torchao", "bitsandbytes"]
Scaling = Literal["tensorwise", "rowwise"]

LEAST_VALUES = 4096
"""Both packages keep the moments of smaller tensors in float32."""
BLOCK = 256
"""Values that share one scale; torchao keeps a tensor that they do not divide in float32."""
TABLES = ("qmap1", "qmap2")
"""What bitsandbytes' codes stand for: the same two tables for every tensor, so no checkpoint holds them."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torchao says as it is imported: that kernels for other machines could not be loaded."""
    talks = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [talk.level for talk in talks]
    for talk in talks:
        talk.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for talk, level in zip(talks, levels, strict=True):
            talk.setLevel(level)


def adamw_in_eight_bits(
    groups: list[Group], config: OptimConfig, package: Package, whole: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """AdamW over `groups` whose moments are stored in eight bits, but for those of `whole`, and of small parameters.

    Raises LayerError where `package` is missing or broken.
    """
    make = _of_torchao() if package == "torchao" else _of_bitsandbytes()
    made: Any = make(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)
    made.whole = frozenset(id(parameter) for parameter in whole)
    return cast("torch.optim.Optimizer", made)


def sparsely_graded(model: nn.Module) -> list[Tensor]:
    """Parameters of which one batch moves few entries: embeddings, and experts that are fused into one weight."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return [*tables, *(parameter for parameter in model.parameters() if parameter.dim() >= 3)]


def packs(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> bool:
    """Whether `optimizer` is one of these and is to keep the moments of `parameter` in eight bits."""
    is_large = parameter.numel() >= LEAST_VALUES and parameter.numel() % BLOCK == 0
    return is_large and id(parameter) not in getattr(optimizer, "whole", {id(parameter)})


def in_eight_bits(values: Mapping[str, Any]) -> bool:
    """Whether two moments in an optimizer's state of one parameter are codes of eight bits."""
    codes = [getattr(value, "codes", value) for value in values.values() if isinstance(value, Tensor)]
    return sum(code.dtype is torch.uint8 for code in codes) >= 2


def bytes_of(values: Mapping[str, Any]) -> int:
    """Memory of one parameter's state; bitsandbytes' tables, which all share, are left out."""
    tensors = [value for key, value in values.items() if isinstance(value, Tensor) and key not in TABLES]
    parts = [part for tensor in tensors for part in _parts(tensor).values()]
    return sum(part.nbytes for part in parts)


def _parts(phase: Any) -> dict[str, Tensor]:
    """A moment of torchao as the tensors it is made of; any other tensor is its own only part."""
    return {"codes": phase.codes, "scale": phase.scale} if hasattr(phase, "codes") else {"": phase}


def _of_torchao() -> Any:
    try:
        with quiet():
            import torchao  # noqa: F401  # first, so that a missing package is told from one without optimizers
            from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise LayerError(f"torchao is installed and cannot be imported: {error}") from error
        raise LayerError("optimizer=8bit: needs the package torchao\n  try: pip install 'gptoughts[lowbit]'") from None
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(f"torchao is installed and cannot be imported: {type(error).__name__}: {error}") from error

    class OfTorchao(AdamW8bit):
        """torchao's AdamW8bit, which keeps its moments in a tensor class of its own."""

        made_by = "torchao.AdamW8bit"

        whole: frozenset[int] = frozenset()

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if packs(self, p) else torch.zeros_like(p)

        def step(self, closure: Any = None) -> Any:
            """One update. On a CPU operator by operator: the package compiles a kernel for every shape, and a GPU earns that back."""
            on_gpu = any(parameter.is_cuda for group in self.param_groups for parameter in group["params"])
            with nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

        def stored(self, parameter: Tensor) -> dict[str, Any]:
            """Codes and scales as plain tensors."""
            plain = {}
            for key, value in self.state[parameter].items():
                parts = _parts(value) if isinstance(value, Tensor) else {"": value}
                plain.update({f"{key}.{part}" if part else key: tensor for part, tensor in parts.items()})
            return plain

        def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
            """Moments as `stored` gave them."""
            state: dict[str, Any] = {"step": values["step"].clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                phase = self._new_buffer(parameter, key == "exp_avg")
                for part, into in _parts(phase).items():
                    _fill(into, values.get(f"{key}.{part}" if part else key), key)
                state[key] = phase
            self.state[parameter] = state

    return OfTorchao


def _of_bitsandbytes() -> Any:
    package = bitsandbytes_package()

    class OfBitsandbytes(package.optim.AdamW8bit):  # type: ignore[name-defined]  # known only here
        """bitsandbytes' AdamW8bit."""

        made_by = "bitsandbytes.AdamW8bit"
        whole: frozenset[int] = frozenset()

        def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
            """Settings of one parameter: of those that are to stay whole, 32 bits."""
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config if packs(self, group["params"][pindex]) else {**config, "optim_bits": 32}

        def stored(self, parameter: Tensor) -> dict[str, Any]:
            """Everything but the tables."""
            return {key: value for key, value in self.state[parameter].items() if key not in TABLES}

        def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
            """Moments as `stored` gave them, and the tables again."""
            if "state1" not in values or values["state1"].shape != parameter.shape:
                raise CheckpointError(f"the optimizer's state does not fit a weight of shape {tuple(parameter.shape)}")
            state = {key: value.to(parameter.device) if isinstance(value, Tensor) else value for key, value in values.items()}
            if in_eight_bits(state):
                kinds = zip(TABLES, ("dynamic", "udynamic"), strict=True)
                state |= {key: self.name2qmap[kind].to(parameter.device) for key, kind in kinds}
            self.state[parameter] = state

    return OfBitsandbytes


def _fill(into: Tensor, value: Tensor | None, key: str) -> None:
    if value is None or value.shape != into.shape or value.dtype != into.dtype:
        found = "missing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        raise CheckpointError(f"the optimizer's {key}: {found}, needs {into.dtype} of shape {tuple(into.shape)}")
    into.copy_(value)


# --- products of eight bits


def torchao_float8() -> Any:
    """torchao's float8 package. Raises LayerError with the package's own error where it is installed and broken."""
    try:
        with quiet():
            import torchao.float8 as package
            from torchao.float8 import float8_linear  # noqa: F401  # a part of it may be missing
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(
            f"precision fp8-torchao: torchao is installed and does not import: {type(error).__name__}: {error}"
        ) from error
    return package


def quantize_projections(model: nn.Module, names: Iterable[str], scaling: Scaling, emulate: bool) -> Callable[[], None]:
    """Put torchao's Float8Linear in the place of each nn.Linear that `names` names. Returns the undo.

    The new module works on the very table of parameters of the old one, so names, ties and values are the model's own whoever holds
    them when, and the old module has them when it comes back. `emulate`: quantize, then multiply in float32, where there is no FP8 unit.
    Without gradients (evaluation) it multiplies as nn.Linear does. Raises LayerError where torchao converts another number than was named.
    """
    package, wanted = torchao_float8(), frozenset(names)
    config = replace(package.Float8LinearConfig.from_recipe_name(scaling), emulate=emulate)
    before = {name: model.get_submodule(name) for name in wanted}
    # Through the package's own door, which also keeps inductor from a known miscompilation (triton issue 11111).
    package.convert_to_float8_training(model, module_filter_fn=lambda _, name: name in wanted, config=config)
    kind = _float8_linear()
    for name, old in before.items():
        new = model.get_submodule(name)
        if type(new) is old.__class__:
            raise LayerError(f"precision fp8-torchao: torchao left {name} as it was")
        new.__class__ = kind
        new.train(old.training)
        share_parameters(new, old)

    def undo() -> None:
        for name, old in before.items():
            old.train(model.get_submodule(name).training)
            parent, _, own = name.rpartition(".")
            child_table(model.get_submodule(parent))[own] = old

    return undo


@cache
def _float8_linear() -> Any:
    from torchao.float8.float8_linear import Float8Linear

    class Quantized(Float8Linear):
        """A Float8Linear that evaluates as nn.Linear does."""

        in_eight_bits = True

        def forward(self, input: Tensor) -> Tensor:
            """input ... C -> ... D."""
            if torch.is_grad_enabled():
                return super().forward(input)
            return functional.linear(input, self.weight, self.bias)

    return Quantized


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` multiplies in 8-bit floating point; asks no package, which may not be here."""
    return getattr(module, "in_eight_bits", False) is True

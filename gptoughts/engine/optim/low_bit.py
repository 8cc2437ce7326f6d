"""8-bit optimizer state and FP8 matmuls. The only file that imports torchao; bitsandbytes comes from `models.adapters.nf4`.

AdamW's two moments are stored as 8-bit codes with one scale per 256 values (Dettmers et al. 2022, 8-bit Optimizers via Block-wise
Quantization). Checkpoints hold the codes and scales as plain tensors.

Weights with sparse gradients keep 32-bit moments: a second moment far below its block's maximum is stored as zero, and if the next
gradient is zero too, the first moment is divided by epsilon alone. Measured: after four updates at a rate of 1e-3, embeddings of a tiny
BERT differed by 3.9 from those with float32 moments.
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
from gptoughts.console import NOISY_LOGGERS
from gptoughts.engine.optim.param_groups import Group
from gptoughts.errors import CheckpointError, LayerError
from gptoughts.models.adapters.nf4 import bitsandbytes_package
from gptoughts.models.torch_internals import child_table, share_parameters

Package = Literal["torchao", "bitsandbytes"]
Scaling = Literal["tensorwise", "rowwise"]

LEAST_VALUES = 4096
"""Both packages keep moments of smaller tensors in float32."""
BLOCK = 256
"""Values per scale; torchao keeps tensors that are not a multiple of it in float32."""
TABLES = ("qmap1", "qmap2")
"""bitsandbytes' code tables, the same two for every tensor and therefore not in checkpoints."""


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torchao's import warnings about kernels for other machines."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def adamw_in_eight_bits(
    groups: list[Group], config: OptimConfig, package: Package, whole: Iterable[Tensor] = ()
) -> torch.optim.Optimizer:
    """Build AdamW with 8-bit moments over `groups`; parameters in `whole` and small ones keep 32-bit moments.

    Raises LayerError where `package` is missing or broken.
    """
    make = _of_torchao() if package == "torchao" else _of_bitsandbytes()
    made: Any = make(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.epsilon)
    made.whole = frozenset(id(parameter) for parameter in whole)
    return cast("torch.optim.Optimizer", made)


def sparsely_graded(model: nn.Module) -> list[Tensor]:
    """Return parameters with sparse gradients: embeddings, and experts fused into one weight."""
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return [*tables, *(parameter for parameter in model.parameters() if parameter.dim() >= 3)]


def packs(optimizer: torch.optim.Optimizer | None, parameter: Tensor) -> bool:
    """Return whether `optimizer` is an 8-bit one and stores the moments of `parameter` in eight bits."""
    is_large = parameter.numel() >= LEAST_VALUES and parameter.numel() % BLOCK == 0
    return is_large and id(parameter) not in getattr(optimizer, "whole", {id(parameter)})


def in_eight_bits(values: Mapping[str, Any]) -> bool:
    """Return whether both moments in one parameter's state are 8-bit codes."""
    codes = [getattr(value, "codes", value) for value in values.values() if isinstance(value, Tensor)]
    return sum(code.dtype is torch.uint8 for code in codes) >= 2


def bytes_of(values: Mapping[str, Any]) -> int:
    """Return the bytes of one parameter's state, without bitsandbytes' shared tables."""
    tensors = [value for key, value in values.items() if isinstance(value, Tensor) and key not in TABLES]
    parts = [part for tensor in tensors for part in _parts(tensor).values()]
    return sum(part.nbytes for part in parts)


def _parts(moment: Any) -> dict[str, Tensor]:
    """Return codes and scale of a torchao moment; of any other tensor the tensor itself under an empty name."""
    return {"codes": moment.codes, "scale": moment.scale} if hasattr(moment, "codes") else {"": moment}


def _of_torchao() -> Any:
    try:
        with quiet():
            import torchao  # noqa: F401  # first, to tell a missing package from one without optimizers
            from torchao.optim import AdamW8bit
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise LayerError(f"optimizer=8bit: torchao is installed, but the import fails: {error}") from error
        raise LayerError("optimizer=8bit: needs the package torchao", fix="pip install 'gptoughts[lowbit]'") from None
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(
            f"optimizer=8bit: torchao is installed, but the import fails: {type(error).__name__}: {error}"
        ) from error

    class OfTorchao(AdamW8bit):
        """torchao's AdamW8bit, whose moments are tensor subclasses."""

        made_by = "torchao.AdamW8bit"

        whole: frozenset[int] = frozenset()

        def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
            return super()._new_buffer(p, signed) if packs(self, p) else torch.zeros_like(p)

        def step(self, closure: Any = None) -> Any:
            """Run one update, eager on a CPU: the package compiles a kernel per shape, which pays off on a GPU only."""
            on_gpu = any(parameter.is_cuda for group in self.param_groups for parameter in group["params"])
            with nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                return super().step(closure)

        def stored(self, parameter: Tensor) -> dict[str, Any]:
            """Return codes and scales as plain tensors."""
            plain = {}
            for key, value in self.state[parameter].items():
                parts = _parts(value) if isinstance(value, Tensor) else {"": value}
                plain.update({f"{key}.{part}" if part else key: tensor for part, tensor in parts.items()})
            return plain

        def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
            """Restore moments from `stored`."""
            state: dict[str, Any] = {"step": values["step"].clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = self._new_buffer(parameter, key == "exp_avg")
                for part, into in _parts(moment).items():
                    _fill(into, values.get(f"{key}.{part}" if part else key), key)
                state[key] = moment
            self.state[parameter] = state

    return OfTorchao


def _of_bitsandbytes() -> Any:
    package = bitsandbytes_package()

    class OfBitsandbytes(package.optim.AdamW8bit):  # type: ignore[name-defined]
        """bitsandbytes' AdamW8bit."""

        made_by = "bitsandbytes.AdamW8bit"
        whole: frozenset[int] = frozenset()

        def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
            """Return the settings of one parameter, with 32 bits for those in `whole`."""
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config if packs(self, group["params"][pindex]) else {**config, "optim_bits": 32}

        def stored(self, parameter: Tensor) -> dict[str, Any]:
            """Return the state without the tables."""
            return {key: value for key, value in self.state[parameter].items() if key not in TABLES}

        def take(self, parameter: Tensor, values: Mapping[str, Any]) -> None:
            """Restore moments from `stored`, and the tables."""
            if "state1" not in values or values["state1"].shape != parameter.shape:
                found = f"shape {tuple(values['state1'].shape)}" if "state1" in values else "no state1"
                raise CheckpointError(f"optimizer state: a weight needs shape {tuple(parameter.shape)}", found=found)
            state = {key: value.to(parameter.device) if isinstance(value, Tensor) else value for key, value in values.items()}
            if in_eight_bits(state):
                kinds = zip(TABLES, ("dynamic", "udynamic"), strict=True)
                state |= {key: self.name2qmap[kind].to(parameter.device) for key, kind in kinds}
            self.state[parameter] = state

    return OfBitsandbytes


def _fill(into: Tensor, value: Tensor | None, key: str) -> None:
    if value is None or value.shape != into.shape or value.dtype != into.dtype:
        found = "nothing" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        raise CheckpointError(f"optimizer state {key}: needs {into.dtype} of shape {tuple(into.shape)}", found=found)
    into.copy_(value)


# --- FP8 matmuls


def torchao_float8() -> Any:
    """Import torchao's float8 package. Raises LayerError where it is missing or broken."""
    try:
        with quiet():
            import torchao.float8 as package
            from torchao.float8 import float8_linear  # noqa: F401  # may be missing in the package
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        raise LayerError(
            f"precision=fp8-torchao: torchao is installed, but the import fails: {type(error).__name__}: {error}"
        ) from error
    return package


def quantize_projections(model: nn.Module, names: Iterable[str], scaling: Scaling, emulate: bool) -> Callable[[], None]:
    """Replace each nn.Linear in `names` by torchao's Float8Linear. Returns the undo.

    The new module shares the parameter table of the old one, so names, ties and values stay the model's, also after the undo.
    `emulate`: quantize, then multiply in float32, for devices without FP8. Without gradients (evaluation) it computes as nn.Linear.
    Raises LayerError where torchao leaves a module unchanged.
    """
    package, wanted = torchao_float8(), frozenset(names)
    config = replace(package.Float8LinearConfig.from_recipe_name(scaling), emulate=emulate)
    before = {name: model.get_submodule(name) for name in wanted}
    # The package's own conversion also works around an Inductor miscompilation (triton issue 11111).
    package.convert_to_float8_training(model, module_filter_fn=lambda _, name: name in wanted, config=config)
    kind = _float8_linear()
    for name, old in before.items():
        new = model.get_submodule(name)
        if type(new) is old.__class__:
            raise LayerError(f"precision=fp8-torchao: torchao did not convert {name}")
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
        """Float8Linear that evaluates as nn.Linear."""

        in_eight_bits = True

        def forward(self, input: Tensor) -> Tensor:
            """Map input (..., C) to (..., D)."""
            if torch.is_grad_enabled():
                return super().forward(input)
            return functional.linear(input, self.weight, self.bias)

    return Quantized


def is_quantized(module: nn.Module) -> bool:
    """Return whether `module` multiplies in FP8; imports no package."""
    return getattr(module, "in_eight_bits", False) is True

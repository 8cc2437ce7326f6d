"""Model families: how each architecture is built, where its parts are, and how its weights are initialized.

Optimizations and weight loading use this interface and never depend on a model's class name.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn as nn

from gptoughts.config.loader import ModelConfig
from gptoughts.errors import ConfigError, nearest
from gptoughts.models.gpt.gpt import GPT, Attention, AttentionFunction
from gptoughts.models.gpt.masks import MASKS, MaskForm
from gptoughts.models.kernels.fusion import Site, gpt_sites

Undo = Callable[[], None]

GPT2_STD = 0.02


@dataclass(frozen=True)
class Initial:
    """Initialization of one parameter: normal with mean 0 and `std`, all ones, or all zeros."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


class SetAttention(Protocol):
    """Set the attention function of every attention module of a model, with masks of the form that it takes."""

    def __call__(self, model: nn.Module, function: AttentionFunction, form: MaskForm = "dense") -> Undo: ...


@dataclass(frozen=True)
class Family:
    """Interface of one architecture. A field that is None is not supported.

    build            (config, embedding rows, sequence length) -> model; call it under torch.device("meta")
    blocks           model -> {name: repeated block}, in order; empty if none were found
    tied             model -> [(alias, owner)] as configured, also after allocation untied them
    retie            makes each alias the owner's Parameter again
    buffers          (model, device): writes the buffers that are not in checkpoints
    attentions       model -> {name: attention module}
    set_attention    (model, function, mask form = "dense") -> undo; function is an
                     `attention.AttentionFunction`, form a `masks.MaskForm`
    head             model -> module called as head(hidden, labels, reduction) -> loss, with a replaceable `loss`
    initial          (name, full shape, config) -> initialization of that parameter
    sites            model -> sites that a fused norm-and-projection module can replace
    """

    name: str
    build: Callable[[ModelConfig, int, int], nn.Module]
    blocks: Callable[[nn.Module], dict[str, nn.Module]]
    tied: Callable[[nn.Module], list[tuple[str, str]]]
    retie: Callable[[nn.Module], None]
    buffers: Callable[[nn.Module, torch.device], None]
    attentions: Callable[[nn.Module], dict[str, nn.Module]] | None = None
    set_attention: SetAttention | None = None
    head: Callable[[nn.Module], nn.Module] | None = None
    initial: Callable[[str, Sequence[int], ModelConfig], Initial] | None = None
    sites: Callable[[nn.Module], list[Site]] | None = None


# --- initialization


def draw(seed: int, name: str, shape: Sequence[int], initial: Initial) -> torch.Tensor:
    """Return the initial value of parameter `name`, fp32 on the CPU: a pure function of (seed, name, full shape, initial).

    Every rank draws the whole tensor and keeps its slice, so one rank, DDP and FSDP start from the same bits. Drawn in
    fp64 and rounded, because torch's fp32 normals differ in the last bits between instruction sets (AVX2 and none).
    Takes about 30 ns per element.
    """
    if initial.kind == "ones":
        return torch.ones(tuple(shape), device="cpu")
    if initial.kind == "zeros":
        return torch.zeros(tuple(shape), device="cpu")
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    normal = torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")
    return normal.mul_(initial.std).float()


def initialize(model: nn.Module, family: Family, config: ModelConfig, seed: int) -> None:
    """Initialize an unsharded model in place with `draw`; restore its ties and write its buffers."""
    if family.initial is None:
        raise ConfigError(f"model.family: the {family.name} family has no initialization; pass an initialized model")
    family.retie(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(seed, name, parameter.shape, family.initial(name, parameter.shape, config)))
    family.buffers(model, next(model.parameters()).device)


# --- the native GPT


def gpt_initial(name: str, shape: Sequence[int], config: ModelConfig) -> Initial:
    """Return GPT-2's initialization (Radford et al. 2019): normal 0.02, times 1/sqrt(2 depth) for residual output projections.

    The modern form uses it too (as OLMo 2 and nanoGPT). Norms start at one, biases at zero.
    """
    *_, module, kind = name.split(".")
    if kind == "bias":
        return Initial("zeros")
    if module in ("norm", "norm1", "norm2", "query_norm", "key_norm"):
        return Initial("ones")
    if module in ("out", "down"):
        return Initial("normal", GPT2_STD / math.sqrt(2 * config.depth))
    if module in ("embed", "positions", "head", "qkv", "up", "gate_up"):
        return Initial("normal", GPT2_STD)
    raise ConfigError(f"{name}: no initialization in the gpt family for this parameter")


def _gpt(model: nn.Module) -> GPT:
    if not isinstance(model, GPT):
        raise TypeError(f"model: not a GPT. Found {type(model).__name__}")
    return model


def _gpt_blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {f"blocks.{index}": block for index, block in enumerate(_gpt(model).blocks)}


def _gpt_tied(model: nn.Module) -> list[tuple[str, str]]:
    return [("head.weight", "embed.weight")] if _gpt(model).config.tied else []


def _gpt_attentions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Attention)}


def _gpt_set_attention(model: nn.Module, function: AttentionFunction, form: MaskForm = "dense") -> Undo:
    before = [(module, module.attend) for module in model.modules() if isinstance(module, Attention)]
    for module, _ in before:
        module.attend = function
    gpt = _gpt(model)
    masking, gpt.masking = gpt.masking, MASKS[form]

    def undo() -> None:
        gpt.masking = masking
        for module, old in before:
            module.attend = old

    return undo


def native(name: str, causal: bool) -> Family:
    """Return the family of the native GPT: causal (gpt) or bidirectional (llada: the mask predictor of Nie et al. 2025)."""
    return Family(
        name=name,
        build=partial(GPT, causal=causal),
        blocks=_gpt_blocks,
        tied=_gpt_tied,
        retie=lambda model: _gpt(model).tie(),
        buffers=lambda model, device: _gpt(model).build_buffers(device),
        attentions=_gpt_attentions,
        set_attention=_gpt_set_attention,
        head=lambda model: _gpt(model).head,
        initial=gpt_initial,
        sites=gpt_sites,
    )


FAMILIES: dict[str, Family] = {"gpt": native("gpt", causal=True), "llada": native("llada", causal=False)}


def family_of(name: str) -> Family:
    """Return the family called `name`. Raises ConfigError with the nearest name if there is none."""
    if name not in FAMILIES:
        raise ConfigError(f"model.family: not one of {', '.join(FAMILIES)}{nearest(name, FAMILIES)}", found=repr(name))
    return FAMILIES[name]


# --- a user's own model


def custom_family(model: nn.Module) -> Family:
    """Return the family of a user's own module: its ties and repeated blocks, without attention, head or initialization.

    Blocks are the longest nn.ModuleList or nn.Sequential of at least two children of one class.
    """
    blocks = repeated_blocks(model)
    ties = shared_parameters(model)
    return Family(
        name="custom",
        build=lambda config, vocab_size, sequence_length: model,
        blocks=lambda _: dict(blocks),
        tied=lambda _: list(ties),
        retie=lambda own: _retie(own, ties),
        buffers=_require_real_buffers,
    )


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> child of the longest list of same-class children in `model`, the outermost of equally long ones."""
    longest: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        same_class = len({type(child) for child in children.values()}) == 1
        if same_class and len(children) > max(1, len(longest)):
            longest = children
    return longest


def shared_parameters(model: nn.Module) -> list[tuple[str, str]]:
    """Return (alias, owner) of every Parameter with more than one name; the owner is its first name."""
    owners: dict[int, str] = {}
    aliases = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(id(parameter), name)
        if owner != name:
            aliases.append((name, owner))
    return aliases


def _retie(model: nn.Module, ties: list[tuple[str, str]]) -> None:
    for alias, owner in ties:
        module, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(module), attribute, model.get_parameter(owner))


def _require_real_buffers(model: nn.Module, device: torch.device) -> None:
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise ConfigError(f"model: buffers on the meta device: {', '.join(empty)}", fix="build the model on a real device")

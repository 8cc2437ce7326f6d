"""Mixtures of experts in models that others wrote: where their routers are, how they choose, and how unbalanced they are.

Nothing here knows a model by its name. A holder of experts is a module with a weight of three dimensions, the first of them the
experts (transformers since 5.0), or an `nn.ModuleList` of modules of one class. A router is a module beside a holder that has a
matrix with as many rows or columns as there are experts, and that answers: a copy of it with random weights is given hidden states
on the CPU and must return a score for every expert and the numbers of those it chose. The answer also tells whether scores become
probabilities by softmax or by sigmoid. It costs a few milliseconds a router and works for models on meta.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.errors import ConfigError, listed
from gptoughts.models.torch_internals import convolution_type, unsaved_buffers

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What transformers' configs call the number of experts that a token can be sent to."""
COEFFICIENT = "router_aux_loss_coef"
ALPHA = "aux_loss_alpha"
BIASES = ("e_score_correction_bias", "expert_bias")
"""What models call the bias that is added to scores for the choice alone. It learns from loads, not from gradients."""
PROBES = 16


@dataclass(frozen=True)
class Router:
    """One router, as its module answered."""

    name: str
    module: nn.Module
    experts: int
    chosen: int
    """Experts per token."""
    scores_at: int
    """Place of the scores, N E before softmax or sigmoid, in what forward returns."""
    choice_at: int
    """Place of the chosen experts, N K integers."""
    sigmoid: bool
    """Whether scores become probabilities by sigmoid; else by softmax."""
    bias: tuple[nn.Module, str] | None
    """Where the bias of the choice is, if there is one: its module and its name there. The tensor itself may be replaced."""

    def balancing_bias(self) -> Tensor | None:
        """The bias of the choice as it is now."""
        return None if self.bias is None else getattr(*self.bias)

    def trained(self) -> bool:
        """Whether any weight of the router learns."""
        return any(parameter.requires_grad for parameter in self.module.parameters())


def routers(model: nn.Module) -> dict[str, Router]:
    """Name -> router of every mixture in `model`, in order; empty for a dense model.

    Raises ConfigError where the model's config counts experts and no mixture is found, and where a mixture's router does not answer.
    """
    found: dict[str, Router] = {}
    silent: dict[str, None] = {}
    for name, block in model.named_modules():
        for holder, experts in _holders(block):
            beside = dict(_beside(block, holder, experts))
            answers = {child: _answer(module, experts) for child, module in beside.items()}
            heard = {child: answer for child, answer in answers.items() if isinstance(answer, tuple)}
            for child, (chosen, scores_at, choice_at, sigmoid) in heard.items():
                full = f"{name}.{child}" if name else child
                bias = _bias(block, holder, experts)
                found[full] = Router(full, beside[child], experts, chosen, scores_at, choice_at, sigmoid, bias)
            if not heard and _stacked(block.get_submodule(holder)):
                reasons = [f"{child} ({type(beside[child]).__name__}) {answer}" for child, answer in answers.items()]
                why = "; ".join(reasons) or f"no module with a matrix of {experts} rows or columns beside them"
                silent[f"{type(block).__name__}: {why}"] = None
    if silent:
        raise listed(
            "experts without a router that answers with scores and chosen experts; this model cannot be trained here", silent
        )
    told = config_of(model)
    if told is not None and not found:
        config, key = told
        raise ConfigError(
            f"the config ({type(config).__name__}) says {key} = {getattr(config, key)}, and no block of the "
            f"{type(model).__name__} holds experts with a router beside them; a dense model needs a config without {key}"
        )
    return found


def described(found: Mapping[str, Router]) -> str:
    """One line for whoever asks what was found."""
    if not found:
        return "dense: no experts"
    kinds: dict[str, int] = {}
    for router in found.values():
        how = "sigmoid" if router.sigmoid else "softmax"
        kind = f"{type(router.module).__name__}, {how}, {router.chosen} of {router.experts} experts"
        kind += f", balancing bias {router.bias[1]}" if router.bias else ""
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def config_of(model: nn.Module) -> tuple[Any, str] | None:
    """The config that counts experts, and its key; None where no module's config does. One expert is no mixture."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "text_config", None)):
            for key in COUNTS:
                value = getattr(part, key, None)
                if isinstance(value, int) and value > 1:
                    return part, key
    return None


def coefficient(model: nn.Module, found: Mapping[str, Router]) -> float:
    """Weight of `balance` by the model's own config, else 0.

    `router_aux_loss_coef` goes with this definition. DeepSeek's `aux_loss_alpha` goes with loads that sum to 1 where these sum to the
    experts per token, so it is divided by them.
    """
    told = config_of(model)
    if told is None or not found:
        return 0.0
    given = getattr(told[0], COEFFICIENT, None)
    if given is not None:
        return float(given)
    return float(getattr(told[0], ALPHA, None) or 0.0) / next(iter(found.values())).chosen


def measured(outputs: Sequence[Tensor], router: Router, counted: Tensor) -> Tensor:
    """2 E: tokens sent to each expert, and probabilities summed, over positions where `counted` (N, 0 or 1) is 1.

    Only the second row has a gradient. Probabilities are softmax of the scores, or sigmoids divided by their sum (DeepSeek-V3).
    """
    scores = outputs[router.scores_at].reshape(-1, router.experts).float()  # N E
    choice = outputs[router.choice_at].reshape(-1, router.chosen)  # N K
    if router.sigmoid:
        positive = scores.sigmoid()
        shares = positive / (positive.sum(-1, keepdim=True) + 1e-20)
    else:
        shares = scores.softmax(-1)
    sent = torch.zeros(router.experts, device=scores.device)
    sent = sent.index_add(0, choice.flatten(), counted[:, None].expand(choice.shape).flatten())
    return torch.stack([sent, (shares * counted[:, None]).sum(0)])


def balance(seen: Sequence[Tensor]) -> Tensor:
    """Experts times the sum over experts of load times mean probability, a mean over layers; `seen` is a `measured` per layer.

    Load is the number of choices of an expert per counted token, so a layer that sends every token to K experts evenly gives K.
    Equal to transformers' `load_balancing_loss_func` called with one layer; with several that function averages loads and
    probabilities over all layers first, so layers that are each lopsided in another way look even to it, and not here.
    The product of two means is not linear in the batch: see `Balanced`. Source: Fedus et al. 2021, Switch Transformers, (4) to (6).
    """
    layers = []
    for sent, probability in seen:
        tokens = probability.detach().sum().clamp(min=1e-6)  # each counted token's probabilities sum to one
        layers.append(len(sent) * (sent.detach() * probability).sum() / tokens**2)
    return torch.stack(layers).mean()


def nudge(router: Router, load: Tensor, rate: float) -> None:
    """Raise the balancing bias by `rate` where `load` (E) is below its mean, lower it where above. Nothing without such a bias.

    Source: Wang et al. 2024, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts; DeepSeek-V3 takes 1e-3.
    """
    bias = router.balancing_bias()
    if bias is None:
        return
    load = load.double()
    with torch.no_grad():
        bias.add_(rate * torch.sign(load.mean() - load).to(bias.dtype).view_as(bias))


# --- finding


def _stacked(module: nn.Module) -> int:
    """Experts whose weights `module` itself holds in one tensor; 0 where it holds none. A convolution's weight is no experts."""
    if isinstance(module, convolution_type()):
        return 0
    sizes = {
        parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3 and 1 not in parameter.shape
    }
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 1 else 0


def _holders(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Children of `block` that hold experts, with their number."""
    for name, child in block.named_children():
        count = _stacked(child)
        if not count and isinstance(child, nn.ModuleList) and len({type(expert) for expert in child}) == 1:
            count = len(child)
        if count > 1:
            yield name, count


def _beside(block: nn.Module, holder: str, experts: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if name != holder and any(weight.ndim == 2 and experts in weight.shape for weight in child.parameters()):
            yield name, child


def _bias(block: nn.Module, holder: str, experts: int) -> tuple[nn.Module, str] | None:
    for name, module in block.named_modules():
        if name.split(".")[0] == holder:
            continue
        own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
        for key in BIASES:
            if key in own and own[key].numel() == experts and not own[key].requires_grad:
                if key in unsaved_buffers(module):
                    raise ConfigError(f"{name}.{key} balances experts and is not saved: it must be a persistent buffer")
                return module, key
    return None


def _answer(module: nn.Module, experts: int) -> tuple[int, int, int, bool] | str:
    """Experts per token, places of scores and choice, and whether sigmoid; or why the module is no router."""
    probe = copy.deepcopy(module)
    probe.__dict__.pop("forward", None)  # the class's own, whatever was laid over this one
    probe.to_empty(device="cpu").float().eval()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for buffer in probe.buffers():
            buffer.zero_()
        for name, parameter in probe.named_parameters():
            if name.split(".")[-1] in BIASES:
                parameter.zero_()
        width = next(weight.shape[-1] for weight in probe.parameters() if weight.ndim == 2)
        hidden = torch.randn((1, PROBES, width), generator=generator)
        more = list(inspect.signature(probe.forward).parameters.values())[1:]
        extra = [torch.zeros(experts) for one in more if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        try:
            outputs = probe(hidden, *extra)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return _reading(outputs, experts)


def _reading(outputs: Any, experts: int) -> tuple[int, int, int, bool] | str:
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, Tensor) for output in outputs):
        return "does not return several tensors"
    scores_at = next((at for at, one in enumerate(outputs) if one.is_floating_point() and one.shape[-1:] == (experts,)), None)
    choice_at = next((at for at, one in enumerate(outputs) if one.dtype in (torch.int64, torch.int32)), None)
    if scores_at is None or choice_at is None:
        return "does not return scores of every expert and the experts chosen"
    scores, choice = outputs[scores_at].reshape(-1, experts), outputs[choice_at]
    if len(scores) != PROBES or choice.numel() % PROBES or choice.numel() > PROBES * experts:
        return "does not return a row for each token"
    choice = choice.reshape(PROBES, -1).long()
    others = [one for at, one in enumerate(outputs) if at not in (scores_at, choice_at) and one.numel() == choice.numel()]
    sigmoid = any(_weighs(one.reshape(choice.shape), scores.sigmoid().gather(1, choice)) for one in others)
    softmax = any(_weighs(one.reshape(choice.shape), scores.softmax(-1).gather(1, choice)) for one in others)
    return choice.shape[1], scores_at, choice_at, sigmoid and not softmax


def _weighs(weights: Tensor, expected: Tensor) -> bool:
    """Whether each token's weights are the expected ones, but for a factor of its own."""
    if weights.shape[1] == 1:
        return torch.allclose(weights, expected, rtol=1e-3)
    return torch.allclose(weights / weights.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True), rtol=1e-3)

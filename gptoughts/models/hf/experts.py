"""Find the routers of mixture-of-experts models, and measure and balance their loads.

Detection does not depend on model names. An expert container is a module with a three-dimensional weight whose first dimension is
the experts (transformers since 5.0), or an `nn.ModuleList` of modules of one class. A router is a sibling of a container that has
a matrix with as many rows or columns as there are experts, and passes a probe: a copy with random weights gets hidden states on
the CPU and must return a score for every expert and the indices of the chosen ones. The probe also detects whether scores become
probabilities by softmax or by sigmoid. It takes a few milliseconds per router and works for models on meta.
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

EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config keys of transformers for the number of routed experts."""
EXPERT_SWITCHES = ("is_moe", "enable_moe_block")
"""Config keys of transformers that say whether a model has experts, where the number alone does not."""
AUX_LOSS_KEY = "router_aux_loss_coef"
DEEPSEEK_AUX_LOSS_KEY = "aux_loss_alpha"
BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
"""Names of the bias added to scores for the choice only. It is updated from loads, not by gradients."""
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Router:
    """Router module and the layout of its outputs, as detected by the probe."""

    name: str
    module: nn.Module
    experts: int
    chosen: int
    """Experts per token."""
    scores_at: int
    """Index in the outputs of the scores, N E before softmax or sigmoid."""
    choice_at: int
    """Index in the outputs of the chosen experts, N K integers."""
    sigmoid: bool
    """Whether scores become probabilities by sigmoid; else by softmax."""
    bias: tuple[nn.Module, str] | None
    """Module and attribute name of the balancing bias, if any. Looked up each time, because the tensor may be replaced."""

    def balancing_bias(self) -> Tensor | None:
        """Return the current balancing bias, or None."""
        return None if self.bias is None else getattr(*self.bias)

    def trained(self) -> bool:
        """Return whether any weight of the router is trained."""
        return any(parameter.requires_grad for parameter in self.module.parameters())


def routers(model: nn.Module) -> dict[str, Router]:
    """Return name -> router of every mixture in `model`, in order; empty for a dense model.

    Raises ConfigError if the model's config counts experts but no mixture is found, and if no router of a mixture passes the probe.
    """
    found: dict[str, Router] = {}
    unsupported: dict[str, None] = {}
    counts = _counts(model)
    for name, block in model.named_modules():
        for container, experts in _expert_containers(block):
            candidates = dict(_router_candidates(block, container, experts))
            results = {child: _probe(module, experts) for child, module in candidates.items()}
            passed = {child: result for child, result in results.items() if isinstance(result, tuple)}
            for child, (chosen, scores_at, choice_at, sigmoid) in passed.items():
                full = f"{name}.{child}" if name else child
                found[full] = Router(
                    name=full, module=candidates[child], experts=experts, chosen=chosen, scores_at=scores_at,
                    choice_at=choice_at, sigmoid=sigmoid, bias=_balancing_bias(block, container, experts),
                )  # fmt: skip
            if not passed and _stacked_experts(block.get_submodule(container)) and (counts is None or experts in counts):
                reasons = [f"{child} ({type(candidates[child]).__name__}) {result}" for child, result in results.items()]
                reason = "; ".join(reasons) or f"no sibling module has a matrix of {experts} rows or columns"
                unsupported[f"{type(block).__name__}: {reason}"] = None
    if unsupported:
        raise listed("model: no router returns scores and chosen experts, so its experts cannot be trained", unsupported)
    counted = config_of(model)
    if counted is not None and not found:
        config, key = counted
        raise ConfigError(
            f"{type(config).__name__}.{key}: no block of {type(model).__name__} has experts with a router",
            found=getattr(config, key),
            fix=f"for a dense model, a config without {key}",
        )
    return found


def described(found: Mapping[str, Router]) -> str:
    """Return a one-line description of the routers."""
    if not found:
        return "dense: no experts"
    kinds: dict[str, int] = {}
    for router in found.values():
        scoring = "sigmoid" if router.sigmoid else "softmax"
        kind = f"{type(router.module).__name__}, {scoring}, {router.chosen} of {router.experts} experts"
        kind += f", balancing bias {router.bias[1]}" if router.bias else ""
        kinds[kind] = kinds.get(kind, 0) + 1
    return "; ".join(f"{count} x {kind}" for kind, count in kinds.items())


def config_of(model: nn.Module) -> tuple[Any, str] | None:
    """Return the config that counts more than one expert, and its key; None without one, or where a switch makes the model dense."""
    for module in model.modules():
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "text_config", None)):
            for key in EXPERT_COUNT_KEYS:
                value = getattr(part, key, None)
                if isinstance(value, int) and value > 1 and all(getattr(part, switch, True) for switch in EXPERT_SWITCHES):
                    return part, key
    return None


def _counts(model: nn.Module) -> set[int] | None:
    """Return every number of the model's configs whose key speaks of experts; None for a model without a config.

    Weights with three dimensions are not experts if their number is none of these: block-diagonal weights of a recurrence, heads.
    """
    config: Any = next(
        (module.config for module in model.modules() if hasattr(getattr(module, "config", None), "to_dict")), None
    )
    parts = [] if config is None else [config, config.get_text_config()]
    if not parts:
        return None
    return {value for part in parts for key in dir(part) if "expert" in key and isinstance(value := getattr(part, key), int)}


def coefficient(model: nn.Module, found: Mapping[str, Router]) -> float:
    """Return the weight of `balance` from the model's config, else 0.

    `router_aux_loss_coef` uses the same definition. DeepSeek's `aux_loss_alpha` assumes loads that sum to 1; ours sum to the experts
    per token, so it is divided by that number.
    """
    counted = config_of(model)
    if counted is None or not found:
        return 0.0
    weight = getattr(counted[0], AUX_LOSS_KEY, None)
    if weight is not None:
        return float(weight)
    return float(getattr(counted[0], DEEPSEEK_AUX_LOSS_KEY, None) or 0.0) / next(iter(found.values())).chosen


def measured(outputs: Sequence[Tensor], router: Router, counted: Tensor) -> Tensor:
    """Return 2 E: tokens sent to each expert and summed probabilities, over positions where `counted` (N, 0 or 1) is 1.

    Only the second row has a gradient. Probabilities are the softmax of the scores, or sigmoids divided by their sum (DeepSeek-V3).
    """
    scores = outputs[router.scores_at].reshape(-1, router.experts).float()  # N E
    choice = outputs[router.choice_at].reshape(-1, router.chosen)  # N K
    if router.sigmoid:
        positive = scores.sigmoid()
        probabilities = positive / (positive.sum(-1, keepdim=True) + 1e-20)
    else:
        probabilities = scores.softmax(-1)
    sent = torch.zeros(router.experts, device=scores.device)
    sent = sent.index_add(0, choice.flatten(), counted[:, None].expand(choice.shape).flatten())
    return torch.stack([sent, (probabilities * counted[:, None]).sum(0)])


def balance(seen: Sequence[Tensor]) -> Tensor:
    """Return E times the sum over experts of load times mean probability, averaged over layers; `seen` has one `measured` per layer.

    Load is the number of choices of an expert per counted token, so a layer that sends every token to K experts evenly gives K.
    Equal to transformers' `load_balancing_loss_func` for one layer. For several, that function first averages loads and
    probabilities over layers, so opposite imbalances of layers cancel there, but not here.
    The product of two means is not linear in the batch: see `Balanced`. Source: Fedus et al. 2021, Switch Transformers, (4) to (6).
    """
    layers = []
    for sent, probability in seen:
        tokens = probability.detach().sum().clamp(min=1e-6)  # probabilities of each counted token sum to one
        layers.append(len(sent) * (sent.detach() * probability).sum() / tokens**2)
    return torch.stack(layers).mean()


def update_balancing_bias(router: Router, load: Tensor, rate: float) -> None:
    """Raise the balancing bias by `rate` for experts whose `load` (E) is below the mean, lower it above. No-op without a bias.

    Source: Wang et al. 2024, Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts; DeepSeek-V3 uses 1e-3.
    """
    bias = router.balancing_bias()
    if bias is None:
        return
    load = load.double()
    with torch.no_grad():
        bias.add_(rate * torch.sign(load.mean() - load).to(bias.dtype).view_as(bias))


# --- detection


def _stacked_experts(module: nn.Module) -> int:
    """Return the number of experts stacked in the three-dimensional weights of `module`, else 0. Convolutions do not count."""
    if isinstance(module, convolution_type()):
        return 0
    sizes = {
        parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.ndim == 3 and 1 not in parameter.shape
    }
    return sizes.pop() if len(sizes) == 1 and min(sizes) > 1 else 0


def _expert_containers(block: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield children of `block` that contain experts, with the number of experts."""
    for name, child in block.named_children():
        count = _stacked_experts(child)
        if not count and isinstance(child, nn.ModuleList) and len({type(expert) for expert in child}) == 1:
            count = len(child)
        if count > 1:
            yield name, count


def _router_candidates(block: nn.Module, container: str, experts: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in block.named_children():
        if name != container and any(weight.ndim == 2 and experts in weight.shape for weight in child.parameters()):
            yield name, child


def _balancing_bias(block: nn.Module, container: str, experts: int) -> tuple[nn.Module, str] | None:
    for name, module in block.named_modules():
        if name.split(".")[0] == container:
            continue
        own = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
        for key in BIAS_NAMES:
            if key in own and own[key].numel() == experts and not own[key].requires_grad:
                if key in unsaved_buffers(module):
                    raise ConfigError(f"{name}.{key}: a balancing bias must be a persistent buffer, so that it is saved")
                return module, key
    return None


def _probe(module: nn.Module, experts: int) -> tuple[int, int, int, bool] | str:
    """Return (experts per token, indices of scores and choice, sigmoid), or the reason why `module` is no router."""
    probe = copy.deepcopy(module)
    probe.__dict__.pop("forward", None)  # use the class's forward, not a patched one
    probe.to_empty(device="cpu").float().eval()
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad(), torch.device("cpu"):
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for buffer in probe.buffers():
            buffer.zero_()
        for name, parameter in probe.named_parameters():
            if name.split(".")[-1] in BIAS_NAMES:
                parameter.zero_()
        width = next(weight.shape[-1] for weight in probe.parameters() if weight.ndim == 2)
        hidden = torch.randn((1, PROBE_TOKENS, width), generator=generator)
        others = list(inspect.signature(probe.forward).parameters.values())[1:]
        needed = [one.name for one in others if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        biases = [one.name for one in others if one.name in BIAS_NAMES]
        try:
            outputs = probe(hidden, **{name: torch.zeros(experts) for name in [*needed, *biases]})
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return _parse_outputs(outputs, experts)


def _parse_outputs(outputs: Any, experts: int) -> tuple[int, int, int, bool] | str:
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, Tensor) for output in outputs):
        return "does not return several tensors"
    scores_at = next((at for at, one in enumerate(outputs) if one.is_floating_point() and one.shape[-1:] == (experts,)), None)
    choice_at = next((at for at, one in enumerate(outputs) if one.dtype in (torch.int64, torch.int32)), None)
    if scores_at is None or choice_at is None:
        return "does not return scores of every expert and the chosen experts"
    scores, choice = outputs[scores_at].reshape(-1, experts), outputs[choice_at]
    if len(scores) != PROBE_TOKENS or choice.numel() % PROBE_TOKENS or choice.numel() > PROBE_TOKENS * experts:
        return "does not return a row for each token"
    choice = choice.reshape(PROBE_TOKENS, -1).long()
    others = [one for at, one in enumerate(outputs) if at not in (scores_at, choice_at) and one.numel() == choice.numel()]
    sigmoid = any(_proportional(one.reshape(choice.shape), scores.sigmoid().gather(1, choice)) for one in others)
    softmax = any(_proportional(one.reshape(choice.shape), scores.softmax(-1).gather(1, choice)) for one in others)
    return choice.shape[1], scores_at, choice_at, sigmoid and not softmax


def _proportional(weights: Tensor, expected: Tensor) -> bool:
    """Return whether each token's weights are proportional to the expected ones."""
    if weights.shape[1] == 1:
        return torch.allclose(weights, expected, rtol=1e-3)
    return torch.allclose(weights / weights.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True), rtol=1e-3)

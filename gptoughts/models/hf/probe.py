"""Probe a causal language model by running it: does a token change what stands before it, and do packed documents stay apart?

The model itself runs if it is small, else a twin of it with small sizes (`twin`), with random weights in float32 on the CPU, in about
0.1 s. Reading the code cannot answer: a config can make a causal architecture read both ways, and the other way round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from gptoughts.console import LOGGER
from gptoughts.models.hf import reading, twin
from gptoughts.models.hf.config import first_line, quiet

LENGTH, CUT, ROWS = 24, 9, 2
"""Tokens of a probed row, tokens of its first document, rows."""
SPREAD = 0.1
"""Standard deviation added to matrices, so that an effect is far above rounding."""
MOVED = 1e-4
"""Smallest change of logits, relative to the largest, that is no rounding."""
SMALL = 4_000_000
"""Parameters up to which the model itself is probed."""
REMEMBERED = 64
OTHER_IDS = 5
"""Ids below are special tokens, which some models treat as padding."""
FORWARD_ERRORS = (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError)
"""What transformers' forwards raise for an argument that they do not support."""


@dataclass(frozen=True)
class Probed:
    """What a probe found; None where it could not run, with the reason in `problem`."""

    before: float | None
    """Largest change of the logits before a changed token, relative to the largest logit."""
    apart: float | None
    """Largest difference of packed documents from each alone; infinity for a model that takes no positions."""
    cached: float | None = None
    """Largest change of the logits of the last token if it is read with a cache; None for a model that takes none."""
    problem: str = ""

    @property
    def caches(self) -> bool:
        """Whether a text may be read token by token."""
        return self.cached is not None and self.cached <= MOVED

    @property
    def causal(self) -> bool | None:
        """Whether no token changes what stands before it."""
        return None if self.before is None else self.before <= MOVED

    @property
    def separates(self) -> bool | None:
        """Whether packed documents, told by positions that restart, stay apart."""
        return None if self.apart is None else self.apart <= MOVED


_KNOWN: OrderedDict[str, Probed] = OrderedDict()


def probe(config: PretrainedConfig, make: Callable[[PretrainedConfig], PreTrainedModel], parameters: int) -> Probed:
    """Return what a run of the model of `config` shows; `make` builds it, and `parameters` is its size. Results are remembered.

    Random state is kept. Never raises: a model that cannot run is no error here, and is told once.
    """
    key = f"{type(config).__module__}.{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _KNOWN:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), quiet():
            _KNOWN[key] = _probed(config, make, parameters)
        if _KNOWN[key].problem:
            LOGGER.warning("model %s: not tried whether it is causal: %s", config.model_type, _KNOWN[key].problem)
        while len(_KNOWN) > REMEMBERED:
            _KNOWN.popitem(last=False)
    return _KNOWN[key]


def _probed(config: PretrainedConfig, make: Callable[[PretrainedConfig], PreTrainedModel], parameters: int) -> Probed:
    try:
        model = make(config if parameters <= SMALL else smaller(config)).eval()
    except Exception as error:  # of transformers, for sizes that do not fit each other
        return Probed(None, None, problem=f"no tiny model of this config: {type(error).__name__}: {first_line(error)}")
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=generator))
        rows = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(min(OTHER_IDS, rows // 2), rows, (ROWS, LENGTH), generator=generator)
        try:
            whole = _logits(model, ids)
            changed = ids.clone()
            changed[:, CUT] = torch.where(ids[:, CUT] == rows - 1, rows - 2, rows - 1)
            before = _far(_logits(model, changed)[:, :CUT], whole[:, :CUT], whole)
        except Exception as error:  # of transformers' forward
            return Probed(None, None, problem=f"its tiny model does not run: {type(error).__name__}: {first_line(error)}")
        return Probed(before, _apart(model, ids), _cached(model, ids, whole))


def _apart(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the largest difference of two documents in a row from each alone; infinity for a model that takes no positions."""
    positions = torch.cat((torch.arange(CUT), torch.arange(LENGTH - CUT))).expand(ROWS, -1)
    try:
        together = _logits(model, ids, position_ids=positions)
        alone = torch.cat((_logits(model, ids[:, :CUT]), _logits(model, ids[:, CUT:])), 1)
    except FORWARD_ERRORS:
        return float("inf")
    return _far(together, alone, alone)


def _cached(model: PreTrainedModel, ids: Tensor, whole: Tensor) -> float | None:
    """Return the largest difference of the last tokens' logits if they are read one by one with a cache; None if it takes none."""
    row, read_alone = ids[0].tolist(), 3
    try:
        read = reading.cached(model)
        found = [read(row[: LENGTH - read_alone]), *(read([one]) for one in row[LENGTH - read_alone :])]
    except FORWARD_ERRORS:  # for a cache of another class
        return None
    wanted = whole[0, LENGTH - read_alone - 1 :]
    return _far(torch.stack(found).float(), wanted, wanted)


def smaller(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the tiny twin."""
    content = twin.smaller(config.to_dict())
    for name in ("transformers_version", "dtype", "architectures", "auto_map", "quantization_config"):
        content.pop(name, None)
    made: PretrainedConfig = type(config).from_dict(content)
    return made


def _logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits.float()


def _far(one: Tensor, other: Tensor, scale: Tensor) -> float:
    return float((one - other).abs().max() / scale.abs().max().clamp(min=1e-30))

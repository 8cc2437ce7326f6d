"""Generate with a model larger than GPU memory: accelerate distributes its blocks over GPUs, CPU memory and disk. Slow.

Only folders with Hugging Face's layout, which accelerate loads block by block.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.files import writing_problem
from gptoughts.inference.generate.autoregressive import Read
from gptoughts.models.hf.config import open_config
from gptoughts.models.meta import on_meta
from gptoughts.models.weight_files import refuse_adapter, refuse_larger, weight_files


class Offloaded(torch.nn.Module):
    """A transformers model with a device map, as a `Reader`."""

    _model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # not a submodule, because only its own hooks may move its parameters
        self.sequence_length: int = getattr(model.config, "max_position_embeddings", None) or 4096
        self.vocab_size: int = model.config.vocab_size

    @property
    def places(self) -> dict[str, int]:
        """Number of modules per device: GPU index, cpu, disk."""
        return dict(Counter(str(device) for device in self._model.hf_device_map.values()))

    def reader(self) -> Offloaded:
        """Return itself."""
        return self

    def reading(self) -> Read:
        """Start an empty transformers cache."""
        state: dict[str, Any] = {"cache": None}

        def read(ids: list[int]) -> torch.Tensor:
            input_ids = torch.tensor([ids], device=self._model.device)
            out = self._model(input_ids=input_ids, past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values
            row: torch.Tensor = out.logits[0, -1]
            return row

        return read


def opened(folder: Path, memory_gib: float | None, offload: str | None) -> Offloaded:
    """Load the model in `folder` with at most `memory_gib` per device, the rest under `offload`. Raises ConfigError, CheckpointError."""
    from transformers import AutoModelForCausalLM

    gpus = list(range(torch.cuda.device_count()))
    limit = None if memory_gib is None else dict.fromkeys([*gpus, "cpu"], f"{memory_gib}GiB")
    if offload is not None:
        _prepare(Path(offload))
    refuse_adapter(folder)
    files = weight_files(folder)
    # Opened here: transformers would ask on standard input whether to run the code that a config names.
    config, _ = open_config(ModelConfig(family="hf", path=str(folder)), quantized=True)
    with on_meta():
        planned = sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(config, trust_remote_code=False).parameters()
        )
    refuse_larger(planned, files, f"{folder / 'config.json'}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, device_map="auto", max_memory=limit, offload_folder=offload, local_files_only=True,
            dtype="auto", use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ImportError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, ValueError) and "offload" in str(error):
            raise ConfigError(f"{folder}: does not fit --memory", fix="--offload DIR, a folder on a fast disk") from None
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{folder}: cannot be opened: {reason[:300]}") from error
    return Offloaded(model.eval())


def _prepare(folder: Path) -> None:
    """Create the folder of --offload. Raises ConfigError where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = writing_problem(folder)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise ConfigError(f"--offload {folder}: cannot be written ({problem})", fix="--offload DIR on a disk with space")

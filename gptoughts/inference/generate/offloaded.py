"""Text from a model that is larger than memory: accelerate spreads its blocks over GPUs, main memory and disk. Slow, and it fits.

Only folders of Hugging Face's layout are opened, because accelerate loads them block by block.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference.generate.autoregressive import Read


class Offloaded(torch.nn.Module):
    """A transformers model under a device map, as generation reads it."""

    _model: Any

    def __init__(self, model: Any) -> None:
        super().__init__()
        object.__setattr__(self, "_model", model)  # its hooks move its own parameters; nobody else may
        self.sequence_length: int = getattr(model.config, "max_position_embeddings", None) or 4096
        self.vocab_size: int = model.config.vocab_size

    @property
    def places(self) -> dict[str, int]:
        """How many modules lie where: a GPU's number, cpu, disk."""
        found: dict[str, int] = {}
        for place in self._model.hf_device_map.values():
            found[str(place)] = found.get(str(place), 0) + 1
        return found

    def reader(self) -> Offloaded:
        """Itself."""
        return self

    def reading(self) -> Read:
        """A fresh cache of transformers' own."""
        state: dict[str, Any] = {"cache": None}

        def read(ids: list[int]) -> torch.Tensor:
            given = torch.tensor([ids], device=self._model.device)
            out = self._model(input_ids=given, past_key_values=state["cache"], use_cache=True)
            state["cache"] = out.past_key_values
            row: torch.Tensor = out.logits[0, -1]
            return row

        return read


def opened(folder: Path, memory_gib: float | None, offload: str | None) -> Offloaded:
    """The model in `folder`, with at most `memory_gib` in each memory and the rest under `offload`. Raises ConfigError, CheckpointError."""
    from transformers import AutoModelForCausalLM

    gpus = list(range(torch.cuda.device_count()))
    limit = None if memory_gib is None else dict.fromkeys([*gpus, "cpu"], f"{memory_gib}GiB")
    if offload is not None:
        Path(offload).mkdir(parents=True, exist_ok=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, device_map="auto", max_memory=limit, offload_folder=offload, local_files_only=True, dtype="auto",
            use_safetensors=True,
        )  # fmt: skip
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, ValueError) and "offload" in str(error):
            told = "does not fit the memory that was given\n  try: --offload DIR, a folder on a fast disk"
            raise ConfigError(f"{folder}: {told}") from None
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{folder}: cannot be opened: {said[:300]}") from error
    return Offloaded(model.eval())

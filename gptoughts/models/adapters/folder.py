"""An adapter on disk as peft reads and writes it: adapter_config.json, adapter_model.safetensors, and beside them which base it is for.

base.json is ours: the base's folder and a digest of it, so that an adapter never runs over weights that it was not trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.config.recipe import AdapterConfig
from gptoughts.errors import CheckpointError
from gptoughts.models.adapters.adapter import NAME, adapter_layers, base_name, is_trained, peft, ported
from gptoughts.models.adapters.nf4 import is_turned
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.family import Family
from gptoughts.models.json_file import read_json

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
NOT_THE_BASE = ("optimizer.safetensors", "state.safetensors", WEIGHTS)
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file: a header alone cannot tell two trainings of one model apart
REFUSED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
}
"""Keys of adapter_config.json that must hold one of these for our model to compute the same."""
BEGINNINGS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
"""Tables there that say how training began or ran. Any other table means another kind of layer."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# --- names


def published(name: str) -> str:
    """The name under which peft stores a trained parameter of the model."""
    return PREFIX + name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector").replace(f".{NAME}.", ".")


def internal(name: str) -> str:
    """The trained parameter of the model that peft stores under `name`."""
    own = name.removeprefix(PREFIX)
    for kind in ("A", "B"):
        own = own.replace(f".lora_{kind}.", f".lora_{kind}.{NAME}.")
    return re.sub(r"\.lora_magnitude_vector(\.weight)?$", f".lora_magnitude_vector.{NAME}.weight", own)


# --- the base


@dataclass(frozen=True)
class BaseRecord:
    """Which weights an adapter was trained over."""

    path: str
    digest: str


def record_of(folder: Path) -> BaseRecord:
    """The record of a model's folder, or of one .gguf file: config, and of each weight file name, size, header and 64 samples."""
    files = [folder] if folder.is_file() else sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf") and path.name not in NOT_THE_BASE
    )  # fmt: skip
    if not files:
        raise CheckpointError(f"{folder} holds no weights (*.safetensors or *.gguf) that an adapter could be for")
    config = folder / "config.json"
    digest = hashlib.sha256(config.read_bytes() if config.is_file() else b"")
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(_header(file) if path.suffix == ".safetensors" else b"")
            for index in range(SAMPLES):
                file.seek(index * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return BaseRecord(str(folder.resolve()), digest.hexdigest())


def record_of_drawn(model: Mapping[str, Any], seed: int) -> BaseRecord:
    """The record of a base without a folder: weights drawn from a seed for the recipe's [model]."""
    text = json.dumps({"model": dict(model), "seed": seed}, sort_keys=True, default=str)
    return BaseRecord(f"drawn from seed {seed}", hashlib.sha256(text.encode()).hexdigest())


def _header(file: BinaryIO) -> bytes:
    return file.read(int.from_bytes(file.read(8), "little"))


def check_base(folder: Path, here: BaseRecord) -> str:
    """Raise CheckpointError where the adapter in `folder` is for another base. Returns a remark where it does not say, else ''."""
    try:
        noted = json.loads((folder / BASE).read_text(encoding="utf-8"))
        was = BaseRecord(str(noted["path"]), str(noted["digest"]))
    except FileNotFoundError:
        return f"{folder} does not record its base; taken for {here.path}"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / BASE} cannot be read: {error}") from error
    if was.digest != here.digest:
        raise CheckpointError(
            f"the adapter in {folder} is for another base (adapter | here)\n"
            f"  {was.path} | {here.path}\n  {was.digest[:16]} | {here.digest[:16]}\n  try: --model.path {was.path}"
        )
    return ""


# --- writing


def save_adapter(
    model: nn.Module,
    config: AdapterConfig,
    folder: Path,
    base: BaseRecord,
    source: AdapterSource | None = None,
    task: str | None = "CAUSAL_LM",
) -> None:
    """Write `folder` so that `peft.PeftModel.from_pretrained(base, folder)` computes what `model` computes.

    PiSSA's base is not the published one, so its adapter is written as the LoRA of twice the rank that stands for the difference
    (as peft converts it); that needs the `source` the model was filled from. The file is read back before this returns.
    """
    values = {name: value.detach().cpu() for name, value in model.named_parameters() if is_trained(name)}
    rank, alpha = config.rank, config.alpha
    if config.kind == "pissa":
        if source is None:
            raise CheckpointError("a PiSSA adapter is written as its change from where it began; that needs the base's weights")
        rank, alpha = 2 * rank, 2 * alpha
        for place in adapter_layers(model):
            a, b = (values[f"{place}.lora_{kind}.{NAME}.weight"] for kind in "AB")
            first_a, first_b = (value.to(a) for value in source.start(place))
            values[f"{place}.lora_A.{NAME}.weight"] = torch.cat([a, first_a])
            values[f"{place}.lora_B.{NAME}.weight"] = torch.cat([b, -first_b], dim=1)
    tensors = {published(name): value.contiguous() for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = load_file(folder / WEIGHTS)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in written):
        raise CheckpointError(f"{folder / WEIGHTS} does not hold what was written; is the disk full?")
    _write(folder / CONFIG, peft_config(model, config, base, rank, alpha, task))
    _write(folder / BASE, asdict(base))


def peft_config(
    model: nn.Module, config: AdapterConfig, base: BaseRecord, rank: int, alpha: float, task: str | None
) -> dict[str, Any]:
    """The content of adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base.path,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.dropout,
        "target_modules": target_words(model),
        "use_rslora": config.kind == "rslora",
        "use_dora": config.kind == "dora",
        "fan_in_fan_out": any(is_turned(layer.base_layer) for layer in adapter_layers(model).values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def target_words(model: nn.Module) -> list[str]:
    """The shortest list by which peft finds the adapted projections again: last words where they mean no other module."""
    layers = set(adapter_layers(model))
    words = {name.rpartition(".")[2] for name in layers}
    modules = {base_name(name) for name, _ in model.named_modules() if ".lora_" not in name}
    meant = {name for name in modules if name.rpartition(".")[2] in words}
    return sorted(words if meant == layers else layers)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- reading


class AdapterFolder:
    """The trained parameters in a folder that peft or `save_adapter` wrote, under the names they have in our model."""

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))] if folder.is_dir() else []
            why = f"{pickles[0]} is a pickle, which can run code; save it as safetensors" if pickles else "not found"
            raise CheckpointError(f"{path}: {why}")
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be opened: {error}") from error
        self._stored = {internal(name): name for name in self._file.keys()}  # noqa: SIM118  # not a dict
        self._left = dict(self._stored)

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """The stored value of a trained parameter, or None."""
        if name not in self._stored:
            return None
        self._left.pop(name, None)
        value: Tensor = self._file.get_tensor(self._stored[name])
        return value

    def buffer(self, name: str) -> Tensor | None:
        """An adapter has no buffers."""
        return None

    def unused(self) -> list[str]:
        """Stored names that nobody asked for."""
        return sorted(self._left.values())


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises CheckpointError for what cannot be read, and for kinds of adapters that our model does not have."""
    path = folder / CONFIG
    content = read_json(path)
    wrong = [f"{key} = {content[key]!r}" for key, allowed in REFUSED.items() if key in content and content[key] not in allowed]
    wrong += [f"{key} is set" for key in content if key.endswith("_config") and content[key] and key not in BEGINNINGS]
    begins = content.get("init_lora_weights", True)
    if str(begins).startswith(CHANGE_THE_BASE):
        wrong.append(f"init_lora_weights = {begins!r} (convert it with peft's path_initial_model_for_weight_conversion)")
    if wrong:
        raise CheckpointError(f"{path}: this adapter cannot be opened here: " + ", ".join(wrong))
    return content


def adapted_as(family: Family, folder: Path, base: Literal["full", "nf4"] = "full") -> Family:
    """`family` with the LoRA in `folder` in its blocks, whoever trained it. Fill it from AdapterSource(base, model, saved=AdapterFolder)."""
    content = read_config(folder)

    def lora_config(model: nn.Module) -> Any:
        known = peft().LoraConfig.__dataclass_fields__
        return peft().LoraConfig(**{key: value for key, value in content.items() if key in known and key != "peft_type"})

    return ported(family, lora_config, base)

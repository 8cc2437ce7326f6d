"""Adapter folders in peft's format: adapter_config.json and adapter_model.safetensors, plus base.json.

base.json records the base's folder and a digest, so that an adapter is never applied to weights that it was not trained on.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoughts.config.recipe import AdapterConfig
from gptoughts.errors import CheckpointError
from gptoughts.files import load_json
from gptoughts.models.adapters.adapter import NAME, adapter_layers, base_name, is_trained, peft, with_injected
from gptoughts.models.adapters.nf4 import is_turned
from gptoughts.models.adapters.weights import AdapterSource
from gptoughts.models.family import Family
from gptoughts.models.weight_files import MAX_HEADER_BYTES, opened, read_json

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."
NOT_THE_BASE = ("optimizer.safetensors", "state.safetensors", WEIGHTS)
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each weight file: headers are equal for all trainings of one model
SUPPORTED: dict[str, tuple[Any, ...]] = {
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
"""Supported values of adapter_config.json keys that would change the computation."""
NEUTRAL_TABLES = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config")
"""Tables of adapter_config.json about initialization or runtime. Any other table configures another kind of layer."""
PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
"""Keys whose texts peft matches as regular expressions against the name of every module."""
PLAIN = re.compile(r"[\w.]+|all-linear")
MOST_RANK, MOST_ALPHA = 1 << 20, 1e9
"""Bounds of numbers in adapter_config.json, far above every use."""
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# --- names


def published(name: str) -> str:
    """Return the name under which peft stores a trained parameter."""
    return PREFIX + name.replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector").replace(f".{NAME}.", ".")


def internal(name: str) -> str:
    """Return the model's name of the parameter that peft stores under `name`."""
    own = name.removeprefix(PREFIX)
    for kind in ("A", "B"):
        own = own.replace(f".lora_{kind}.", f".lora_{kind}.{NAME}.")
    return re.sub(r"\.lora_magnitude_vector(\.weight)?$", f".lora_magnitude_vector.{NAME}.weight", own)


# --- the base


@dataclass(frozen=True)
class BaseRecord:
    """Identity of the weights that an adapter was trained on."""

    path: str
    digest: str


def record_of(folder: Path) -> BaseRecord:
    """Return the record of a model folder or .gguf file: a digest of config, and name, size, header and 64 samples per weight file."""
    files = [folder] if folder.is_file() else sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf") and path.name not in NOT_THE_BASE
    )  # fmt: skip
    if not files:
        raise CheckpointError(f"{folder}: no base weights (*.safetensors or *.gguf)")
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
    """Return the record of a randomly initialized base: the recipe's [model] and the seed."""
    text = json.dumps({"model": dict(model), "seed": seed}, sort_keys=True, default=str)
    return BaseRecord(f"drawn from seed {seed}", hashlib.sha256(text.encode()).hexdigest())


def _header(file: BinaryIO) -> bytes:
    return file.read(min(int.from_bytes(file.read(8), "little"), MAX_HEADER_BYTES))


def check_base(folder: Path, current: BaseRecord) -> str:
    """Raise CheckpointError if the adapter in `folder` was trained on another base. Returns a warning if it has no record, else ''."""
    try:
        content = load_json(folder / BASE)
        recorded = BaseRecord(str(content["path"]), str(content["digest"]))
    except FileNotFoundError:
        return f"{folder}: no {BASE}; base assumed to be {current.path}"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / BASE}: cannot be read: {error}") from error
    if recorded.digest != current.digest:
        raise CheckpointError(
            f"{folder}: the adapter was trained on another base, {recorded.path} (digest {recorded.digest[:16]})",
            found=f"{current.path} (digest {current.digest[:16]})",
            fix=f"--model.path {recorded.path}",
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
    """Write `folder` so that `peft.PeftModel.from_pretrained(base, folder)` equals `model`.

    PiSSA changes the base, so its adapter is converted to a LoRA of twice the rank on the original base (as peft does); that needs
    the `source` of the model's weights. The file is read back and compared before this returns.
    """
    values = {name: value.detach().cpu() for name, value in model.named_parameters() if is_trained(name)}
    rank, alpha = config.rank, config.alpha
    if config.kind == "pissa":
        if source is None:
            raise CheckpointError(
                "adapter.kind: pissa is saved as the difference from its initial factors, which needs the base's weights"
            )
        rank, alpha = 2 * rank, 2 * alpha
        for layer in adapter_layers(model):
            a, b = (values[f"{layer}.lora_{kind}.{NAME}.weight"] for kind in "AB")
            initial_a, initial_b = (value.to(a) for value in source.start(layer))
            values[f"{layer}.lora_A.{NAME}.weight"] = torch.cat([a, initial_a])
            values[f"{layer}.lora_B.{NAME}.weight"] = torch.cat([b, -initial_b], dim=1)
    tensors = {published(name): value.contiguous() for name, value in values.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    written = load_file(folder / WEIGHTS)
    if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in written):
        raise CheckpointError(f"{folder / WEIGHTS}: read-back differs from the written values", fix="check free disk space")
    _write(folder / CONFIG, peft_config(model, config, base, rank, alpha, task))
    _write(folder / BASE, asdict(base))


def peft_config(
    model: nn.Module, config: AdapterConfig, base: BaseRecord, rank: int, alpha: float, task: str | None
) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
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
    """Return peft's target_modules: last names of the adapted projections if no other module has them, else full names."""
    layers = set(adapter_layers(model))
    words = {name.rpartition(".")[2] for name in layers}
    modules = {base_name(name) for name, _ in model.named_modules() if ".lora_" not in name}
    matched = {name for name in modules if name.rpartition(".")[2] in words}
    return sorted(words if matched == layers else layers)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- reading


class AdapterFolder:
    """Trained parameters in a folder written by peft or `save_adapter`, by the model's names."""

    def __init__(self, folder: Path) -> None:
        path = folder / WEIGHTS
        if not path.is_file():
            pickles = [name for name in os.listdir(folder) if name.endswith((".bin", ".pt", ".pth"))] if folder.is_dir() else []
            if not pickles:
                raise CheckpointError(f"{path}: not found")
            problem = f"{folder / pickles[0]}: a pickle, which can run code when loaded"
            raise CheckpointError(problem, fix="save the adapter again with peft's save_pretrained (safetensors)")
        self._file = opened(path)
        self._stored = {internal(name): name for name in self._file.keys()}  # noqa: SIM118  # not a dict
        self._left = dict(self._stored)

    def tensor(self, name: str, shape: torch.Size) -> Tensor | None:
        """Return the stored value of a trained parameter, or None."""
        if name not in self._stored:
            return None
        self._left.pop(name, None)
        value: Tensor = self._file.get_tensor(self._stored[name])
        return value

    def buffer(self, name: str) -> Tensor | None:
        """Return None: an adapter has no buffers."""
        return None

    def unused(self) -> list[str]:
        """Return stored names that were never read."""
        return sorted(self._left.values())


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises CheckpointError for an unreadable file and for unsupported kinds of adapters."""
    path = folder / CONFIG
    content = read_json(path)
    unsupported = [
        f"{key} = {content[key]!r}" for key, allowed in SUPPORTED.items() if key in content and content[key] not in allowed
    ]
    unsupported += [
        f"{key} is set" for key in content if key.endswith("_config") and content[key] and key not in NEUTRAL_TABLES
    ]
    if not isinstance(content.get("base_model_name_or_path"), str | None):
        raise CheckpointError(f"{path}: base_model_name_or_path must be a string")
    problem = _type_problem(content)
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    _refuse_patterns(content, path)
    initial = content.get("init_lora_weights", True)
    if str(initial).startswith(CHANGE_THE_BASE):
        unsupported.append(f"init_lora_weights = {initial!r} (convert with peft's path_initial_model_for_weight_conversion)")
    if unsupported:
        raise CheckpointError(f"{path}: unsupported settings: {', '.join(unsupported)}")
    return content


def _refuse_patterns(content: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError for regular expressions, some of which take longer than anybody waits to match a module's name."""
    for key in PATTERNS:
        value = content.get(key)
        names = [value] if isinstance(value, str) else list(value) if isinstance(value, list | dict) else []
        for name in names:
            if not isinstance(name, str) or not PLAIN.fullmatch(name):
                fix = "list the names of modules, as peft's save_pretrained does for a list"
                raise CheckpointError(
                    f"{path}: {key} must hold plain names, no regular expressions", found=repr(name)[:100], fix=fix
                )


def _type_problem(content: Mapping[str, Any]) -> str:
    """Return which value is of another type or out of range, an empty string if none is."""
    numbers: tuple[tuple[str, Any, float, float], ...] = (
        ("r", int, 1, MOST_RANK), ("lora_alpha", (int, float), 0, MOST_ALPHA), ("lora_dropout", (int, float), 0, 1)
    )  # fmt: skip
    for key, kind, least, most in numbers:
        value = content.get(key)
        if key in content and (isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most):
            return f"{key} must be {'an integer' if kind is int else 'a number'} from {least} to {most}. Found {value!r:.100}"
    for key in ("rank_pattern", "alpha_pattern"):
        kind, least, most = numbers[key != "rank_pattern"][1:]
        table = content.get(key) or {}
        if not isinstance(table, dict) or not all(
            isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most for value in table.values()
        ):
            return f"{key} must be a table of numbers from {least} to {most}. Found {table!r:.100}"
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode"):
        if not isinstance(content.get(key, False), bool | None):
            return f"{key} must be true or false. Found {content[key]!r:.100}"
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value, allowed = content.get(key), int if key == "layers_to_transform" else str
        entries = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(entry, allowed) and not isinstance(entry, bool) for entry in entries):
            return f"{key} must be {allowed.__name__} or a list of them. Found {value!r:.100}"
    return ""


def adapted_as(family: Family, folder: Path, base: Literal["full", "nf4"] = "full") -> Family:
    """Return `family` with the LoRA in `folder` in its blocks. Fill it from AdapterSource(base, model, saved=AdapterFolder)."""
    content = read_config(folder)

    def lora_config(model: nn.Module) -> Any:
        known = peft().LoraConfig.__dataclass_fields__
        return peft().LoraConfig(**{key: value for key, value in content.items() if key in known and key != "peft_type"})

    return with_injected(family, lora_config, base)

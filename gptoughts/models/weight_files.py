"""Files of a model folder: JSON beside the weights, and safetensors, single or sharded. Pickles are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptoughts.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for an unreadable file and for any other JSON value."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object", found=type(content).__name__)
    return content


def pickles(folder: Path) -> list[str]:
    """Return the names of pickle files in `folder`, sorted."""
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`: the single file, or the shards in its index.

    Raises CheckpointError for missing weights, an invalid index, and pickles (with the command that converts one).
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{folder / INDEX}: no weight_map")
        return [
            folder / Path(str(name)).name for name in sorted(set(names.values()))
        ]  # the name only: never outside the folder
    if not (found := pickles(folder)):
        raise CheckpointError(f"{folder / SINGLE}: not found")
    raise CheckpointError(
        f"{folder / found[0]}: a pickle, which can run code when loaded",
        fix=f'if you trust it, python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{found[0]}', weights_only=True), '{SINGLE}')\"",
    )

"""Files of a model folder: JSON beside the weights, and safetensors, single or sharded. Pickles are refused.

Headers are checked here before a library allocates what they say.
"""

from __future__ import annotations

import math
import shlex
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptoughts.errors import CheckpointError
from gptoughts.files import is_file_name, load_json, parse_json, regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_HEADER_BYTES = 100 << 20
"""Size of a header that the format allows."""
NEW_ELEMENTS = 1 << 26
"""Parameters that a model may have beyond those in its files, such as a new head."""
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16, "U16": 16, "I8": 8, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
}  # fmt: skip
"""Size of an element of each dtype of safetensors."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for an unreadable file and for any other JSON value."""
    try:
        content = load_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object", found=type(content).__name__)
    return content


def pickles(folder: Path) -> list[str]:
    """Return the names of pickle files in `folder`, sorted."""
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))


def refuse_adapter(folder: Path) -> None:
    """Raise CheckpointError for a model's folder with an adapter_config.json: transformers would load that adapter, or the base it names."""
    path = folder / ADAPTER
    if path.exists() or path.is_symlink():
        raise CheckpointError(
            f"{path}: an adapter beside a model would change what is loaded", fix=f"mv {shlex.quote(str(path))} elsewhere"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of `folder`: the single file, or the shards in its index.

    Raises CheckpointError for missing weights, an invalid index, and pickles (with the command that converts one).
    """
    if (folder / SINGLE).is_file():
        return [checked(folder / SINGLE)]
    if (folder / INDEX).is_file():
        return [checked(path) for path in shards_of(folder / INDEX)]
    if not (found := pickles(folder)):
        raise CheckpointError(f"{folder / SINGLE}: not found")
    raise CheckpointError(
        f"{folder / found[0]}: a pickle, which can run code when loaded",
        fix=f'if you trust it, python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{found[0]}', weights_only=True), '{SINGLE}')\"",
    )


def shards_of(index: Path) -> list[Path]:
    """Return the shards that an index names, all of them in its folder. Raises CheckpointError, also for a name that leads elsewhere."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index}: no weight_map")
    files = sorted(set(names.values()))
    outside = [name for name in files if name in ("", ".", "..") or Path(name).name != name or not is_file_name(name)]
    if outside:
        raise CheckpointError(f"{index}: a shard must be a file name in this folder", found=repr(outside[0])[:200])
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index.parent}: missing shards of its index: {', '.join(missing[:8])}")
    return [index.parent / name for name in files]


def refuse_larger(elements: int, files: Iterable[Path], what: str) -> None:
    """Raise CheckpointError for a config of far more `elements` than its files can hold, at two bits each, before they are allocated."""
    bits = sum(
        math.prod(entry["shape"]) * BITS.get(entry["dtype"], 64) for path in files for entry in read_header(path).values()
    )
    if elements > bits // 2 + NEW_ELEMENTS:
        raise CheckpointError(
            f"{what}: describes {elements:,} parameters, more than the files of weights hold", found=f"{bits // 8:,} bytes"
        )


def checked(path: Path) -> Path:
    """Return a safetensors file whose header is sound. Raises CheckpointError."""
    read_header(path)
    return path


def opened(path: Path) -> Any:
    """Open a safetensors file whose header is sound. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(checked(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return tensor name -> dtype, shape and data_offsets. Raises CheckpointError unless the tensors fill the file without overlap."""
    try:
        size = regular(path).stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"header of {length:,} bytes, longer than the file or the format allows")
            content = parse_json(file.read(length))
        tensors = {name: entry for name, entry in content.items() if name != "__metadata__"}
        _check_places(tensors, size - 8 - length)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {first_line(error)}") from None
    return tensors


def _check_places(tensors: dict[str, dict[str, Any]], size: int) -> None:
    """Raise ValueError unless tensors of these sizes follow each other from 0 to `size`."""
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda one: tuple(one[1]["data_offsets"])):
        (begin, end), shape, bits = entry["data_offsets"], entry["shape"], BITS.get(entry["dtype"])
        whole = all(type(number) is int and number >= 0 for number in (begin, end, *shape))
        if not whole or len(shape) > 64 or (bits is not None and math.prod(shape) * bits != (end - begin) * 8):
            raise ValueError(f"shape and size of {name!r:.100} disagree: {shape!r:.100} in bytes {begin} to {end}")
        if begin != reached:
            raise ValueError(
                f"{name!r:.100} {'overlaps another tensor' if begin < reached else 'leaves a gap'} at byte {begin}"
            )
        reached = end
    if reached != size:
        raise ValueError(f"tensors of {reached} bytes in a file with room for {size}")


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of an error's text, or the name of its type."""
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)

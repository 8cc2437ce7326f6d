"""GPU memory at the time it ran out: the allocator's snapshot as JSON, and a summary of the largest blocks.

Torch's viewer (pytorch.org/memory_viz) reads a pickle; the same records are written as JSON here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from gptoughts.console import bytes_in_words, share
from gptoughts.files import write_text
from gptoughts.models.torch_internals import allocation_history

MOST_ROWS = 15
OURS = "/gptoughts/"
UNKNOWN = "not recorded (gptoughts trace --memory-history records it)"


@contextmanager
def history(device: Any) -> Iterator[None]:
    """Record the stack of every allocation in the block. Costs a few microseconds per allocation; does nothing on a CPU."""
    with allocation_history(device) if device.type == "cuda" else nullcontext():
        yield


def memory_report(path: Path, segments: Sequence[Mapping[str, Any]] | None = None) -> str:
    """Write the allocator's segments to `path` as JSON and return a summary of the largest live blocks and the lines that allocated them.

    segments  as returned by `torch.cuda.memory_snapshot()`, which is called if not given
    """
    if segments is None:
        import torch

        segments = torch.cuda.memory_snapshot()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"segments": segments}, default=str) + "\n")
    return f"{_summary(segments)}\nall blocks: {path}  (JSON; not the pickle that pytorch.org/memory_viz reads)"


def _summary(segments: Sequence[Mapping[str, Any]]) -> str:
    if not segments:
        return "GPU memory: nothing allocated by torch"
    blocks = [block for segment in segments for block in segment["blocks"]]
    reserved = sum(int(segment["total_size"]) for segment in segments)
    live = [block for block in blocks if block["state"] == "active_allocated"]
    free = [int(block["size"]) for block in blocks if block["state"] == "inactive"]
    waiting = sum(int(block["size"]) for block in blocks if block["state"].startswith("active") and block not in live)
    used = sum(int(block["size"]) for block in live)
    lines = [
        f"GPU memory: {bytes_in_words(reserved)} reserved in {len(segments)} segments, {bytes_in_words(used)} in {len(live)} live blocks, "
        f"{bytes_in_words(sum(free))} free ({share(sum(free) / reserved if reserved else None)}), "
        f"largest free block {bytes_in_words(max(free, default=0))}"
        + (f", {bytes_in_words(waiting)} waiting for a stream" if waiting else "")
    ]
    groups: dict[str, list[int]] = {}
    for block in live:
        groups.setdefault(_allocated_by(block), []).append(int(block["size"]))
    lines.append("largest live blocks, by allocating line:")
    for place, sizes in sorted(groups.items(), key=lambda row: -sum(row[1]))[:MOST_ROWS]:
        lines.append(f"  {bytes_in_words(sum(sizes)):>10}  {len(sizes):>5} x up to {bytes_in_words(max(sizes)):<10}  {place}")
    return "\n".join(lines)


def _allocated_by(block: Mapping[str, Any]) -> str:
    """Return the innermost frame in gptoughts, else outside torch, else the innermost."""
    frames = [frame for frame in block.get("frames") or () if frame.get("filename") not in (None, "", "??")]
    if not frames:
        return UNKNOWN
    ours = [frame for frame in frames if OURS in frame["filename"]]
    others = [frame for frame in frames if "/torch/" not in frame["filename"]]
    frame = (ours or others or frames)[0]
    return f"{Path(frame['filename']).name}:{frame['line']} {frame['name']}"

"""Read changed files in a child process with limits: `{"reader", "seed", "steps"}` gives what the reader did."""

from __future__ import annotations

import base64
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gptoughts.errors import GptoughtsError
from tests.fuzz.mutations import mutated
from tests.fuzz.readers import CONTROLS, READERS, Seed

CPU_SECONDS = 60
"""CPU time after which the child is ended; it includes the imports of its first case."""
SLOW_SECONDS = 10
GROWTH_BYTES = 1 << 30
"""Resident memory that one case may add."""
ADDRESS_SPACE = 16 << 30


def answering() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return the function that answers requests."""
    home = tempfile.mkdtemp(prefix="fuzz-")
    os.environ.update(
        {
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": f"{home}/cache",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
        }
    )
    os.chdir(home)
    sys.path[:] = [path for path in sys.path if path]
    return Cases(Path(home)).answer


class Cases:
    """The seeds of each reader, written once, and the place where a changed file takes that of the seed's."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seeds: dict[str, list[Seed]] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Read one case; `{"seeds": n}` for a request without steps."""
        name = request["reader"]
        reader = (READERS | CONTROLS)[name]
        if name not in self.seeds:
            reader.load()
            self.seeds[name] = reader.seeds(self.home / name)
        if "steps" not in request and "content" not in request:
            return {"seeds": len(self.seeds[name])}
        seed = self.seeds[name][request["seed"]]
        steps = [(word, number) for word, number in request.get("steps", ())]
        content = base64.b64decode(request["content"]) if "content" in request else mutated(seed.content, seed.kind, steps)
        if request.get("only_content"):
            return {"content": base64.b64encode(content).decode(), "suffix": seed.path.suffix, "seed": request["seed"]}
        seed.path.unlink(missing_ok=True)
        seed.path.write_bytes(content)
        try:
            return self._read(lambda: reader.read(seed), content)
        finally:
            seed.path.write_bytes(seed.content)

    @staticmethod
    def _read(read: Callable[[], object], content: bytes) -> dict[str, Any]:
        before, begun = _peak(), time.process_time()
        outcome: dict[str, Any]
        try:
            read()
            outcome = {"outcome": "read"}
        except GptoughtsError as error:
            outcome = {"outcome": "refused", "error": str(error)[:400]}
        except MemoryError:
            outcome = _crash("MemoryError", "memory", "")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            frames = list(traceback.extract_tb(error.__traceback__))
            ours = [frame for frame in frames if f"{os.sep}gptoughts{os.sep}" in frame.filename] or frames
            place = f"{Path(ours[-1].filename).name}:{ours[-1].name}"
            outcome = _crash(
                f"{type(error).__name__}: {str(error)[:200]}",
                f"{type(error).__name__} in {place}",
                traceback.format_exc()[-3000:],
            )
        seconds, grown = time.process_time() - begun, _peak() - before
        if seconds > SLOW_SECONDS:
            outcome = _crash(f"{seconds:.1f} s of CPU time", "slow", outcome.get("error", ""))
        elif grown > GROWTH_BYTES:
            outcome = _crash(f"{grown >> 20} MiB of memory", "memory", outcome.get("error", ""))
        if outcome["outcome"] == "crash":
            outcome["content"] = base64.b64encode(content[: 1 << 20]).decode()
        return outcome


def _crash(error: str, kind: str, trace: str) -> dict[str, Any]:
    return {"outcome": "crash", "error": error, "kind": kind, "trace": trace}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

"""Divide the encoding of one corpus among the tasks of a job, such as those of `srun`.

Every task reads the text and encodes each N-th group of pieces. Task 0 owns the folder: it makes the tokenizer, takes the groups in order
and writes shards, journal and index as one process does, so the bytes do not depend on the number of tasks. The others leave their groups
as files in `tasks/` of that folder, which all nodes must see.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.text.shards import INDEX
from gptoughts.data.text.workers import Encoded, Piece, WorkerDied
from gptoughts.errors import DataError
from gptoughts.files import load_json, replacing, write_json
from gptoughts.hardware.world import OPENMPI, SRUN, TORCHRUN, World

FOLDER, PLAN = "tasks", "plan.json"
IDENTITY = {
    SRUN.name: ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    TORCHRUN.name: ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"),
    OPENMPI.name: ("PMIX_NAMESPACE",),
}
"""Launcher -> variables whose values all tasks of one job share, and no other job has."""
AHEAD = 16
"""Groups that a task leaves unread before it waits."""
POLL_SECONDS = 0.05
LIMIT_SECONDS = 1800.0

Groups = Iterable[list[Piece]]
Encode = Callable[[Iterator[list[Piece]]], Iterator[Encoded]]


@dataclass(frozen=True)
class Tasks:
    """This process as one of the tasks that tokenize into a folder together."""

    folder: Path
    number: int
    count: int
    identity: str

    @staticmethod
    def of(world: World, environment: Mapping[str, str], folder: Path) -> Tasks | None:
        """Return the task of a launched process; None for a single one, and for launchers that give a job no name."""
        names = IDENTITY.get(world.launcher, ())
        if world.world_size == 1 or not any(name in environment for name in names):
            return None
        identity = " ".join(f"{name}={environment.get(name, '')}" for name in names)
        return Tasks(folder, world.rank, world.world_size, identity)

    @property
    def first(self) -> bool:
        """Whether this task owns the folder."""
        return self.number == 0

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Remove the files of tasks after the block; if it fails, write a plan that ends the other tasks."""
        place = self.folder / FOLDER
        try:
            yield
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # on a full disk the others end after their limit
                self._announce({"failed": True})
            raise
        shutil.rmtree(place, ignore_errors=True)

    def begin(self, done: int, settings: Mapping[str, Any]) -> None:
        """Let the other tasks begin after the first `done` pieces."""
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)
        self._announce({"pieces": done, **settings})

    def _announce(self, plan: Mapping[str, Any]) -> None:
        (self.folder / FOLDER).mkdir(exist_ok=True)
        write_json(self.folder / FOLDER / PLAN, {"identity": self.identity, **plan}, durable=True)

    def collect(self, groups: Groups, encode: Encode) -> Iterator[Encoded]:
        """Yield all groups in order: own ones encoded here, the others as their tasks leave them. Raises the error of any task."""
        mine, every = tee(groups)
        own = encode(group for number, group in enumerate(mine) if number % self.count == 0)
        for number, group in enumerate(every):
            yield next(own) if number % self.count == 0 else self._take(number, group)

    def _take(self, number: int, group: list[Piece]) -> Encoded:
        path, task = self._path(number), number % self.count
        _wait(
            lambda: path.exists() or self._error(task).exists(),
            f"{self.folder}: task {task} of {self.count} left no tokens in {LIMIT_SECONDS:.0f} s",
        )
        if not path.exists():
            error = load_json(self._error(task))
            raise (DataError if error["of_text"] else WorkerDied)(f"task {task} of {self.count}: {error['message']}")
        head, _, body = path.read_bytes().partition(b"\n")
        card = json.loads(head)
        path.unlink()
        return Encoded(group, np.frombuffer(body, dtype=card["dtype"]), card["lengths"])

    def follow(self, overwrite: bool) -> dict[str, Any] | None:
        """Wait until task 0 begins. Returns its plan; None where the folder is complete already."""
        began = time.time()
        index = self.folder / INDEX
        found: list[dict[str, Any]] = []

        def begun() -> bool:
            try:
                plan = load_json(self.folder / FOLDER / PLAN)
            except (FileNotFoundError, NotADirectoryError):
                with suppress(FileNotFoundError):
                    written = index.stat().st_mtime
                    return not overwrite or written > began
                return False
            if plan.get("identity") == self.identity:
                found.append(plan)
            return bool(found)

        _wait(begun, f"{self.folder}: task 0 of {self.count} did not begin in {LIMIT_SECONDS:.0f} s")
        if found and found[0].get("failed"):
            raise self._ended()
        return found[0] if found else None

    def contribute(self, groups: Groups, encode: Encode) -> None:
        """Encode this task's groups and leave them for task 0, then wait until it has ended."""
        encoded = encode(group for number, group in enumerate(groups) if number % self.count == self.number)
        for turn, one in enumerate(encoded):
            self._leave(turn, one)
        self._wait_for_the_first()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Hand an error of the block to task 0, and raise it here too."""
        try:
            yield
        except Exception as error:
            if self._is_over():
                raise self._ended() from None
            of_text = isinstance(error, DataError) and not isinstance(error, WorkerDied)
            message = str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):
                write_json(self._error(self.number), {"of_text": of_text, "message": message})
            raise

    def _wait_for_the_first(self) -> None:
        _wait(self._is_over, f"{self.folder}: task 0 of {self.count} did not end in {LIMIT_SECONDS:.0f} s")
        if not (self.folder / INDEX).exists():
            raise self._ended()

    def _is_over(self) -> bool:
        """Return whether task 0 has ended, well or not."""
        try:
            plan = load_json(self.folder / FOLDER / PLAN)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return bool(plan.get("failed"))

    def _ended(self) -> WorkerDied:
        return WorkerDied(f"{self.folder}: task 0 of {self.count} ended early, its message says why")

    def _leave(self, turn: int, encoded: Encoded) -> None:
        before = turn - AHEAD
        if before >= 0:
            oldest = self._path(before * self.count + self.number)
            _wait(
                lambda: not oldest.exists(),
                f"{self.folder}: task 0 of {self.count} took no tokens in {LIMIT_SECONDS:.0f} s",
            )
        card = {"dtype": encoded.tokens.dtype.name, "lengths": list(map(int, encoded.lengths))}
        with replacing(self._path(turn * self.count + self.number)) as temporary:
            temporary.write_bytes(json.dumps(card).encode() + b"\n" + encoded.tokens.tobytes())

    def _path(self, number: int) -> Path:
        return self.folder / FOLDER / f"{number:08d}.tokens"

    def _error(self, task: int) -> Path:
        return self.folder / FOLDER / f"task-{task}.error"


def _wait(done: Callable[[], bool], problem: str) -> None:
    """Wait until `done`. Raises WorkerDied with `problem` after the limit."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise WorkerDied(f"{problem}; do all nodes see this folder?")
        time.sleep(POLL_SECONDS)

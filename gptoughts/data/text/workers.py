"""Tokenize texts in several child processes; results come in order."""

from __future__ import annotations

import os
import queue
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.errors import DataError
from gptoughts.processes import Child, ChildDied, receive, send

SERVE = (__name__, "serve")


@dataclass(frozen=True)
class Piece:
    """A part of a document; `first` if the document starts here, where an end-of-text token is inserted."""

    split: str
    where: str
    text: str
    first: bool


@dataclass(frozen=True)
class Encoded:
    """Concatenated token ids of pieces; `lengths[i]` of them belong to piece i."""

    pieces: Sequence[Piece]
    tokens: np.ndarray
    lengths: list[int]


class BadPiece(DataError):
    """A piece that cannot be encoded; `index` is its position in its task."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


class WorkerDied(DataError):
    """A child process ended. The files written so far stay, and the next run continues there."""


def encode(tokenizer: Tokenizer, texts: Sequence[str], firsts: Sequence[bool]) -> tuple[np.ndarray, list[int]]:
    """Return the ids of all texts in one array, with end-of-text before those that are `first`, and the length of each.

    Raises BadPiece where a text cannot be encoded, or an id is not below `vocab_size`.
    """
    try:
        encoded = tokenizer.encode_batch(texts)
    except DataError:
        for index, text in enumerate(texts):
            try:
                tokenizer.encode_batch([text])
            except DataError as error:
                raise BadPiece(index, str(error)) from None
        raise
    eot = np.array([tokenizer.eot_id], dtype=tokenizer.dtype)
    tokens = np.concatenate(
        [part for ids, first in zip(encoded, firsts, strict=True) for part in ((eot, ids) if first else (ids,))]
    )
    lengths = [len(ids) + first for ids, first in zip(encoded, firsts, strict=True)]
    if int(tokens.max(initial=0)) >= tokenizer.vocab_size:
        bad = next(index for index, ids in enumerate(encoded) if int(ids.max(initial=0)) >= tokenizer.vocab_size)
        raise BadPiece(
            bad, f"token id {int(encoded[bad].max())} is outside the tokenizer's vocabulary of {tokenizer.vocab_size}"
        )
    return tokens, lengths


def encode_all(tokenizer: Tokenizer, saved: Path, tasks: Iterator[list[Piece]], processes: int) -> Iterator[Encoded]:
    """Yield every task encoded, in order; at most three tasks per process are queued.

    `saved` is the folder from which workers load the tokenizer. Raises DataError that names the document.
    """
    if processes == 1:
        for task in tasks:
            yield named(task, encode, tokenizer, [piece.text for piece in task], [piece.first for piece in task])
        return
    with ThreadPoolExecutor(processes) as threads, Workers(saved, processes) as workers:
        waiting: deque[tuple[list[Piece], Future[Any]]] = deque()
        for task in tasks:
            waiting.append(
                (task, threads.submit(workers.encode, [piece.text for piece in task], [piece.first for piece in task]))
            )
            if len(waiting) >= 3 * processes:
                oldest, future = waiting.popleft()
                yield named(oldest, future.result)
        while waiting:
            oldest, future = waiting.popleft()
            yield named(oldest, future.result)


def named(task: list[Piece], call: Any, *arguments: Any) -> Encoded:
    """Return the result of `call`; prefix an error about a piece with the name of its document."""
    try:
        tokens, lengths = call(*arguments)
    except BadPiece as error:
        raise DataError(f"{task[error.index].where}: {error}") from None
    return Encoded(task, tokens, lengths)


class Workers(ExitStack):
    """Child processes with a loaded tokenizer each; one thread at a time talks to one of them."""

    def __init__(self, saved: Path, count: int) -> None:
        # One thread each: the processes are the parallelism.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        super().__init__()
        self.idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for _ in range(count):
            self.idle.put(self.enter_context(Child(*SERVE, str(saved), environment=environment)))
        self.dtype = Tokenizer.load(saved).dtype

    def encode(self, texts: Sequence[str], firsts: Sequence[bool]) -> tuple[np.ndarray, list[int]]:
        """Run `encode` in one of the children. Raises WorkerDied if the child exits."""
        child = self.idle.get()
        try:
            raw = [text.encode("utf-8") for text in texts]
            head, body = child.ask({"sizes": [len(part) for part in raw], "firsts": list(firsts)}, b"".join(raw))
        except ChildDied as error:
            memory = " (out of memory?)" if error.code == -signal.SIGKILL else ""
            raise WorkerDied(f"tokenizing process: {error}{memory}", fix="run again with fewer --processes") from None
        finally:
            self.idle.put(child)
        if "error" in head:
            raise BadPiece(head["piece"], head["error"])
        return np.frombuffer(body, dtype=self.dtype), head["lengths"]


def serve(requests: IO[bytes], answers: IO[bytes], saved: str) -> None:
    """Load the tokenizer and answer requests until the parent closes the pipe or dies."""
    tokenizer = Tokenizer.load(Path(saved))
    try:
        while True:
            head, body = receive(requests)
            texts, start = [], 0
            for size in head["sizes"]:
                texts.append(str(body[start : start + size], "utf-8"))
                start += size
            try:
                tokens, lengths = encode(tokenizer, texts, head["firsts"])
            except BadPiece as error:
                send(answers, {"error": str(error), "piece": error.index})
            else:
                send(answers, {"lengths": lengths}, tokens.data)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done or gone; a normal exit would report the broken pipe

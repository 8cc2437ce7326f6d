"""Encode texts in several processes, in order.

Workers are plain child processes with their own pipes, so they work in a notebook and in a script without a main guard, and
exit when the parent is killed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from gptoughts.data.tokenizers.tokenizer import Tokenizer
from gptoughts.errors import DataError

COMMAND = "from gptoughts.data.text.workers import serve; serve()"


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


class Workers:
    """Pool of child processes with the tokenizer; each is used by one thread at a time."""

    def __init__(self, saved: Path, count: int) -> None:
        # One thread per process. sys.path is passed on, so that a checkout works without installation.
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.children = [
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, str(saved)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for _ in range(count)
        ]
        self.dtype = Tokenizer.load(saved).dtype
        self.idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        for child in self.children:
            self.idle.put(child)

    def encode(self, texts: Sequence[str], firsts: Sequence[bool]) -> tuple[np.ndarray, list[int]]:
        """Run `encode` in one of the children. Raises WorkerDied where the child exited."""
        child = self.idle.get()
        assert child.stdin is not None and child.stdout is not None
        try:
            raw = [text.encode("utf-8") for text in texts]
            send(child.stdin, {"sizes": [len(part) for part in raw], "firsts": list(firsts)}, b"".join(raw))
            head, body = receive(child.stdout)
        except (BrokenPipeError, EOFError):
            code = child.wait()
            raise WorkerDied(
                f"processes: a tokenizing process exited with code {code} (-9: out of memory?)",
                fix="run again with fewer processes; it continues from here",
            ) from None
        finally:
            self.idle.put(child)
        if "error" in head:
            raise BadPiece(head["piece"], head["error"])
        return np.frombuffer(body, dtype=self.dtype), head["lengths"]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    # Closing flushes unsent bytes of an abandoned task.
                    with suppress(BrokenPipeError):
                        pipe.close()


def serve() -> None:
    """Run a worker: load the tokenizer, answer requests on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it.
    tokenizer = Tokenizer.load(Path(sys.argv[1]))
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # Output that a library prints must not mix with the answers.
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
                send(answers, {"error": str(error), "piece": error.index}, b"")
            else:
                send(answers, {"lengths": lengths}, tokens.data)
    except (EOFError, BrokenPipeError):
        os._exit(0)  # The parent has exited or finished; a normal exit would report a broken pipe.


def send(pipe: IO[bytes], head: dict[str, Any], body: Any) -> None:
    """Send one frame: two lengths (uint64), a JSON head, raw bytes."""
    raw = json.dumps(head).encode()
    view = memoryview(body).cast("B") if len(body) else b""
    pipe.write(struct.pack("<QQ", len(raw), len(view)) + raw)
    pipe.write(view)
    pipe.flush()


def receive(pipe: IO[bytes]) -> tuple[dict[str, Any], bytes]:
    """Receive one frame. Raises EOFError where the pipe ends."""
    lengths = pipe.read(16)
    if len(lengths) < 16:
        raise EOFError
    head_length, body_length = struct.unpack("<QQ", lengths)
    head, body = pipe.read(head_length), pipe.read(body_length)
    if len(head) < head_length or len(body) < body_length:
        raise EOFError
    return json.loads(head), body

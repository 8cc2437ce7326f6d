"""Bring all ranks together before data is read, within a limit, with an error that names who is missing.

Every rank registers in one store. The store then serves two more purposes: ranks wait there for a slow tokenizer without a collective that
could time out, and an error that all ranks find is printed by the first of them.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from typing import TypeVar

import torch.distributed as dist

from gptoughts.console import LOGGER
from gptoughts.errors import ConfigError, RunError, ToldElsewhere
from gptoughts.hardware.endpoint import COLLECTIVE_SECONDS, LOOPBACK, RENDEZVOUS_SECONDS, Endpoint, endpoint, limit
from gptoughts.hardware.world import World

Result = TypeVar("Result")
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0
REMIND_SECONDS = 60.0
FAILED = "failed"
_FIX = (
    "check that the first machine is reachable on this port (firewall), and name its network card in NCCL_SOCKET_IFNAME and"
    " GLOO_SOCKET_IFNAME"
)


class Meeting:
    """A store that all ranks of a world have reached."""

    def __init__(self, world: World, place: Endpoint, store: dist.Store, seconds: int) -> None:
        self.world, self.place, self.store, self.seconds = world, place, store, seconds
        self._groups, self._rounds = count(), count()

    def wait_for_all(self) -> None:
        """Register this rank and wait for the others. Raises RunError after the limit; one rank raises it with the reason."""
        self.store.set(_name(self.world.rank), socket.gethostname())
        # A FileStore has no check() that is free of waiting in all versions; add(key, 0) reads a counter in every store.
        self.store.add(f"arrived/{self.world.rank}", 1)
        self._collect("arrived", time.monotonic() + self.seconds)

    def wait_for_data(self, work: Callable[[], Result]) -> Result:
        """Let the first rank of every machine do `work`, tokenizing, then the others; return its result when all have it, without limit."""
        number = next(self._rounds)
        name, ready = f"data/{number}/{socket.gethostname()}", f"ready/{number}"
        if self.world.local_rank > 0:
            self._until(lambda: self._read(name) > 0, lambda: None)
        try:
            result = work()
        except BaseException:
            self.fail()
            raise
        if self.world.local_rank == 0:
            self.store.add(name, 1)
        self.store.add(ready, 1)
        self._until(lambda: self._read(ready) >= self.world.world_size, lambda: self._remind(ready))
        return result

    def group_store(self) -> dist.Store:
        """Return a part of the store for the next process group of this process."""
        return dist.PrefixStore(f"group/{next(self._groups)}", self.store)

    def fail(self) -> None:
        """Tell waiting ranks that this one has an error, which it prints."""
        with suppress(RuntimeError):
            self.store.add(FAILED, 1)

    def claim(self, text: str) -> bool:
        """Return whether this rank is the first to print `text`; True also where the store is gone."""
        try:
            return self.store.add(f"said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
        except RuntimeError:
            return True

    def _collect(self, what: str, deadline: float) -> None:
        """Wait for the key of every rank, in rank order."""
        missing = list(range(self.world.world_size))
        pause = FIRST_PAUSE
        while True:
            while missing and self._read(f"{what}/{missing[0]}") > 0:
                missing.pop(0)
            if not missing:
                return
            if self._read(FAILED):
                time.sleep(LONGEST_PAUSE)  # the rank that prints the reason comes first
                raise ToldElsewhere
            if time.monotonic() > deadline:
                raise self._too_few([rank for rank in missing if self._read(f"{what}/{rank}") == 0])
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 1.5)

    def _too_few(self, missing: list[int]) -> RunError:
        arrived = self.world.world_size - len(missing)
        if self.store.add(FAILED, 1) > 1:  # another rank, whose limit passed first, prints it
            time.sleep(LONGEST_PAUSE)
            return ToldElsewhere()
        if self.place.serves:
            time.sleep(2 * LONGEST_PAUSE)  # others must read it before the store ends with this process
        hosts = sorted({self.store.get(_name(rank)).decode() for rank in range(self.world.world_size) if rank not in missing})
        return RunError(
            f"rendezvous at {self.place}: {arrived} of {self.world.world_size} ranks arrived within {self.seconds} s;"
            f" missing: {ranges(missing)}",
            found=f"{self.place.source}; arrived from {', '.join(hosts[:8])}{', ...' if len(hosts) > 8 else ''}",
            fix=f"{_FIX}; {RENDEZVOUS_SECONDS} sets the limit",
        )

    def _read(self, name: str) -> int:
        try:
            return int(self.store.add(name, 0))
        except RuntimeError as error:
            raise RunError(
                f"rendezvous at {self.place}: the process that answered there ended before all ranks were ready",
                found=str(error).splitlines()[0][:200],
                fix="see the messages of rank 0",
            ) from None

    def _until(self, done: Callable[[], bool], remind: Callable[[], None]) -> None:
        pause, reminded = FIRST_PAUSE, time.monotonic()
        while not done():
            if self._read(FAILED):
                time.sleep(LONGEST_PAUSE)
                raise ToldElsewhere
            if time.monotonic() - reminded > REMIND_SECONDS:
                remind()
                reminded = time.monotonic()
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 1.5)

    def _remind(self, ready: str) -> None:
        if self.world.rank == 0:
            LOGGER.info(f"data: {self._read(ready)} of {self.world.world_size} ranks have their data, waiting for the others")


_open: dict[str, Meeting] = {}
"""The meeting of this process: a second process group uses the same store."""


def meet(world: World) -> Meeting:
    """Return the store of this world's ranks, once all have reached it. Raises ConfigError for variables, RunError after the limit."""
    place, seconds = endpoint(world, os.environ), limit(RENDEZVOUS_SECONDS, os.environ, 300)
    key = f"{place} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {world}"
    if key not in _open:
        made = Meeting(world, place, _store(world, place, seconds), seconds)
        _open[key] = made
        made.wait_for_all()
    return _open[key]


def current() -> Meeting | None:
    """Return the newest meeting of this process."""
    return next(reversed(_open.values()), None)


def collective_limit() -> timedelta:
    """Return how long one collective may take."""
    return timedelta(seconds=limit(COLLECTIVE_SECONDS, os.environ, 3600))


def _store(world: World, place: Endpoint, seconds: int) -> dist.Store:
    patience = timedelta(seconds=seconds)
    if place.file is not None:
        store: dist.Store = dist.FileStore(str(place.file), world.world_size)
        store.set_timeout(patience)
        return store
    try:
        # Torch listens on all addresses of the machine, whatever the address. Ranks of one machine need only its own.
        listener = _listen(place.port) if world.on_one_machine and place.serves else None
        store = dist.TCPStore(
            LOOPBACK if world.on_one_machine else place.address, place.port, world.world_size, place.serves, patience,
            wait_for_workers=False, master_listen_fd=listener,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        raise _no_store(place, error, seconds, world) from None
    # torchrun's restarts use the store of its agent again.
    return dist.PrefixStore(f"gptoughts/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _listen(port: int) -> int:
    """Return a socket that listens on the loopback interface alone, for torch to own. Raises OSError."""
    with socket.create_server((LOOPBACK, port), backlog=4096) as server:
        return server.detach()


def _no_store(place: Endpoint, error: RuntimeError | OSError, seconds: int, world: World) -> RunError | ConfigError:
    cause = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        return ConfigError(
            f"MASTER_PORT: port {place.port} is in use on {socket.gethostname()}, where rank 0 listens",
            found=place.source,
            fix="MASTER_PORT with another number; `ss -ltnp` names the process that uses it",
        )
    if place.serves:
        return ConfigError(
            f"MASTER_ADDR: rank 0 cannot listen at {place}",
            found=f"{place.source}; {cause[:200]}",
            fix="MASTER_PORT with another number",
        )
    return RunError(
        f"rendezvous at {place}: no answer within {seconds} s on rank {world.rank} ({socket.gethostname()})",
        found=f"{place.source}; {cause[:200]}",
        fix=f"{_FIX}; see whether rank 0 started; {RENDEZVOUS_SECONDS} sets the limit",
    )


def _name(rank: int) -> str:
    return f"host/{rank}"


def ranges(ranks: list[int]) -> str:
    """Return `rank 1` or `ranks 1-3, 7`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][1] == rank - 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    text = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"

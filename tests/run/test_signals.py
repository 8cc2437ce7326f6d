"""Signals that end a run: which are heeded, which interrupt at once, and that handlers are put back."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from gptoughts.data.batches import Cursor
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.trainer import Progress
from gptoughts.hardware.world import World
from gptoughts.run.signals import SAVING, SignalWatcher


@pytest.fixture
def watcher() -> SignalWatcher:
    return SignalWatcher(Ranks(World(), torch.device("cpu")))


def asked(watcher: SignalWatcher) -> bool:
    return watcher.asked(Progress(0, 0, 0.0, Cursor()))


@pytest.mark.parametrize("number", SAVING)
def test_the_first_signal_ends_the_run_and_handlers_are_put_back(watcher: SignalWatcher, number: int) -> None:
    before = signal.getsignal(number)
    with watcher.listening():
        assert not asked(watcher)
        os.kill(os.getpid(), number)
        assert asked(watcher)
        assert watcher.signal == number
    assert signal.getsignal(number) is before


def test_a_launcher_may_deliver_its_signal_twice(watcher: SignalWatcher) -> None:
    with watcher.listening():
        assert not asked(watcher)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked(watcher)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert watcher.signal == signal.SIGUSR1


def test_nohup_stays_in_effect(watcher: SignalWatcher) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watcher.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked(watcher)
    finally:
        signal.signal(signal.SIGHUP, before)

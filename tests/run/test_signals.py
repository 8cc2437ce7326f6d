"""Signals that end a run: which are heeded, which interrupt at once, and that handlers are put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoughts.console import SilentConsole
from gptoughts.data.batches import Cursor
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.trainer import Progress
from gptoughts.hardware.world import World
from gptoughts.run import signals
from gptoughts.run.callbacks import Evaluate, Sample
from gptoughts.run.signals import REQUEST, SAVING, Interrupted, SecondSignal, SignalWatcher
from gptoughts.run.tracking.sink import Sink
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of


@pytest.fixture(autouse=True)
def none_is_ignored() -> Iterator[None]:
    """Heed SIGHUP and SIGINT where the tests were started with nohup, or by a shell in the background."""
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGINT)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


@pytest.mark.parametrize("number", [number for number in SAVING if number != signal.SIGUSR1])
def test_before_the_first_step_a_signal_ends_at_once(
    watcher: SignalWatcher, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with watcher.listening(), pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert capfd.readouterr().err == f"ended by {signal.Signals(number).name} before the first step; saved checkpoints stay\n"


def test_the_second_signal_has_its_own_exit_code(watcher: SignalWatcher) -> None:
    with watcher.listening():
        assert not asked(watcher)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(SecondSignal) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_sigusr2_asks_for_one_checkpoint_and_does_not_end_the_run(watcher: SignalWatcher) -> None:
    with watcher.listening():
        assert not asked(watcher) and not watcher.save_asked()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not asked(watcher)
        assert watcher.save_asked() and not watcher.save_asked()


def test_a_file_asks_for_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LOOK_SECONDS", 0.0)
    watcher = SignalWatcher(Ranks(World(), torch.device("cpu")), tmp_path)
    assert not asked(watcher) and not watcher.save_asked()
    (tmp_path / REQUEST).touch()
    assert not asked(watcher) and watcher.save_asked() and not (tmp_path / REQUEST).exists()
    monkeypatch.setattr(Path, "unlink", lambda path: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    (tmp_path / REQUEST).touch()
    assert [asked(watcher) or watcher.save_asked() for _ in range(3)] == [True, False, False], "once, also where it stays"


class Rows(Sink):
    def __init__(self) -> None:
        self.rows: list[Any] = []

    def log(self, step: int, values: Any) -> None:
        self.rows.append(values)


def test_validation_ends_between_two_batches_and_leaves_no_row(watcher: SignalWatcher) -> None:
    recipe, rows, read = recipe_of("modern"), Rows(), []

    def batches() -> Iterator[Any]:
        for number, (batch, _) in zip(range(9), random_batches(recipe), strict=False):
            read.append(number)
            if number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with engine_of(recipe, plan_of(recipe)) as engine, watcher.listening():
        assert not asked(watcher)
        evaluate = Evaluate(1, lambda: watcher.until_asked(batches()), rows, SilentConsole(), within=watcher.interruptible)
        evaluate.on_step(engine, Progress(step=1), None, False)  # type: ignore[arg-type]
        assert asked(watcher)
    assert (read, rows.rows, evaluate.result) == ([0, 1, 2], [], None)


def test_a_sample_ends_before_its_next_token(watcher: SignalWatcher) -> None:
    recipe, calls = recipe_of("modern"), []
    with engine_of(recipe, plan_of(recipe)) as engine, watcher.listening():
        assert not asked(watcher)

        def write(engine: Any) -> str:
            with watcher.interruptible(engine.bare), torch.no_grad():
                for number in range(9):
                    calls.append(number)
                    engine.bare(next(random_batches(recipe))[0]["input_ids"][:, :-1])
                    if number == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
            return "text"

        sample = Sample(1, write, SilentConsole())
        sample.on_step(engine, Progress(step=1), None, False)  # type: ignore[arg-type]
        assert not engine.bare._forward_pre_hooks
    assert calls == [0, 1, 2] and sample.text == ""


def test_a_signal_that_was_lost_in_an_import_ends_the_process_before_training(
    watcher: SignalWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals.CLOCK, "heard", signal.SIGTERM)
    with pytest.raises(SystemExit) as left, watcher.listening():
        raise AssertionError("trained")
    assert left.value.code == 143
    monkeypatch.setattr(signals.CLOCK, "heard", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), watcher.listening():
        raise AssertionError("trained")


class Dropping:
    """Collected with a callback in which a signal arrives; Python drops what a callback raises."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __del__(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)


def wait() -> None:
    for _ in range(1000):
        time.sleep(0.01)


def test_what_a_handler_raises_in_a_callback_is_raised_after_it(
    watcher: SignalWatcher, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with watcher.listening():
        with pytest.raises(SystemExit) as left:  # before the first step
            Dropping(signal.SIGTERM)
            wait()
        assert left.value.code == 143
    watcher.signal = None
    monkeypatch.setattr(signals, "is_compiling", lambda: True)
    with watcher.listening():
        assert not asked(watcher)
        with pytest.raises(Interrupted), watcher.interruptible():
            Dropping(signal.SIGTERM)
            wait()
        assert asked(watcher)
        with pytest.raises(SecondSignal) as ended:
            Dropping(signal.SIGTERM)
            wait()
        assert ended.value.code == 143
    assert capfd.readouterr().err == "ended by SIGTERM before the first step; saved checkpoints stay\n"


def test_other_exceptions_of_callbacks_are_told_as_before(watcher: SignalWatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __del__(self) -> None:
            raise ValueError("a defect")

    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(str(unraisable.exc_value)))
    with watcher.listening():
        Wrong()
    Wrong()
    assert told == ["a defect"] * 2


STUCK = """
import hashlib, signal, sys
from gptoughts import processes
processes.SIGNAL_SECONDS = 0.3
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
processes.CLOCK.start((signal.SIGTERM,))
processes.CLOCK.excused = lambda: sys.argv[1] == "excused"
print("ready", flush=True)
hashlib.pbkdf2_hmac("sha256", b"", b"", {"excused": 5_000_000, "no": 50_000_000}[sys.argv[1]])  # native code, for seconds; "no" is ended in it
"""


@pytest.mark.parametrize(("excused", "code"), [("no", 143), ("excused", 5)])
def test_a_main_thread_in_native_code_is_ended_unless_it_has_something_to_save(excused: str, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK, excused], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == ("ended by SIGTERM; saved checkpoints stay\n" if code == 143 else "")

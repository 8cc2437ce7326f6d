"""Show on this machine whether a killed and resumed training makes the bits of an unbroken one, and which layer is the cause if it does not."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoughts.diagnostics.bench.variants import Layers, baseline_of, layers_of, with_slot
from gptoughts.errors import RunError
from gptoughts.processes import POLL_SECONDS, exit_text, kill_tree, last_lines, module_words

Say = Callable[[str], None]
COMPARED = ("train/loss", "train/grad_norm", "eval/loss")
"""Metrics that must be equal at every step; the clock's are not."""


@dataclass(frozen=True)
class Trial:
    """A training of a few steps that is started several times, each time in a folder of its own below `folder`."""

    words: tuple[str, ...]
    """Words of `gptoughts train`: the recipe and its options, without layers."""
    layers: Mapping[str, Any]
    """Slots and their options, as on the command line."""
    before: int
    """Steps until the checkpoint after which the process is killed."""
    after: int
    """Steps after that checkpoint."""
    folder: Path

    @property
    def steps(self) -> int:
        """Return the steps of the unbroken training."""
        return self.before + self.after

    def command(self, place: Path) -> list[str]:
        """Return the command line of this training in `place`."""
        given = {
            "train.steps": self.steps, "save.every": self.before, "save.keep": 2, "save.keep_best": "false", "log.every": 1,
            "eval.every": self.before, "eval.batches": 1, "eval.patience": 0, "eval.tasks": "", "track.sinks": "jsonl",
        }  # fmt: skip
        slots = {f"layer.{key}": value for key, value in self.layers.items()}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in {**given, **slots}.items()]
        return [*module_words("gptoughts"), "train", *self.words, *flags, "--run-dir", str(place)]

    def checkpoint(self, place: Path, step: int) -> Path:
        """Return the checkpoint of a step of the training in `place`."""
        return place / "checkpoints" / f"step-{step:06d}"

    def run(self, name: str) -> Path:
        """Train to the end, or go on to the end where a process was killed. Returns the folder. Raises RunError."""
        place = self.folder / name
        with self._started(place) as process:
            code = process.wait()
        if code or not self.checkpoint(place, self.steps).is_dir():
            raise self._failed(place, code)
        return place

    def kill(self, name: str) -> Path:
        """Train until the checkpoint of step `before` is written, then kill every process. Returns the folder. Raises RunError."""
        place = self.folder / name
        wanted, end = self.checkpoint(place, self.before), self.checkpoint(place, self.steps)
        with self._started(place) as process:
            while process.poll() is None and not wanted.is_dir():
                time.sleep(POLL_SECONDS / 10)
            kill_tree(process.pid)
            code = process.wait()
        if end.is_dir():
            raise RunError(
                "--after: the training had ended before it could be killed", found=f"{self.after} steps", fix=f"--after {10 * self.after}"
            )  # fmt: skip
        if not wanted.is_dir():
            raise self._failed(place, code)
        return place

    @contextmanager
    def _started(self, place: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start the training with its output in a file; kill all of its processes if the block is left by an error."""
        place.parent.mkdir(parents=True, exist_ok=True)
        process: subprocess.Popen[bytes] | None = None
        try:
            # A signal between the start and the assignment would leave the training running. The child lets signals through by itself.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
            try:
                with self._log(place).open("ab") as log:
                    process = subprocess.Popen(
                        self.command(place),
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            yield process
        finally:
            if process is not None and process.poll() is None:
                kill_tree(process.pid)
                process.wait()

    def _log(self, place: Path) -> Path:
        return place.with_name(f"{place.name}.log")

    def _failed(self, place: Path, code: int) -> RunError:
        _, _, said = self._log(place).read_text(encoding="utf-8", errors="replace").rpartition("error: ")
        return RunError(
            f"verify-resume: the training ended with {exit_text(code)}: {last_lines(said, 3)}", fix=f"see {self._log(place)}"
        )


@dataclass(frozen=True)
class Difference:
    """What is not equal between two trainings of the same words, empty if nothing is."""

    lines: tuple[str, ...]
    losses: int
    """Metrics that were compared."""
    files: int
    """Files of tensors that were compared."""


def compare(trial: Trial, unbroken: Path, other: Path) -> Difference:
    """Compare metrics of every step and all tensors of the last checkpoint, bit for bit."""
    from gptoughts.engine.checkpoint.store import read_state
    from gptoughts.files import sha256_of
    from gptoughts.run.tracking.jsonl import FILE, read

    lines = list[str]()
    left, right = (_metrics(read(place / FILE)) for place in (unbroken, other))
    wrong = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
    if wrong:
        step, name = wrong[0]
        values = [float.fromhex(found[wrong[0]]) if wrong[0] in found else None for found in (left, right)]
        lines.append(f"first at step {step}: {name} {values[0]!r} without the kill, {values[1]!r} with it")
    ends = [trial.checkpoint(place, trial.steps) for place in (unbroken, other)]
    names = sorted({path.name for end in ends for path in end.glob("*.safetensors")})
    for name in names:
        files = [end / name for end in ends]
        if not all(path.is_file() for path in files):
            lines.append(f"{name}: only in one of the two checkpoints")
        elif sha256_of(files[0]) != sha256_of(files[1]):
            lines.append(f"{name}: {_tensor_difference(*files)}")
    cursors = [read_state(end)["run"]["progress"]["cursor"] for end in ends]
    if cursors[0] != cursors[1]:
        lines.append(f"position in the data: {cursors[0]} without the kill, {cursors[1]} with it")
    return Difference(tuple(lines), len(left), len(names))


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], str]:
    return {
        (row["step"], name): float(row[name]).hex()
        for row in rows
        for name in COMPARED
        if isinstance(row.get(name), int | float)
    }


def _tensor_difference(left: Path, right: Path) -> str:
    import torch
    from safetensors import safe_open

    with safe_open(left, "pt") as one, safe_open(right, "pt") as two:
        if sorted(one.keys()) != sorted(two.keys()):
            return "other tensors"
        for name in sorted(one.keys()):
            a, b = one.get_tensor(name), two.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{name}: another shape or type"
            if not torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
                return f"{name}: largest difference {float((a.double() - b.double()).abs().max()):.3g}"
    return "equal tensors, other metadata"


def verify(trial: Trial, say: Say, name: str = "plan") -> tuple[Difference, Path]:
    """Train unbroken, train and kill, resume, and compare. Returns the difference and the folder of the unbroken training."""
    began = time.monotonic()
    unbroken = trial.run(f"{name}-unbroken")
    say(f"{trial.steps} steps without a break: {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    place = trial.kill(f"{name}-killed")
    say(f"killed after the checkpoint of step {trial.before}: {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    trial.run(f"{name}-killed")
    say(f"resumed to step {trial.steps}: {time.monotonic() - began:.1f} s")
    return compare(trial, unbroken, place), unbroken


def find_cause(trial: Trial, setting: Any, unbroken: Path, say: Say) -> str:
    """Replace one layer after another by its baseline until the bits are equal. Returns what that says, in one sentence.

    setting  the ResolvedRun of the trial
    """
    repeats = not compare(trial, unbroken, trial.run("plan-again")).lines
    say(f"two trainings without a kill: {'equal' if repeats else 'not equal, so a resume cannot be exact'}")
    layers, nothing = layers_of(setting.plan), baseline_of(setting)
    for slot, layer in ((slot, layers[slot]) for slot in nothing if layers.get(slot) not in (None, nothing[slot])):
        found = _is_exact(trial, with_slot(layers, slot, {slot: nothing[slot]}), f"without-{layer}", repeats)
        say(f"{slot}: {nothing[slot]} instead of {layer}: {found}")
        if found == "exact":
            return f"layer {layer} (slot {slot}) is the cause: with {nothing[slot]} the training is exact"
    found = _is_exact(trial, nothing, "baseline", repeats)
    say(f"the baseline layer in every slot: {found}")
    if found == "exact":
        return "several layers are the cause: with the baseline in every slot the training is exact, without any one of them it is not"
    return "no layer is the cause: with the baseline in every slot the training is not exact either"


def _is_exact(trial: Trial, layers: Layers, name: str, repeats: bool) -> str:
    """Return whether the trial with other layers is exact, or why it could not be run."""
    other = Trial(trial.words, layers, trial.before, trial.after, trial.folder)
    try:
        if repeats:
            difference, _ = verify(other, lambda text: None, name)
        else:
            difference = compare(other, other.run(f"{name}-unbroken"), other.run(f"{name}-again"))
    except RunError as error:
        return f"cannot run ({str(error).splitlines()[0]})"
    return "not exact" if difference.lines else "exact"

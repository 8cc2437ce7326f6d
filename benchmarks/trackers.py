"""Measure what all trackers and the system sampler cost a training step, against `jsonl` alone, interleaved.

    python -m benchmarks.trackers quickstart --rounds 20 --to docs/measurements/cpu/trackers.json

One process holds three warm models of the same recipe: with metrics.jsonl alone, with every tracker and the sampler, and with metrics.jsonl
alone again. Each round runs all three in rotated order, and only times of the same round are compared. A round of the tracked one ends when
its trackers have taken all rows, which a real run does not wait for. "Off again / off" compares equal code: its distance from 1 is the
error of the other ratio. CPU time of the trackers' threads and of wandb's service is counted too, which a busy machine does not blur.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import click

from benchmarks import front
from benchmarks.step import Subject
from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.options import CONTEXT, RecipeCommand, option, recipe_options, split_flags
from gptoughts.cli.train import apply_environment
from gptoughts.console import SilentConsole
from gptoughts.diagnostics.bench.children import order
from gptoughts.diagnostics.bench.figures import machine_figures, paired, spread
from gptoughts.engine.engine import Engine
from gptoughts.engine.trainer import Progress, train
from gptoughts.hardware.world import World
from gptoughts.run.log import Log
from gptoughts.run.throughput import Throughput
from gptoughts.run.tracking.sink import QueuedSink, RunInfo, Sinks, make_sinks
from gptoughts.run.tracking.system import NodeSampler, Peer, SystemMetrics

MODULE = "benchmarks.trackers"
OFF, ON, AGAIN = "off", "on", "off again"
ALL = ("plot", "tensorboard", "wandb")
SAME_MEASUREMENT = ("what", "recipe", "plan", "model")


class Tracked:
    """Our loop with the given trackers; with any, the system is sampled too."""

    def __init__(self, subject: Subject, engine: Engine, folder: Path, names: Sequence[str]) -> None:
        self.engine, self._subject, self._names = engine, subject, names
        self.made = make_sinks(names)
        self._sinks, self._samples = Sinks(self.made), 0
        settings = subject.recipe.track.model_dump()
        self._sinks.start(RunInfo("bench", folder, recipe=subject.recipe.model_dump(), run_id="bench", settings=settings))
        self.progress = Progress()
        self._log = Log(subject.recipe.log.every, self._sinks, SilentConsole(), Throughput(mfu=subject.mfu[0]))

    def __call__(self, steps: int) -> None:
        """Train for `steps` more steps, and wait until the trackers have everything."""
        goal, rate = self.progress.step + steps, self._subject.length.rate
        system = SystemMetrics(
            self._subject.ranks, self._sinks, self._subject.recipe.track.sample_seconds if self._names else 0.0, self._samples
        )
        system.on_start(self.engine, self.progress)
        self.progress = train(
            self.engine,
            self.progress,
            lambda now: False,
            rate,
            callbacks=[system, self._log],
            pause=lambda now: now.step >= goal,
        )
        system.close()
        self._samples += 1000
        self.drain()

    def drain(self) -> None:
        """Wait until every tracker took what is queued."""
        for sink in self.made:
            if isinstance(sink, QueuedSink):
                taken = threading.Event()
                sink.put(taken.set)
                taken.wait(60)

    def close(self) -> None:
        """Close the trackers."""
        self._sinks.close()


def background_seconds() -> dict[str, float]:
    """Return the CPU time so far of the trackers' threads, by name, and of child processes, of which wandb's service is one."""
    found: dict[str, float] = {}
    for thread in threading.enumerate():
        if thread.name.startswith("tracker-"):
            found[thread.name] = _cpu_seconds(Path(f"/proc/self/task/{thread.native_id}"))
    pids = " ".join(_text(task / "children") for task in Path("/proc/self/task").iterdir()).split()
    found["child processes"] = sum(_cpu_seconds(task) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir())
    return found


def _text(file: Path) -> str:
    """Return the text of a file of /proc, or nothing if the thread it belongs to has ended since it was listed."""
    try:
        return file.read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def sample_seconds(times: int = 50) -> float:
    """Return the time that one sample of this process and the GPUs takes, on the sampler's thread."""
    with ExitStack() as stack:
        sampler = NodeSampler(World(), [Peer("", os.getpid(), 0, False, "")], stack)
        began = perf_counter()
        for _ in range(times):
            sampler.read()
        return (perf_counter() - began) / times


def _cpu_seconds(task: Path) -> float:
    """Return the CPU time of a thread, which schedstat has in nanoseconds."""
    return int((_text(task / "schedstat") or "0").split()[0]) / 1e9


def bench_trackers(setting: ResolvedRun, rounds: int, steps: int, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures as plain data."""
    subject = Subject(setting)
    seconds: dict[str, list[float]] = {OFF: [], ON: [], AGAIN: []}
    load = [round(os.getloadavg()[0], 2)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        variants: dict[str, Tracked] = {}
        for number, (name, trackers) in enumerate(((OFF, ()), (ON, ALL), (AGAIN, ()))):
            say(f"warming up: {name}")
            out = folder / str(number)
            out.mkdir()
            engine = stack.enter_context(subject.engine(subject.recipe, setting.plan))
            variants[name] = Tracked(subject, engine, out, trackers)
            stack.callback(variants[name].close)
            variants[name](2)
        background: dict[str, float] = {}
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in order(list(variants), number):
                before, began = background_seconds(), perf_counter()
                variants[name](steps)
                seconds[name].append((perf_counter() - began) / steps)
                if name == ON:
                    for thread, value in background_seconds().items():
                        background[thread] = background.get(thread, 0.0) + value - before.get(thread, 0.0)
            load.append(round(os.getloadavg()[0], 2))
    made = {"command": command, "rounds": rounds, "steps_per_round": steps, "load_averages": load}
    return _figures(setting, subject, seconds, background, made)


def _figures(
    setting: ResolvedRun,
    subject: Subject,
    seconds: dict[str, list[float]],
    background: dict[str, float],
    made: dict[str, Any],
) -> dict[str, Any]:
    recipe, steps = setting.resolved.recipe, made["rounds"] * made["steps_per_round"]
    per_step = {name: value / steps for name, value in sorted(background.items())}
    threads = sum(value for name, value in per_step.items() if name.startswith("tracker-"))
    return {
        "what": "bench trackers",
        **made,
        "machine": machine_figures(setting.machine),
        "recipe": recipe.name,
        "model": {key: value for key, value in vars(subject.spec).items() if value is not None},
        "plan": setting.plan.layers,
        "trackers": ["jsonl", *ALL],
        "log_every": recipe.log.every,
        "sample_seconds": recipe.track.sample_seconds,
        "variants": {name: {"step_ms": spread([1000 * value for value in values], 3)} for name, values in seconds.items()},
        "ratios_of_seconds": {
            f"{ON} / {OFF}": paired(seconds[ON], seconds[OFF]),
            f"{AGAIN} / {OFF}": paired(seconds[AGAIN], seconds[OFF]),
        },
        "sample_ms": round(1000 * sample_seconds(), 3),
        "background_cpu_ms_per_step": {name: round(1000 * value, 4) for name, value in per_step.items()},
        "shares_of_a_step": {  # of one core, by the median step, which spikes of other programs do not stretch
            "threads of the trackers": round(threads / median(seconds[ON]), 5),
            "child processes": round(per_step.get("child processes", 0.0) / median(seconds[ON]), 5),
        },
    }


def trackers_table(run: dict[str, Any]) -> str:
    """Return variants, ratios and CPU time as text."""
    lines = [
        f"{run['recipe']} on {run['machine']['label']}; load {min(run['load_averages'])} to {max(run['load_averages'])}",
        "",
    ]
    lines += [f"{name:<12}{row['step_ms']['median']:>10.2f} ms/step" for name, row in run["variants"].items()]
    lines += [
        f"{name:<20}{row['median']:>8.4f}  quartiles {row['q1']:.4f} to {row['q3']:.4f}"
        for name, row in run["ratios_of_seconds"].items()
    ]
    lines += [f"CPU of {name:<22}{value:>8.3f} ms/step" for name, value in run["background_cpu_ms_per_step"].items()]
    lines.append(f"one sample of the system {run['sample_ms']:>8.3f} ms")
    lines += [f"CPU of {name}: {100 * share:.2f} % of a step" for name, share in run["shares_of_a_step"].items()]
    return "\n".join(lines)


def _main(
    recipe: str | None, profile: str, plugin: tuple[str, ...], rounds: int, steps: int, out: str | None, **flags: Any
) -> None:
    fields, layers, _ = split_flags(flags)
    setting = decide(recipe, profile, fields, layers, plugin)
    apply_environment(setting)
    path = front.target(out)
    run = bench_trackers(setting, rounds, steps, front.typed(MODULE), front.progress)
    print(trackers_table(run))
    front.write(path, run, SAME_MEASUREMENT)


def main(arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.trackers`."""
    own: list[click.Parameter] = [
        *recipe_options(),
        option("--rounds", type=click.IntRange(2), default=20, help="paired rounds"),
        option("--steps", type=click.IntRange(1), default=20, help="steps per round and variant"),
        option("--to", "out", metavar="FILE", help="write JSON to FILE"),
    ]
    text = "Compare a run with every tracker and the system sampler with one that writes metrics.jsonl alone, interleaved."
    front.run(RecipeCommand("trackers", params=own, callback=_main, help=text, context_settings=CONTEXT), MODULE, arguments)


if __name__ == "__main__":
    main()

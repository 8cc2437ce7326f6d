"""Measure what our trainer adds to a bare DistributedDataParallel loop on the same model, batches and optimizer.

    python -m benchmarks.ddp_overhead bench-10m --ranks 2 --rounds 15 --to docs/measurements/cpu/ddp-overhead.json

Every rank process holds three warm models: ours, the bare loop's, and ours again. Each round runs all three in rotated order on all ranks,
and only times of the same round are compared. "Ours again / ours" compares equal code: its distance from 1 is the error of the other ratio.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import IO, Any

import click
from torch import nn

from benchmarks import front
from benchmarks.plain import plain_settings
from benchmarks.step import AGAIN, OURS, Ours, Run, Subject, plain_run
from gptoughts.api import ResolvedRun, decide
from gptoughts.cli.options import CONTEXT, RecipeCommand, option, recipe_options, split_flags
from gptoughts.config.loader import Recipe
from gptoughts.console import count
from gptoughts.diagnostics.bench.children import order
from gptoughts.diagnostics.bench.figures import machine_figures, paired, spread
from gptoughts.diagnostics.bench.variant_process import LOOPBACK, free_port, rank_variables
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.errors import ConfigError, RunError
from gptoughts.processes import Child, ChildDied, receive, send
from gptoughts.run.evidence import warmup_steps
from gptoughts.run.session import select_device

MODULE = "benchmarks.ddp_overhead"
BARE = "bare DDP"
NAMES = (OURS, BARE, AGAIN)
SAME_MEASUREMENT = ("what", "recipe", "plan", "model", "ranks", "threads_per_rank")


@dataclass(frozen=True)
class RankJob:
    """The arguments of `decide` in every rank."""

    recipe: str | None
    profile: str
    fields: Mapping[str, str]
    layers: Mapping[str, str]
    plugins: Sequence[str] = ()


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Run one rank: receive a RankJob, answer with plan and evidence when all variants are warm, then time the requested ones."""
    job = receive(requests)[0]
    setting = decide(job["recipe"], job["profile"], job["fields"], job["layers"], job["plugins"])
    device = select_device(setting.machine, setting.world)
    with ExitStack() as stack:
        ranks = stack.enter_context(process_group(setting.world, device))
        subject = Subject(setting, ranks)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ours = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        again = Ours(subject, stack.enter_context(subject.engine(subject.recipe, setting.plan)), folder)
        settings = plain_settings(setting.plan, ours.engine)
        variants: dict[str, Run] = {OURS: ours, BARE: plain_run(subject, settings, _wrapped), AGAIN: again}
        warm = 1 + warmup_steps(setting.plan, setting.extensions.catalog)
        ours(warm)
        evidence = ours.watched(setting.plan)
        for name in (BARE, AGAIN):
            variants[name](warm + 1)
        proofs = {line.slot: line.evidence.text for line in evidence if line.evidence.text != "baseline"}
        spec = {key: value for key, value in vars(subject.spec).items() if value is not None}
        machine = machine_figures(setting.machine)
        send(answers, {"plan": setting.plan.layers, "evidence": proofs, "model": spec, "machine": machine})
        while True:
            try:
                asked = receive(requests)[0]
            except EOFError:
                return
            subject.synchronize()
            began = perf_counter()
            loss = variants[asked["variant"]](asked["steps"])
            subject.synchronize()
            send(answers, {"seconds": (perf_counter() - began) / asked["steps"], "loss": loss})


def _wrapped(model: nn.Module) -> nn.Module:
    device = next(model.parameters()).device
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def bench_overhead(
    setting: ResolvedRun, job: RankJob, *, ranks: int, threads: int, rounds: int, steps: int, command: str,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Return all figures as plain data; a round's time is that of the slowest rank. Raises ConfigError if the ranks cannot start."""
    meeting = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": str(threads)}
    if not setting.machine.gpus:
        meeting["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    losses: dict[str, list[float]] = {}
    load = [round(os.getloadavg()[0], 2)]
    with ExitStack() as stack, ThreadPoolExecutor(ranks) as pool:
        children = [
            stack.enter_context(Child(MODULE, "serve", environment={**os.environ, **meeting, **rank_variables(rank, ranks)}))
            for rank in range(ranks)
        ]
        say(f"starting {ranks} ranks")

        def ask(message: Any) -> list[dict[str, Any]]:
            try:
                return list(pool.map(lambda child: child.ask(message)[0], children))
            except ChildDied as error:
                raise RunError(f"benchmarks.ddp_overhead: a rank ended early: {error}") from None

        ready = ask(asdict(job))
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            for name in order(list(NAMES), number):
                answers = ask({"variant": name, "steps": steps})
                seconds[name].append(max(answer["seconds"] for answer in answers))
                losses[name] = [answer["loss"] for answer in answers]
            load.append(round(os.getloadavg()[0], 2))
    counts = {"command": command, "rounds": rounds, "steps_per_round": steps, "ranks": ranks, "threads_per_rank": threads}
    return _figures(setting.resolved.recipe, ready[0], seconds, losses, {**counts, "load_averages": load})


def _figures(
    recipe: Recipe, first: Mapping[str, Any], seconds: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]],
    counts: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    return {
        "what": "bench ddp overhead",
        **counts,
        "machine": first["machine"],
        "recipe": recipe.name,
        "model": first["model"],
        "global_batch": recipe.train.global_batch,
        "tokens_per_step": recipe.train.global_batch * recipe.data.sequence_length,
        "plan": first["plan"],
        "evidence": first["evidence"],
        "variants": {name: {"step_ms": spread([1000 * value for value in values], 3)} for name, values in seconds.items()},
        "ratios_of_seconds": {
            f"{OURS} / {BARE}": paired(seconds[OURS], seconds[BARE]),
            f"{AGAIN} / {OURS}": paired(seconds[AGAIN], seconds[OURS]),
        },
        "overhead": round(median(one / other for one, other in zip(_both(seconds), seconds[BARE], strict=True)) - 1, 5),
        "last_logged_losses": {name: [round(value, 4) for value in values] for name, values in losses.items()},
    }


def _both(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the mean of both of ours in every round."""
    return [(one + other) / 2 for one, other in zip(seconds[OURS], seconds[AGAIN], strict=True)]


def overhead_table(run: Mapping[str, Any]) -> str:
    """Return variants and ratios as text."""
    size = count(run["model"]["parameters"]) if "parameters" in run["model"] else "n/a"
    lines = [
        f"{run['recipe']}: {size} parameters, {run['global_batch']} sequences per step over {run['ranks']} ranks, "
        f"threads per rank: {run['threads_per_rank']}",
        f"on {run['machine']['label']}; torch {run['machine']['torch']}, "
        f"load {min(run['load_averages'])} to {max(run['load_averages'])}",
        "",
        f"{'variant':<22}{'ms/step':>10}{'q1':>10}{'q3':>10}{'min':>10}{'max':>10}",
    ]
    for name, row in run["variants"].items():
        lines.append(f"{name:<22}" + "".join(f"{row['step_ms'][key]:>10.1f}" for key in ("median", "q1", "q3", "min", "max")))
    lines += [
        "",
        f"{'seconds, paired':<22}{'median':>10}{'q1':>10}{'q3':>10}{'min':>10}{'max':>10}   over {run['rounds']} rounds",
    ]
    for name, row in run["ratios_of_seconds"].items():
        lines.append(f"{name:<22}" + "".join(f"{row[key]:>10.3f}" for key in ("median", "q1", "q3", "min", "max")))
    return "\n".join([*lines, "", f"overhead of ours (both): {100 * run['overhead']:+.2f} %, median over rounds"])


def _main(
    recipe: str | None, profile: str, plugin: tuple[str, ...], ranks: int, threads: int, rounds: int, steps: int, out: str | None,
    **flags: Any,
) -> None:  # fmt: skip
    fields, layers, _ = split_flags(flags)
    layers = {"parallel": "ddp", **layers}
    setting = decide(recipe, profile, fields, layers, plugin, ranks=ranks)
    if setting.machine.gpus and ranks > len(setting.machine.gpus):
        raise ConfigError("--ranks: more than the GPUs of this machine", found=ranks)
    path = front.target(out)
    job = RankJob(recipe, profile, fields, layers, plugin)
    run = bench_overhead(
        setting, job, ranks=ranks, threads=threads, rounds=rounds, steps=steps, command=front.typed(MODULE), say=front.progress
    )
    print(overhead_table(run))
    front.write(path, run, SAME_MEASUREMENT)


def main(arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.ddp_overhead`."""
    own: list[click.Parameter] = [
        *recipe_options(),
        option("--ranks", type=click.IntRange(2), default=2, help="ranks on this machine"),
        option("--threads", type=click.IntRange(1), default=1, help="threads of every rank"),
        option("--rounds", type=click.IntRange(2), default=15, help="paired rounds"),
        option("--steps", type=click.IntRange(1), default=1, help="steps per round and variant"),
        option("--to", "out", metavar="FILE", help="write JSON to FILE"),
    ]
    text = "Compare our trainer under the ddp layer with a bare DistributedDataParallel loop of the same settings, interleaved."
    front.run(
        RecipeCommand("ddp-overhead", params=own, callback=_main, help=text, context_settings=CONTEXT),
        MODULE,
        arguments,
    )


if __name__ == "__main__":
    main()

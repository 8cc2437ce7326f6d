"""The commands of `gptoughts bench` and their options."""

from __future__ import annotations

import click

from gptoughts.cli.options import command, group, option, recipe_command, recipe_options


def bench_group() -> click.Command:
    """Build `gptoughts bench` and its commands."""
    gemm = [
        option("--largest", type=click.IntRange(64), metavar="N", help="largest matrices, N x N; default: limited by time"),
        option("--to", "--out", "out", metavar="FILE", help="write JSON and a Markdown table next to it"),
    ]
    return group(
        "bench",
        "Run benchmarks: interleaved variants, medians and spread.",
        *_bench_plan(),
        command(
            "gemm",
            "bench.gemm",
            "Measure matrix products and copies on this machine. The user's cache keeps the results for other commands.",
            gemm,
        ),
    )


def _bench_plan() -> list[click.Command]:
    to = option(
        "--to", "--out", "out", metavar="FILE.json", help="write JSON, a Markdown table and a picture, named after FILE"
    )
    layers = [
        *recipe_options(),
        option("--rounds", type=click.IntRange(1), default=5, help="rounds over all variants"),
        option("--steps", type=click.IntRange(1), default=5, help="steps per round and variant"),
        to,
    ]
    parity = [
        *recipe_options(),
        option("--steps", type=click.IntRange(2), default=200, help="steps of every training"),
        option("--seeds", type=click.IntRange(0), default=2, help="further reference trainings with other initial weights"),
        option(
            "--slots",
            metavar="SLOT,...",
            help="slots to compare; default: precision and optimizer, otherwise all that change numerics",
        ),
        to,
    ]
    gain = "Measure the gain of each layer of the plan. Runs the plan without it and the baseline with it, interleaved."
    same = (
        "Compare the training loss of the plan with its reference. Exits with code 1 if it differs by more than 0.5 % "
        "and twice the noise of seeds."
    )
    return [
        recipe_command("layers", "bench.layers", gain, layers),
        recipe_command("parity", "bench.parity", same, parity),
        _bench_scaling(),
    ]


def _bench_scaling() -> click.Command:
    params = [
        *recipe_options(),
        option(
            "--ranks",
            metavar="N,...",
            help="numbers of ranks; 1 is added; default: 1, 2, 4, ... up to the GPUs, else the cores",
        ),
        option(
            "--strategies",
            metavar="LAYER,...",
            help="layers of the slot parallel; default: all that can run. Their options: --layer.parallel.OPTION",
        ),
        option("--only", type=click.Choice(["strong", "weak"]), help="one kind of scaling; default: both"),
        option(
            "--threads",
            type=click.IntRange(1),
            help="threads of every rank; default: 1, beside GPUs an even share of the cores",
        ),
        option("--rounds", type=click.IntRange(1), default=5, help="rounds over all runs"),
        option("--steps", type=click.IntRange(1), default=5, help="steps per round and run"),
        option("--to", "--out", "out", metavar="FILE.json", help="write JSON, Markdown, CSV and a picture, named after FILE"),
    ]
    text = (
        "Measure speed-up, efficiency, time in collectives and memory per rank of several ranks against one process of equal "
        "settings, interleaved."
    )
    return recipe_command("scaling", "bench.scaling", text, params)

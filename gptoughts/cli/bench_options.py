"""The verbs of `gptoughts bench`."""

from __future__ import annotations

import click

from gptoughts.cli.options import CONTEXT, Command, CommandGroup, RecipeCommand, call, call_with_recipe, option, recipe_options


def bench_group() -> click.Command:
    """`gptoughts bench` with its verbs."""
    group = CommandGroup("bench", help="Measure, interleaved, with medians and spread.", context_settings=CONTEXT)
    for command in _bench_plan():
        group.add_command(command)
    gemm: list[click.Parameter] = [
        option(
            "--largest",
            type=click.IntRange(64),
            metavar="N",
            help="largest matrices, N x N; as far as time allows if not given",
        ),
        option("--to", "--out", "out", metavar="FILE", help="write JSON, and a Markdown table beside it"),
    ]
    text = "What matrix products and copies reach on this machine; kept in the user's cache, for other verbs to compare with."
    group.add_command(Command("gemm", params=gemm, callback=call("bench", "gemm"), help=text, context_settings=CONTEXT))
    return group


def _bench_plan() -> list[click.Command]:
    to = option("--to", "--out", "out", metavar="FILE.json", help="write JSON, a Markdown table and a picture, all named FILE")
    layers = [
        *recipe_options(),
        option("--rounds", type=click.IntRange(1), default=5, help="rounds in which every variant takes its turn"),
        option("--steps", type=click.IntRange(1), default=5, help="steps per round and variant"),
        to,
    ]
    parity = [
        *recipe_options(),
        option("--steps", type=click.IntRange(2), default=200, help="steps of every training"),
        option(
            "--seeds", type=click.IntRange(0), default=2, help="further trainings of the reference from other first weights"
        ),
        option(
            "--slots",
            metavar="SLOT,...",
            help="slots in question; of themselves precision and optimizer, else all that change numbers",
        ),
        to,
    ]
    text = "What each layer of the plan gives: the plan without it, the baseline with it, in processes that take turns."
    said = "Does the plan learn as its reference does? Leaves with 1 where the loss differs by more than 0.5 % and twice the noise of seeds."
    return [
        RecipeCommand(
            "layers", params=layers, callback=call_with_recipe("bench", "layers"), help=text, context_settings=CONTEXT
        ),
        RecipeCommand(
            "parity", params=parity, callback=call_with_recipe("bench", "parity"), help=said, context_settings=CONTEXT
        ),
    ]

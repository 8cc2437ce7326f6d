"""The command line. Each verb is one function in `gptoughts.cli`; nothing heavy is imported before a verb is known.

Words of a recipe become dotted flags by themselves, so `--help` lists every field with its type.
"""

from __future__ import annotations

import os
import sys

import click

from gptoughts.cli.bench_options import bench_group
from gptoughts.cli.options import CONTEXT, Command, CommandGroup, RecipeCommand, call, call_with_recipe
from gptoughts.cli.options import argument as _argument
from gptoughts.cli.options import option as _option
from gptoughts.cli.options import recipe_options as _recipe_options
from gptoughts.errors import ConfigError, GptoughtsError
from gptoughts.planning.environment import Process


def verbs() -> CommandGroup:
    """The whole command line."""
    group = CommandGroup(
        "gptoughts",
        help="Train language models, take what the hardware can give, and prove it.\n\n"
        "A recipe says what to train, a profile how on which hardware, a run is what happened.",
        context_settings=CONTEXT,
        epilog="Start with: gptoughts plan, then gptoughts train quickstart",
    )
    group.params.append(
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
        )
    )
    for command in (
        _train(), _plan(), _trace(), *_lists(), _tokenize(), _data(), _generate(), _export(), _eval(), bench_group(), _doctor(),
    ):  # fmt: skip
        group.add_command(command)
    return group


def _version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from gptoughts import __version__

        click.echo(__version__)
        context.exit()


def _train() -> click.Command:
    own = [
        *_recipe_options(),
        _option("--run", "run_name", metavar="NAME", help="name of the run; a named run resumes by itself"),
        _option("--run-dir", metavar="DIR", help="write everything into DIR instead of out/ and checkpoints/"),
        _option("--resume", default="auto", metavar="auto|never|PATH", help="where to go on from"),
        _option("--strict", is_flag=True, help="stop on layers that cannot be proven, too"),
        _option(
            "--numerics",
            default="check",
            type=click.Choice(["check", "off"]),
            help="compare layers with the baseline on two blocks before the first step",
        ),
    ]
    text = "Train RECIPE (a name or a .toml file). Without one: quickstart on a CPU, gpt-1b on a GPU."
    return RecipeCommand("train", params=own, callback=call_with_recipe("train", "train"), help=text, context_settings=CONTEXT)


def _plan() -> click.Command:
    own = [
        *_recipe_options(),
        _option("--machine", metavar="FILE", help="plan for the machine in FILE (gptoughts doctor --machine-json prints one)"),
        _option("--ranks", type=click.IntRange(1), help="plan for this many ranks"),
        _option("--json", "as_json", is_flag=True, help="print JSON"),
    ]
    text = "Show which layers RECIPE would get and why, without training; also for a machine that is not here."
    return RecipeCommand("plan", params=own, callback=call_with_recipe("plan", "plan"), help=text, context_settings=CONTEXT)


def _trace() -> click.Command:
    own = [
        *_recipe_options(),
        _option(
            "--from", "first", type=click.IntRange(1), metavar="N", help="first step to trace; after the warm ones if not given"
        ),
        _option("--to", "last", type=click.IntRange(1), metavar="M", help="last step to trace; three steps if not given"),
        _option("--run", "run_name", metavar="NAME", help="write into out/NAME"),
        _option("--run-dir", metavar="DIR", help="write into DIR instead"),
        _option("--memory-history", is_flag=True, help="note who asks for GPU memory, for the report when it runs out"),
    ]
    text = "Train RECIPE for a few steps under the profiler and say where their time went."
    return RecipeCommand("trace", params=own, callback=call_with_recipe("trace", "trace"), help=text, context_settings=CONTEXT)


def _lists() -> list[click.Command]:
    name: list[click.Parameter] = [_argument("name", required=False)]
    return [
        Command(
            "recipes",
            params=name,
            callback=call("lists", "recipes"),
            help="List recipes, or print one.",
            context_settings=CONTEXT,
        ),
        Command(
            "profiles",
            params=list(name),
            callback=call("lists", "profiles"),
            help="List profiles, or print one.",
            context_settings=CONTEXT,
        ),
        Command(
            "layers",
            params=[*name, _option("--markdown", is_flag=True, help="print docs/layers.md")],
            callback=call("lists", "layers"),
            help="List layers and whether they fit this machine, or print one card.",
            context_settings=CONTEXT,
        ),
    ]


def _tokenize() -> click.Command:
    params = [
        _argument("source"),
        _option("--to", "out", required=True, metavar="DIR", help="folder for the shards"),
        _option("--tokenizer", help="bytes, chars, gpt2 (if not given), or a tokenizer.json", metavar="NAME"),
        _option("--train-bpe", type=click.IntRange(1), metavar="N", help="train a byte-level BPE of N tokens on the text"),
        _option("--val-fraction", type=click.FloatRange(0, 1, max_open=True), default=0.05, help="share kept for validation"),
        _option("--val-from", type=click.Choice(["auto", "tail", "documents"]), default="auto", help="what validation takes"),
        _option("--text-key", default="text", help="field of a row that holds the text"),
        _option("--shard-tokens", type=click.IntRange(1), default=100_000_000, help="tokens per shard"),
        _option("--processes", type=click.IntRange(1), help="parallel processes; all usable cores if not given"),
        _option("--overwrite", is_flag=True, help="start over in a folder made with other settings"),
    ]
    text = "Turn SOURCE (a file, folder, glob or dataset) into shards of tokens. Goes on where it was interrupted."
    return Command("tokenize", params=params, callback=call("tokenize", "tokenize"), help=text, context_settings=CONTEXT)


def _generate() -> click.Command:
    params: list[click.Parameter] = [
        _argument("checkpoint"),
        _option("--prompt", multiple=True, help="start of the text; several times for several; - reads standard input"),
        _option(
            "--tokens", type=click.IntRange(1), help="tokens to write at most; if not given 200, by diffusion the recipe's"
        ),
        _option("--temperature", type=click.FloatRange(0), default=0.8, help="0 takes the likeliest token"),
        _option("--top-k", type=click.IntRange(0), default=50, help="0 keeps every token"),
        _option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="keep the likeliest tokens of this share"
        ),
        _option("--seed", type=click.IntRange(0), default=0, help="seed of the draws"),
        _option("--chat", is_flag=True, help="each prompt is a user's turn, put into the tokenizer's chat template"),
        _option("--base", metavar="PATH", help="model under an adapter, where the adapter's own note of it does not hold"),
        _option("--steps", type=click.IntRange(1), help="diffusion: denoising steps; the recipe's if not given"),
        _option("--block-length", type=click.IntRange(1), help="diffusion: tokens per block, written left to right"),
        _option("--remasking", type=click.Choice(["low-confidence", "random"]), help="diffusion: what stays masked longer"),
        _option("--guidance", type=click.FloatRange(0), help="diffusion: classifier-free guidance"),
        _option(
            "--memory", metavar="GIB", type=click.FloatRange(0, min_open=True), help="a model that is larger goes to --offload"
        ),
        _option("--offload", metavar="DIR", help="keep what does not fit in memory in DIR (accelerate)"),
    ]
    text = "Write text with CHECKPOINT: a run's name, its folder, one checkpoint, an exported folder or an adapter."
    return Command("generate", params=params, callback=call("generate", "generate"), help=text, context_settings=CONTEXT)


def _data() -> click.Command:
    group = CommandGroup("data", help="Look at what a recipe would train on.", context_settings=CONTEXT)
    own = [*_recipe_options()[:1], _option("--count", type=click.IntRange(1), default=3, help="samples to show")]
    text = "Print samples as they are trained on, decoded, with the learned tokens marked."
    group.add_command(
        RecipeCommand("show", params=own, callback=call_with_recipe("data", "show"), help=text, context_settings=CONTEXT)
    )
    return group


def _export() -> click.Command:
    params: list[click.Parameter] = [
        _argument("checkpoint"),
        _option("--to", "out", required=True, metavar="DIR", help="folder to write"),
        _option("--base", metavar="PATH", help="model under an adapter, where the adapter's own note of it does not hold"),
        _option("--adapter-only", is_flag=True, help="write the adapter as it is (peft opens it) instead of merging it"),
        _option(
            "--text", metavar="FILE", help="text to compare logits on; a passage of this Python's own license if not given"
        ),
    ]
    text = "Write CHECKPOINT as a folder that transformers opens, and check that it gives the same logits."
    return Command("export", params=params, callback=call("export", "export"), help=text, context_settings=CONTEXT)


def _eval() -> click.Command:
    group = CommandGroup("eval", help="Evaluate a checkpoint or an exported folder.", context_settings=CONTEXT)
    data = _option("--data", metavar="PATH", help="text or tokenized folder; the run's own validation split if not given")
    split = _option("--split", default="val", help="split of the tokenized folder")
    batch = _option("--batch", type=click.IntRange(1), default=16, help="sequences per forward")
    length = _option("--length", type=click.IntRange(1), help="tokens of context; the run's own if not given")
    as_json = _option("--json", "as_json", is_flag=True, help="print JSON")
    draws = _option("--draws", type=click.IntRange(1), default=128, help="maskings per window")
    limit = _option("--windows", type=click.IntRange(1), help="windows of the split, spread over it; all if not given")
    questions = _option("--data", metavar="FILE", help="SQuAD JSON; the run's own validation questions if not given")
    threshold = _option("--threshold", type=float, help="lead that no answer needs to be left unanswered")
    out = _option("--to", "out", metavar="DIR", help="write predictions into DIR")
    kinds: dict[str, tuple[list[click.Parameter], str]] = {
        "perplexity": ([data, split, batch, length, as_json], "Loss and perplexity over a whole split."),
        "likelihood": ([data, split, batch, length, draws, limit, as_json], "Likelihood bound of a masked-diffusion model."),
        "squad": ([questions, threshold, batch, out, as_json], "Exact match and F1 of a question-answering model."),
    }
    needed = _option("--data", required=True, metavar="PATH", help="text that neither was trained on; all of it is used")
    kinds["compare"] = (
        [_argument("other"), needed, batch, length, limit, as_json],
        "How much better OTHER predicts a text than CHECKPOINT, with an interval.",
    )
    for name, (options, text) in kinds.items():
        params = [_argument("checkpoint"), *options]
        group.add_command(Command(name, params=params, callback=call("evaluate", name), help=text, context_settings=CONTEXT))
    return group


def _doctor() -> click.Command:
    params: list[click.Parameter] = [
        _option("--json", "json", is_flag=True, help="print JSON"),
        _option("--quick", is_flag=True, help="leave out what has to be tried: imports, speed, ranks, disk rates"),
        _option("--machine-json", is_flag=True, help="print this machine as a file for plan --machine"),
    ]
    text = "What is here, what is missing or slow, what that costs, and what to type."
    return Command("doctor", params=params, callback=call("doctor", "doctor"), help=text, context_settings=CONTEXT)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user's mistake is one message and exit code 2.

    Called without arguments, the process is ours and may be started again with other variables.
    """
    process = Process.OURS if arguments is None else Process.CALLERS
    try:
        verbs().main(args=arguments, prog_name="gptoughts", standalone_mode=False, obj=process)
    except click.ClickException as error:
        _leave(f"{ConfigError.__name__}: {error.format_message()}", error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _leave("interrupted", 130)
    except GptoughtsError as error:
        _leave(f"{type(error).__name__}: {error}", error.exit_code)
    except BrokenPipeError:
        # Who read our output has gone; the interpreter must not try to flush into the closed pipe at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _leave(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)

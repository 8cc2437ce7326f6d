"""The command line: builds the command tree and prints errors.

Commands import their module when they run, so `--help` and `plan` load nothing heavy. Recipe fields become dotted flags.
"""

from __future__ import annotations

import os
import sys

import click

from gptoughts.cli.bench_commands import bench_group
from gptoughts.cli.ending import one_message
from gptoughts.cli.eval_commands import eval_group
from gptoughts.cli.options import (
    CommandGroup,
    argument,
    command,
    group,
    option,
    recipe_command,
    recipe_options,
    remote_code,
)
from gptoughts.cli.report_commands import report_commands
from gptoughts.console import flush_output_at_exit, print_line, print_result, print_traceback
from gptoughts.planning.environment import Process
from gptoughts.processes import shelter_children


def build_cli() -> CommandGroup:
    """Build the whole command tree."""
    tree = group(
        "gptoughts",
        "Train language models at the speed of the hardware, with evidence that every optimization is active.\n\n"
        "A recipe defines the training, a profile the optimizations for a kind of hardware, a run is one training.",
        _train(), _plan(), _trace(), _verify_resume(), *_lists(), _fetch(), _tokenize(), _data(), _generate(), _export(), eval_group(),
        bench_group(), *report_commands(), _doctor(), _launch(),
        epilog="Start with: gptoughts plan, then gptoughts train quickstart",
    )  # fmt: skip
    tree.params.append(
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
        )
    )
    return tree


def _version(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        from gptoughts import __version__

        print_result(__version__)
        context.exit()


def _name(text: str) -> list[click.Parameter]:
    """Return `--name`, and its old name: torchrun takes `--run` for an abbreviation of its own options."""
    old = click.Option(["--run", "old_name"], hidden=True, expose_value=False, is_eager=True, callback=_renamed)
    return [old, option("--name", "run_name", metavar="NAME", help=text, default=_old_name, show_default=False)]


def _renamed(context: click.Context, parameter: click.Parameter, given: str | None) -> None:
    if given is not None:
        context.meta["gptoughts.old_name"] = given
        from gptoughts.hardware.world import is_quiet

        if not is_quiet(os.environ):
            print_line("note: --run is now --name", sys.stderr)


def _old_name() -> str | None:
    """Return the value of `--run`, for `--name` where it is not given."""
    found: str | None = click.get_current_context().meta.get("gptoughts.old_name")
    return found


def _gpus() -> list[click.Parameter]:
    return [option("--gpus", type=click.IntRange(1), metavar="N", help="GPUs to use on each machine; default: all")]


def _numerics() -> click.Parameter:
    text = "compare the layers with the baseline on two blocks before the first step"
    return option("--numerics", default="check", type=click.Choice(["check", "off"]), help=text)


def _train() -> click.Command:
    params = [
        *recipe_options(),
        *_name("name of the run; a run of this name is resumed"),
        option("--run-dir", metavar="DIR", help="write everything into DIR instead of out/ and checkpoints/"),
        option("--resume", default="auto", metavar="auto|never|PATH", help="checkpoint to resume from"),
        option("--strict", is_flag=True, help="also stop if a layer cannot be proven active"),
        _numerics(),
        option("--ranks", type=click.IntRange(1), help="processes to start on this machine; default: one per GPU"),
        *_gpus(),
        option(
            "--collectives",
            default="auto",
            type=click.Choice(["auto", "gloo", "nccl", "mpi"]),
            help="library that ranks communicate by; auto: nccl on GPUs, gloo on CPUs",
        ),
    ]
    text = "Train RECIPE (a name or a .toml file). Default: quickstart on a CPU, gpt-1b on a GPU."
    return recipe_command("train", "train.train", text, params)


def _plan() -> click.Command:
    params = [
        *recipe_options(),
        option("--machine", metavar="FILE", help="plan for the machine in FILE (written by gptoughts doctor --machine-json)"),
        option("--ranks", type=click.IntRange(1), help="plan for this many ranks; default: those that train starts"),
        *_gpus(),
        option("--json", "as_json", is_flag=True, help="print JSON"),
    ]
    text = "Show layers, reasons and expected memory for RECIPE. Trains nothing; --machine plans for another machine."
    return recipe_command("plan", "plan.plan", text, params)


def _trace() -> click.Command:
    step = click.IntRange(1)
    params = [
        *recipe_options(),
        option("--from", "first", type=step, metavar="N", help="first step to trace; default: after the warm-up steps"),
        option("--to", "last", type=step, metavar="M", help="last step to trace; default: three steps"),
        *_name("write into out/NAME"),
        option("--run-dir", metavar="DIR", help="write into DIR instead"),
        option("--memory-history", is_flag=True, help="record GPU allocations, for the report if memory runs out"),
    ]
    return recipe_command("trace", "trace.trace", "Profile a few steps of RECIPE and show where the time goes.", params)


def _verify_resume() -> click.Command:
    steps = click.IntRange(1)
    params = [
        *recipe_options(),
        option("--before", type=steps, default=10, metavar="N", help="steps before the kill"),
        option("--after", type=steps, default=10, metavar="M", help="steps after it"),
        _numerics(),
        option("--ranks", type=steps, help="processes to start on this machine; default: one per GPU"),
        *_gpus(),
        option(
            "--run-dir", metavar="DIR", help="keep the trainings in DIR; default: a new folder in out/, removed if all is equal"
        ),
    ]
    text = (
        "Train RECIPE, kill it with SIGKILL and resume it; compare losses and checkpoint with a training that was not killed. "
        "Exits with code 1 if a bit differs, and names the layer."
    )
    return recipe_command("verify-resume", "verify_resume.verify_resume", text, params)


def _lists() -> list[click.Command]:
    name, markdown = argument("name", required=False), option("--markdown", is_flag=True, help="print docs/layers.md")
    return [
        command("recipes", "lists.recipes", "List recipes, or print one.", [name]),
        command("profiles", "lists.profiles", "List profiles, or print one.", [name]),
        command("layers", "lists.layers", "List layers and their state on this machine, or print one.", [name, markdown]),
    ]


def _fetch() -> click.Command:
    params = [
        argument("names", nargs=-1),
        option("--dataset", multiple=True, metavar="OWNER/NAME", help="dataset of the Hugging Face Hub; repeatable"),
    ]
    text = "Download the models and datasets of NAMES (recipes, or OWNER/MODEL), for jobs without a network."
    return command("fetch", "fetch.fetch", text, params)


def _tokenize() -> click.Command:
    params = [
        argument("source"),
        option("--to", "out", required=True, metavar="DIR", help="folder for the shards"),
        option("--tokenizer", help="bytes, chars, gpt2 (default) or a tokenizer.json", metavar="NAME"),
        option("--train-bpe", type=click.IntRange(1), metavar="N", help="train a byte-level BPE of N tokens on the text"),
        option("--val-fraction", type=click.FloatRange(0, 1, max_open=True), default=0.05, help="share for validation"),
        option("--val-from", type=click.Choice(["auto", "tail", "documents"]), default="auto", help="part used for validation"),
        option("--text-key", default="text", help="field of a row that holds the text"),
        option("--bad-rows", type=click.Choice(["error", "skip"]), default="error", help="rows that cannot be read"),
        option("--shard-tokens", type=click.IntRange(1), default=100_000_000, help="tokens per shard"),
        option("--processes", type=click.IntRange(1), help="parallel processes; default: all usable cores"),
        option("--overwrite", is_flag=True, help="start over in a folder made with other settings"),
    ]
    text = "Tokenize SOURCE (a file, folder, glob or dataset) into shards. Continues if interrupted."
    return command("tokenize", "tokenize.tokenize", text, params)


def _generate() -> click.Command:
    params: list[click.Parameter] = [
        argument("checkpoint"),
        option("--prompt", multiple=True, help="start of the text; repeatable; - reads standard input"),
        option(
            "--tokens", type=click.IntRange(1), help="maximum number of new tokens; default: 200, for diffusion the recipe's"
        ),
        option("--temperature", type=click.FloatRange(0), default=0.8, help="0 takes the most likely token"),
        option("--top-k", type=click.IntRange(0), default=50, help="0 keeps all tokens"),
        option(
            "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="keep the most likely tokens of this share"
        ),
        option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="random seed"),
        option("--chat", is_flag=True, help="put each prompt into the tokenizer's chat template as a user turn"),
        option("--base", metavar="PATH", help="base model of an adapter, if not the one noted in the adapter"),
        remote_code(),
        option("--steps", type=click.IntRange(1), help="diffusion: denoising steps; default: the recipe's"),
        option("--block-length", type=click.IntRange(1), help="diffusion: tokens per block, written left to right"),
        option(
            "--remasking", type=click.Choice(["low-confidence", "random"]), help="diffusion: tokens that stay masked longer"
        ),
        option("--guidance", type=click.FloatRange(0), help="diffusion: classifier-free guidance scale"),
        option(
            "--memory",
            metavar="GIB",
            type=click.FloatRange(0, 2**30, min_open=True),
            help="offload weights beyond this to --offload",
        ),
        option("--offload", metavar="DIR", help="keep weights that exceed memory in DIR (accelerate)"),
    ]
    text = "Generate text with CHECKPOINT. It is a run name, a run folder, one checkpoint, an exported folder or an adapter."
    return command("generate", "generate.generate", text, params)


def _data() -> click.Command:
    params = [
        *recipe_options()[:1],
        option("--count", type=click.IntRange(1), default=3, help="number of samples"),
        option("--ids", is_flag=True, help="print the token ids too, learned ones marked"),
    ]
    text = "Print training samples, decoded, with the learned tokens marked."
    return group("data", "Inspect training data.", recipe_command("show", "data.show", text, params))


def _export() -> click.Command:
    params: list[click.Parameter] = [
        argument("checkpoint"),
        option("--to", "out", required=True, metavar="DIR", help="folder to write"),
        option("--base", metavar="PATH", help="base model of an adapter, if not the one noted in the adapter"),
        remote_code(),
        option("--adapter-only", is_flag=True, help="write the adapter for peft instead of merging it"),
        option("--text", metavar="FILE", help="text to compare logits on; default: a passage of Python's license"),
    ]
    text = "Export CHECKPOINT as a folder for transformers. Checks that the logits are equal."
    return command("export", "export.export", text, params)


def _doctor() -> click.Command:
    params: list[click.Parameter] = [
        option("--json", "json", is_flag=True, help="print JSON"),
        option("--quick", is_flag=True, help="skip imports, speed, rank and disk checks"),
        option("--machine-json", is_flag=True, help="print this machine as a file for plan --machine"),
    ]
    text = "Check this machine for missing or slow parts. Prints the cost of each problem and the command that fixes it."
    return command("doctor", "doctor.doctor", text, params)


def _launch() -> click.Command:
    shared = [
        *recipe_options(),
        option("--name", metavar="NAME", help="name of the run; a run of this name is resumed"),
        option("--submit", is_flag=True, help="also submit or start it"),
        option("--dry-run", is_flag=True, help="only print it"),
    ]
    site = [
        option("--site", metavar="FILE.toml", help="file with a table [slurm]; options given here win"),
        option("--to", "out", metavar="FILE", help="job file to write; default: logs/NAME.sbatch"),
        option("--nodes", type=click.IntRange(1), help="nodes"),
        option("--gpus-per-node", type=click.IntRange(0), help="GPUs per node, one rank each"),
        option("--tasks-per-node", type=click.IntRange(1), help="ranks per node without GPUs"),
        option("--cpus-per-task", type=click.IntRange(1), help="cores per rank"),
        option("--time", metavar="D-HH:MM:SS", help="time limit; the run saves before it and is requeued"),
        *(option(f"--{name}", metavar="NAME", help=f"sbatch --{name}") for name in ("partition", "account", "qos")),
    ]
    ranks = option("--ranks", type=click.IntRange(1), required=True, help="number of ranks")
    hosts = option("--hostfile", metavar="FILE", help="hosts for mpirun")
    return group(
        "launch",
        "Run RECIPE in many processes.",
        recipe_command("slurm", "submit.slurm", "Write a SLURM job file for RECIPE, and submit it.", [*shared, *site]),
        recipe_command("mpi", "submit.mpi", "Print the mpirun command for RECIPE, or start it.", [*shared, ranks, hosts]),
        recipe_command(
            "torchrun",
            "submit.torchrun",
            "Print the command that runs RECIPE in ranks of this machine, or start it.",
            [*shared, ranks],
        ),
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Errors of the user are printed as one message, with exit code 2 or that of the error.

    Without `arguments` the process is ours and may be restarted with other environment variables.
    """
    process = Process.OURS if arguments is None else Process.CALLERS
    if process is Process.OURS:
        flush_output_at_exit()
        sys.excepthook = print_traceback
        shelter_children()
    with one_message(process):
        build_cli().main(args=arguments, prog_name="gptoughts", standalone_mode=False, obj=process)

"""The command line. Each verb is one function in `gptoughts.commands`; nothing heavy is imported before a verb is known.

Words of a recipe become dotted flags by themselves, so `--help` lists every field with its type.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import click

from gptoughts.errors import GptoughtsError

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
}


class Verbs(click.Group):
    """The verbs in the order in which a newcomer meets them."""

    def list_commands(self, context: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)


class RecipeCommand(click.Command):
    """A verb that takes a recipe: every field and every slot is a flag, and a help page is grouped by table."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._own = list(self.params)
        self._filled = False

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        """The verb's own parameters, then the recipe's fields, then the layers; made when they are needed."""
        if not self._filled:
            self.params = [*self._own, *_field_flags(), *_layer_flags()]
            self._filled = True
        return super().get_params(context)

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """One section per table of the recipe, one for layers."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            row = parameter.get_help_record(context)
            if row is not None:
                sections.setdefault(_section(parameter.opts[0]), []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def _section(flag: str) -> str:
    words = flag.lstrip("-").split(".")
    if words[0] == "layer":
        return "Layers (gptoughts layers)"
    return f"Recipe, [{words[0]}]" if len(words) > 1 else "Options"


def _field_flags() -> list[click.Option]:
    from gptoughts.config import fields, type_word

    flags = []
    for key, annotation, description in fields():
        if key in ("name", "note"):
            continue
        spelled = [f"--{key.replace('_', '-')}", _inner("field", key)]
        flags.append(click.Option(spelled, metavar=type_word(annotation), help=description))
    return flags


def _layer_flags() -> list[click.Option]:
    from gptoughts.layer import SLOTS
    from gptoughts.layers import CATALOG

    flags = []
    for slot in SLOTS:
        layers = [layer for layer in CATALOG.values() if layer.slot == slot]
        names = "|".join(layer.name for layer in layers)
        flags.append(click.Option([f"--layer.{slot.replace('_', '-')}", _inner("layer", slot)], metavar="NAME", help=names))
        options = {name: (layer, option) for layer in layers for name, option in layer.options.items()}
        for name, (layer, option) in options.items():
            metavar = "|".join(option.choices) or option.kind.__name__
            spelled = f"--layer.{slot}.{name}".replace("_", "-")
            flags.append(
                click.Option([spelled, _inner("layer", f"{slot}.{name}")], metavar=metavar, help=f"{layer.name}: {option.help}")
            )
    return flags


def _inner(kind: str, key: str) -> str:
    """A dotted key as the identifier that click wants: `field__model__depth`."""
    return f"{kind}__{key.replace('.', '__')}"


def split_flags(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Parsed parameters as (recipe fields, layers and their options, the rest); what was not given is left out."""
    parts: dict[str, dict[str, Any]] = {"field": {}, "layer": {}, "": {}}
    for name, value in values.items():
        kind, _, key = name.partition("__")
        if key and value is not None:
            parts[kind][key.replace("__", ".")] = value
        elif not key:
            parts[""][name] = value
    return parts["field"], parts["layer"], parts[""]


def call(module: str, function: str) -> Callable[..., None]:
    """A click callback that imports its verb when it is run and leaves with the number that it returns."""

    def run(**values: Any) -> None:
        verb = getattr(import_module(f"gptoughts.commands.{module}"), function)
        sys.exit(verb(**values) or 0)

    return run


def call_with_recipe(module: str, function: str) -> Callable[..., None]:
    """As `call`, with the recipe's fields and the layers gathered in `fields` and `layers`."""

    def run(**values: Any) -> None:
        recipe, layers, rest = split_flags(values)
        verb = getattr(import_module(f"gptoughts.commands.{module}"), function)
        sys.exit(verb(fields=recipe, layers=layers, **rest) or 0)

    return run


def _argument(name: str, **keywords: Any) -> click.Argument:
    return click.Argument([name], **keywords)


def _option(*names: str, **keywords: Any) -> click.Option:
    if "default" in keywords and keywords["default"] is not None and not keywords.get("is_flag"):
        keywords.setdefault("show_default", True)
    return click.Option(list(names), **keywords)


def _recipe_options() -> list[click.Parameter]:
    return [
        _argument("recipe", required=False),
        _option("--profile", default="auto", help="hardware profile by name or path; auto takes the one that matches"),
        _option("--plugin", multiple=True, metavar="FILE.py", help="a file that adds layers, models or objectives"),
    ]


def verbs() -> Verbs:
    """The whole command line."""
    group = Verbs(
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
    for command in (_train(), _plan(), *_lists(), _tokenize(), _generate(), _eval(), _bench(), _doctor()):
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


def _lists() -> list[click.Command]:
    name = [_argument("name", required=False)]
    return [
        click.Command(
            "recipes",
            params=name,
            callback=call("lists", "recipes"),
            help="List recipes, or print one.",
            context_settings=CONTEXT,
        ),
        click.Command(
            "profiles",
            params=list(name),
            callback=call("lists", "profiles"),
            help="List profiles, or print one.",
            context_settings=CONTEXT,
        ),
        click.Command(
            "layers",
            params=[*name, _option("--markdown", is_flag=True, help="print docs/layers.md")],
            callback=call("layers", "layers"),
            help="List layers and whether they fit this machine, or print one card.",
            context_settings=CONTEXT,
        ),
    ]


def _tokenize() -> click.Command:
    params = [
        _argument("source"),
        _option("--to", "out", required=True, metavar="DIR", help="folder for the shards"),
        _option("--tokenizer", help="bytes, chars, gpt2, or a tokenizer.json", metavar="NAME"),
        _option("--train-bpe", type=click.IntRange(1), metavar="N", help="train a byte-level BPE of N tokens on the text"),
        _option("--val-fraction", type=float, default=0.01, help="share kept for validation"),
        _option("--val-from", type=click.Choice(["auto", "tail", "documents"]), default="auto", help="what validation takes"),
        _option("--text-key", default="text", help="field of a row that holds the text"),
        _option("--shard-tokens", type=click.IntRange(1), default=100_000_000, help="tokens per shard"),
        _option("--processes", type=click.IntRange(1), help="parallel processes; all usable cores if not given"),
        _option("--overwrite", is_flag=True, help="start over in a folder made with other settings"),
    ]
    text = "Turn SOURCE (a file, folder, glob or dataset) into shards of tokens. Goes on where it was interrupted."
    return click.Command("tokenize", params=params, callback=call("tokenize", "tokenize"), help=text, context_settings=CONTEXT)


def _generate() -> click.Command:
    params = [
        _argument("checkpoint"),
        _option("--prompt", multiple=True, help="start of the text; several times for several; - reads standard input"),
        _option("--tokens", type=click.IntRange(1), default=200, help="tokens to write at most"),
        _option("--temperature", type=float, default=0.8, help="0 takes the likeliest token"),
        _option("--top-k", type=int, default=50, help="0 keeps every token"),
        _option("--top-p", type=float, default=1.0, help="keep the likeliest tokens of this share"),
        _option("--seed", type=int, default=0, help="seed of the draws"),
    ]
    text = "Write text with CHECKPOINT: a run's name, its folder, or one checkpoint."
    return click.Command("generate", params=params, callback=call("generate", "generate"), help=text, context_settings=CONTEXT)


def _eval() -> click.Command:
    group = click.Group("eval", help="Evaluate a checkpoint.", context_settings=CONTEXT)
    params = [
        _argument("checkpoint"),
        _option("--data", metavar="PATH", help="text or tokenised folder; the run's own validation split if not given"),
        _option("--split", default="val", help="split of the tokenised folder"),
        _option("--batch", type=click.IntRange(1), default=16, help="sequences per forward"),
        _option("--json", "as_json", is_flag=True, help="print JSON"),
    ]
    group.add_command(
        click.Command(
            "perplexity",
            params=params,
            callback=call("evaluate", "perplexity"),
            help="Loss and perplexity over a whole split.",
            context_settings=CONTEXT,
        )
    )
    return group


def _bench() -> click.Command:
    group = click.Group("bench", help="Measure, interleaved, with medians and spread.", context_settings=CONTEXT)
    own = [
        *_recipe_options(),
        _option("--rounds", type=click.IntRange(2), default=7, help="paired rounds"),
        _option("--steps", type=click.IntRange(1), default=10, help="steps per round and variant"),
        _option("--to", "out", metavar="FILE", help="write JSON to FILE"),
    ]
    text = "Our loop, a bare PyTorch loop with the same settings, and float32 eager, taking turns."
    group.add_command(
        RecipeCommand("step", params=own, callback=call_with_recipe("bench", "step"), help=text, context_settings=CONTEXT)
    )
    data = [_option("--to", "out", metavar="FILE", help="write JSON to FILE")]
    group.add_command(
        click.Command(
            "data", params=data, callback=call("bench", "data"), help="Tokenising and batches.", context_settings=CONTEXT
        )
    )
    return group


def _doctor() -> click.Command:
    params = [
        _option("--json", "json", is_flag=True, help="print JSON"),
        _option("--machine-json", is_flag=True, help="print this machine as a file for plan --machine"),
    ]
    text = "What is here, what is missing, and what to type."
    return click.Command("doctor", params=params, callback=call("doctor", "doctor"), help=text, context_settings=CONTEXT)


def foreign_word(flag: str) -> str:
    """What another tool's flag is called here; empty where it is unknown."""
    from gptoughts.config import FOREIGN_WORDS

    ours = FOREIGN_WORDS.get(flag.lstrip("-").replace("-", "_"))
    if ours is None:
        return ""
    dotted = ours if ours.startswith("--") or " " in ours.split("(")[0].strip() else f"--{ours.replace('_', '-')}"
    return f"{flag} is called {dotted} here"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user's mistake is one message and exit code 2."""
    try:
        verbs().main(args=arguments, prog_name="gptoughts", standalone_mode=False)
    except click.exceptions.NoSuchOption as error:
        ours = foreign_word(error.option_name)
        _leave(ours or error.format_message(), error.exit_code)
    except click.ClickException as error:
        _leave(error.format_message(), error.exit_code)
    except click.exceptions.Abort:
        _leave("interrupted", 130)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except GptoughtsError as error:
        _leave(f"{type(error).__name__}: {error}", error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _leave(message: str, code: int) -> None:
    print(f"gptoughts: {message}" if ":" not in message.split(" ")[0] else message, file=sys.stderr)
    sys.exit(code)

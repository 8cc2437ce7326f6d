"""Build commands and their flags: one flag per recipe field and per slot, with did-you-mean errors for unknown ones."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import click

from gptoughts.errors import describe, listed, nearest
from gptoughts.planning.environment import Process

CONTEXT = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
}

SHORT = {"track.sinks": ("--track",)}
"""Recipe fields that have a second flag."""

MAY_BE_EMPTY = ("--prompt",)
"""Options for which an empty text has a meaning. Recipe fields and layers check theirs."""


class Command(click.Command):
    """A command that reports all unknown flags in one error, each with the nearest known one."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse as click does. Raises ConfigError for unknown flags."""
        known = {flag: parameter for parameter in self.get_params(context) for flag in parameter.opts if flag.startswith("--")}
        shown = [flag for flag, parameter in known.items() if not getattr(parameter, "hidden", False)]
        problems = [f"{flag}: {self.unknown(flag, value, shown)}" for flag, value in _unknown(args, known)]
        if problems:
            raise listed(context.command_path, problems)
        rest = super().parse_args(context, args)
        problems = [problem for parameter in self.get_params(context) for problem in _text_problems(parameter, context.params)]
        if problems:
            raise listed(context.command_path, problems)
        return rest

    def unknown(self, flag: str, value: str, known: Sequence[str]) -> str:
        """Return the problem for a flag that is not in `known`; `value` is the text after it."""
        return f"no such flag{nearest(spelled(flag), known)}"


class RecipeCommand(Command):
    """A command that takes a recipe: every field and every slot is a flag; the help page is grouped by table."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._own = list(self.params)
        self._filled = False

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        """Return the command's own parameters, then recipe fields, then layers; built on first use."""
        if not self._filled:
            self.params = [*self._own, *_field_flags(), *_layer_flags()]
            self._filled = True
        return super().get_params(context)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse as above. With a plugin, accept any layer option; those of its layers are checked after it is loaded."""
        if any(arg.partition("=")[0] == "--plugin" for arg in args):
            there = {flag for parameter in self.get_params(context) for flag in parameter.opts}
            named = {spelled(arg.partition("=")[0]) for arg in args if arg.startswith("--layer.") and arg.count(".") > 1}
            self.params = [*self.params, *(_layer_flag(flag) for flag in sorted(named - there))]
        return super().parse_args(context, args)

    def unknown(self, flag: str, value: str, known: Sequence[str]) -> str:
        """Suggest our flag for an option of another trainer, then the same field in a table, then the nearest flag.

        Raises ConfigError for a DeepSpeed configuration, with our flag for each of its keys.
        """
        from gptoughts.config.aliases import instead, our_flag

        flag = spelled(flag)
        if flag in ("--deepspeed", "--deepspeed-config") and value and not value.startswith("--"):
            from gptoughts.config.deepspeed_json import refusal

            raise refusal(Path(value))
        ours, field = our_flag(flag), flag.lstrip("-").rpartition(".")[2]
        if ours:
            return describe("no such flag", fix=ours)
        if instead(flag):
            return f"no such flag: {instead(flag)}"
        tables = [other for other in known if other.endswith(f".{field}") and not other.startswith("--layer.")]
        return f"no such flag (did you mean {' or '.join(tables)}?)" if tables else f"no such flag{nearest(flag, known)}"

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per recipe table and one for layers."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            row = parameter.get_help_record(context)
            if row is not None:
                sections.setdefault(_section(parameter.opts[0]), []).append(row)
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)


def spelled(flag: str) -> str:
    """Return a flag as in `--help`, with hyphens for underscores."""
    return flag.replace("_", "-")


def split_flags(values: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Split parsed parameters into (recipe fields, layers and their options, the rest); the first two contain given ones only."""
    parts: dict[str, dict[str, Any]] = {"field": {}, "layer": {}, "": {}}
    for name, value in values.items():
        kind, _, key = name.partition("__")
        if key and value is not None:
            parts[kind][key.replace("__", ".")] = value
        elif not key:
            parts[""][name] = value
    return parts["field"], parts["layer"], parts[""]


def _text_problems(parameter: click.Parameter, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for an empty value, as of an unset shell variable, and for one that is not UTF-8; paths of arguments may be any bytes."""
    given = values.get(parameter.name or "")
    of_recipe = "__" in (parameter.name or "")
    for value in given if isinstance(given, tuple) else (given,):
        if not isinstance(value, str):
            continue
        is_option = isinstance(parameter, click.Option)
        label = parameter.opts[0] if is_option else parameter.name
        if is_option and any("\ud800" <= character <= "\udfff" for character in value):
            yield describe(f"{label}: not UTF-8", ascii(value)[:200])
        elif value == "" and not of_recipe and label not in MAY_BE_EMPTY:
            yield f"{label}: empty, as is the value of an unset variable"


def _unknown(args: Sequence[str], known: Mapping[str, click.Parameter]) -> Iterator[tuple[str, str]]:
    """Yield unknown flags, each with the text after it. The value of a known flag is skipped, even if it begins with `--`."""
    words = pairwise([*args, ""])
    for word, following in words:
        if word == "--":
            return
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            continue
        parameter = known.get(spelled(flag))
        if parameter is None:
            yield flag, value or following
        elif isinstance(parameter, click.Option) and not parameter.is_flag and not equals:
            next(words, None)


def _section(flag: str) -> str:
    words = flag.lstrip("-").split(".")
    if words[0] == "layer":
        return "Layers (gptoughts layers)"
    return f"Recipe, [{words[0]}]" if len(words) > 1 else "Options"


def _field_flags() -> list[click.Option]:
    from gptoughts.config.recipe import fields, type_word

    return [
        click.Option(
            [f"--{spelled(key)}", *SHORT.get(key, ()), _inner("field", key)], metavar=type_word(annotation), help=description
        )
        for key, annotation, description in fields()
        if key not in ("name", "note")
    ]


def _layer_flags() -> Iterator[click.Option]:
    from gptoughts.layers import CATALOG
    from gptoughts.planning.layer import SLOTS

    for slot in SLOTS:
        layers = [layer for layer in CATALOG.values() if layer.slot == slot]
        yield _layer_flag(f"--layer.{slot}", "NAME", "|".join(layer.name for layer in layers))
        options: dict[str, list[str]] = {}
        values: dict[str, dict[str, None]] = {}  # of all layers that have the option, each once
        for layer in layers:
            for name, option in layer.options.items():
                options.setdefault(name, []).append(f"{layer.name}: {option.help}")
                values.setdefault(name, {}).update(dict.fromkeys(option.choices or (option.kind.__name__,)))
        for name, helps in options.items():
            yield _layer_flag(f"--layer.{slot}.{name}", "|".join(values[name]), "; ".join(helps))


def _layer_flag(flag: str, metavar: str = "VALUE", text: str = "") -> click.Option:
    key = flag.removeprefix("--layer.").replace("-", "_")
    return click.Option([spelled(flag), _inner("layer", key)], metavar=metavar, help=text)


def _inner(kind: str, key: str) -> str:
    """Return a dotted key as an identifier for click: `field__model__depth`."""
    return f"{kind}__{key.replace('.', '__')}"


class CommandGroup(click.Group):
    """A group that lists its commands in the order in which they were added."""

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names in the order of addition."""
        return list(self.commands)

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; without arguments print the help. Keeps the words for messages and for ranks."""
        if context.parent is None:
            context.meta["gptoughts.words"] = tuple(args)
        return super().parse_args(context, args or ["--help"])


def group(name: str, text: str, *commands: click.Command, **keywords: Any) -> CommandGroup:
    """Build a group of commands with the help `text`."""
    return CommandGroup(name, list(commands), help=text, context_settings=CONTEXT, **keywords)


def command(name: str, target: str, text: str, params: Sequence[click.Parameter]) -> Command:
    """Build a command with the help `text` that runs `target`, given as `module.function` in `gptoughts.cli`."""

    def run(**values: Any) -> None:
        _run(target, values)

    return Command(name, params=list(params), callback=run, help=text, context_settings=CONTEXT)


def recipe_command(name: str, target: str, text: str, params: Sequence[click.Parameter]) -> RecipeCommand:
    """Build a command as `command` does, whose `target` also takes recipe fields as `fields` and layers as `layers`."""

    def run(**values: Any) -> None:
        recipe, layers, rest = split_flags(values)
        _run(target, {"fields": recipe, "layers": layers, **rest})

    return RecipeCommand(name, params=list(params), callback=run, help=text, context_settings=CONTEXT)


def _run(target: str, values: Mapping[str, Any]) -> NoReturn:
    """Run `module.function` and exit with its code. Imports happen here, so that `--help` stays fast."""
    from gptoughts.cli.ending import end_at_signals
    from gptoughts.console import Console, SilentConsole
    from gptoughts.hardware.world import is_quiet

    end_at_signals()
    quiet = is_quiet(os.environ)
    if click.get_current_context().obj is Process.OURS:
        _quiet_libraries(quiet)
    module, _, function = target.partition(".")
    with (SilentConsole() if quiet else Console(sys.stderr)).logging():
        sys.exit(getattr(import_module(f"gptoughts.cli.{module}"), function)(**values) or 0)


def _quiet_libraries(quiet: bool) -> None:
    """Hide import and deprecation warnings of libraries, which a user of the command line cannot act on.

    `quiet` hides all warnings, on a rank that repeats those of rank 0.
    """
    import logging

    from gptoughts.console import NOISY_LOGGERS

    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|torchao|transformers|peft)\b")
    if quiet:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def argument(name: str, **keywords: Any) -> click.Argument:
    """Build a positional argument."""
    return click.Argument([name], **keywords)


def option(*names: str, **keywords: Any) -> click.Option:
    """Build a flag whose help shows the default."""
    if "default" in keywords and keywords["default"] is not None and not keywords.get("is_flag"):
        keywords.setdefault("show_default", True)
    return click.Option(list(names), **keywords)


def recipe_options() -> list[click.Parameter]:
    """Return the parameters of every command that takes a recipe."""
    return [
        argument("recipe", required=False),
        option("--profile", default="auto", help="hardware profile, by name or path; auto picks the one for this machine"),
        option("--plugin", multiple=True, metavar="FILE.py", help="load a file that adds layers, models or objectives"),
    ]


def remote_code() -> click.Parameter:
    """Return the option by which this command line allows a model's own code."""
    text = "run the code that comes with this model; it must be the model of CHECKPOINT"
    return option("--remote-code", metavar="MODEL", help=text)

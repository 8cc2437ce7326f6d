"""Exceptions that the command line prints without a traceback.

Every message follows one formula: `<option or file>: <problem>. Found <x>. Try: <command>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def describe(problem: str, found: object = None, fix: str = "") -> str:
    """Return one problem as text: `problem. Found <found>. Try: <fix>`. Parts that are not given are left out."""
    text = problem if found is None else f"{problem}. Found {found}"
    return f"{text}. Try: {fix}" if fix else text


class GptoughtsError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with `exit_code`.

    problem   begins with the option, key or file at fault and a colon: `--ranks: not a multiple of 8`
    found     the value or state that was found, as it shall be printed
    fix       a command, a flag or a setting that helps
    """

    exit_code = 2

    def __init__(self, problem: str = "", *, found: object = None, fix: str = "") -> None:
        text = describe(problem, found)
        end = "" if "\n" in text or not text else "."  # a problem of several lines is a list
        super().__init__(f"{text}{end}\n  Try: {fix}" if fix else text)


class ConfigError(GptoughtsError):
    """Invalid recipe, profile, option or file name."""


class PlanError(GptoughtsError):
    """No valid plan for this profile, machine and model."""


class DataError(GptoughtsError):
    """Invalid text, token shards or tokenizer."""


class CheckpointError(GptoughtsError):
    """Missing or damaged checkpoint, or one of a different model."""


class StorageError(CheckpointError):
    """A checkpoint could not be written where the run keeps its checkpoints. The exit code is EX_IOERR."""

    exit_code = 74


class RunError(GptoughtsError):
    """A run cannot start or continue: run folder in use, loss not finite, out of memory."""


class LayerError(GptoughtsError):
    """A planned layer could not be applied, or was inactive in the watched step."""

    exit_code = 3


class ToldElsewhere(RunError):
    """Another rank prints the cause; this one exits with the same code and prints nothing."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'hopper'?)` for the closest known word, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class ErrorCollector:
    """Collect ConfigErrors of several blocks and raise them as one: `with errors.collect(): ...`."""

    def __init__(self) -> None:
        self._found: list[ConfigError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep a ConfigError raised in the block and continue after the block."""
        try:
            yield
        except ConfigError as error:
            self._found.append(error)

    def raise_collected(self) -> None:
        """Raise one ConfigError with all collected messages; do nothing if there are none."""
        if self._found:
            raise ConfigError("\n".join(map(str, self._found)))


def listed(heading: str, problems: Iterable[str]) -> ConfigError:
    """Return one ConfigError for several problems: a heading, then a line per problem."""
    lines = list(problems)
    return ConfigError(f"{heading}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{heading}:", *lines]))

"""What a user reads when something cannot be. Every message says what, where the wish came from, what is here, what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GptoughtsError(Exception):
    """A mistake that the user can mend. The command line prints it without a traceback and leaves with `exit_code`."""

    exit_code = 2


class ConfigError(GptoughtsError):
    """A recipe, profile, flag or file name that cannot be read as it stands."""


class PlanError(GptoughtsError):
    """A profile that cannot run on this machine, with this model."""


class DataError(GptoughtsError):
    """Text, shards or a tokenizer that cannot be trained on."""


class CheckpointError(GptoughtsError):
    """A checkpoint that is missing, damaged or of another model."""


class RunError(GptoughtsError):
    """A run that cannot start or go on: its folder is in use, its loss is not finite."""


class LayerError(GptoughtsError):
    """A layer was planned and the watched step did not show it, or it could not be applied."""

    exit_code = 3


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: ` (did you mean 'hopper'?)`, or nothing where no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


class Mistakes:
    """Mistakes in several places, told at once: `with mistakes.gathered(): ...` goes on after a ConfigError."""

    def __init__(self) -> None:
        self._found: list[ConfigError] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep a ConfigError of the block and leave the block."""
        try:
            yield
        except ConfigError as error:
            self._found.append(error)

    def stop(self) -> None:
        """Raise what was gathered as one ConfigError; nothing where nothing was."""
        if self._found:
            raise ConfigError("\n".join(map(str, self._found)))


def listed(heading: str, problems: Iterable[str]) -> ConfigError:
    """One error for many problems: a heading, then a line each; on one line where there is only one."""
    lines = list(problems)
    return ConfigError(f"{heading}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{heading}:", *lines]))

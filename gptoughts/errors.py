"""What a user reads when something cannot be. Every message says what, where the wish came from, what is here, what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

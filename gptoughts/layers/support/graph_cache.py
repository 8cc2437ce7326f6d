"""Where compiled graphs are kept for the next start. What lies in such a cache is code, so the folder is one that only its user can write.

Loads no torch by itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from gptoughts.errors import LayerError
from gptoughts.models.torch_internals import caches_disabled, default_graph_cache, disable_caches
from gptoughts.planning.layer import Option

CACHE = Option(
    "own",
    "where compiled graphs are kept for the next start: own (a folder that only you can write), torch (its default), off",
    choices=("own", "torch", "off"),
)


def cache_folder(environment: MutableMapping[str, str]) -> Path:
    """Where graphs are kept: below XDG_CACHE_HOME, or ~/.cache."""
    return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "gptoughts" / "compiled"


@contextmanager
def kept(cache: str, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Let torch keep its graphs in the user's own folder while the block lasts; a TORCHINDUCTOR_CACHE_DIR that the user set wins.

    Torch's own default lies below /tmp under a name that anyone can guess and make first; what lies in a cache is code that is run.
    Raises LayerError where somebody else owns the folder or can write to it.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before, disabled = environment.get(name), caches_disabled()
    try:
        if cache == "off":
            disable_caches(True)
        elif cache == "own" and before in (None, default_graph_cache()):  # torch writes its default there when it first asks
            environment[name] = str(_own(cache_folder(environment)))
        yield
    finally:
        disable_caches(disabled)
        if before is not None:
            environment[name] = before
        elif cache == "own":
            environment.pop(name, None)


def _own(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid == os.geteuid():
            folder.chmod(0o700)
            return folder
    except OSError as error:
        raise LayerError(
            f"compiled graphs cannot be kept in {folder}: {error.strerror}\n  try: another XDG_CACHE_HOME, or --layer.compile.cache torch"
        ) from None
    raise LayerError(
        f"{folder} belongs to user {state.st_uid}, not to you ({os.geteuid()}); what lies in it is code that would be run\n"
        "  try: another XDG_CACHE_HOME, or --layer.compile.cache off"
    )

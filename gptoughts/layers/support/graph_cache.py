"""Cache folder for compiled graphs. Cached graphs are code, so only the user may write the folder.

Imports no torch at module level.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from gptoughts.errors import LayerError
from gptoughts.files import cache_dir, make_private, open_to_all
from gptoughts.models.torch_internals import caches_disabled, default_graph_cache, disable_caches
from gptoughts.planning.layer import Option

CACHE = Option(
    "own",
    "cache for compiled graphs: own (a folder only you can write), torch (its default), off",
    choices=("own", "torch", "off"),
)


def cache_folder(environment: MutableMapping[str, str]) -> Path:
    """Return the cache folder, below XDG_CACHE_HOME or ~/.cache."""
    return cache_dir("compiled", environment=environment)


@contextmanager
def cached_graphs(cache: str, environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Set torch's graph cache to the user's own folder inside the block, unless TORCHINDUCTOR_CACHE_DIR is set.

    Torch's default is a predictable name below /tmp that another user can create first, and cached code is executed.
    Raises LayerError if another user owns the folder, or everybody can write the one in use.
    """
    name = "TORCHINDUCTOR_CACHE_DIR"
    before, disabled = environment.get(name), caches_disabled()
    try:
        if cache == "off":
            disable_caches(True)
        elif cache == "own" and before in (None, default_graph_cache()):  # torch sets its default there on first use
            environment[name] = str(_own(cache_folder(environment)))
        if cache != "off":
            _check(environment.get(name))
        yield
    finally:
        disable_caches(disabled)
        if before is not None:
            environment[name] = before
        elif cache == "own":
            environment.pop(name, None)


def _check(named: str | None) -> None:
    default = default_graph_cache()
    folder = Path(named or default)
    place = open_to_all(folder)
    if place is not None:
        raise LayerError(
            f"{folder}: everybody can write {place}, and cached code would be executed",
            fix=f"chmod o-w {place}, or --layer.compile.cache own without TORCHINDUCTOR_CACHE_DIR",
        )
    if str(folder) == default and folder.exists():
        _check_owner(folder)  # a predictable name below /tmp


def _own(folder: Path) -> Path:
    try:
        make_private(folder)
        _check_owner(folder)
        folder.chmod(0o700)
        return folder
    except OSError as error:
        raise LayerError(
            f"{folder}: cannot cache compiled graphs: {error.strerror}",
            fix="another XDG_CACHE_HOME, or --layer.compile.cache torch",
        ) from None


def _check_owner(folder: Path) -> None:
    owner = folder.stat().st_uid
    if owner == os.geteuid():
        return
    raise LayerError(
        f"{folder}: belongs to another user, and cached code would be executed",
        found=f"user {owner}, you are {os.geteuid()}",
        fix="another XDG_CACHE_HOME, or --layer.compile.cache off",
    )

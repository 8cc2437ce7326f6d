"""`gptoughts fetch NAME ...`: download models and datasets where there is a network, for jobs that have none."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gptoughts.config.loader import load, recipe_names
from gptoughts.config.model_path import HUB_NAME, is_offline, resolve_model_folder
from gptoughts.console import print_result
from gptoughts.errors import ConfigError, GptoughtsError, listed, nearest


def fetch(names: Sequence[str], dataset: Sequence[str]) -> int:
    """Download every named model, the model and dataset of every named recipe, and every `dataset`; print their folders.

    What is cached is not asked for again. All failures are reported at once.
    """
    if not names and not dataset:
        raise ConfigError(
            "fetch: nothing to fetch", fix="gptoughts fetch RECIPE, gptoughts fetch OWNER/MODEL, or --dataset OWNER/NAME"
        )
    wanted = dict.fromkeys([*(one for name in names for one in _wanted(name)), *(("dataset", name) for name in dataset)])
    problems = []
    if not wanted:
        print_result(f"nothing to fetch: {', '.join(names)} needs no files from the hub")
    for kind, name in wanted:
        try:
            print_result(f"{kind:<8} {name}  {_download(kind, name)}")
        except GptoughtsError as error:
            problems.append(str(error))
    if problems:
        raise listed("fetch", problems)
    return 0


def _wanted(name: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, hub name) for a model, or for what a recipe needs from the hub."""
    if name not in recipe_names() and not name.endswith(".toml"):
        if "/" not in name and nearest(name, recipe_names()):
            raise ConfigError(f"fetch {name}: neither a recipe nor OWNER/MODEL{nearest(name, recipe_names())}")
        yield "model", name
        return
    recipe = load(name).recipe
    if recipe.model.path and _is_remote(recipe.model.path):
        yield "model", recipe.model.path
    if recipe.data.format == "text" and _is_remote(recipe.data.path):
        yield "dataset", recipe.data.path


def _is_remote(name: str) -> bool:
    """Return whether `name` is of the form OWNER/NAME and no local path."""
    return "/" in name and HUB_NAME.fullmatch(name) is not None and not Path(name).exists() and not Path(name).parent.is_dir()


def _download(kind: str, name: str) -> str:
    if kind == "model":
        return str(resolve_model_folder(name))
    from gptoughts.data.text.rows import hub_dataset

    if is_offline():
        # The library reads this variable at import and would name neither it nor the way out.
        found = next(word for word in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(word))
        raise ConfigError(f"dataset {name}: {found} is set", fix=f"unset {found}, on a machine with a network")
    return _rows(hub_dataset(name))


def _rows(loaded: Any) -> str:
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return ", ".join(f"{split} {len(rows):,} rows" for split, rows in splits.items())

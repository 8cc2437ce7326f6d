"""Load plugins: Python files, named on the command line or in a call, that add layers, models or objectives."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from gptoughts.errors import ConfigError, describe, listed
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Layer


@dataclass(frozen=True)
class Extensions:
    """The shipped catalog extended by plugins, and the families and objectives of plugins."""

    catalog: dict[str, Layer]
    families: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Any] = field(default_factory=dict)


def extensions(files: Sequence[str] = ()) -> Extensions:
    """Execute each plugin file and collect its LAYERS (list), FAMILIES and OBJECTIVES (dicts). Raises ConfigError with every problem.

    A plugin runs with the user's rights. Only named files are executed.
    """
    found = Extensions(dict(CATALOG), {}, {})
    problems: list[str] = []
    for file in files:
        try:
            added = _collected(_module(Path(file)))
        except ConfigError as error:
            problems.append(f"--plugin {file}: {error}")
            continue
        for kind in ("catalog", "families", "objectives"):
            mine, theirs = getattr(found, kind), getattr(added, kind)
            problems += [f"--plugin {file}: {name!r} exists already; choose another name" for name in theirs if name in mine]
            mine.update(theirs)
    if problems:
        raise listed("plugins", problems)
    return found


def _collected(module: ModuleType) -> Extensions:
    layers, families, objectives = (getattr(module, name, None) for name in ("LAYERS", "FAMILIES", "OBJECTIVES"))
    if layers is None and families is None and objectives is None:
        raise ConfigError("defines none of LAYERS, FAMILIES, OBJECTIVES")
    if not isinstance(layers or [], list | tuple) or not all(isinstance(layer, Layer) for layer in layers or []):
        raise ConfigError(describe("LAYERS: must be a list of gptoughts.planning.layer.Layer", f"{layers!r:.80}"))
    for name, table in (("FAMILIES", families), ("OBJECTIVES", objectives)):
        if not isinstance(table or {}, dict):
            raise ConfigError(describe(f"{name}: must be a dict of names", f"{table!r:.80}"))
    by_name = {layer.name: layer for layer in layers or []}
    if len(by_name) < len(layers or []):
        raise ConfigError("LAYERS: two layers share a name")
    return Extensions(by_name, families or {}, objectives or {})


def _module(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigError("no such file")
    name = f"gptoughts_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError("not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look up modules there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise ConfigError(f"{type(error).__name__}{where}: {error}") from error
    return module

"""Plugins: a Python file, named on the command line or in the call and nowhere else, that adds layers, models or objectives."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoughts.errors import ConfigError
from gptoughts.layer import Layer
from gptoughts.layers import CATALOG


@dataclass(frozen=True)
class Extensions:
    """The shipped catalog with what plugins add, and the families and objectives that they add."""

    catalog: Mapping[str, Layer]
    families: Mapping[str, Any] = field(default_factory=dict)
    objectives: Mapping[str, Any] = field(default_factory=dict)


def extensions(files: Sequence[str] = ()) -> Extensions:
    """Run each plugin file and collect its LAYERS (a list), FAMILIES and OBJECTIVES (dicts). Raises ConfigError.

    A plugin is code: it runs with your rights. Nothing is run that was not named.
    """
    catalog, families, objectives = dict(CATALOG), {}, {}
    for file in files:
        module = _module(Path(file))
        found = [getattr(module, name, None) for name in ("LAYERS", "FAMILIES", "OBJECTIVES")]
        if not any(found):
            raise ConfigError(f"--plugin {file}: defines none of LAYERS, FAMILIES, OBJECTIVES")
        for layer in found[0] or []:
            if layer.name in catalog:
                raise ConfigError(f"--plugin {file}: a layer {layer.name!r} is there already; take another name")
            catalog[layer.name] = layer
        families |= found[1] or {}
        objectives |= found[2] or {}
    return Extensions(catalog, families, objectives)


def _module(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"gptoughts_plugin_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"--plugin {path}: {type(error).__name__}: {error}") from error
    return module

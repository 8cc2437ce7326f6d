"""TOML and dotted flags become one frozen, typed Recipe in which every value knows where it came from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptoughts.config.aliases import ours
from gptoughts.config.recipe import (
    LENGTHS,
    DataConfig,
    Disagreement,
    ModelConfig,
    OptimConfig,
    Recipe,
    TrainConfig,
    fields,
    leaf_types,
    type_word,
)
from gptoughts.errors import ConfigError, listed, nearest

__all__ = [
    "DataConfig", "ModelConfig", "OptimConfig", "Recipe", "Resolved", "TrainConfig", "fields", "from_values", "load", "type_word",
]  # fmt: skip

PACKAGED_RECIPES = Path(__file__).parents[1] / "recipes"


def shown(path: Path) -> str:
    """`path` as a user knows it: relative to where they stand when it lies there."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


@dataclass(frozen=True)
class Resolved:
    """A recipe and, for every dotted key, where its value came from."""

    recipe: Recipe
    sources: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """Every leaf by its dotted key."""
        return _flatten(self.recipe.model_dump())

    def given(self, key: str) -> bool:
        """Whether somebody wrote the value of `key`, in a file, a flag or a call."""
        return key in self.sources

    def to_toml(self) -> str:
        """The recipe as TOML that `gptoughts train FILE` reads, each line with its source. Unset values are written as "none"."""
        lines, table = [], ""
        for key, value in self.values().items():
            head, _, leaf = key.rpartition(".")
            if head != table:
                table = head
                lines.append(f"\n[{table}]")
            source = "default" if key not in self.sources else _one_line(self.sources[key])
            lines.append(f"{leaf} = {_toml(value)}  # {source}")
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A leaf as TOML. JSON spells it the same, but for nothing at all and for the one control character that it leaves raw."""
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in PACKAGED_RECIPES.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe, or the path to a .toml file that `name` is. Raises ConfigError."""
    return find_toml("recipe", name, PACKAGED_RECIPES, recipe_names())


def find_toml(what: str, name: str, shipped: Path, known: list[str]) -> Path:
    """The file that `name` means: a path where it has a slash or ends in .toml, else one of `shipped`. Raises ConfigError."""
    is_path = name.endswith(".toml") or "/" in name
    path = Path(name) if is_path else shipped / f"{name}.toml"
    if path.is_file():
        return path
    if is_path:
        raise ConfigError(f"{what} {name}: there is no such file")
    raise ConfigError(f"no {what} {name!r}{nearest(name, known)}; shipped: {', '.join(known)}, or a path to a .toml file")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError where it cannot be read as one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{shown(path)}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{shown(path)}: not TOML: {error}") from None


def load(name: str, flags: Mapping[str, Any] | None = None) -> Resolved:
    """The recipe `name` (a shipped one, or a path to a .toml file) with `flags` (dotted key -> text or value) laid over it.

    Raises ConfigError that lists every problem at once, each with its file or flag.
    """
    path = find_recipe(name)
    values = _flatten(read_toml(path))
    sources = dict.fromkeys(values, shown(path))
    laid = {key: f"--{key.replace('_', '-')}" for key in flags or {}}
    return _resolved(values, sources, flags or {}, laid, f"recipe {name}")


def from_values(values: Mapping[str, Any], origin: str, fields: Mapping[str, Any] | None = None) -> Resolved:
    """A recipe from nested or dotted values, as Python callers and checkpoints give them, with `fields` laid over. Raises ConfigError."""
    flat = _flatten(dict(values))
    return _resolved(flat, dict.fromkeys(flat, origin), fields or {}, dict.fromkeys(fields or {}, origin), origin)


def _resolved(
    values: dict[str, Any], sources: dict[str, str], over: Mapping[str, Any], over_sources: Mapping[str, str], what: str
) -> Resolved:
    if any(over.get(f"train.{length}") is not None for length in LENGTHS):  # a length replaces the recipe's, whatever its unit
        values = {key: value for key, value in values.items() if key.removeprefix("train.") not in LENGTHS}
    kinds, merged = _kinds(), {**values, **over}
    sources = {key: source for key, source in {**sources, **over_sources}.items() if key in merged}
    read = {key: _read(value, kinds.get(key, ()), as_text=key in over) for key, value in merged.items()}
    return Resolved(_validate(read, sources, what), sources)


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """Dotted key -> what its field may hold."""
    return {key: leaf_types(annotation) for key, annotation, _ in fields()}


def _read(value: Any, kinds: tuple[Any, ...], as_text: bool) -> Any:
    """A written value as its field wants it; what cannot be read stays as it is, so that validation says why.

    "none" unsets a field that may be unset, in TOML too, which has no word for it. Only flags are text for numbers and truths.
    """
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "null") and type(None) in kinds:
        return None
    if not as_text or str in kinds:
        return value
    if bool in kinds:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower(), value)
    for kind in (int, float):
        try:
            return kind(value) if int in kinds or float in kinds else value
        except ValueError:
            continue
    return value


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Known dotted keys as tables."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        table, _, leaf = key.rpartition(".")
        (nested.setdefault(table, {}) if table else nested)[leaf] = value
    return nested


def _validate(values: Mapping[str, Any], sources: Mapping[str, str], what: str) -> Recipe:
    known = list(_kinds())
    tables = {key.partition(".")[0] for key in known if "." in key}
    problems = []
    for key, value in values.items():
        if key in tables and value != {}:
            problems.append(f"{key}: is a table, here {value!r}{_where([key], sources)}")
        elif key not in known and key not in tables:
            problems.append(f"{key}: {unknown_key(key, known)}{_where([key], sources)}")
    fitting = {key: value for key, value in values.items() if key in known}
    try:
        recipe = Recipe.model_validate(_nest(fitting))
    except ValidationError as error:
        told = {key: source for key, source in sources.items() if values.get(key) != {}}
        problems += describe(error, known, told)
    if problems:
        raise listed(f"{what} cannot be used", problems)
    return recipe


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Why `key` is none of `known`, with our word for another tool's, the same leaf in its table, or the nearest key."""
    known, leaf = list(known), key.rpartition(".")[2]
    if ours(key):
        return f"no such key; here that is {ours(key)}"
    elsewhere = [other for other in known if other.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"no such key (did you mean {' or '.join(map(repr, elsewhere))}?)"
    return f"no such key{nearest(key, known)}"


def describe(error: ValidationError, known: Iterable[str], sources: Mapping[str, str] | None = None) -> list[str]:
    """One line per problem: key, what is wrong, what is here, where it came from."""
    return list(_described(error, list(known), sources or {}))


def _described(error: ValidationError, known: list[str], sources: Mapping[str, str]) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        what = problem.get("ctx", {}).get("error")
        if problem["type"] == "extra_forbidden":
            yield f"{key}: {unknown_key(key, known)}{_where([key], sources)}"
        elif isinstance(what, Disagreement):
            yield f"{key}: {what}{_where([f'{key}.{name}' for name in what.keys], sources)}"
        elif problem["type"] == "missing" and key in sources:
            continue  # a value stands where the table should, which is told already
        elif problem["type"] == "missing":
            unset = "; give one of " + ", ".join(f"{key}.{length}" for length in LENGTHS) if key == "train" else ""
            yield f"{key}: must be given{unset}"
        else:
            said = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
            yield f"{key}: {said}, here {problem['input']!r}{_where([key], sources)}"


def _where(keys: list[str], sources: Mapping[str, str]) -> str:
    """Where the values came from, each source once: `  (my.toml, --train.tokens)`."""
    told = list(dict.fromkeys(sources[key] for key in keys if key in sources))
    return f"  ({', '.join(told)})" if told else ""

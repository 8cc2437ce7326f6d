"""Load a recipe from TOML and dotted flags into one frozen, typed Recipe, with the source of every value."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from gptoughts.config.aliases import instead, ours
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
from gptoughts.console import Redactor, redacted
from gptoughts.errors import ConfigError, listed, nearest
from gptoughts.errors import describe as problem_line
from gptoughts.files import is_path, parse_toml, read_limited

__all__ = [
    "DataConfig", "ModelConfig", "OptimConfig", "Recipe", "Resolved", "TrainConfig", "fields", "from_values", "load", "type_word",
]  # fmt: skip

PACKAGED_RECIPES = Path(__file__).parents[1] / "recipes"
REMOTE_CODE = "model.remote_code"
PLACES = (
    "data.path", "data.val_path", "data.tokenizer", "data.template", "data.cache", "model.path", "model.config", "eval.task_data"
)  # fmt: skip
"""Keys of paths and names, which a later command looks up."""
MOST_BYTES = 16 << 20
"""Size of a TOML file."""


def shown(path: Path) -> str:
    """Return `path` relative to the working directory if it is below it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


@dataclass(frozen=True)
class Resolved:
    """A recipe, and the source of each given value by dotted key."""

    recipe: Recipe
    sources: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """Return every leaf by dotted key."""
        return _flatten(self.recipe.model_dump())

    def given(self, key: str) -> bool:
        """Return whether a file, flag or call set `key`."""
        return key in self.sources

    def saved_values(self) -> dict[str, Any]:
        """Return every leaf as a run saves it, without secrets.

        A path or name keeps what is also the value of a variable: without it the run could not be read again.
        """
        of_forms = Redactor({})
        return {key: of_forms(value) if key in PLACES else redacted({key: value})[key] for key, value in self.values().items()}

    def to_toml(self) -> str:
        """Return the recipe as TOML for `gptoughts train FILE`, each line with its source, without secrets. Unset values are "none"."""
        lines, table = [], ""
        for key, value in self.saved_values().items():
            head, _, leaf = key.rpartition(".")
            if head != table:
                table = head
                lines.append(f"\n[{table}]")
            source = "default" if key not in self.sources else _one_line(self.sources[key])
            lines.append(f"{leaf} = {_toml(value)}  # {redacted(source)}")
        return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Return a leaf as TOML: as JSON, except for None and for U+007F, which JSON does not escape."""
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _one_line(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in PACKAGED_RECIPES.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """Return the file of a shipped recipe, or `name` if it is a path to a .toml file. Raises ConfigError."""
    return find_toml("recipe", name, PACKAGED_RECIPES, recipe_names())


def find_toml(what: str, name: str, shipped: Path, known: list[str]) -> Path:
    """Return the file of `name`: a path if it has a slash or ends in .toml, else one of `shipped`. Raises ConfigError."""
    a_path = name.endswith(".toml") or "/" in name
    path = Path(name) if a_path else shipped / f"{name}.toml"
    if is_path(str(path)) and path.is_file():
        return path
    if a_path and is_path(str(path)) and path.exists():
        raise ConfigError(f"{what} {name:.200}: not a regular file")
    if a_path:
        raise ConfigError(f"{what} {name:.200}: no such file")
    raise ConfigError(
        f"{what} {name!r}: no such {what}{nearest(name, known)}; shipped: {', '.join(known)}, or a path to a .toml file"
    )


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises ConfigError if it cannot be read or is not TOML."""
    try:
        return parse_toml(read_limited(path, MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{shown(path)}: cannot read it ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{shown(path)}: not valid TOML: {error}") from None


def load(name: str, flags: Mapping[str, Any] | None = None) -> Resolved:
    """Return the recipe `name` (shipped, or a path to a .toml file) with `flags` (dotted key -> text or value) applied.

    Raises ConfigError listing every problem with its file or flag.
    """
    path = find_recipe(name)
    values = _flatten({key: value for key, value in read_toml(path).items() if key != "slurm"})  # config/site.py reads it
    refuse_consent(values, shown(path), flags or {})
    sources = dict.fromkeys(values, shown(path))
    flag_sources = {key: f"--{key.replace('_', '-')}" for key in flags or {}}
    return _resolved(values, sources, flags or {}, flag_sources, f"recipe {name}")


def refuse_consent(values: Mapping[str, Any], file: str, flags: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Raise ConfigError for a file that allows code to run: consent belongs to this command line, not to a file that came along."""
    named = values.get(REMOTE_CODE)
    if named is not None and str(named).lower() not in ("none", "null") and flags.get(REMOTE_CODE) is None:
        fix = f"--model.remote-code {shlex.quote(str(named))}, if you trust the code in that folder"
        raise ConfigError(f"{file}: {REMOTE_CODE}: a file cannot allow code to run", found=repr(named)[:200], fix=fix)


def from_values(values: Mapping[str, Any], origin: str, fields: Mapping[str, Any] | None = None) -> Resolved:
    """Return a recipe from nested or dotted values (Python calls, checkpoints) with `fields` applied. Raises ConfigError."""
    flat = _flatten(dict(values))
    return _resolved(flat, dict.fromkeys(flat, origin), fields or {}, dict.fromkeys(fields or {}, origin), origin)


def _resolved(
    values: dict[str, Any], sources: dict[str, str], over: Mapping[str, Any], over_sources: Mapping[str, str], what: str
) -> Resolved:
    if any(over.get(f"train.{length}") is not None for length in LENGTHS):  # a given length replaces the recipe's, in any unit
        values = {key: value for key, value in values.items() if key.removeprefix("train.") not in LENGTHS}
    kinds, merged = _kinds(), {**values, **over}
    sources = {key: source for key, source in {**sources, **over_sources}.items() if key in merged}
    read = {key: _read(value, kinds.get(key, ()), as_text=key in over) for key, value in merged.items()}
    return Resolved(_validate(read, sources, what), sources)


@cache
def _kinds() -> dict[str, tuple[Any, ...]]:
    """Return the leaf types of each dotted key."""
    return {key: leaf_types(annotation) for key, annotation, _ in fields()}


def _read(value: Any, kinds: tuple[Any, ...], as_text: bool) -> Any:
    """Convert a value to the type of its field; leave it unchanged if that fails, so that validation reports it.

    "none" unsets an optional field, also in TOML, which has no null. Only flags (`as_text`) are parsed to numbers and booleans.
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
    """Return dotted keys as nested tables."""
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
            problems.append(problem_line(f"{key}: must be a table", repr(value)) + _where([key], sources))
        elif key not in known and key not in tables:
            problems.append(f"{key}: {unknown_key(key, known)}{_where([key], sources)}")
    fitting = {key: value for key, value in values.items() if key in known}
    try:
        recipe = Recipe.model_validate(_nest(fitting))
    except ValidationError as error:
        problems += describe(error, known, {key: source for key, source in sources.items() if values.get(key) != {}})
    if problems:
        raise listed(what, problems)
    return recipe


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Return the error text of an unknown key, with our name for another trainer's, the same leaf elsewhere, or the nearest key."""
    known, leaf = list(known), key.rpartition(".")[2]
    if ours(key):
        return f"no such key; use {ours(key)}"
    if instead(key):
        return f"no such key: {instead(key)}"
    elsewhere = [other for other in known if other.rpartition(".")[2] == leaf]
    if elsewhere:
        return f"no such key (did you mean {' or '.join(map(repr, elsewhere))}?)"
    return f"no such key{nearest(key, known)}"


def describe(error: ValidationError, known: Iterable[str], sources: Mapping[str, str] | None = None) -> list[str]:
    """Return one line per problem: key, problem, found value and its source."""
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
            continue  # a value in place of the table, reported above
        elif problem["type"] == "missing":
            yield problem_line(
                f"{key}: missing",
                fix=f"set one of {', '.join(f'{key}.{length}' for length in LENGTHS)}" if key == "train" else "",
            )
        else:
            text = f"{problem['msg'][0].lower()}{problem['msg'][1:]}"
            bound = next((value for value in problem.get("ctx", {}).values() if type(value) is int and value > 2**53), None)
            if bound is not None:  # pydantic prints it rounded, as a float
                text = f"{text.rpartition(' ')[0]} {bound}"
            yield problem_line(f"{key}: {text}", repr(problem["input"])) + _where([key], sources)


def _where(keys: list[str], sources: Mapping[str, str]) -> str:
    """Return the sources of the values, each once: `  (my.toml, --train.tokens)`."""
    found = list(dict.fromkeys(sources[key] for key in keys if key in sources))
    return f"  ({', '.join(found)})" if found else ""

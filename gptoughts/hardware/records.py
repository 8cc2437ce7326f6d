"""Read records such as `Machine` and `World` from JSON, with one error that lists every problem and its key path."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from gptoughts.errors import ConfigError, describe, nearest
from gptoughts.hardware.cpu import Cpu
from gptoughts.hardware.nvml import Gpu

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""Configuration of a record that is read from JSON; nested records inherit it."""

Record = TypeVar("Record")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validate(kind: type[Record], content: str | bytes, source: str) -> Record:
    """Return `content`, JSON, as `kind`. Raises ConfigError listing every problem with its key path."""
    try:
        # Only JSON input lets strict mode take lists for tuples and objects for records.
        return typing.cast("Record", _adapter(typing.cast("Any", kind)).validate_json(content))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    if problems[0]["type"] == "json_invalid":
        raise ConfigError(f"{source}: not valid JSON ({problems[0]['ctx']['error']})")
    raise ConfigError(f"{source}:\n" + "\n".join(f"  {_problem(kind, problem)}" for problem in problems))


def _problem(kind: type, problem: Mapping[str, Any]) -> str:
    """Return one pydantic error as `gpus[0].mig: input should be a valid boolean. Found 0`."""
    place = problem["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".") or "top level"
    if problem["type"] == "missing":
        return f"{path}: missing"
    if problem["type"] == "unexpected_keyword_argument":
        record = {"gpus": Gpu, "cpu": Cpu}.get(place[0], kind) if len(place) > 1 else kind
        return f"{path}: unknown key{nearest(str(place[-1]), [part.name for part in fields(record)])}"
    text = problem["msg"]
    return describe(f"{path}: {text[:1].lower()}{text[1:]}", found=f"{problem['input']!r:.60}")

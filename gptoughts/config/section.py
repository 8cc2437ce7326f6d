"""The base of a recipe's tables, types of their fields, and the error for values that are invalid together."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from gptoughts.errors import describe
from gptoughts.files import is_path


def _integral(value: Any) -> Any:
    """Convert a float with an integer value, such as 1e9, to int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Upper bounds are far above every use; a number beyond one would build, allocate or loop without an end in sight.
Positive = Annotated[int, BeforeValidator(_integral), Field(gt=0, lt=2**60)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=0, lt=2**63)]
Depth = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=10_000)]
Size = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=2**24)]
Length = Annotated[int, BeforeValidator(_integral), Field(gt=0, le=2**28)]
Share = Annotated[float, Field(ge=0, lt=1)]


def _path(text: str) -> str:
    if not text:
        raise PydanticCustomError("path", "must not be empty, as is the value of an unset variable")
    if not is_path(text):
        raise PydanticCustomError("path", "must be a name or path of a file system, at most 255 bytes between two slashes")
    return text


Name = Annotated[str, AfterValidator(_path)]
"""A file, a folder, or a name that is looked up as one."""


class Disagreement(ValueError):
    """Values that are valid alone and invalid together. `keys` are their names in the table, to look up their sources."""

    def __init__(self, problem: str, *keys: str, found: object = None, fix: str = "") -> None:
        super().__init__(describe(problem, found, fix))
        self.keys = keys


class Section(BaseModel):
    """Frozen table of a recipe; unknown keys are errors."""

    # defer_build: --help lists fields and needs no validators.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)

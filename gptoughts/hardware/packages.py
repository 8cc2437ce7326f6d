"""Versions of installed distributions and the requirements of gptoughts' extras, from package metadata. Imports no package."""

from __future__ import annotations

import os
import re
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import Distribution

# Distributions that layers name and no extra lists: dependencies of other packages, builds from source, our base install.
UNLISTED = ("flash-attn-3", "nvidia-ml-py", "tokenspeed-fa3", "transformer-engine-torch", "triton")

_REQUIREMENT = re.compile(r"([\w.-]+(?:\[[^\]]*\])?)\s*\(?([^;)]*)\)?\s*;.*\bextra == ['\"]([^'\"]+)['\"]")


class InstalledPackages(dict[str, str]):
    """Distribution name -> version. Holds the recorded names; a lookup of any other name reads its metadata.

    Names are compared in normalized form (PEP 503). Iteration, equality and JSON cover the recorded names only.
    """

    def __init__(self, *recorded: Any) -> None:
        super().__init__(*recorded)
        self._others: dict[str, str | None] = {}

    def _find(self, name: object) -> str | None:
        if not isinstance(name, str):
            return None
        name = normalized(name)
        if not super().__contains__(name):
            if name not in self._others:
                self._others[name] = _version(name)[0]
            return self._others[name]
        return super().get(name)

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def __missing__(self, name: str) -> str:
        version = self._find(name)
        if version is None:
            raise KeyError(name)
        return version

    def get(self, name: str, default: Any = None) -> Any:
        """Return the version of `name`, or `default` if it is not installed."""
        version = self._find(name)
        return default if version is None else version


def installed_packages() -> tuple[InstalledPackages, list[str]]:
    """Return the installed packages, and a note for each recorded one with broken metadata.

    `c++` is the compiler that torch.compile uses on a CPU, with its command as version. torch has the version of
    `torch.__version__`, with its build (`+cpu`, `+cu130`), which its metadata may leave out.
    """
    found: dict[str, str] = {}
    notes: list[str] = []
    compiler = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    if compiler is not None:
        found["c++"] = compiler
    for name in recorded_names():
        version, note = _version(name)
        if version is not None:
            found[name] = version
        if note:
            notes.append(note)
    return InstalledPackages(found), notes


@cache
def recorded_names() -> tuple[str, ...]:
    """Return the normalized names of the distributions that extras or layers name, sorted."""
    listed = {re.split(r"[\[<>=!~ ]", line)[0] for lines in extras().values() for line in lines}
    return tuple(sorted({*map(normalized, listed), *UNLISTED}))


@cache
def extras() -> dict[str, tuple[str, ...]]:
    """Return the requirements of each extra except `dev`: extra -> `torch>=2.10,<2.14`, ...

    Source: the metadata of gptoughts; pyproject.toml in a checkout that is not installed; empty if there is neither.
    """
    from importlib import metadata

    try:
        header = _header(metadata.distribution("gptoughts"))
    except (metadata.PackageNotFoundError, UnicodeDecodeError):
        header = ""
    found: dict[str, list[str]] = {}
    for match in filter(None, map(_REQUIREMENT.match, re.findall(r"^Requires-Dist:\s*(.+)$", header, re.MULTILINE))):
        name, bounds, extra = match.groups()
        # Build backends sort bounds alphabetically; the lower bound reads first.
        parts = sorted((part.strip() for part in bounds.split(",")), key=lambda part: part.startswith("<"))
        found.setdefault(extra, []).append(name + ",".join(parts))
    return {extra: tuple(lines) for extra, lines in (found or _extras_of_checkout()).items() if extra != "dev"}


def _extras_of_checkout() -> dict[str, list[str]]:
    import tomllib

    try:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return dict(project["optional-dependencies"])
    except (OSError, ValueError, KeyError):
        return {}


def normalized(name: str) -> str:
    """Return a distribution name in normalized form: `Flash_Attn` -> `flash-attn` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _version(name: str) -> tuple[str | None, str]:
    """Return the version of a distribution, None if it is not installed, and a note if its metadata is broken."""
    from importlib import metadata

    try:
        distribution = metadata.distribution(name)
        match = re.search(r"^Version:\s*(\S+)", _header(distribution), re.MULTILINE | re.IGNORECASE)
    except metadata.PackageNotFoundError:
        return None, ""
    except Exception as error:  # a metadata file can be truncated or unreadable in many ways
        return None, f"package {name}: cannot read its metadata ({type(error).__name__}: {error})"
    if match is None:
        return None, f"package {name}: no version in its metadata"
    if name == "torch":
        return _torch_version(Path(str(distribution.locate_file("torch/version.py")))) or match[1], ""
    return match[1], ""


def _header(distribution: Distribution) -> str:
    """Return the metadata fields without the long description. Parsing them all as e-mail takes three times as long."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return text.replace("\r\n", "\n").partition("\n\n")[0]


def _torch_version(path: Path) -> str | None:
    """Return `__version__` from the text of torch/version.py."""
    try:
        match = re.search(r"^__version__ = '([^']+)'", path.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return match[1] if match else None

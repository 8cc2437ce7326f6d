"""Exit with code 0 if this checkout is installed as editable with all requirements of an extra, so that pip need not run."""

import json
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).resolve().parent.parent


def requirements(project: dict, extra: str) -> Iterator[str]:
    """Yield the requirements of the package and the extra, and of other extras that it includes."""
    yield from project["dependencies"]
    for line in project["optional-dependencies"][extra]:
        if line.startswith(project["name"] + "["):
            for other in line[line.index("[") + 1 : line.index("]")].split(","):
                yield from requirements(project, other.strip())
        else:
            yield line


def is_here(name: str) -> bool:
    """Return whether the installed package is this folder."""
    origin = json.loads(distribution(name).read_text("direct_url.json") or "{}")
    editable = origin.get("dir_info", {}).get("editable", False)
    return editable and Path(unquote(urlparse(origin["url"]).path)).resolve() == ROOT


def has_extras(project: dict) -> bool:
    """Return whether the metadata of the installed package, which an editable install writes once, names the present extras."""
    return set(distribution(project["name"]).metadata.get_all("Provides-Extra") or ()) == set(project["optional-dependencies"])


def satisfied(line: str) -> bool:
    """Return whether the requirement is installed in an allowed version."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(line)
    return wanted.specifier.contains(version(wanted.name), prereleases=True)


def main(extra: str) -> int:
    """Return 0 if nothing is missing, else 1."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    try:
        return (
            0 if is_here(project["name"]) and has_extras(project) and all(map(satisfied, requirements(project, extra))) else 1
        )
    except (PackageNotFoundError, ImportError, KeyError, ValueError):
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

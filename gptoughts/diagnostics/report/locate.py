"""Find the folder of a run by its name, its folder, or a checkpoint of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptoughts.errors import RunError, nearest

FILE = "metrics.jsonl"
"""Equal to `run.tracking.jsonl.FILE`, whose module loads torch; a report needs none."""
FILES = (FILE, "plan.json", "evidence.json", "recipe.toml", "system.jsonl", "samples.jsonl", "goodput.json")
"""Files of a run folder that a report reads; each may be missing."""


@dataclass(frozen=True)
class RunPlace:
    """Where the files of a run are."""

    name: str
    out: Path
    checkpoints: Path
    """May be missing."""


def locate(name: str) -> RunPlace:
    """Return the place of a run name below out/, of a run folder, or of the run of a checkpoint. Raises RunError."""
    path = Path(name).expanduser()
    found = [place for place in _places(path, name) if any((place.out / file).is_file() for file in FILES)]
    if found:
        return found[0]
    if path.exists():
        raise RunError(f"{name}: no files of a run", found="neither " + " nor ".join(FILES[:2]), fix="a folder out/NAME")
    known = sorted(folder.name for folder in Path("out").glob("*/") if any((folder / file).is_file() for file in FILES))
    raise RunError(
        f"{name}: no such run{nearest(name, known)}", found=f"the runs {', '.join(known)}" if known else "no runs in out/"
    )


def _places(path: Path, name: str) -> list[RunPlace]:
    """Return the places that a name can mean, the likeliest first: a path that exists, then a run below out/."""
    places = []
    if path.is_dir():
        path = path.resolve()
        inside, beside = path / "checkpoints", path.parent.parent / "checkpoints" / path.name
        places.append(RunPlace(path.name, path, inside if inside.is_dir() else beside))
        for folder in (path, path.parent):  # the folder of all checkpoints of a run, or one of them
            places.append(RunPlace(folder.name, folder.parent.parent / "out" / folder.name, folder))
            if folder.name == "checkpoints":
                places.append(RunPlace(folder.parent.name, folder.parent, folder))
    if "/" not in name:
        places.append(RunPlace(name, Path("out") / name, Path("checkpoints") / name))
    return places

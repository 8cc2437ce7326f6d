"""`python -m gptoughts`, which torchrun needs, and the command `gptoughts`: without modules of the current folder."""

import os
import sys


def start() -> None:
    """Run the command line. `-m` puts the current folder first on sys.path, where a numpy.py would be imported: take it off."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path[0] != root:
        del sys.path[0]
    _drop_empty_entries(root)

    from gptoughts.cli.main import main

    main()


def _drop_empty_entries(root: str) -> None:
    """Take off the current folder where only an empty entry of PYTHONPATH means it, here and for child processes."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = [entry for entry in entries if entry]
    if not named or len(named) == len(entries) or sys.flags.ignore_environment:
        return
    os.environ["GPTOUGHTS_EMPTY_PYTHONPATH"] = "1"  # for gptoughts doctor
    os.environ["PYTHONPATH"] = os.pathsep.join(named)
    here = os.getcwd()
    if here not in (root, *map(os.path.abspath, named)):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", here)]


if __name__ == "__main__":
    start()

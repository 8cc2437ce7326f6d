"""`python -m gptoughts`, which torchrun needs: the same as the command `gptoughts`, without modules of the current folder."""

import os
import sys


def start() -> None:
    """Run the command line. `-m` puts the current folder first on sys.path, where a numpy.py would be imported: take it off."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path[0] != root:
        del sys.path[0]

    from gptoughts.cli.main import main

    main()


if __name__ == "__main__":
    start()

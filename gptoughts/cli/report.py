"""`gptoughts report`: one HTML file with the curves and tables of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gptoughts.console import print_result, redacted
from gptoughts.errors import ConfigError


def report(runs: Sequence[str], out: str | None) -> int:
    """Write the report and print its path; cautions about the comparison are printed too."""
    from gptoughts import __version__
    from gptoughts.diagnostics.report.differences import cautions
    from gptoughts.diagnostics.report.locate import locate
    from gptoughts.diagnostics.report.page import page
    from gptoughts.diagnostics.report.run_data import load_named
    from gptoughts.diagnostics.report.text import CAUTION
    from gptoughts.files import write_text

    places = [locate(run) for run in runs]
    path = Path(out).expanduser() if out else places[0].out / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"--to {path}: {'is a folder' if path.is_dir() else 'its folder does not exist'}", fix="--to FILE.html"
        )
    loaded = load_named(places)
    text = redacted(page(loaded, __version__))
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"--to {path}: cannot be written ({error.strerror})", fix="--to FILE.html in another folder"
        ) from None
    for line in cautions(loaded):
        print_result(f"caution: {CAUTION}: {line}")
    print_result(f"{path} ({len(text.encode()) / 1e6:.2f} MB)")
    return 0

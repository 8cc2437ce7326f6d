"""`gptoughts compare`: results of runs and what differs between them, as text."""

from __future__ import annotations

from collections.abc import Sequence

from gptoughts.console import print_result


def compare(runs: Sequence[str]) -> int:
    """Print cautions, results, step time, wall time, and the differences of recipe and plan."""
    from gptoughts.diagnostics.report.locate import locate
    from gptoughts.diagnostics.report.run_data import load_named
    from gptoughts.diagnostics.report.text import comparison

    print_result(comparison(load_named([locate(run) for run in runs])))
    return 0

"""The commands `gptoughts report` and `gptoughts compare` and their options."""

from __future__ import annotations

import click

from gptoughts.cli.options import argument, command, option


def report_commands() -> list[click.Command]:
    """Build both commands."""
    runs = argument("runs", nargs=-1, required=True)
    to = option("--to", "out", metavar="FILE.html", help="file to write; default: report.html in the folder of the first run")
    page = "Write curves, plan, evidence and samples of RUNS (names, folders or checkpoints) into one HTML file."
    text = "Print results of RUNS and what differs between them. Two models on one text: gptoughts eval compare."
    return [
        command("report", "report.report", page, [runs, to]),
        command("compare", "compare.compare", text, [runs]),
    ]

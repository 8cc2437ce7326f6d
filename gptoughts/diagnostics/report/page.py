"""Put the report of one or several runs together: one HTML file that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from gptoughts.diagnostics.report import tables
from gptoughts.diagnostics.report.charts import Chart, axis_maps, make_charts, section_of
from gptoughts.diagnostics.report.differences import cautions
from gptoughts.diagnostics.report.markup import Markup, element, joined, json_block, table
from gptoughts.diagnostics.report.run_data import RunData
from gptoughts.diagnostics.report.text import CAUTION

HERE = Path(__file__).parent
STYLES = ("vendor/uPlot.min.css", "page/report.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "page/report.js")
LICENSE = "vendor/uPlot.LICENSE"
"""uPlot draws the charts; its license asks to travel with it."""


def page(runs: list[RunData], version: str) -> str:
    """Return the HTML file."""
    charts = make_charts(runs)
    title = f"Report: {', '.join(run.name for run in runs)}"
    scripts = [(HERE / name).read_text(encoding="utf-8") for name in SCRIPTS]
    data = {
        "runs": [{"name": run.name, "axes": axis_maps(run)} for run in runs],
        "charts": [chart.to_json() for chart in charts],
    }
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    body = element(
        "body",
        element("header", element("h1", title), element("p", f"gptoughts {version}, written {written}", class_="quiet")),
        element("main", *_sections(runs, charts)),
        json_block("data", data),
        *(Markup(f"<script>{script}</script>") for script in scripts),
    )
    license_text = (HERE / LICENSE).read_text(encoding="utf-8")
    return f"<!doctype html>\n<!-- uPlot: {license_text} -->\n" + element("html", _head(title, scripts), body, lang="en")


def _head(title: str, scripts: Sequence[str]) -> Markup:
    """Return the head. Its policy lets the browser run the scripts of this file only, and load nothing."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {allowed}; base-uri 'none'; form-action 'none'"
    styles = "\n".join((HERE / name).read_text(encoding="utf-8") for name in STYLES)
    return element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<link rel="icon" href="data:,">'),
        element("title", title),
        Markup(f"<style>{styles}</style>"),
    )


def _sections(runs: list[RunData], charts: list[Chart]) -> list[Markup]:
    several = len(runs) > 1
    found = [element("p", "Caution: ", CAUTION, ". ", line, class_="caution") for line in cautions(runs)]
    found += [element("p", f"{run.name}: {line}", class_="note") for run in runs for line in run.notes]
    found.append(_section("Results", tables.result_table(runs)))
    if several:
        found.append(_section("What differs", tables.difference_tables(runs)))
    found.append(_controls())
    found += _chart_sections(runs, charts)
    goodput = tables.goodput_bars(runs)
    if goodput:
        found.append(_section("Goodput: where the wall time went", goodput))
    with_samples = [run for run in runs if run.samples]
    if with_samples:
        found.append(_section("Samples", *map(tables.sample_list, with_samples)))
    found.append(_section("Machine", tables.machine_table(runs)))
    judged = [joined([element("h3", run.name), tables.evidence_table(run)]) for run in runs if run.plan or run.evidence]
    if judged:
        found.append(_section("Plan and evidence", *judged))
    if missing := _missing(runs):
        found.append(element("p", missing, class_="quiet"))
    return found


def _section(title: str, *children: object) -> Markup:
    return element("section", element("h2", title), *children)


def _controls() -> Markup:
    choices = [
        element(
            "label", Markup(f'<input type="radio" name="axis" value="{value}"{" checked" if value == "step" else ""}> '), value
        )
        for value in ("step", "tokens", "hours")
    ]
    log = element("label", Markup('<input type="checkbox" id="log"> '), "log scale")
    help_text = "Drag in a chart to zoom, double-click to reset. Click a name in a legend to hide its curve."
    shown = element("div", "x-axis: ", *choices, log, element("span", help_text, class_="quiet"), class_="controls", hidden="")
    return joined(
        [shown, element("noscript", element("p", "The charts need JavaScript; every table reads without it.", class_="note"))]
    )


def _chart_sections(runs: list[RunData], charts: list[Chart]) -> list[Markup]:
    """Return a section of charts for each group of keys, with the tables that belong to it."""
    texts = [key for run in runs for kept in (run.metrics, run.system) for key in kept.words]
    titles = dict.fromkeys([*(chart.section for chart in charts), *map(section_of, texts)])
    found = []
    for title in titles:
        figures = [_figure(number, chart, runs) for number, chart in enumerate(charts) if chart.section == title]
        parts = _section_tables(title, runs)
        parts = (
            [element("div", *figures, class_="charts"), *parts]
            if title != "Step time"
            else [*parts, element("div", *figures, class_="charts")]
        )
        found.append(_section(title, *parts))
    return found


def _section_tables(title: str, runs: list[RunData]) -> list[Markup]:
    if title == "Step time":
        bars = tables.step_time_bars(runs)
        return [bars] if bars else []
    prefixes = {
        key.partition("/")[0] for run in runs for kept in (run.metrics, run.system) for key in (*kept.keys, *kept.words)
    }
    found: list[Markup] = []
    for prefix in sorted(one for one in prefixes if section_of(f"{one}/") == title):
        found += tables.word_tables(runs, f"{prefix}/")
        ranks = tables.rank_table(runs, f"{prefix}/")
        found += [ranks] if ranks else []
    return found


def _figure(number: int, chart: Chart, runs: Sequence[RunData]) -> Markup:
    """Return the place of a chart with its definition and, for readers without JavaScript, the ends of its curves."""
    shown = chart.to_json()
    rows = []
    for line, points in zip(shown["lines"], chart.lines, strict=True):
        label = " ".join(part for part in (runs[line["run"]].name if len(runs) > 1 else "", line["label"]) if part)
        values = line["y"]
        if values:
            ends = [values[0], min(values), max(values), values[-1]]
            rows.append([label or chart.title, *(f"{one:.5g}" for one in ends), f"{len(points.points):,}"])
    unit = f" ({shown['unit']})" if shown["unit"] else ""
    figures = element(
        "details",
        element("summary", "figures"),
        table(["", "first", "lowest", "highest", "last", "points drawn"], rows, "figures"),
    )
    text = element("p", chart.definition, class_="quiet") if chart.definition else ""
    caption = element("figcaption", element("h3", f"{chart.title}{unit}"), text)
    return element("figure", caption, element("div", class_="chart", data_chart=number), figures)


def _missing(runs: Sequence[RunData]) -> str:
    """Return which optional parts no run has, so that an absent section is not read as a zero."""
    parts = {
        "system metrics (system.jsonl)": any(run.system.rows for run in runs),
        "parts of a step (time/ keys)": any(key.startswith("time/") for run in runs for key in run.metrics.keys),
        "goodput (goodput.json)": any(run.goodput for run in runs),
        "samples (samples.jsonl)": any(run.samples for run in runs),
        "evidence (evidence.json)": any(run.evidence for run in runs),
    }
    absent = [name for name, there in parts.items() if not there]
    return f"Not recorded by these runs: {', '.join(absent)}." if absent else ""

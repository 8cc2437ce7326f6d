"""Reports in a real browser: every chart is drawn, axes, units and legends are right, nothing fails. Skipped without Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoughts.diagnostics.report.locate import RunPlace
from gptoughts.diagnostics.report.page import page
from gptoughts.diagnostics.report.run_data import load_run
from tests.support.browser import Browser, program
from tests.support.run_files import write_run

CHARTS = """
[...document.querySelectorAll("[data-chart]")].map(function (box) {
  const canvas = box.querySelector("canvas"), figure = box.closest("figure");
  const pixels = canvas ? canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data : [];
  const colors = new Set();
  for (let place = 0; place < pixels.length; place += 4) {
    if (pixels[place + 3] === 255) colors.add(pixels[place] + "," + pixels[place + 1] + "," + pixels[place + 2]);
  }
  return {
    title: figure.querySelector("h3").textContent, section: figure.closest("section").querySelector("h2").textContent,
    lines: +box.dataset.lines, colors: [...colors], legend: [...box.querySelectorAll(".u-label")].map(one => one.textContent),
    values: [...box.querySelectorAll(".u-value")].map(one => one.textContent), width: box.clientWidth, canvas: canvas ? canvas.clientWidth : 0
  };
})
"""
"""What stands in each chart, read from the page and the pixels of its canvas."""
BLUE, ORANGE = "31,111,214", "217,115,13"
"""--c0 and --c1 of the style sheet, the colors of the first two runs."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs."""
    program()
    folder = tmp_path_factory.mktemp("runs")
    runs = [
        write_run(folder / "one", steps=120),
        write_run(folder / "<script>alert(1)<", steps=120, profile="h100-fp8", precision="fp8-te", slower=0.8, rate=2e-3),
    ]
    path = folder / "report.html"
    loaded = [load_run(RunPlace(run.name, run, run / "checkpoints")) for run in runs]
    path.write_text(page(loaded, "0"), encoding="utf-8")
    return path


@pytest.fixture
def browser(report: Path) -> Iterator[Browser]:
    """A browser that shows it, and must not have reported an error at the end."""
    with Browser() as opened:
        opened.open(report)
        yield opened
        # The browser advises on getImageData, which only `CHARTS` calls.
        assert [error for error in opened.errors if "willReadFrequently" not in error] == []
        assert opened.requests == [report.as_uri()]


def charts(browser: Browser) -> dict[str, dict[str, Any]]:
    return {chart["title"]: chart for chart in browser.value(CHARTS)}


def choose(browser: Browser, axis: str) -> None:
    browser.value(f"document.querySelector('input[value={axis}]').click()")


def test_every_chart_is_drawn_with_axes_units_and_legends(browser: Browser) -> None:
    drawn = charts(browser)
    assert len(drawn) >= 12
    for title, chart in drawn.items():
        assert chart["lines"] > 0 and len(chart["colors"]) >= 2, title
        assert abs(chart["canvas"] - chart["width"]) <= 1, title
    hostile = "<script>alert(1)<"
    loss = drawn["Training and validation loss (nats)"]
    assert loss["legend"] == ["step", *(f"{run} {kind}" for kind in ("training", "validation") for run in ("one", hostile))]
    speed = drawn["Tokens per second (tokens/s)"]
    assert speed["legend"] == ["step", "one", hostile] and {BLUE, ORANGE} <= set(speed["colors"])
    assert drawn[f"Parts of a step: {hostile} (ms)"]["legend"] == ["step", "data wait", "forward", "backward", "optimizer"]
    assert drawn["Memory (GiB)"]["section"] == "GPU" and drawn["Memory process (GiB)"]["section"] == "CPU and memory"
    assert drawn["Utilization (%)" if "Utilization (%)" in drawn else "Utilization"]["legend"][1:4] == [
        "one", "one lowest rank", "one highest rank",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "label", "clock"),
    [("tokens", "tokens", "tokens"), ("hours", "hours of training steps", "hours since the start (wall clock)")],
)
def test_the_axis_can_be_tokens_or_hours(axis: str, label: str, clock: str, browser: Browser) -> None:
    choose(browser, axis)
    drawn = charts(browser)
    assert drawn["Training and validation loss (nats)"]["legend"][0] == label
    assert drawn["Memory (GiB)"]["legend"][0] == clock
    assert all(chart["lines"] > 0 and len(chart["colors"]) >= 2 for chart in drawn.values())


def test_hovering_shows_values_and_dragging_zooms_all_charts(browser: Browser) -> None:
    browser.value("document.querySelector('[data-chart=\"0\"]').scrollIntoView({block: 'center'})")
    x, y, width = browser.value(
        "(function () { const r = document.querySelector('[data-chart=\"0\"] .u-over').getBoundingClientRect(); return [r.x, r.y + r.height / 2, r.width]; })()"
    )
    browser.hover(x + width - 1, y)
    values = charts(browser)["Training and validation loss (nats)"]["values"]
    assert values[0] == "120" and values[1].endswith(" nats")
    browser.drag((x + 0.25 * width, y), (x + 0.5 * width, y))
    browser.hover(x + width - 1, y)
    drawn = charts(browser)
    assert 50 < int(drawn["Training and validation loss (nats)"]["values"][0]) < 65
    assert 50 < int(drawn["Grad norm"]["values"][0]) < 65


def test_dark_and_phone(browser: Browser) -> None:
    light = charts(browser)["Grad norm"]["colors"]
    browser.scheme("dark")
    assert (
        browser.value("new Promise(done => setTimeout(() => done(getComputedStyle(document.body).backgroundColor), 200))")
        == "rgb(13, 17, 23)"
    )
    assert charts(browser)["Grad norm"]["colors"] != light
    browser.resize(390, 844, mobile=True)
    script = "new Promise(done => setTimeout(() => done(document.documentElement.scrollWidth), 500))"
    assert browser.value(script) == 390
    assert all(chart["canvas"] < 390 and len(chart["colors"]) >= 2 for chart in charts(browser).values())


def test_log_scale_draws(browser: Browser) -> None:
    browser.value("document.getElementById('log').click()")
    assert all(len(chart["colors"]) >= 2 for chart in charts(browser).values())


def test_tables_read_without_scripts(report: Path) -> None:
    with Browser() as browser:
        browser.scripts(False)
        browser.open(report)
        browser.scripts(True)
        text = browser.value("document.body.innerText")
        assert "The charts need JavaScript" in text and "12 flash kernels" in text and "optim.learning_rate" in text
        assert not browser.value("document.querySelector('canvas')")
        assert browser.errors == []


def test_a_report_of_a_run_without_metrics_has_no_error(tmp_path: Path) -> None:
    program()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    path = tmp_path / "report.html"
    path.write_text(page([load_run(RunPlace("run", folder, folder))], "0"), encoding="utf-8")
    with Browser() as browser:
        browser.open(path)
        assert browser.errors == [] and "metrics.jsonl: missing" in browser.value("document.body.innerText")

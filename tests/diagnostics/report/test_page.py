"""The page as a file: everything from files is escaped, nothing is loaded, and it stays small."""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.diagnostics.report.charts import make_charts
from gptoughts.diagnostics.report.locate import RunPlace
from gptoughts.diagnostics.report.markup import element, json_block
from gptoughts.diagnostics.report.page import HERE, page
from gptoughts.diagnostics.report.run_data import RunData, load_run
from tests.support.golden_files import ROOT
from tests.support.run_files import SPIKE, metrics_rows, write_lines, write_run

ATTACK = "<script>boom()</script><img src=x onerror=boom()>\"'&"


def load(folder: Path) -> RunData:
    return load_run(RunPlace(folder.name, folder, folder / "checkpoints"))


class Tags(HTMLParser):
    """Counts elements, keeps attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_everything_from_files_is_escaped(tmp_path: Path) -> None:
    """A run named as a script, and markup in every text of every file, add no element to the page."""
    plain, hostile = write_run(tmp_path / "a", steps=20), write_run(tmp_path / "b", steps=20)
    for name, words in (
        ("samples.jsonl", ("def f(x)", "prompt")),
        ("plan.json", ("sdpa", "no GPU", "hopper", "2 x NVIDIA H100", "liger")),
        ("evidence.json", ("12 flash kernels",)),
        ("metrics.jsonl", ("tensor cores", "eval/hellaswag_acc", "perf/advice")),
        ("system.jsonl", ("power cap",)),
        ("goodput.json", ("productive",)),
    ):
        text = (hostile / name).read_text(encoding="utf-8")
        for word in words:
            assert word in text, word
            text = text.replace(word, json.dumps(word + ATTACK)[1:-1])
        (hostile / name).write_text(text, encoding="utf-8")
    (hostile / "recipe.toml").write_text(f"name = 'r'\n[data]\npath = '''{ATTACK}\"'''\n", encoding="utf-8")
    runs = [load(plain), load(hostile)]
    runs[1].name = ATTACK
    shown = Tags(page(runs, "0"))
    safe = [load(plain), load(write_run(tmp_path / "c", steps=20))]
    reference = Tags(page(safe, "0"))
    for tag in ("script", "img", "style", "a", "iframe"):
        assert [one for one, _ in shown.tags].count(tag) == [one for one, _ in reference.tags].count(tag), tag
    assert not [key for _, attributes in shown.tags for key in attributes if key.startswith("on")]
    assert shown.text.count(ATTACK) > 10


@given(st.text())
def test_text_and_data_stay_text_and_data(text: str) -> None:
    assert Tags(element("p", text, title=text)).tags[0][1]["title"] is not None
    assert len(Tags(element("p", text)).tags) == 1
    block = json_block("data", {"text": text, "key": [text]})
    inner = re.fullmatch(r'<script type="application/json" id="data">(.*)</script>', block, re.DOTALL)
    assert inner and "<" not in inner[1] and json.loads(inner[1])["text"] == text


def test_nothing_is_loaded(tmp_path: Path) -> None:
    """No element names another file, and the policy of the page forbids it."""
    shown = Tags(page([load(write_run(tmp_path / "a", steps=20))], "0"))
    named = [value for _, attributes in shown.tags for key, value in attributes.items() if key in ("src", "href", "action")]
    assert named == ["data:,"]
    (policy,) = (attributes["content"] for tag, attributes in shown.tags if attributes.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; ") and "http" not in policy


def test_the_spike_is_in_the_data_of_a_long_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", metrics_rows(6_000))
    charts = {chart.key: chart.to_json() for chart in make_charts([load(tmp_path)])}
    line = charts["loss"]["lines"][0]
    assert max(line["y"]) == SPIKE and len(line["y"]) < 3000
    place = line["y"].index(SPIKE)
    assert sum(line["x"][: place + 1]) == 3_001


def test_many_long_curves_stay_below_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of points is bounded over all curves, however many keys there are."""
    monkeypatch.setattr("gptoughts.diagnostics.report.charts.MOST_POINTS", 5_000)
    rows = [{"step": step, **{f"x/{key}": (step * 7919 + key) % 1000 / 7 for key in range(100)}} for step in range(1, 600)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    charts = make_charts([load(tmp_path)])
    assert len(charts) == 100 and sum(len(line.points) for chart in charts for line in chart.lines) < 6_000


@pytest.mark.long
def test_a_million_steps_are_below_five_megabytes(tmp_path: Path) -> None:
    names = (
        "train/loss",
        "train/grad_norm",
        "train/num_tokens",
        "train/seconds",
        "perf/tokens_per_second",
        "time/forward",
        "x/y",
    )
    with (tmp_path / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, 1_000_001):
            values = {key: (step * 7919 * (place + 1)) % 100_003 / 977 for place, key in enumerate(names)}
            values["train/loss"] = SPIKE * 100 if step == 654_321 else values["train/loss"]
            file.write(json.dumps({"step": step, "attempt": 1, **values}) + "\n")
    run = load(tmp_path)
    assert max(point.y for point in run.metrics.keys["train/loss"].curve.points()) == SPIKE * 100
    text = page([run], "0")
    assert len(text.encode()) < 5e6 and f"{SPIKE * 100}" in text


def test_the_vendored_library_is_the_one_of_the_decisions() -> None:
    """Version and hashes of uPlot stand in docs/decisions.md; its license travels in every report."""
    decisions = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        content = (HERE / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() in decisions, name
    version = re.search(r"\(v([\d.]+)\)", (HERE / "vendor" / "uPlot.iife.min.js").read_text(encoding="utf-8"))
    assert version and f"uPlot {version[1]}" in decisions
    assert "Leon Sorokin" in page([], "0")

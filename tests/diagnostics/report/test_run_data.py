"""A run is read whatever its files hold: cut off, damaged, missing, resumed, hostile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.diagnostics.report import locate as places
from gptoughts.diagnostics.report.charts import make_charts
from gptoughts.diagnostics.report.locate import FILES, RunPlace, locate
from gptoughts.diagnostics.report.page import page
from gptoughts.diagnostics.report.run_data import RunData, load_named, load_run
from gptoughts.diagnostics.report.summary import results
from gptoughts.diagnostics.report.text import comparison
from gptoughts.errors import RunError
from gptoughts.run.tracking import jsonl
from tests.support.run_files import SPIKE, metrics_rows, write_lines, write_run


def load(folder: Path) -> RunData:
    return load_run(RunPlace(folder.name, folder, folder / "checkpoints"))


def ys(run: RunData, key: str) -> list[float]:
    return [point.y for point in run.metrics.keys[key].curve.points()]


def test_a_whole_run(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "a"))
    assert run.notes == [] and run.attempts == 1
    assert len(ys(run, "train/loss")) == 200 and max(ys(run, "train/loss")) == SPIKE
    assert "perf/of_gemm" not in run.metrics.keys
    assert run.metrics.words["perf/limiter"] == {"tensor cores": 150, "host launch": 50}
    assert run.system.words["gpu/throttle"] == {"power cap": 17}
    assert run.recipe["data.path"] == "books.txt" and run.samples[0]["step"] == 100
    shown = {figure.name: figure.texts()[0] for figure in results([run])}
    assert shown["tokens/s, last 90 % of the steps"] == "10 k" and shown["steps"] == "200"
    assert shown["goodput (productive share of wall time)"] == f"{100 * 20 / 36.5:.1f} %"


def test_rows_that_a_later_attempt_made_again_are_replaced(tmp_path: Path) -> None:
    """The same rows as the reader of metrics.jsonl returns."""
    rows = [*metrics_rows(50), *metrics_rows(30, attempt=2, first=41, loss=3.0), *metrics_rows(5, attempt=3, first=61)]
    folder = tmp_path / "a"
    folder.mkdir()
    write_lines(folder / "metrics.jsonl", rows)
    run = load(folder)
    kept = [row for row in jsonl.read(folder / "metrics.jsonl") if "train/loss" in row]
    assert ys(run, "train/loss") == [row["train/loss"] for row in kept]
    assert run.attempts == 3 and len(kept) == 65


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("end", [0, 60, -3])
def test_a_file_that_is_cut_off_or_missing(name: str, end: int, tmp_path: Path) -> None:
    """The page and the text are made, and a note names the file unless it was cut at the end of a line."""
    folder = write_run(tmp_path / "a", steps=20)
    whole = (folder / name).read_bytes()
    cut = whole[:end]
    (folder / name).write_bytes(cut)
    runs = [load(folder)]
    assert page(runs, "0") and comparison(runs)
    ends_inside = not cut.endswith(b"\n") and end
    assert any(note.startswith(f"{name}:") for note in runs[0].notes) or not ends_inside or name == "recipe.toml"
    (folder / name).unlink()
    assert page([load(folder)], "0")


def test_a_metrics_file_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    run = load(folder)
    assert len(ys(run, "train/loss")) == 19
    assert run.notes == ["metrics.jsonl: 1 lines that are cut off or damaged left out"]
    path.write_bytes(whole[:-1])  # the last line is whole, its end is not written yet
    assert len(ys(load(folder), "train/loss")) == 20


def test_a_recipe_that_is_cut_off_keeps_its_whole_lines(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    text = (folder / "recipe.toml").read_text(encoding="utf-8")
    (folder / "recipe.toml").write_text(text[: text.index("sequence_length") + 9], encoding="utf-8")
    run = load(folder)
    assert run.recipe["data.tokenizer"] == "gpt2" and "data.sequence_length" not in run.recipe
    assert any("recipe.toml" in note for note in run.notes)


HOSTILE = [
    b'{"step": 1e999, "train/loss": 1}', b'{"step": "x"}', b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000,
    b'{"step": 3, "a": NaN, "b": Infinity, "c": 1e308, "d": true, "e": {"f": 1}, "g": [1, [2]], "h": [1, 2, 3], "": 2}',
    b'{"step": 4, "attempt": "x", "n": ' + b"9" * 400 + b"}", b'{"step": 5, "n": ' + b"9" * 5000 + b"}", b'{"step": -7, "attempt": -1, "c": 2}',
]  # fmt: skip


@pytest.mark.parametrize("name", ["metrics.jsonl", "system.jsonl", "samples.jsonl"])
def test_hostile_rows(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", steps=20)
    more = [line.replace(b'"step"', b'"time"') for line in HOSTILE] if name == "system.jsonl" else HOSTILE
    with (folder / name).open("ab") as file:
        file.write(b"\n".join(more) + b"\n")
    run = load(folder)
    assert run.notes and page([run], "0") and comparison([run])
    if name == "metrics.jsonl":
        assert run.metrics.keys["h mean"].last == 2 and run.metrics.keys["b"].not_finite == 1
        assert len(ys(run, "train/loss")) == 20


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)  # fmt: skip


@settings(max_examples=25)
@given(st.lists(st.dictionaries(st.sampled_from(["step", "attempt", "time", "train/loss", "perf/limiter", "x/y", "choices", "layers", "parts"]), JSON), max_size=6))  # fmt: skip
def test_any_json_makes_a_page(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    folder = tmp_path_factory.mktemp("run")
    for name in FILES:
        if name.endswith(".jsonl"):
            write_lines(folder / name, rows)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows[0] if rows else {}), encoding="utf-8")
    runs = [load(folder)]
    assert page(runs, "0") and comparison(runs)
    shutil.rmtree(folder)


def test_many_keys_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoughts.diagnostics.report.run_data.MOST_KEYS", 5)
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, **{f"x/{key}": 1.0 for key in range(9)}} for step in range(3)])
    run = load(tmp_path)
    assert len(run.metrics.keys) == 5 and any("values of keys" in note for note in run.notes)


def test_a_line_without_end_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoughts.diagnostics.report.rows.MOST_BYTES_OF_A_LINE", 1000)
    rows = [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0, "text": "x" * 5000}, {"step": 3, "train/loss": 3.0}]
    write_lines(tmp_path / "metrics.jsonl", rows)
    run = load(tmp_path)
    assert ys(run, "train/loss") == [1.0, 3.0] and run.notes == ["metrics.jsonl: 1 lines that are too long left out"]


def test_unknown_keys_get_charts_under_their_prefix(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "metrics.jsonl", [{"step": step, "mine/speed_bytes": 2.0**31 * step, "odd": step} for step in range(5)]
    )
    charts = {chart.key: chart for chart in make_charts([load(tmp_path)])}
    assert (charts["mine/speed_bytes"].section, charts["mine/speed_bytes"].to_json()["unit"]) == ("mine", "GiB")
    assert charts["mine/speed_bytes"].to_json()["lines"][0]["y"][-1] == 8.0
    assert charts["odd"].section == "Other"


def test_runs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = write_run(tmp_path / "out" / "first", steps=5)
    step = tmp_path / "checkpoints" / "first" / "step-000005"
    step.mkdir(parents=True)
    own = write_run(tmp_path / "elsewhere", steps=5)
    (own / "checkpoints" / "step-000005").mkdir(parents=True)
    for name in ("first", "out/first", str(out), str(step), "checkpoints/first"):
        assert (locate(name).out.resolve(), locate(name).name) == (out, "first"), name
        assert locate(name).checkpoints.resolve() == step.parent
    for name in ("elsewhere", str(own / "checkpoints"), str(own / "checkpoints" / "step-000005")):
        assert (locate(name).out.resolve(), locate(name).checkpoints.resolve()) == (own, own / "checkpoints"), name
    with pytest.raises(RunError, match=r"frist: no such run \(did you mean 'first'\?\). Found the runs first"):
        locate("frist")
    with pytest.raises(RunError, match="no files of a run"):
        locate(str(tmp_path))
    assert places.FILE == jsonl.FILE


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / parent / "run", steps=5) for parent in ("a", "b")]
    assert [run.name for run in load_named([locate(str(folder)) for folder in folders])] == ["a/run", "b/run"]
    assert [run.name for run in load_named([locate(str(folders[0]))] * 2)] == ["run (1)", "run (2)"]

"""Where a step went: on this CPU for real, on a GPU by traces in the form that its profiler gives; and what lay in memory."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.api import decide
from gptoughts.cli.trace import steps_to_trace
from gptoughts.diagnostics import trace as tracing
from gptoughts.errors import ConfigError, DataError
from gptoughts.hardware.world import World
from gptoughts.run.memory_snapshot import UNKNOWN, history, memory_report
from tests.support.engines import engine_of, plan_of, recipe_of, steps

TRACES = Path(__file__).parents[1] / "traces"


def kinds(summary: tracing.Summary) -> dict[str, float]:
    return {part.name: part.seconds for part in summary.kinds}


# --- recorded and read on this CPU


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"attention": "sdpa"})) as engine:
        steps(engine, 1)
        with tracing.phases_named(engine), tracing.recorded(engine.device, file):
            for number in (2, 3):
                with tracing.step_named(number):
                    steps(engine, 1)
        assert "next_batch" not in vars(engine)
        assert engine._wrappers["clip"] == []
    return file


def test_a_trace_of_real_steps_adds_up_and_names_kinds(recorded: Path) -> None:
    summary = tracing.summarize(tracing.read(recorded))
    assert (summary.device, summary.steps) == ("CPU", 2)
    found = kinds(summary)
    named = {"matmul", "attention", "norm and elementwise", "optimizer and clipping", "copies and casts", tracing.WAITING}
    assert named <= set(found)
    assert sum(found.values()) == pytest.approx(summary.seconds, rel=0.02)  # own times: nothing is counted twice
    attention = [part for part in summary.kinds if part.name == "attention"]
    assert attention[0].calls >= 2 * 3 * 2  # forward and backward of three blocks in two steps, and what is inside


def test_a_trace_is_small_enough_to_send_and_a_viewer_knows_it(recorded: Path) -> None:
    with gzip.open(recorded, "rt", encoding="utf-8") as stream:
        assert {"traceEvents", "schemaVersion"} <= set(json.load(stream))
    assert [path.name for path in recorded.parent.iterdir()] == [recorded.name]


def test_the_summary_is_text_json_and_a_picture(recorded: Path, tmp_path: Path) -> None:
    summary = tracing.summarize(tracing.read(recorded))
    text = summary.markdown("a title")
    assert text.startswith("# a title\n\n2 steps, ")
    assert "| matmul |" in text and "| `aten::mm` | matmul |" in text
    assert json.loads(json.dumps(summary.to_json()))["steps"] == 2
    tracing.draw(summary, tmp_path / "trace.png", "a title")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


# --- a GPU's


def test_on_a_gpu_kernels_count_and_idle_time_is_what_none_covers() -> None:
    summary = tracing.summarize(tracing.read(TRACES / "cuda-kernels.json"))
    assert summary.device == "GPU"
    found = {name: round(1e6 * seconds) for name, seconds in kinds(summary).items()}
    assert found["matmul"] == 400
    assert found["attention"] == 220
    assert found["norm and elementwise"] == 2 * (30 + 25)
    assert found["copies and casts"] == 2 * 4 + 3 + 2
    assert found["communication"] == 50
    assert found[tracing.IDLE] == round(1e6 * summary.idle_share * summary.seconds)
    assert 0 < summary.idle_share < 1
    assert "idle (no kernel)" in summary.markdown("t")


def test_compiled_kernels_and_the_fused_update_have_kinds_of_their_own() -> None:
    summary = tracing.summarize(tracing.read(TRACES / "cuda-graph.json"))
    found = {name: round(1e6 * seconds) for name, seconds in kinds(summary).items()}
    assert found["compiled kernels"] == 2 * (15 + 20)
    assert found["matmul"] == 2 * (180 + 220)
    assert found["attention"] == 2 * 90
    assert found["optimizer and clipping"] == 120
    assert found["copies and casts"] == 12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matmul"), ("aten::bmm", "matmul"), ("aten::_scaled_mm", "matmul"), ("mkldnn::_linear_pointwise", "matmul"),
        ("triton_tem_fused_mm_3", "matmul"), ("triton_tem_fused_flex_attention_0", "attention"), ("triton_per_fused_add_1", "compiled kernels"),
        ("flash::FlashAttnFwdSm90<...>", "attention"), ("aten::_foreach_mul_", "optimizer and clipping"), ("aten::copy_", "copies and casts"),
        ("aten::_fused_adamw_", "optimizer and clipping"), ("aten::_log_softmax", "loss"), ("aten::native_layer_norm", "norm and elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"), ("something new", tracing.OTHER),
    ],
)  # fmt: skip
def test_kinds_by_name(name: str, kind: str) -> None:
    assert tracing.kind_of(name) == kind


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 50)), max_size=30))
def test_the_union_of_spans_is_the_number_of_covered_points(spans: list[tuple[int, int]]) -> None:
    covered = {point for begin, length in spans for point in range(begin, begin + length)}
    assert tracing._union((float(begin), float(begin + length)) for begin, length in spans) == len(covered)


def test_what_is_no_trace_is_said(tmp_path: Path) -> None:
    for name, content in (("a.json", "no json"), ("b.json", "[]"), ("c.json.gz", "not gzipped")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match="not a trace of torch's profiler"):
            tracing.read(tmp_path / name)
    with pytest.raises(DataError, match="shows no step"):
        tracing.summarize([])


# --- which steps


def chosen(first: int | None, last: int | None, **fields: Any) -> tuple[int, int]:
    given = {"train.steps": "30", **fields}
    return steps_to_trace(decide("quickstart", fields=given, world=World()), first, last)


def test_the_steps_that_nobody_named_come_after_the_warm_ones() -> None:
    first, last = chosen(None, None)
    assert first > 2 and last == first + 2
    assert chosen(7, None) == (7, 9)
    assert chosen(None, 3) == (3, 3)
    assert chosen(None, None, **{"train.steps": "2"}) == (2, 2)


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (9, 4, "--from 9 --to 4: the range is empty"),
        (None, 31, "--to 31: beyond the last step. Found 30 steps"),
        (40, 50, "--from 40, --to 50: beyond the last step"),
    ],
)
def test_steps_that_cannot_be_are_refused(first: int | None, last: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen(first, last)


def test_several_ranks_are_refused() -> None:
    setting = SimpleNamespace(world=World(0, 0, 2, 2))
    with pytest.raises(ConfigError, match="one process"):
        steps_to_trace(setting, None, None)  # type: ignore[arg-type]


def test_the_verb_trains_writes_and_prints(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n" * 300, encoding="utf-8")
    sizes = [
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--model.depth",
        "2",
        "--data.sequence-length",
        "32",
        "--train.steps",
        "8",
    ]
    command = [
        sys.executable, "-m", "gptoughts", "trace", "shakespeare-char", "--data.path", "text.txt", "--data.cache", "cache",
        "--name", "look", "--from", "4", "--to", "5", "--memory-history", *sizes,
    ]  # fmt: skip
    ran = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "# look: steps 4 to 5 on CPU" in ran.stdout
    assert "| kind | ms per step |" in ran.stdout
    assert "--memory-history: records GPU allocations, and there is no GPU" in ran.stdout
    files = {path.name for path in (tmp_path / "out" / "look").iterdir()}
    assert files == {"trace.json.gz", "trace.md", "trace.summary.json", "trace.png"}
    assert json.loads((tmp_path / "out" / "look" / "trace.summary.json").read_text())["steps"] == 2
    ran = subprocess.run(
        [*command[:-len(sizes)], *sizes, "--from", "9"], cwd=tmp_path, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr and "beyond the last step. Found 8 steps" in ran.stderr


# --- memory

MIB = 2**20


MODEL, TORCH = ("/x/gptoughts/models/gpt/gpt.py", 120, "forward"), ("/site-packages/torch/nn/functional.py", 9, "linear")


def block(size: int, state: str = "active_allocated", *frames: tuple[str, int, str]) -> dict[str, Any]:
    told = [{"filename": file, "line": line, "name": name} for file, line, name in frames]
    return {"address": 1, "size": size, "requested_size": size, "state": state, "frames": told}


SEGMENTS = [
    {
        "device": 0, "address": 1, "total_size": 64 * MIB, "stream": 0, "segment_type": "large", "is_expandable": True,
        "blocks": [
            block(24 * MIB, "active_allocated", TORCH, MODEL), block(8 * MIB, "active_allocated", MODEL),
            block(20 * MIB, "inactive"), block(2 * MIB, "active_awaiting_free"), block(10 * MIB),
        ],
    },
]  # fmt: skip


def test_the_memory_report_says_whose_the_largest_blocks_are(tmp_path: Path) -> None:
    said = memory_report(tmp_path / "deep" / "memory.json", SEGMENTS)
    assert "64 MiB reserved in 1 segments, 42 MiB in 3 live blocks, 20 MiB free (31.2 %)" in said
    assert "largest free block 20 MiB" in said and "2 MiB waiting for a stream" in said
    rows = said.splitlines()
    assert "32 MiB" in rows[2] and "2 x up to 24 MiB" in rows[2] and rows[2].endswith("gpt.py:120 forward")
    assert UNKNOWN in rows[3]
    assert "not the pickle" in rows[-1]
    kept = json.loads((tmp_path / "deep" / "memory.json").read_text(encoding="utf-8"))
    assert kept["segments"] == SEGMENTS
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["memory.json"]


def test_an_allocator_that_held_nothing_is_said(tmp_path: Path) -> None:
    assert "nothing allocated by torch" in memory_report(tmp_path / "memory.json", [])


def test_only_a_gpus_allocator_notes_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled, **_: told.append(enabled))
    with history(torch.device("cpu")):
        assert told == []
    assert told == []
    with history(torch.device("cuda", 0)):
        assert told == ["state"]
    assert told == ["state", None]

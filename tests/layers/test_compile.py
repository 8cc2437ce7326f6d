"""What the compiled layers prove, count, name, keep and refuse. The traces of recorded graphs are in the form that a GPU's profiler gives."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gptoughts.config.model_spec import spec_for
from gptoughts.console import Console
from gptoughts.errors import LayerError, PlanError
from gptoughts.hardware.machine import probe, read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.support import compile as compiling
from gptoughts.planning.evidence import Operator, Status, StepTrace
from gptoughts.planning.layer import Case, Kind
from gptoughts.run import step_trace
from tests.support.engines import NEEDS_INDUCTOR, compile_quickly, engine_of, plan_of, random_batches, recipe_of, steps, watched

TRACES = Path(__file__).parents[1] / "traces"
MACHINES = Path(__file__).parents[1] / "machines"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Numbered(nn.Module):
    """A block as people write them: it knows its own number, so every one of them is another graph."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.linear = number, nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (1 + self.number)


class Alike(nn.Module):
    """A block that knows nothing of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x))


# --- graphs that are made again


def graphs_of(blocks: list[nn.Module]) -> compiling.Compilations:
    with compiling.count_compilations() as made:
        for block in blocks:
            block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            block(torch.ones(2, 4)).sum().backward()
        made.read()
    return made


def test_a_graph_made_again_is_counted_and_its_cause_named() -> None:
    made = graphs_of([Numbered(0), Numbered(1), Numbered(2)])
    assert len(made.causes) == 2
    assert "forward (test_compile.py:" in made.causes[0]
    assert "number ==" in made.causes[0]
    assert "HINT" not in made.causes[0] and "\n" not in made.causes[0]
    assert "2 recompilations, last for forward (" in made.words()


def test_blocks_that_are_alike_make_no_second_graph() -> None:
    assert graphs_of([Alike(), Alike()]).causes == []


def test_a_forward_without_gradients_is_told_in_words() -> None:
    block = Alike()
    with compiling.count_compilations() as made:
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        block(torch.ones(2, 4))
        with torch.no_grad():
            block(torch.ones(2, 4))
        (cause,) = made.news()
        assert "a forward without gradients" in cause
        assert made.news() == []


def test_a_count_sees_neither_what_was_before_it_nor_what_comes_after() -> None:
    graphs_of([Numbered(0), Numbered(1)])
    with compiling.count_compilations() as made:
        assert compiling.newest() is made
        assert compiling.recompiles() == ()
    assert compiling.newest() is None
    assert graphs_of([Numbered(5)]).causes != []  # the code is known, the number is not: a graph made again
    assert made.causes == []


def test_the_watched_step_holds_the_causes_and_later_ones_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_quickly(monkeypatch)
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"compile": "compile-blocks", "compile.cache": "torch"})) as engine:
        trace = watched(engine)
        assert trace.recompiles == ()
        assert CATALOG["compile-blocks"].verify(engine, trace, {}).status is Status.ACTIVE
        assert "recompiled" not in capsys.readouterr().out
        batch = next(random_batches(recipe, seed=3))[0]
        with Console(sys.stdout).logging():
            with torch.no_grad(), engine.eval_context():
                engine.objective(engine.model, batch)
            steps(engine, 1)
        said = capsys.readouterr().out.strip().splitlines()
        assert len(said) == 1
        assert said[0].startswith("note: recompiled in update 3: ")
        assert "a forward without gradients" in said[0]
        again = step_trace.trace_step(engine, lambda: steps(engine, 1) and None)
        assert len(again.recompiles) == 1


def test_a_full_cache_stops_the_run_with_the_limit_and_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: every block has its own number, and the compiler may keep one graph for a function."""
    compile_quickly(monkeypatch)
    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"compile": "compile-blocks", "compile.cache": "torch"})
    with torch._dynamo.config.patch(recompile_limit=1), engine_of(recipe, plan) as engine:
        for number, block in enumerate(engine.blocks.values()):
            block.number = number
            block.register_forward_pre_hook(lambda block, given: (given[0] * (1 + block.number), *given[1:]))
        with pytest.raises(LayerError, match=r"recompile limit \(1\) reached for a function: .*number"):
            steps(engine, 1)


def test_a_block_that_the_compiler_left_eager_is_inactive_with_the_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quickly(monkeypatch)
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"compile": "compile-blocks", "compile.cache": "torch"})) as engine:
        next(iter(engine.blocks.values()))._compiled_call_impl = None
        proof = CATALOG["compile-blocks"].verify(engine, watched(engine), {})
    assert proof.status is Status.INACTIVE
    assert proof.text.startswith("2 compiled calls in 3 block forwards; ")


def test_what_the_compiler_cannot_do_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_quickly(monkeypatch)
    recipe = recipe_of("modern")
    for layer in ("compile-blocks", "compile-model"):
        with engine_of(recipe, plan_of(recipe, {"compile": layer, "compile.cache": "torch"})) as engine:
            next(iter(engine.blocks.values())).register_forward_hook(lambda *_: print("a hook that prints"))
            with pytest.raises(LayerError, match=f"compile={layer}: the compiler failed: Unsupported: ") as caught:
                steps(engine, 1)
        assert "--layer.compile eager" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 3
        torch._dynamo.reset()


@pytest.mark.skipif(
    probe().has_older("torch", (2, 12)), reason="this torch passes over it without a word; the watched step tells"
)
def test_a_part_that_the_compiler_passes_over_is_told() -> None:
    """Torch's own modules are not compiled when they stand alone."""
    block = nn.Linear(4, 4)
    block.compile(backend="aot_eager", fullgraph=True, dynamic=False)
    with (
        pytest.raises(LayerError, match="compile=compile-blocks: the compiler failed"),
        compiling.compiler_errors("compile-blocks"),
    ):
        block(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="something else"), compiling.compiler_errors("compile-blocks"):
        raise RuntimeError("something else")


# --- marks in graphs


class Marking(nn.Module):
    """Counts its calls, by `mark`, in a function inside a function as losses do."""

    def __init__(self, mark: Any) -> None:
        super().__init__()
        self.mark = mark

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        self.mark()
        return x * 2


def graphs_of_marks(mark: Any) -> list[str]:
    model = Marking(mark)
    with compiling.count_compilations() as made:
        model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        for _ in range(4):
            model(torch.ones(2))
        made.read()
    return made.causes


def test_a_mark_is_told_from_a_graph_and_makes_no_second_one() -> None:
    call_counts: Counter[str] = Counter()
    mark = compiling.counting(call_counts, "seen")
    assert graphs_of_marks(mark) == []
    assert call_counts["seen"] == 0
    assert compiling.in_graphs(call_counts, "seen") == 1
    Marking(mark)(torch.ones(2))
    assert call_counts["seen"] == 1

    def written_out() -> None:
        call_counts["out"] += 1

    assert len(graphs_of_marks(written_out)) >= 3  # and this is why `counting` is there


# --- the cache


def test_graphs_are_kept_in_a_folder_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    with compiling.cached_graphs("own", environment):
        folder = Path(environment["TORCHINDUCTOR_CACHE_DIR"])
        assert folder == tmp_path / "gptoughts" / "compiled"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert environment == {"XDG_CACHE_HOME": str(tmp_path)}
    folder.chmod(0o777)
    with compiling.cached_graphs("own", environment):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_users_folder_wins_and_torchs_default_does_not(tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    mine = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "/mine"}
    with compiling.cached_graphs("own", mine):
        assert mine["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    torchs = {"XDG_CACHE_HOME": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": default_cache_dir()}
    with compiling.cached_graphs("own", torchs):
        assert torchs["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "gptoughts" / "compiled")
    assert torchs["TORCHINDUCTOR_CACHE_DIR"] == default_cache_dir()


def test_the_cache_can_be_off_or_torchs() -> None:
    from torch._inductor import config

    environment: dict[str, str] = {}
    with compiling.cached_graphs("torch", environment):
        assert environment == {} and not config.force_disable_caches
    with compiling.cached_graphs("off", environment):
        assert config.force_disable_caches
    assert not config.force_disable_caches


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    with compiling.cached_graphs("own", environment):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LayerError, match="belongs to another user"), compiling.cached_graphs("own", environment):
        pass


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "gptoughts").write_text("a file", encoding="utf-8")
    with (
        pytest.raises(LayerError, match="cannot cache compiled graphs"),
        compiling.cached_graphs("own", {"XDG_CACHE_HOME": str(tmp_path)}),
    ):
        pass


@NEEDS_INDUCTOR
def test_a_second_start_reads_its_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    figures = []
    for _ in range(2):
        torch._dynamo.reset()
        with compiling.cached_graphs("own"), compiling.count_compilations() as made:
            model = Marking(lambda: None)  # one kernel without a backward: the C++ compiler takes seconds for each
            model.compile(fullgraph=True, dynamic=False)
            model(torch.ones(2))
            figures.append(made.figures)
    assert [row["made"] > 0 for row in figures] == [True, False]
    assert [row["cached"] > 0 for row in figures] == [False, True]
    assert any((tmp_path / "gptoughts" / "compiled").iterdir())


# --- plans


def reasons(layer: str, machine: str, recipe: Any = None, world: World | None = None) -> list[Any]:
    recipe = recipe or recipe_of("modern")
    found = CATALOG[layer]
    case = Case(read(MACHINES / f"{machine}.json"), spec_for(recipe), recipe, world or World())
    return found.rejections(case, found.read_options({}, "the test"))


def test_recorded_graphs_are_for_one_gpu_and_by_name() -> None:
    kinds = [reason.kind for reason in reasons("cuda-graph", "h100")]
    assert kinds == [Kind.SLOWER]
    two = reasons("cuda-graph", "h100", world=World(0, 0, 2, 2))
    assert any(reason.kind is Kind.UNSUPPORTED and "one process" in str(reason) for reason in two)
    experts = reasons("cuda-graph", "h100", recipe_of("deepseek"))
    assert any(reason.kind is Kind.UNSUPPORTED and "expert load" in str(reason) for reason in experts)
    with pytest.raises(PlanError, match="needs an NVIDIA GPU"):
        plan_of(recipe_of("modern"), {"compile": "cuda-graph"})


def test_one_graph_and_several_ranks_do_not_pay() -> None:
    assert any("exchanged" in str(reason) for reason in reasons("compile-model", "h100", world=World(0, 0, 2, 2)))
    assert not [reason for reason in reasons("compile-model", "h100") if reason.kind is Kind.UNSUPPORTED]


@pytest.mark.parametrize("layer", ["compile-model", "cuda-graph"])
def test_one_graph_clashes_with_what_python_does_inside(layer: str) -> None:
    assert {"fp8-te", "in-backward"} <= set(CATALOG[layer].clashes)


# --- recorded graphs, as a GPU's profiler shows them


@contextmanager
def counted_as(skips: int = 0, why: str = "") -> Iterator[None]:
    from torch._dynamo.utils import counters

    with compiling.count_compilations() as made:
        counters["inductor"]["cudagraph_skips"] += skips
        made.skipped += [why] if why else []
        yield


def sight_of(trace: str) -> StepTrace:
    """A sight made of the events of a chrome trace under tests/traces, as `prove` reads them."""
    events = json.loads((TRACES / trace).read_text(encoding="utf-8"))["traceEvents"]
    seen = step_trace.ProfilerTotals()
    step_trace.add_events([_event(event) for event in events if event.get("ph") == "X"], seen)
    return StepTrace(
        operators={name: Operator(name, calls, dict(seen.dtypes[name])) for name, calls in seen.calls.items()},
        kernels=dict(seen.kernels), regions=seen.regions, micro_batches=2, blocks=3, updated=True, weights_moved=True,
        step_seconds=1.0, data_wait_seconds=0.0,
    )  # fmt: skip


def _event(event: dict[str, Any]) -> Any:
    kinds = torch.autograd.DeviceType
    on_gpu = event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")
    start, length = int(event["ts"] * 1000), int(event["dur"] * 1000)
    return SimpleNamespace(
        name=lambda: event["name"],
        device_type=lambda: kinds.CUDA if on_gpu else kinds.CPU,
        device_resource_id=lambda: event["tid"],
        start_ns=lambda: start,
        duration_ns=lambda: length,
        start_thread_id=lambda: event["tid"],
        dtypes=list,
        shapes=list,
    )


def verdict(trace: str, device: str = "cuda") -> Any:
    engine = SimpleNamespace(device=SimpleNamespace(type=device))
    return CATALOG["cuda-graph"].verify(engine, sight_of(trace), {})


def test_recorded_graphs_are_seen_by_their_launches() -> None:
    with counted_as():
        proof = verdict("cuda-graph.json")
    assert proof.status is Status.ACTIVE
    assert proof.figures["launches"] == 4
    assert verdict("cuda-graph.json", "cpu").status is Status.INACTIVE


def test_kernels_launched_one_by_one_are_not_recorded_graphs() -> None:
    with counted_as():
        proof = verdict("cuda-kernels.json")
    assert proof.status is Status.INACTIVE
    assert proof.text.startswith("0 launches of recorded graphs in 2 micro-batches")


def test_a_graph_that_torch_left_out_is_named() -> None:
    with counted_as(1, "skipping cudagraphs due to cpu device (arg0_1)"):
        proof = verdict("cuda-graph.json")
    assert proof.status is Status.INACTIVE
    assert "1 graphs not recorded: skipping cudagraphs due to cpu device" in proof.text


def test_gradients_stay_outside_the_graphs_memory() -> None:
    """The tensor that a gradient is added into is the same for all micro-batches of an update."""
    from gptoughts.layers import compile_cuda_graph

    weight = nn.Parameter(torch.ones(3))
    engine = SimpleNamespace(parameters=lambda: [weight])
    compile_cuda_graph._outside_the_pool(engine, torch.Tensor.backward, (weight * 2).sum())
    held = weight.grad
    compile_cuda_graph._outside_the_pool(engine, torch.Tensor.backward, (weight * 3).sum())
    assert weight.grad is held
    assert held is not None and held.tolist() == [5.0, 5.0, 5.0]


@pytest.mark.parametrize("name", ["compile-blocks", "compile-model"])
def test_what_the_compiler_gets_wrong_on_a_cpu_is_refused(name: str) -> None:
    recipe = recipe_of("modern")
    with pytest.raises(PlanError, match="NaN gradients"):
        plan_of(recipe, {"precision": "bf16", "compile": name})
    assert plan_of(recipe, {"attention": "sdpa", "precision": "bf16", "compile": name}).layers["compile"] == name

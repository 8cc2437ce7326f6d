"""Layers that trade for memory: the gradient is the same to the last bit, what is saved is measured, and a half-applied one is noticed."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gptoughts.config.loader import Recipe
from gptoughts.config.model_spec import ModelSpec, spec_for
from gptoughts.console import bytes_in_words
from gptoughts.engine.checkpoint import state as training_state
from gptoughts.engine.checkpoint import store as checkpoint
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.optim.factory import optimizer
from gptoughts.errors import CheckpointError, LayerError
from gptoughts.hardware.machine import probe, read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.layers.recompute_ops import is_kept
from gptoughts.layers.support.activation_offload import HostActivations
from gptoughts.models.sources import meta_model
from gptoughts.planning.evidence import Operator, StepTrace
from gptoughts.planning.layer import Case, Kind, Status
from gptoughts.planning.memory_fit import memory_headroom
from gptoughts.planning.memory_model import baseline
from gptoughts.run.build import build_engine
from tests.layers.test_contract import gradient
from tests.support.engines import ROWS, engine_of, family_for, objective_for, plan_of, random_batches, recipe_of, steps, watched
from tests.support.golden_files import ROOT

SMALL = {"offload": "offload-activations", "offload.least_bytes": 1024}


def options(name: str, **given: Any) -> dict[str, Any]:
    return CATALOG[name].read_options(given, "the test")


def verdict(name: str, engine: Any, trace: StepTrace, **given: Any) -> Any:
    return CATALOG[name].verify(engine, trace, options(name, **given))


def compiled_without_inductor(engine: Engine) -> None:
    """Dynamo's and autograd's graphs, which decide what is saved, without the minutes of making kernels of them."""
    for block in engine.blocks.values():
        block.compile(backend="aot_eager", fullgraph=True, dynamic=False)


# --- recompute-ops


@pytest.mark.parametrize("keep", ["matmuls", "attention"])
@pytest.mark.parametrize("family", ["modern", "llama", "bert"])
def test_recomputed_operators_give_the_very_same_gradient(family: str, keep: str) -> None:
    recipe, others = recipe_of(family), {"attention": "sdpa"}
    kept = gradient(recipe, others)[1]
    assert torch.equal(kept, gradient(recipe, {**others, "recompute": "recompute-ops", "recompute.keep": keep})[1])


class Made(TorchDispatchMode):
    """Remembers the memory behind every tensor that an operator gives, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.held[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> int:
        return sum(size for storage, size in self.held.items() if not storage.expired())


def saved_bytes(layers: dict[str, Any]) -> int:
    """Bytes that a forward made and left behind for its backward."""
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"attention": "sdpa", **layers})) as engine:
        batch, _ = engine.next_batch()
        with Made() as made, engine.forward_context():
            loss = engine.objective(engine.model, batch)
        left = made.alive()
        loss.backward()
        return left


def test_each_way_of_recomputing_keeps_less_than_the_one_before() -> None:
    everything = saved_bytes({})
    matmuls = saved_bytes({"recompute": "recompute-ops"})
    attention = saved_bytes({"recompute": "recompute-ops", "recompute.keep": "attention"})
    blocks = saved_bytes({"recompute": "recompute-blocks"})
    assert everything > matmuls > attention > blocks > 0
    assert matmuls < 0.75 * everything
    assert blocks < 0.3 * everything


def test_a_policy_that_keeps_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoughts.layers.recompute_ops.PRODUCT_NAMES", ())
    is_kept.cache_clear()
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"recompute": "recompute-ops"})) as engine:
        proof = verdict("recompute-ops", engine, watched(engine))
    is_kept.cache_clear()
    assert proof.status is Status.INACTIVE and "0 outputs kept" in proof.text


def test_kept_and_run_again_is_noticed() -> None:
    """Whole blocks run twice under a name that promises less."""
    trace = watched_marks({"recompute-ops": 12, "recompute-ops: kept": 6, "recompute-ops: kept and run again": 6})
    proof = verdict("recompute-ops", SimpleNamespace(device=SimpleNamespace(type="cuda")), trace)
    assert proof.status is Status.INACTIVE and "6 kept operators ran again" in proof.text


def test_compiled_blocks_are_told_and_the_rest_is_unproven() -> None:
    recipe = recipe_of("modern")
    torch._dynamo.reset()
    with engine_of(recipe, plan_of(recipe, {"recompute": "recompute-ops"})) as engine:
        compiled_without_inductor(engine)
        proof = verdict("recompute-ops", engine, watched(engine))
    assert proof.status is Status.UNPROVEN and "policy keep=matmuls was traced" in proof.text


def test_attention_that_is_written_out_cannot_be_kept() -> None:
    from gptoughts.errors import PlanError

    with pytest.raises(PlanError, match="unfused attention is not one operator"):
        plan_of(recipe_of("modern"), {"recompute": "recompute-ops", "recompute.keep": "attention"})


@pytest.mark.parametrize(
    ("name", "matmuls", "attention"),
    [
        ("aten::mm", True, False),
        ("aten::addmm", True, False),
        ("aten::_grouped_mm", True, False),
        ("aten::bmm", False, False),
        ("aten::silu", False, False),
        ("aten::_scaled_dot_product_flash_attention", True, True),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", True, True),
        ("flash_attn::_flash_attn_forward", True, True),
        ("flash_attn_3::fwd", True, True),
        ("flex_attention", True, True),
        ("torch_attn::_varlen_attn", True, True),
    ],
)
def test_what_is_kept(name: str, matmuls: bool, attention: bool) -> None:
    assert (is_kept(name, "matmuls"), is_kept(name, "attention")) == (matmuls, attention)


@pytest.mark.parametrize(
    ("width", "taken"), [(64, "keep"), (1536, "recompute-ops"), (2560, "recompute-blocks")], ids=["small", "middle", "large"]
)
def test_where_each_pays(width: int, taken: str) -> None:
    """On an H100: everything fits, everything but the cheap operators' outputs fits, only whole blocks fit."""
    machine = read(ROOT / "tests" / "machines" / "h100.json")
    recipe = recipe_of("modern", train={"steps": 10, "global_batch": 32}, data={"sequence_length": 1024, "tokenizer": "chars"})
    spec = ModelSpec(family="gpt", width=width, depth=32, sequence_length=1024, parameters=12 * 32 * width**2)
    budget = baseline(dataclasses.replace(spec, vocab_size=0), recipe, 32)
    assert budget is not None
    case = Case(machine, spec, recipe, World(), budget=budget.without_scores().half())
    first = next(
        name for name in ("keep", "recompute-ops", "recompute-blocks")
        if (name == "keep" and fits_at_all(case)) or (name != "keep" and not list(CATALOG[name].rejections(case, options(name))))
    )  # fmt: skip
    assert first == taken


def fits_at_all(case: Case) -> bool:
    found = memory_headroom(case)
    return found is not None and found.is_enough


# --- offload-activations


@pytest.mark.parametrize("family", ["modern", "llama", "bert"])
@pytest.mark.parametrize(
    "others", [{"attention": "sdpa", "precision": "bf16"}, {"recompute": "recompute-ops"}], ids=["bf16", "recomputed"]
)
def test_offloaded_activations_give_the_very_same_gradient(family: str, others: dict[str, Any]) -> None:
    recipe = recipe_of(family)
    assert torch.equal(gradient(recipe, others)[1], gradient(recipe, {**others, **SMALL})[1])


def test_compiled_blocks_offload_what_their_graphs_save() -> None:
    recipe, seen = recipe_of("modern"), []
    for layers in ({}, SMALL):
        torch._dynamo.reset()
        seen.append(gradient(recipe, layers, compiled_without_inductor)[1])
    assert torch.equal(*seen)


def test_with_recomputation_only_what_enters_a_block_travels() -> None:
    recipe, went = recipe_of("modern"), []
    for layers in ({}, {"recompute": "recompute-blocks"}):
        with engine_of(recipe, plan_of(recipe, {**layers, **SMALL})) as engine:
            trace = watched(engine)
            assert verdict("offload-activations", engine, trace).status is Status.ACTIVE
            went.append(trace.call_counts["offload-activations"])
    assert went[1] < went[0] / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_their_views_and_their_casts_stay(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, call_counts = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64, bias=False)), Counter[str]()
    hooks = HostActivations(model, 1, 2, 1, call_counts).context()
    gone: list[Tensor] = []
    inner = hooks.pack  # type: ignore[attr-defined]

    def pack(tensor: Tensor) -> Any:
        held = inner(tensor)
        gone.extend([tensor] if held is not tensor else [])
        return held

    hooks.pack = pack  # type: ignore[attr-defined]
    x = torch.randn(64, 64)  # as large as the weights, so that no size could tell them apart
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16), hooks:
        model(x).float().square().sum().backward()
    kept = [parameter.detach().to(dtype).flatten().sort().values for parameter in model.parameters()]
    assert len(gone) >= 3
    for tensor in gone:
        values = tensor.detach().flatten().to(dtype).sort().values
        assert not any(values.shape == one.shape and torch.equal(values, one) for one in kept), tensor.shape


def test_forwards_without_the_hooks_are_noticed() -> None:
    """One of two micro-batches keeps its activations on the device; or the threshold lets nothing go."""
    recipe = recipe_of("modern")
    layers = {**SMALL, "microbatch": "fixed", "microbatch.sequences": 2}
    with engine_of(recipe, plan_of(recipe, layers)) as engine:
        factory, calls = engine._contexts["forward_context"][-1], []

        def every_second() -> Any:
            calls.append(1)
            return factory() if len(calls) % 2 else torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)

        engine._contexts["forward_context"][-1] = every_second
        proof = verdict("offload-activations", engine, watched(engine))
        engine._contexts["forward_context"][-1] = factory
    assert proof.status is Status.INACTIVE and "in 1 of 2 forwards" in proof.text
    with engine_of(recipe, plan_of(recipe, {"offload": "offload-activations"})) as engine:
        proof = verdict("offload-activations", engine, watched(engine))
    assert proof.status is Status.INACTIVE
    found = re.search(r"the largest saved tensor was (\d+) bytes, below --layer.offload.least-bytes 1048576", proof.text)
    assert found is not None and 1024 < int(found[1]) < 1048576, proof.text
    largest = {"offload": "offload-activations", "offload.least_bytes": int(found[1])}
    with engine_of(recipe, plan_of(recipe, largest)) as engine:
        assert watched(engine).call_counts["offload-activations"] > 0, "what is typed is large enough"
    largest["offload.least_bytes"] = int(found[1]) + 1
    with engine_of(recipe, plan_of(recipe, largest)) as engine:
        assert watched(engine).call_counts.get("offload-activations", 0) == 0


def watched_marks(call_counts: dict[str, int], **more: Any) -> StepTrace:
    """A sight as a GPU's profiler would give it: 3 blocks, 2 micro-batches."""
    seen: dict[str, Any] = {
        "operators": {"aten::silu": Operator("aten::silu", 12)}, "kernels": {"some_kernel": 1}, "regions": 0, "micro_batches": 2,
        "blocks": 3, "updated": True, "weights_moved": True, "step_seconds": 1.0, "data_wait_seconds": 0.0, "call_counts": call_counts,
    }  # fmt: skip
    return StepTrace(**{**seen, **more})


CUDA = SimpleNamespace(device=SimpleNamespace(type="cuda"))
MOVED = {"offload-activations": 9, "offload-activations: back": 9, "offload-activations: forwards": 2}


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"copies": {"DtoH": 9, "HtoD": 9}, "memcpy_streams": 1}, Status.ACTIVE),
        ({"copies": {"DtoH": 8, "HtoD": 9}, "memcpy_streams": 1}, Status.INACTIVE),
        ({"copies": {"DtoH": 9, "HtoD": 9}, "memcpy_streams": 0}, Status.INACTIVE),
        ({"copies": {}, "memcpy_streams": 1}, Status.INACTIVE),
    ],
)
def test_on_a_gpu_copies_each_way_on_a_stream_of_their_own_are_the_proof(more: dict[str, Any], status: Status) -> None:
    assert verdict("offload-activations", CUDA, watched_marks(MOVED, **more)).status is status


# --- state-on-cpu


def reached(layers: dict[str, Any], change: Callable[[Engine], None] = lambda engine: None) -> list[Tensor]:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, layers)) as engine:
        steps(engine, 2)
        change(engine)
        steps(engine, 2)
        return [parameter.detach().clone() for parameter in engine.parameters()]


def halve(engine: Engine) -> None:
    with torch.no_grad():
        engine.parameters()[0].mul_(0.5)


@pytest.mark.parametrize("optimizer", ["plain", "fused"])
@pytest.mark.parametrize("change", [lambda engine: None, halve], ids=["untouched", "written"])
def test_updates_on_the_host_are_those_of_the_same_adamw(optimizer: str, change: Callable[[Engine], None]) -> None:
    """Also where somebody else writes a weight between two updates, as a restore does."""
    beside, there = ({"optimizer": optimizer, "optimizer_offload": slot} for slot in ("with-weights", "state-on-cpu"))
    pairs = zip(reached(beside, change), reached(there, change), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def engine_from(recipe: Recipe, folder: Path, skip: int, offload: str) -> Any:
    family, stream = family_for(recipe), random_batches(recipe)
    for _ in range(skip):
        next(stream)
    plan, ranks = plan_of(recipe, {"optimizer_offload": offload}), Ranks(World(), torch.device("cpu"))
    model, source = meta_model(recipe, family, ROWS), training_state.Weights(folder)
    return build_engine(model, family, objective_for(recipe), recipe, plan, CATALOG, ranks=ranks, batches=stream, source=source)


@pytest.mark.parametrize("then", ["state-on-cpu", "with-weights"])
@pytest.mark.parametrize("first", ["state-on-cpu", "with-weights"])
def test_a_restart_changes_no_bit_with_or_without_it(first: str, then: str, tmp_path: Path) -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"optimizer_offload": first})) as engine:
        steps(engine, 3)
        folder = checkpoint.write(training_state.snapshot(engine, 3, {}, {}, {}), tmp_path)
        losses = steps(engine, 3)
        weights = [parameter.detach().clone() for parameter in engine.parameters()]
    with engine_from(recipe, folder, 3, then) as engine:
        training_state.restore(engine, folder)
        assert steps(engine, 3) == losses
        assert all(torch.equal(one, other) for one, other in zip(weights, engine.parameters(), strict=True))


def test_state_that_does_not_fit_and_updates_elsewhere_are_noticed() -> None:
    from gptoughts.layers.support.cpu_optimizer import OnHost

    model = nn.Linear(4, 4)
    made = OnHost(optimizer(model, recipe_of("modern").optim, "plain"), Counter())
    with pytest.raises(CheckpointError, match="exp_avg, exp_avg_sq missing, or not of the weight's shape"):
        made.take(model.weight, {"exp_avg": torch.zeros(3, 4), "step": torch.tensor(1.0)})
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe, {"optimizer_offload": "state-on-cpu"})) as engine:
        trace = watched(engine)
        one_less = dataclasses.replace(trace, call_counts={"state-on-cpu": trace.call_counts["state-on-cpu"] - 1})
        assert verdict("state-on-cpu", engine, trace).status is Status.ACTIVE
        assert verdict("state-on-cpu", engine, one_less).status is Status.INACTIVE
        still = dataclasses.replace(trace, weights_moved=False)
        assert verdict("state-on-cpu", engine, still).status is Status.INACTIVE
        there = SimpleNamespace(device=CUDA.device, optimizer=engine.optimizer)
        for copies, status in (({}, Status.INACTIVE), ({"DtoH": 26, "HtoD": 26}, Status.ACTIVE)):
            on_gpu = dataclasses.replace(trace, kernels={"some_kernel": 1}, copies=copies)
            assert verdict("state-on-cpu", there, on_gpu).status is status


def test_the_host_must_hold_it() -> None:
    machine = dataclasses.replace(read(ROOT / "tests" / "machines" / "h100.json"), memory_bytes=32 << 30)
    spec = dataclasses.replace(spec_for(recipe_of("modern")), parameters=3_000_000_000, vocab_size=256)
    told = told_of("state-on-cpu", Case(machine, spec, recipe_of("modern"), World()))
    assert "one process needs 44.70 GiB of host memory, more than 80% of 32.00 GiB" in told
    half = dataclasses.replace(spec, parameters=1_000_000_000)
    assert "2 processes need 29.80 GiB" in told_of("state-on-cpu", Case(machine, half, recipe_of("modern"), World(0, 0, 2, 2)))
    other = recipe_of("modern", optim={"name": "lion"})
    assert "(--layer.optimizer-offload with-weights)" in told_of("state-on-cpu", Case(machine, spec, other, World()))


def told_of(name: str, case: Case) -> str:
    """Every reason against a layer."""
    return "; ".join(map(str, CATALOG[name].rejections(case, options(name))))


def a_billion(**more: Any) -> Case:
    """A GPU of 80 GB with a model of 3 billion parameters, forwards of 2,048 tokens and logits of 32,000 words."""
    machine = read(ROOT / "tests" / "machines" / "h100.json")
    machine = dataclasses.replace(machine, packages={**machine.packages, "torchao": "0.18.0", "triton": "3.7.0"})
    recipe = recipe_of(
        "modern", data={"sequence_length": 1024, "tokenizer": "chars"}, train={"steps": 1, "global_batch": 2}, **more
    )
    spec = ModelSpec(
        family="gpt", width=2560, depth=32, sequence_length=1024, parameters=3 * 10**9, embedding_parameters=32000 * 2560,
        vocab_size=32000, heads=20, projections="linear", head="linear", tied=True, norm="rmsnorm", mlp="swiglu",
    )  # fmt: skip
    return Case(machine, spec, recipe, World(), budget=baseline(spec, recipe, 2))


MEMORY_SLOTS = ("state-on-cpu", "in-backward", "8bit")


def test_what_an_adapter_would_save_is_weighed_by_its_own_weights() -> None:
    """The whole model's state is worth it; the adapter's is not, and each figure is the one of the plan's memory line."""
    unclipped = {"clip_norm": 0}
    whole, adapter = a_billion(optim=unclipped), a_billion(optim=unclipped, adapter={"kind": "lora", "rank": 8})
    assert whole.budget is not None and adapter.budget is not None
    assert [told_of(name, whole) for name in MEMORY_SLOTS[1:]] == ["", ""]
    gradients = bytes_in_words(adapter.budget.gradients)
    assert f"gradients take {gradients} of 79.65 GiB" in told_of("in-backward", adapter)
    assert "MiB" in gradients and "saves " in told_of("8bit", adapter) and "MiB of 79.65 GiB" in told_of("8bit", adapter)
    for case in (whole, adapter):
        assert f"state and activations take {memory_headroom(case)}" in told_of("state-on-cpu", case)
    crowded = dataclasses.replace(whole, machine=dataclasses.replace(whole.machine, memory_bytes=50 << 30))
    assert "one process needs 44.70 GiB of host memory" in told_of("state-on-cpu", crowded)
    assert "host memory" not in told_of("state-on-cpu", dataclasses.replace(adapter, machine=crowded.machine))


def test_logits_are_weighed_as_the_memory_line_does() -> None:
    case = a_billion()
    assert case.budget is not None
    assert f"logits take {bytes_in_words(case.budget.logits)} of 79.65 GiB" in told_of("fused-ce", case)
    many = dataclasses.replace(case, budget=dataclasses.replace(case.budget, tokens=2**16))
    assert told_of("fused-ce", many) == ""


@pytest.mark.parametrize("name", ["8bit", "in-backward", "fused-ce"])
def test_what_cannot_be_weighed_would_not_pay(name: str) -> None:
    case = a_billion(optim={"clip_norm": 0})
    case = dataclasses.replace(case, budget=None, spec=dataclasses.replace(case.spec, vocab_size=None))
    assert "unknown" in told_of(name, case)


def test_state_of_a_model_whose_sizes_are_not_known_stays() -> None:
    case = a_billion()
    case = dataclasses.replace(case, budget=None, spec=dataclasses.replace(case.spec, width=None, parameters=None))
    assert "size of the optimizer state unknown" in told_of("state-on-cpu", case)


@pytest.mark.parametrize(("wish", "said"), [("compile-blocks", True), ("cuda-graph", True), ("eager", False)])
@pytest.mark.parametrize("name", ["recompute-blocks", "recompute-ops", "offload-activations"])
def test_a_figure_that_the_compiler_will_lower_says_so(name: str, wish: str, said: bool) -> None:
    case = dataclasses.replace(a_billion(), preferred={"compile": wish}, compiles=CATALOG[wish].compiles)
    told = told_of(name, case)
    assert ("GiB of 80 GiB before compilation" in told) is said and "activations take about" in told
    assert str(memory_headroom(case)) in told


# --- fused-ce


@pytest.mark.parametrize("implementation", ["sliced", "torch"])
@pytest.mark.parametrize(
    ("family", "precision", "tolerance"),
    [
        ("modern", "fp32", 1e-6),
        ("llama", "fp32", 1e-6),
        ("llada", "fp32", 1e-6),
        ("modern", "bf16", 2e-3),
        ("llada", "bf16", 2e-3),
    ],
)
def test_every_implementation_gives_loss_and_gradient(
    implementation: str, family: str, precision: str, tolerance: float
) -> None:
    """Next token takes the sum, masked diffusion one sum per row. In bf16 torch's rounds each token's loss."""
    if implementation == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    recipe, others = recipe_of(family), {"precision": precision}
    loss, flat = gradient(recipe, others)
    its, same = gradient(recipe, {**others, "loss": "fused-ce", "loss.implementation": implementation, "loss.tokens": 32})
    assert its == pytest.approx(loss, rel=tolerance)
    assert torch.nn.functional.cosine_similarity(flat, same, dim=0) > 1 - 1e-4


LIGER = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import tests.support.engines as engines, tests.layers.test_contract as layers
from gptoughts.layers import CATALOG
from gptoughts.planning.resolve import resolve

def plan_of(recipe, demanded=None):
    bare = engines.Profile("bare", "", False, engines.Match(), {{}}, "the test")
    spec = engines.spec_for(recipe)
    return resolve(bare, engines.probe(), spec, recipe, engines.World(), CATALOG, flags=demanded, environment=dict(os.environ))

layers.plan_of = plan_of
demanded = {{"loss": "fused-ce", "loss.implementation": "liger"}}
for family in ("modern", "llada"):
    recipe = engines.recipe_of(family, train={{"steps": 10, "global_batch": 1}})
    loss, flat = layers.gradient(recipe, {{}})
    its, same = layers.gradient(recipe, demanded)
    assert abs(its - loss) < 1e-5 * loss, (its, loss)
    assert torch.nn.functional.cosine_similarity(flat, same, dim=0) > 1 - 1e-5
layer = CATALOG["fused-ce"]
options = layer.read_options({{"implementation": "liger"}}, "the test")
for wanted in (demanded, {{"loss": "fused-ce"}}):
    with engines.engine_of(recipe, plan_of(recipe, wanted)) as engine:
        print(layer.verify(engine, engines.watched(engine, 0), options).status)
"""


@pytest.mark.slow
def test_ligers_kernel_under_tritons_interpreter() -> None:
    """In a process of its own, because Triton reads the variable when it is imported. Our slices are not taken for Liger's."""
    pytest.importorskip("liger_kernel")
    done = subprocess.run(
        [sys.executable, "-c", LIGER.format(root=str(ROOT))],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["active", "inactive"]


def test_an_implementation_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, recipe, machine = CATALOG["fused-ce"], recipe_of("modern"), probe()

    def told(implementation: str, **packages: str) -> str:
        here = {name: version for name, version in machine.packages.items() if name != "liger-kernel"}
        case = Case(dataclasses.replace(machine, packages={**here, **packages}), spec_for(recipe), recipe, World())
        reasons = layer.rejections(case, options("fused-ce", implementation=implementation))
        return "; ".join(str(reason) for reason in reasons if reason.kind is Kind.UNSUPPORTED)

    assert "needs torch 2.13, found 2.11.0" in told("torch", torch="2.11.0")
    assert told("torch", torch="2.13.0+cpu") == "" and told("sliced", torch="2.11.0") == ""
    assert "needs the package liger-kernel" in told("liger")
    assert "needs a GPU" in told("liger", **{"liger-kernel": "0.8.5"})
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    newer = dataclasses.replace(machine, packages={**machine.packages, "torch": "2.13.0"})
    with (
        pytest.raises(LayerError, match="this torch has no linear_cross_entropy"),
        engine_of(recipe, plan_of(recipe, {"loss": "fused-ce", "loss.implementation": "torch"}, machine=newer)),
    ):
        pass

"""One contract over the whole catalog: what fits is applied to a real model, steps, proves itself, and is undone; what does not is refused.

The negative control is the same `verify` on a real watched step of an engine without the layer, and of one where a block was left out.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from gptoughts.config.model_spec import spec_for
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.models.family import custom_family
from gptoughts.models.sources import meta_model
from gptoughts.planning.layer import Case, Kind, Layer, Status, active
from tests.support.engines import (
    FAMILIES_UNDER_TEST,
    NEEDS_INDUCTOR,
    ROWS,
    engine_of,
    family_for,
    objective_for,
    plan_of,
    recipe_of,
    steps,
    watched,
)

OPTIONS: dict[str, dict[str, Any]] = {
    "microbatch": {"microbatch.sequences": 2}, "host": {"host.threads": 1}, "loss": {"loss.tokens": 32},
    "offload": {"offload.least_bytes": 1024}, "compile": {"compile.cache": "torch"},
    "matmul": {"matmul.units": "bf16"},
}  # fmt: skip
OPTIMISATIONS = [layer for layer in CATALOG.values() if not layer.baseline]
# Layers whose proof is about attention that is fused need the layer that fuses it.
WITH = {"recompute-blocks": {"attention": "sdpa"}}
# What a layer must be given by the recipe before it can run at all.
RECIPES: dict[str, dict[str, Any]] = {
    "in-backward": {"optim": {"warmup_steps": 0, "learning_rate": 1e-3, "clip_norm": 0}},
}
TWO_RANKS = ("ddp",)  # tests/engine/test_ddp.py runs these
# Slots whose layers meet another model or another mask in these families; the default tier has them beside "modern".
DIFFERS = {"attention": "llama", "precision": "llama", "kernels": "llama", "loss": "llada", "recompute": "llama"}


def demanded(layer: Layer) -> dict[str, Any]:
    return {**WITH.get(layer.name, {}), layer.slot: layer.name, **OPTIONS.get(layer.slot, {})}


def options_of(layer: Layer) -> dict[str, Any]:
    given = {key.split(".")[1]: value for key, value in OPTIONS.get(layer.slot, {}).items()}
    return layer.read_options(given, "the test")


def recipe_for(layer: Layer, family: str) -> Any:
    return recipe_of(family, **RECIPES.get(layer.name, {}))


@cache
def case_of(family: str, layer: str) -> Case:
    """Return the case of `recipe_for`; `layer` is empty for layers without a recipe of their own."""
    recipe = recipe_for(CATALOG[layer], family) if layer else recipe_of(family)
    return Case(probe(), spec_for(recipe), recipe, World())


def refusals(layer: Layer, family: str) -> list[str]:
    case = case_of(family, layer.name if layer.name in RECIPES else "")
    return [str(reason) for reason in layer.rejections(case, options_of(layer)) if reason.kind is Kind.UNSUPPORTED]


def applicable() -> list[Any]:
    rows = [(layer, family) for layer in OPTIMISATIONS for family in FAMILIES_UNDER_TEST if layer.name not in TWO_RANKS]
    return [
        pytest.param(layer, family, id=f"{layer.name}-{family}", marks=[*pytest_marks(layer.name), *tier(layer, family)])
        for layer, family in rows
        if not refusals(layer, family)
    ]


def tier(layer: Layer, family: str) -> list[pytest.MarkDecorator]:
    return [] if family in ("modern", DIFFERS.get(layer.slot)) else [pytest.mark.slow]


def pytest_marks(name: str) -> list[pytest.MarkDecorator]:
    return [NEEDS_INDUCTOR] if name in ("compile-blocks", "compile-model") else []


def named(name: str, value: Any = None, slow: bool = False) -> Any:
    """The name of a layer, or another value about it, as a parameter, skipped where the layer cannot work."""
    marks = [*pytest_marks(name), *([pytest.mark.slow] if slow else [])]
    return pytest.param(name if value is None else value, id=name, marks=marks)


def test_every_slot_has_a_baseline_and_names_are_unique_keys() -> None:
    from gptoughts.planning.layer import SLOTS

    assert [layer.slot for layer in CATALOG.values() if layer.baseline] == list(SLOTS)
    assert all(name == layer.name for name, layer in CATALOG.items())
    slots = [SLOTS.index(layer.slot) for layer in CATALOG.values()]
    assert slots == sorted(slots)


def test_needs_are_answered_without_torch() -> None:
    program = (
        "import sys, pathlib\n"
        "from gptoughts.config import loader as config, model_spec as known\nfrom gptoughts.hardware import machine, world\n"
        "from gptoughts.planning.layer import Case\n"
        "from gptoughts.layers import CATALOG\n"
        "recipe = config.load('gpt-1b').recipe\n"
        "for path in sorted(pathlib.Path('tests/machines').glob('*.json')):\n"
        "    for ranks in (1, 2):\n"
        "        for spec in (known.spec_for(recipe), known.ModelSpec()):\n"
        "            case = Case(machine.read(path), spec, recipe, world.World(0, 0, ranks, ranks))\n"
        "            for layer in CATALOG.values():\n"
        "                options = layer.read_options({}, 'the test')\n"
        "                assert all(str(reason) for reason in layer.rejections(case, options))\n"
        "                dict(layer.environment(case, options))\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_applied_and_refused_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    applied = {param.values[0].name for param in applicable()}
    for layer in OPTIMISATIONS:
        for family in FAMILIES_UNDER_TEST:
            why = refusals(layer, family)
            print(f"{layer.slot}={layer.name} on {family}: {'refused: ' + '; '.join(why) if why else 'applied'}")
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(OPTIMISATIONS) * len(FAMILIES_UNDER_TEST)
    on_any_cpu = {
        "threads",
        "sdpa",
        "bf16",
        "fp16",
        "fused-ce",
        "recompute-blocks",
        "compile-blocks",
        "fused",
        "prefetch",
        "fixed",
    }
    on_any_cpu |= {"flex", "recompute-ops", "offload-activations", "8bit", "state-on-cpu", "in-backward"}
    assert on_any_cpu <= applied


def fingerprint(engine: Any) -> dict[str, Any]:
    """Everything that a layer may change and must put back, but for the values of weights."""
    model = engine.bare
    return {
        "keys": list(model.state_dict()),
        "classes": {name: type(module) for name, module in model.named_modules()},
        "forwards": {name: module.__dict__.get("forward") for name, module in model.named_modules()},
        "compiled": {name: getattr(module, "_compiled_call_impl", None) for name, module in model.named_modules()},
        "attend": [getattr(module, "attend", None) for module in model.modules()],
        "loss": engine.family.head(model).loss if engine.family.head else None,
        "attention": getattr(getattr(getattr(model, "inner", None), "config", None), "_attn_implementation", None),
        "verbs": set(engine._hooks),
        "wrappers": {verb: list(wrappers) for verb, wrappers in engine._wrappers.items()},
        "contexts": {verb: list(factories) for verb, factories in engine._contexts.items()},
        "extras": dict(engine.extras),
        "micro_batch": engine.micro_batch,
        "repeatable": engine.repeatable,
        "optimizer": engine.optimizer,
        "wrapper": engine.model is engine.bare,
        "threads": torch.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn": torch.backends.cudnn.allow_tf32,
    }


def pristine(family: str) -> dict[str, Any]:
    from gptoughts.engine.distributed.ranks import Ranks
    from gptoughts.engine.engine import Engine

    recipe = recipe_of(family)
    port = family_for(recipe)
    engine = Engine(
        meta_model(recipe, port, ROWS),
        port,
        objective_for(recipe),
        recipe,
        Ranks(World(), torch.device("cpu")),
        torch.device("cpu"),
        batches=iter(()),
    )
    return fingerprint(engine)


@pytest.mark.parametrize(("layer", "family"), applicable())
def test_applied_steps_proves_itself_and_is_undone(layer: Layer, family: str) -> None:
    recipe = recipe_for(layer, family)
    plan = plan_of(recipe, demanded(layer))
    assert plan.layers[layer.slot] == layer.name
    before = pristine(family)
    torch._dynamo.reset()
    with engine_of(recipe, plan) as engine:
        trace = watched(engine)
        proof = layer.verify(engine, trace, options_of(layer))
        assert proof.status is Status.ACTIVE, proof.text
        names = [name for name, _ in engine.bare.named_parameters()]
    after = fingerprint(engine)
    assert after == before
    assert names == [name for name, _ in engine.bare.named_parameters()]
    default = {
        "backward": torch.Tensor.backward,
        "clip": engine._clip,
        "step": engine._step,
        "materialize": engine._materialize,
        "attach": engine._attach,
    }
    assert engine._hooks == default


class _Stop(Exception):
    """An error of the training loop."""


@pytest.mark.parametrize(
    "layer",
    [named(layer.name, layer) for layer in OPTIMISATIONS if layer.name not in TWO_RANKS and not refusals(layer, "modern")],
)
@pytest.mark.parametrize("after_steps", [False, True], ids=["at once", "after a step"])
def test_it_is_undone_after_an_error(layer: Layer, after_steps: bool) -> None:
    recipe = recipe_for(layer, "modern")
    before = pristine("modern")
    torch._dynamo.reset()
    with pytest.raises(_Stop), engine_of(recipe, plan_of(recipe, demanded(layer))) as engine:
        if after_steps and layer.slot != "compile":  # a step of compiled layers takes long, and is undone in the test above
            steps(engine, 1)
        raise _Stop
    assert fingerprint(engine) == before


def test_a_layer_sees_the_error_and_only_its_finally_runs() -> None:
    """Layers are entered as contexts, so that `except`, `finally` and code after the yield mean what they say."""
    seen: list[object] = []

    @contextmanager
    def apply(engine: Any, options: Any) -> Iterator[None]:
        try:
            yield
            seen.append("code after the yield")
        except BaseException as error:
            seen.append(type(error))
            raise
        finally:
            seen.append("finally")

    catalog = {
        **CATALOG,
        "threads": replace(CATALOG["threads"], apply=apply, environment=lambda *_: {}, verify=lambda *_: active("")),
    }
    recipe = recipe_of("modern")
    for error in (_Stop, KeyboardInterrupt):
        with pytest.raises(error), engine_of(recipe, plan_of(recipe, {"host": "threads"}), catalog=catalog):
            raise error
    with engine_of(recipe, plan_of(recipe, {"host": "threads"}), catalog=catalog):
        pass
    assert seen == [_Stop, "finally", KeyboardInterrupt, "finally", "code after the yield", "finally"]


def without_block(layer: str, engine: Any) -> None:
    """Take the layer out of the first block only."""
    from gptoughts.models.gpt.gpt import math_attention

    block = next(iter(engine.blocks.values()))
    if layer == "sdpa":
        block.attention.attend = math_attention
    elif layer in ("recompute-blocks", "recompute-ops"):
        held = block.forward
        block.forward = type(block).forward.__get__(block)
        engine.held = held
    elif layer == "compile-blocks":
        block._compiled_call_impl = None
    elif layer == "compile-model":  # all blocks compiled, and embedding, head and loss left out
        engine.bare._compiled_call_impl = None
        for each in engine.blocks.values():
            each.compile(fullgraph=True, dynamic=False)
    elif layer == "bf16":
        forward = block.forward

        def in_float32(x: torch.Tensor, *more: Any) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return forward(x.float(), *more)

        block.forward = in_float32
    else:
        raise AssertionError(layer)


@pytest.mark.parametrize(
    "name",
    [
        *(named(name) for name in ("sdpa", "recompute-blocks", "recompute-ops", "bf16")),
        *(
            named(name, slow=True) for name in ("compile-blocks", "compile-model")
        ),  # tests/layers/test_compile.py, without Inductor
    ],
)
def test_a_block_left_out_is_noticed(name: str) -> None:
    layer, recipe = CATALOG[name], recipe_of("modern")
    torch._dynamo.reset()
    with engine_of(recipe, plan_of(recipe, demanded(layer))) as engine:
        without_block(name, engine)
        trace = watched(engine)
        proof = layer.verify(engine, trace, options_of(layer))
        assert proof.status is Status.INACTIVE, proof.text


@pytest.mark.parametrize("layer", OPTIMISATIONS, ids=lambda layer: layer.name)
def test_the_proof_says_no_on_an_engine_without_the_layer(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("modern")
    more = {} if layer.slot == "attention" else WITH.get(layer.name, {})
    if layer.name == "threads":
        monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))
    with engine_of(recipe, plan_of(recipe, more)) as engine:
        proof = layer.verify(engine, watched(engine), options_of(layer))
    assert proof.status is Status.INACTIVE, proof.text


def test_a_planned_layer_that_was_not_seen_stops_the_run() -> None:
    from gptoughts.errors import LayerError
    from gptoughts.run import evidence

    recipe = recipe_of("modern")
    plan = plan_of(recipe, {"attention": "sdpa"})
    with engine_of(recipe, plan_of(recipe)) as engine:
        seen = evidence.judge(engine, plan, CATALOG, watched(engine))
        with pytest.raises(LayerError, match=r"attention=sdpa: 0 fused attentions in 3 block forwards, 0 fell back"):
            evidence.demand(seen)


TOLERANCE = {
    "bf16": (2e-2, 0.995),
    "fp16": (1e-3, 0.9999),
    "fp8-torchao": (1e-2, 0.98),
    "tf32": (1e-2, 0.9999),
    "compile-blocks": (1e-4, 0.99999),
    "compile-model": (1e-4, 0.99999),
    "sdpa": (1e-5, 0.999999),
    "flex": (1e-5, 0.999999),
    "fused-ce": (1e-5, 0.999999),
}


@pytest.mark.parametrize("name", [named(name, slow=name == "compile-model") for name in sorted(TOLERANCE)])
def test_a_layer_that_changes_numerics_stays_near_the_baseline(name: str) -> None:
    """Loss within the first tolerance, gradient direction (cosine) above the second, with ragged labels."""
    layer, recipe = CATALOG[name], recipe_of("modern")
    if name == "tf32" and refusals(layer, "modern"):
        pytest.skip("this CPU or torch has no such products; tests/layers/test_matmul.py shows the refusal")
    torch._dynamo.reset()
    results = [gradient(recipe, {}), gradient(recipe, demanded(layer))]
    (loss, flat), (other, its) = results
    assert abs(loss - other) <= TOLERANCE[name][0] * abs(loss)
    assert torch.nn.functional.cosine_similarity(flat, its, dim=0) > TOLERANCE[name][1]


def gradient(
    recipe: Any, layers: dict[str, Any], change: Callable[[Any], None] = lambda engine: None
) -> tuple[float, torch.Tensor]:
    """Loss and the whole gradient of one update, taken before the optimizer uses it."""
    from tests.support.engines import random_batches

    taken: list[torch.Tensor] = []
    with engine_of(recipe, plan_of(recipe, layers), random_batches(recipe, ragged=True)) as engine:
        change(engine)
        inner = engine._hooks["clip"]

        def clip() -> torch.Tensor:
            taken.append(
                torch.cat([parameter.grad.flatten().clone() for parameter in engine.parameters() if parameter.grad is not None])
            )
            return inner()

        engine.replace("clip", clip)
        loss = steps(engine, 1)[0]
    return loss, taken[0]


@pytest.mark.parametrize("family", ["modern", "llada", "llama", "deepseek", "bert"])
@pytest.mark.parametrize("sequences", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_big_batch_equals_accumulated_ones_with_ragged_labels(sequences: int, family: str) -> None:
    """For every objective; the experts' balance term, which no split of a batch leaves as it is, has no weight here."""
    recipe = recipe_of(family)
    loss, whole = gradient(recipe, {})
    other, accumulated = gradient(recipe, {"microbatch": "fixed", "microbatch.sequences": sequences})
    assert abs(loss - other) < 1e-6
    assert (whole - accumulated).abs().max() < 1e-6


def test_the_fused_update_moves_weights_as_the_plain_one_does() -> None:
    """After three updates, within the last bits of float32."""
    recipe, reached = recipe_of("modern"), []
    for layer in ("plain", "fused"):
        with engine_of(recipe, plan_of(recipe, {"optimizer": layer})) as engine:
            before = [parameter.clone() for parameter in engine.parameters()]
            steps(engine, 3)
            assert not any(torch.equal(old, new) for old, new in zip(before, engine.parameters(), strict=True))
            reached.append([parameter.detach().clone() for parameter in engine.parameters()])
    for plain, fused in zip(*reached, strict=True):
        assert (plain - fused).abs().max() < 1e-6


def test_recomputation_gives_the_very_same_gradient() -> None:
    recipe = recipe_of("modern")
    assert torch.equal(gradient(recipe, {})[1], gradient(recipe, {"recompute": "recompute-blocks"})[1])


def test_a_users_own_model_is_refused_by_layers_that_need_a_family() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    assert list(custom_family(model).blocks(model)) == ["0", "1"]
    from gptoughts.config.model_spec import UNKNOWN

    case = Case(probe(), UNKNOWN, recipe_of("modern"), World())
    for name in ("sdpa", "flex", "fused-ce", "recompute-blocks", "compile-blocks"):
        layer = CATALOG[name]
        assert any(reason.kind is Kind.UNSUPPORTED for reason in layer.rejections(case, options_of(layer))), name

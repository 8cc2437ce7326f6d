"""The contract of every layer on this box: larger engines of every family, one row for each layer on each, and the session that runs them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from gptoughts.errors import GptoughtsError, PlanError
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import Case, Layer, Status, StepTrace
from tests.device.kept import Deadline, Kept

FAMILIES = ("modern", "llama", "llada", "deepseek", "bert", "gpt2")
"""In the order of what they can tell of a layer; a session that ends early has done the first."""
LAYERS = [layer for layer in CATALOG.values() if not layer.baseline]
TINY_TOO = (("sdpa", "llama"), ("bf16", "llama"))
"""Rows of a second family that `--tiny` runs."""
MOST_STARTS = 12
CRASHED = "the process ended in the middle of it (crash, or more than its time)"
HERE = {"fixed": {"microbatch.sequences": "2"}}
"""Options without which a layer would do here what its baseline does."""
HALF = {"precision": "bf16"}
"""Attention on a GPU is looked at in half precision, where the kernels are that one wants to see."""


def on_gpu() -> bool:
    """Whether this box has one that may be used."""
    return bool(probe().gpus)


@cache
def engines() -> Any:
    """tests.support.engines with models as large as fused kernels want them: head width 64, widths that are multiples of 16, 128 tokens."""
    from tests.models.hf.hf_configs import write_config
    from tests.support import engines as small

    if not on_gpu():
        return small
    wide = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "max_position_embeddings": 256,
        "vocab_size": 512,
        "num_hidden_layers": 2,
    }
    latent = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 64, "kv_lora_rank": 64, "q_lora_rank": 64}
    more = {"llama": wide, "bert": wide, "deepseek_v3": {**wide, **latent, "moe_intermediate_size": 128}}

    @cache
    def folder(kind: str) -> str:
        return str(write_config(Path(tempfile.mkdtemp(prefix="gptoughts-device-")) / kind, kind, **more[kind]))

    for name, value in {"ROWS": 512, "LENGTH": 128, "BATCH": 8, "config_folder": folder}.items():
        setattr(small, name, value)
    for family, shape in small.FAMILIES_UNDER_TEST.items():
        if "width" in shape:
            small.FAMILIES_UNDER_TEST[family] = {**shape, "depth": 2, "width": 256, "heads": 4}
    return small


@cache
def tables() -> Any:
    """tests.layers.test_contract, whose tables say which other layers a proof needs; loaded after the engines have their size."""
    engines()
    from tests.layers import test_contract as test_layers

    return test_layers


def demanded(layer: Layer) -> dict[str, str]:
    """The layer, what it needs in other slots, and what its proof needs."""
    needed = {slot: allowed[0] for slot, allowed in layer.needs_slots.items()}
    more = dict(tables().WITH.get(layer.name, {}))
    if not on_gpu():
        return {**needed, **tables().demanded(layer)}
    half = HALF if layer.slot == "attention" else {}
    return {**half, **needed, **more, layer.slot: layer.name, **HERE.get(layer.name, {})}


def plan_of(recipe: Any, layers: Mapping[str, Any]) -> Any:
    """Baselines with `layers` demanded, under the variables of this process. Raises PlanError with the reasons."""
    from gptoughts.config.model_spec import spec_for
    from gptoughts.planning.profile import Match, Profile
    from gptoughts.planning.resolve import resolve

    bare = Profile("bare", "", False, Match(), {}, "the test")
    variables = dict(os.environ)
    return resolve(
        bare,
        probe(),
        spec_for(recipe),
        recipe,
        World(),
        CATALOG,
        flags=layers,
        fixed_environment=variables,
        environment=variables,
    )


@contextmanager
def engine_of(recipe: Any, plan: Any) -> Iterator[Any]:
    """The engine of `plan` on the device of this box."""
    import torch

    from gptoughts.engine.distributed.ranks import Ranks

    device = torch.device("cuda", 0) if on_gpu() else torch.device("cpu")
    with engines().engine_of(recipe, plan, ranks=Ranks(World(), device)) as engine:
        yield engine


def seen(trace: StepTrace, whole: bool) -> dict[str, Any]:
    """What the watched step showed, so that matchers of kernel names can be corrected afterwards."""
    from tests.device.ours import top

    row: dict[str, Any] = {
        "kernels": top(trace.kernels), "copies": dict(trace.copies), "memcpy_streams": trace.memcpy_streams,
        "regions": trace.regions, "micro_batches": trace.micro_batches, "blocks": trace.blocks, "step_seconds": trace.step_seconds,
        "recompiles": list(trace.recompiles), "marks": dict(trace.call_counts), "peak_bytes": trace.peak_bytes,
        "attention_operators": {name: op.calls for name, op in trace.operators.items() if "attention" in name},
    }  # fmt: skip
    if whole:
        row["all_kernels"] = {name[:400]: count for name, count in trace.kernels.items()}
        row["operators"] = {
            name: [op.calls, {" ".join(kinds): count for kinds, count in op.input_dtypes.items()}]
            for name, op in trace.operators.items()
            if op.calls > 0
        }
    return row


class Plain:
    """A watched engine of baselines for each family, made once: the negative control of every layer."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._made: dict[str, tuple[Any, StepTrace]] = {}

    def of(self, family: str) -> tuple[Any, StepTrace]:
        """The engine and what a step of it showed."""
        if family not in self._made:
            recipe = engines().recipe_of(family)
            engine = self._stack.enter_context(engine_of(recipe, plan_of(recipe, {})))
            self._made[family] = engine, engines().watched(engine, 1)
        return self._made[family]

    def close(self) -> None:
        """Undo them."""
        self._made.clear()
        self._stack.close()


def row_of(layer: Layer, family: str, plain: Plain) -> dict[str, Any]:
    """Applied, stepped, seen, undone, missed where it is not; every part that does not hold is a line under `wrong`."""
    import torch

    recipe = engines().recipe_of(family)
    try:
        plan = plan_of(recipe, demanded(layer))
    except PlanError as error:
        return {"status": "refused", "passed": True, "reasons": str(error).splitlines()}
    torch._dynamo.reset()
    wrong: list[str] = []
    before, options = tables().pristine(family), plan.choice(layer.slot).options
    row: dict[str, Any] = {"plan": {slot: name for slot, name in plan.layers.items() if not CATALOG[name].baseline}}
    with engine_of(recipe, plan) as engine:
        trace = engines().watched(engine, max(1, layer.warmup_steps))
        proof = layer.verify(engine, trace, options)
        row |= {"status": str(proof.status), "proof": proof.text, "figures": dict(proof.figures)}
        row |= seen(trace, whole=family == FAMILIES[0])
    if proof.status is not Status.ACTIVE:
        wrong.append(f"not seen at work: {proof.text}")
    after = tables().fingerprint(engine)
    if not layer.permanent and after != before:
        wrong += [f"not undone: {key}" for key in before if before[key] != after.get(key)]
    wrong += _missed(layer, options, family, plan, plain, row)
    return {**row, "passed": not wrong, "wrong": wrong}


def _missed(layer: Layer, options: Any, family: str, plan: Any, plain: Plain, row: dict[str, Any]) -> list[str]:
    """The same proof on an engine without the layer must not say active."""
    if layer.environment(_case(family), options):
        row["negative"] = "none: its variables hold for the whole process"
        return []
    engine, trace = plain.of(family)
    answer = layer.verify(engine, trace, options)
    row["negative"] = f"{answer.status}: {answer.text}"
    return [f"active on an engine without it: {answer.text}"] if answer.status is Status.ACTIVE else []


def _case(family: str) -> Case:
    from gptoughts.config.model_spec import spec_for

    recipe = engines().recipe_of(family)
    return Case(probe(), spec_for(recipe), recipe, World())


def profile_row(family: str) -> dict[str, Any]:
    """Every layer of the plan that `--profile auto` makes for the family, together in one step."""
    import torch

    from gptoughts.config.model_spec import spec_for
    from gptoughts.planning.profile import pick
    from gptoughts.planning.resolve import resolve
    from gptoughts.run import evidence

    recipe, here, variables = engines().recipe_of(family), probe(), dict(os.environ)
    torch._dynamo.reset()
    plan = resolve(
        pick("auto", here), here, spec_for(recipe), recipe, World(), CATALOG, fixed_environment=variables, environment=variables
    )
    with engine_of(recipe, plan) as engine:
        trace = engines().watched(engine, 1 + evidence.warmup_steps(plan, CATALOG))
        lines = [line.to_json() for line in evidence.judge(engine, plan, CATALOG, trace)]
    wrong = [f"{line['slot']}={line['layer']}: {line['proof']}" for line in lines if line["status"] != "active"]
    return {
        "status": "active" if not wrong else "inactive", "passed": not wrong, "wrong": wrong, "profile": plan.profile,
        "plan": plan.layers, "evidence": lines, **seen(trace, whole=True),
    }  # fmt: skip


def variables() -> dict[str, str]:
    """What every layer that fits this box wants set before its process starts; the first that asks for a variable gets it."""
    wanted: dict[str, str] = {}
    case = _bare_case()
    for layer in LAYERS:
        try:
            options = layer.read_options({}, "the contract")
            wanted = (
                {**dict(layer.environment(case, options)), **wanted} if not list(layer.rejections(case, options)) else wanted
            )
        except GptoughtsError as error:
            print(f"{layer.name}: {error}", flush=True)
    return wanted


def _bare_case() -> Case:
    from gptoughts.config.loader import load
    from gptoughts.config.model_spec import spec_for

    recipe = load("quickstart").recipe
    return Case(probe(), spec_for(recipe), recipe, World())


def run_contract(kept: Kept, deadline: Deadline, tiny: bool, only: str, again: bool) -> int:
    """Sessions of pytest until every row is there or the time is over: one that crashed is noted, and the next goes on after it."""
    environment = {
        **os.environ,
        **variables(),
        "DEVICE_STAGE": kept.stage,
        "DEVICE_ONLY": only,
        "DEVICE_TINY": "1" if tiny else "",
    }
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "-s"]
    for start in range(MOST_STARTS):
        environment |= {"DEVICE_SECONDS": str(deadline.left()), "DEVICE_AGAIN": "1" if again and start == 0 else ""}
        try:
            code = subprocess.run(
                [*command, "tests/device/test_contract.py"], check=False, env=environment, timeout=max(deadline.left(), 1) + 5
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        kept = Kept(kept.stage)
        crashed = _noted(kept)
        if (code in (0, 1, 5) and not crashed) or not deadline.allows(30):
            break
    return _told(kept, tiny, only)


def _noted(kept: Kept) -> bool:
    """Whether a session was in the middle of a row when it ended; that row says so then."""
    name = kept.values.pop("started", None)
    if name:
        kept.keep(name, {"status": "crashed", "passed": False, "wrong": [CRASHED]})
    return name is not None


def names(tiny: bool, only: str) -> list[tuple[str, str]]:
    """Layer and family of every row, the family that tells most first; `profile` stands for the whole plan."""
    families, wanted = FAMILIES, [word for word in only.split(",") if word]
    first = [("profile", family) for family in families]
    rows = [*first[:1], *[(layer.name, FAMILIES[0]) for layer in LAYERS], *first[1:]]
    rows += [(layer.name, family) for family in families[1:] for layer in LAYERS]
    rows = [row for row in rows if not tiny or wanted or row[1] == FAMILIES[0] or row in TINY_TOO]
    return [row for row in rows if not wanted or row[0] in wanted or f"{row[0]}-{row[1]}" in wanted]


def _told(kept: Kept, tiny: bool, only: str) -> int:
    rows = {f"{layer}-{family}": kept.runs.get(f"{layer}-{family}") for layer, family in names(tiny, only)}
    missing = [name for name, row in rows.items() if row is None]
    failed = {name: row["wrong"] for name, row in rows.items() if row is not None and not row["passed"]}
    refused = sum(row is not None and row["status"] == "refused" for row in rows.values())
    for name, wrong in failed.items():
        print(f"FAILED {name}: {'; '.join(wrong)[:600]}", flush=True)
    passed = len(rows) - len(missing) - len(failed) - refused
    print(f"contract: {passed} passed, {refused} refused, {len(failed)} failed, {len(missing)} not run", flush=True)
    return 1 if missing or failed else 0

"""Plans: golden choices for every machine file, golden text for three, expected choices, and laws of resolution on random catalogs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.loader import Recipe, load
from gptoughts.config.model_spec import UNKNOWN, spec_for, vocabulary_of
from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import Machine, read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning import resolve as resolving
from gptoughts.planning.layer import REPLACED_HOOKS, SLOTS, Kind, Layer, Option, Reason, active
from gptoughts.planning.profile import LayerRequest, Match, Profile, names, pick
from gptoughts.planning.resolve import Plan, resolve
from tests.support.golden_files import ROOT, compare

MACHINES = sorted((ROOT / "tests" / "machines").glob("*.json"))
NARROW = load("gpt2-124m").recipe
WIDE = load("gpt2-124m", {"model.width": "4096", "model.heads": "32"}).recipe


def machine(name: str) -> Machine:
    return read(ROOT / "tests" / "machines" / f"{name}.json")


def planned(
    name: str, profile: str = "auto", recipe: Recipe = NARROW, flags: dict[str, Any] | None = None, world: World | None = None
) -> Plan:
    here = machine(name)
    return resolve(pick(profile, here), here, spec_for(recipe), recipe, world or World(), CATALOG, flags=flags)


def ranks(count: int) -> World:
    return World(0, 0, count, count, "torchrun")


def reasons(plan: Plan, slot: str, layer: str) -> str:
    return "; ".join(map(str, dict(plan.choice(slot).rejected)[layer]))


# Golden plans: choices and kinds of reasons for every machine, the printed text for three.

GOLDEN = ROOT / "tests" / "golden"
PRINTED = ("cpu", "h100x8", "rtx4090")


def asked(here: Machine) -> Iterator[tuple[str, str, Recipe, World]]:
    """Every plan of a machine: its name, profile, recipe and world."""
    for recipe in (NARROW, WIDE):
        worlds = [World(), *([ranks(len(here.gpus))] if len(here.gpus) > 1 else [])]
        for profile, world in [("auto", world) for world in worlds] + [(name, World()) for name in names()]:
            yield f"{profile}, width {recipe.model.width}, ranks {world.world_size}", profile, recipe, world


def kinds(why: Any) -> str:
    """Kinds of reasons, each once: `slower`, `unsupported`."""
    return " ".join(sorted({str(reason.kind) for reason in why}))


def outline(plan: Plan) -> dict[str, Any]:
    """The plan without its wording: layers with options, rejected layers with kinds of reasons, and what follows from them."""
    rows: dict[str, Any] = {"profile": plan.profile}
    for choice in plan.choices:
        options = ",".join(f"{name}={value}" for name, value in choice.options.items() if value is not None)
        rejected = [f"not {layer}: {kinds(why)}" for layer, why in choice.rejected]
        required = ["expected slowdown"] if choice.expected_slowdown else []
        rows[choice.slot] = "; ".join([f"{choice.layer}({options})" if options else choice.layer, *rejected, *required])
    assert plan.memory is not None
    rows["memory"] = " ".join([str(plan.memory.verdict), *(plan.memory.changes or [])])
    rows |= {"environment": dict(plan.environment), "not repeatable": list(plan.not_repeatable), "notes": len(plan.notes)}
    return rows


def outlined(here: Machine, profile: str, recipe: Recipe, world: World, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The outline of a plan; for an impossible one the rejected layers of the slots without a layer."""
    refused: list[dict[str, Any]] = []
    made = resolving._plan_error

    def noted(profile: Profile, case: Any, empty: Any, *more: Any) -> PlanError:
        error = made(profile, case, empty, *more)
        rows = {slot: [f"not {request.layer}: {kinds(why)}" for request, why in checked] for slot, checked in empty.items()}
        fix = str(error).rpartition("Try: ")[2].split()
        refused.append({"error": {slot: "; ".join(row) for slot, row in rows.items()}, "try": " ".join(fix[:2])})
        return error

    with monkeypatch.context() as patched:
        patched.setattr(resolving, "_plan_error", noted)
        try:
            return outline(resolve(pick(profile, here), here, spec_for(recipe), recipe, world, CATALOG))
        except PlanError:
            return refused[-1]


def changed(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """A line for every difference of two tables of outlines."""
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name, {}), now.get(name, {})
        yield from (
            f"{name}: {key}: {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
        )


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_golden_choices(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    here, golden = read(path), GOLDEN / f"{path.stem}.json"
    rows = {name: outlined(here, *plan, monkeypatch) for name, *plan in asked(here)}
    if os.environ.get("UPDATE_GOLDEN") != "1" and golden.is_file():
        differences = list(changed(json.loads(golden.read_text(encoding="utf-8")), rows))
        assert not differences, "\n".join([*differences, "to accept: UPDATE_GOLDEN=1 pytest tests"])
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    compare(golden, f"{{\n{lines}\n}}\n")


def printed(here: Machine, profile: str, recipe: Recipe, world: World) -> str:
    try:
        return resolve(pick(profile, here), here, spec_for(recipe), recipe, world, CATALOG).table()
    except PlanError as error:
        return f"error: {error}"


@pytest.mark.parametrize("name", PRINTED)
def test_golden_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    here = machine(name)
    compare(GOLDEN / f"{name}.txt", "\n".join(f"== {plan}\n{printed(here, *more)}\n" for plan, *more in asked(here)))


# Expected choices.


@pytest.mark.parametrize(
    ("name", "profile", "narrow", "wide"),
    [
        ("cpu", "cpu", "fp32", "fp32"),
        ("cpu-avx512-bf16", "cpu", "bf16", "bf16"),
        ("t4", "turing", "fp16", "fp16"),
        ("rtx3090", "ampere", "bf16", "bf16"),
        ("mixed", "ampere", "bf16", "bf16"),
        ("a100x4-40gb", "a100-bf16", "bf16", "bf16"),
        ("a100x8-80gb", "a100-bf16", "bf16", "bf16"),
        ("rtx4090", "ada", "bf16", "bf16"),
        ("l40s", "ada", "bf16", "bf16"),
        ("h100", "hopper", "bf16", "fp8-te"),
        ("h100x8", "hopper", "bf16", "fp8-te"),
        ("h200x8", "hopper", "bf16", "fp8-torchao"),
        ("b200x8", "blackwell", "bf16", "fp8-te"),
        ("rtx5090", "blackwell", "bf16", "bf16"),
    ],
)
def test_auto_takes(name: str, profile: str, narrow: str, wide: str) -> None:
    for recipe, precision in ((NARROW, narrow), (WIDE, wide)):
        plan = planned(name, recipe=recipe)
        assert (plan.profile, plan.layers["precision"]) == (profile, precision)


def test_every_machine_file_has_an_expectation() -> None:
    call_counts = [mark for mark in test_auto_takes.pytestmark if mark.name == "parametrize"]
    assert {row[0] for row in call_counts[0].args[1]} == {path.stem for path in MACHINES}


def test_h100_compiles_bf16_and_says_why_not_fp8() -> None:
    plan = planned("h100")
    assert plan.layers["compile"] == "compile-blocks"
    assert "width 768 is below 4096" in reasons(plan, "precision", "fp8-te")


def test_h100_fp8_by_name_prints_the_expected_loss_and_nothing_else_is_forced() -> None:
    plan = planned("h100", "h100-fp8")
    assert plan.layers["precision"] == "fp8-te"
    assert "expected slowdown: width 768 is below 4096" in plan.table()
    assert plan.layers["recompute"] == "keep", "an alternative that pays comes before one that does not, in a named profile too"


def test_naming_the_profile_that_auto_takes_changes_nothing() -> None:
    for path in MACHINES:
        for recipe in (NARROW, WIDE):
            auto = planned(path.stem, recipe=recipe)
            assert planned(path.stem, auto.profile, recipe).digest() == auto.digest()


def test_no_fp8_before_ada() -> None:
    with pytest.raises(PlanError, match=r"fp8-te: needs compute capability 8\.9, found 8\.6") as caught:
        planned("rtx3090", "h100-fp8")
    assert "Try: --profile auto   (takes ampere: precision=bf16, attention=sdpa)" in str(caught.value)
    assert "pip install" not in str(caught.value)


def test_ranks_take_ddp_and_one_process_says_how() -> None:
    assert planned("h100x8", world=ranks(8)).layers["parallel"] == "ddp"
    alone = planned("h100x8")
    assert alone.layers["parallel"] == "single"
    assert any("1 of 8 GPUs used. To use all: gptoughts train ... --gpus 8" in note for note in alone.notes)


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(PlanError, match=r"2 ranks on 1 x NVIDIA H100.*every rank needs its own GPU"):
        planned("h100", world=ranks(2))
    under_srun = World(0, 0, 2, 2, "srun")
    with pytest.raises(PlanError, match="Try: srun --gpus-per-task=1"):
        planned("h100", world=under_srun)
    own = planned("h100", world=replace(under_srun, own_gpus=True))
    assert own.layers["parallel"] == "ddp"
    assert not any("GPUs used" in note for note in own.notes)
    wasted = planned("h100x8", world=World(0, 0, 16, 16, "srun", own_gpus=True))
    assert any("1 of 8 GPUs used. To use all: srun --gpus-per-task=1" in note for note in wasted.notes)


def test_a_batch_that_ranks_cannot_share_is_answered_with_one_that_they_can() -> None:
    with pytest.raises(PlanError, match=r"Try: --train\.global-batch 510 or 513"):
        planned("cpu", world=ranks(3))


def test_demanding_compiled_blocks_on_a_wide_model_gives_up_fp8() -> None:
    plan = planned("h100", recipe=WIDE, flags={"compile": "compile-blocks"})
    assert (plan.layers["precision"], plan.layers["compile"]) == ("bf16", "compile-blocks")
    assert "clash" in reasons(plan, "precision", "fp8-te")


def test_two_demands_that_clash_are_an_error_without_both() -> None:
    with pytest.raises(PlanError, match="compile-blocks: fp8-te and compile-blocks clash") as caught:
        planned("h100", recipe=WIDE, flags={"compile": "compile-blocks", "precision": "fp8-te"})
    assert "without --layer.compile " in str(caught.value)


@pytest.mark.parametrize("again", ["recompute-blocks", "recompute-ops"])
def test_scales_from_a_history_and_recomputation_are_refused_before_the_run(again: str) -> None:
    flags = {"precision": "fp8-te", "recompute": again, "loss": "full-ce"}
    assert planned("h100", recipe=WIDE, flags=flags).layers["recompute"] == again
    with pytest.raises(PlanError, match="delayed FP8 scales change") as caught:
        planned("h100", recipe=WIDE, flags={**flags, "precision.scaling": "delayed"})
    assert "--layer.precision.scaling current" in str(caught.value)


def test_an_option_demands_a_layer_that_takes_it() -> None:
    assert planned("cpu", flags={"microbatch.sequences": "4"}).layers["microbatch"] == "fixed"
    assert planned("h100", flags={"precision.scaling": "delayed"}).choice("precision").options["scaling"] == "delayed"
    chosen = planned("h100", flags={"precision.scaling": "delayed"}).choice("precision")
    assert (chosen.layer, chosen.rejected) == ("fp8-te", ()), "torchao's scaling has other values"
    with pytest.raises(PlanError, match="fp8-torchao: needs the package torchao"):
        planned("h100", flags={"precision.scaling": "rowwise"})
    with pytest.raises(PlanError, match="fp8-te"):
        planned("t4", flags={"precision.scaling": "delayed"})


def test_a_layer_named_by_flag_keeps_the_options_of_the_profile() -> None:
    by_profile = planned("h100").choice("microbatch").options["tokens"]
    assert planned("h100", flags={"microbatch": "fixed"}).choice("microbatch").options["tokens"] == by_profile
    assert planned("h100", flags={"microbatch.tokens": "512"}).choice("microbatch").options["tokens"] == 512


def test_all_layer_problems_at_once() -> None:
    flags = {"atention": "sdpa", "precision": "bf61", "host.threads": "many", "loss": "sdpa", "update.speed": "1"}
    with pytest.raises(ConfigError) as caught:
        planned("cpu", flags=flags)
    for words in (
        "--layer.atention: no such slot (did you mean 'attention'?)",
        "--layer.precision: no layer 'bf61' in this slot (did you mean 'bf16'?)",
        "--layer.host.threads: needs an integer above 0. Found 'many'",
        "sdpa belongs to slot attention",
        "--layer.update.speed: after-clip, in-backward: no such option. Options: none",
    ):
        assert words in str(caught.value)


def test_profile_problems_name_the_file() -> None:
    slots = {"precison": (LayerRequest("bf16", {}, "my.toml"),), "loss": (LayerRequest("fused", {}, "my.toml"),)}
    slots["host"] = (LayerRequest("threads", {"thread": 3}, "my.toml"),)
    profile = Profile("my", "", False, Match(), slots, "my.toml")
    with pytest.raises(ConfigError) as caught:
        resolve(profile, machine("cpu"), UNKNOWN, NARROW, World(), CATALOG)
    text = str(caught.value)
    assert "my.toml: slots.precison: no such slot (did you mean 'precision'?)" in text
    assert "my.toml: slots.loss: no layer 'fused' in this slot; fused belongs to slot optimizer" in text
    assert "my.toml: slots.host: threads: no option 'thread' (did you mean 'threads'?)" in text


def test_torch_that_is_loaded_leaves_a_layer_unmet_with_the_command() -> None:
    here = machine("cpu")
    late = resolve(pick("auto", here), here, spec_for(NARROW), NARROW, World(), CATALOG, fixed_environment={})
    assert late.layers["host"] == "system"
    assert "needs OMP_NUM_THREADS=8 before torch is imported (export OMP_NUM_THREADS=8" in reasons(late, "host", "threads")
    ready = resolve(
        pick("auto", here), here, spec_for(NARROW), NARROW, World(), CATALOG, fixed_environment={"OMP_NUM_THREADS": "8"}
    )
    assert ready.layers["host"] == "threads"


def test_vocabulary_is_known_where_it_can_be(tmp_path: Path) -> None:
    data = NARROW.data
    assert vocabulary_of(data) == 50257
    assert vocabulary_of(data.model_copy(update={"tokenizer": "chars"})) is None
    folder = data.model_copy(update={"path": str(tmp_path)})
    for text, size in (('{"vocab_size": 99}', 99), ("[1]", None), ("{", None), ('{"vocab_size": "9"}', None)):
        (tmp_path / "index.json").write_text(text)
        assert vocabulary_of(folder) == size


def test_json_and_table_hold_every_reason() -> None:
    plan = planned("h100", "h100-fp8")
    rows = {row["slot"]: row for row in plan.to_json()["choices"]}
    assert list(rows) == list(SLOTS)
    assert rows["precision"]["expected_slowdown"] and rows["compile"]["rejected"][0]["layer"] == "compile-blocks"
    assert plan.to_json()["digest"] == plan.digest()


# Laws, over random catalogs.


@contextmanager
def nothing(engine: Any, options: Any) -> Any:
    yield


def made(name: str, slot: str, why: tuple[Reason, ...] = (), **more: Any) -> Layer:
    return Layer(
        name=name,
        slot=slot,
        card=name,
        apply=nothing,
        verify=lambda *_: active(""),
        unmet=lambda case, options: list(why),
        **more,
    )


BASELINES = {f"base-{slot}": made(f"base-{slot}", slot, baseline=True) for slot in SLOTS}
BUSY = ("matmul", "precision", "compile", "parallel", "update")
NAMES = {slot: [f"{slot}-{number}" for number in range(3)] for slot in BUSY}
ALL_NAMES = [name for few in NAMES.values() for name in few]
CPU = machine("cpu")


@st.composite
def catalogs(draw: st.DrawFn, conflicts: bool = True) -> dict[str, Layer]:
    catalog = dict(BASELINES)
    for slot in BUSY:
        for name in NAMES[slot]:
            kinds = draw(st.lists(st.sampled_from(Kind), max_size=1))
            more: dict[str, Any] = {}
            if conflicts:
                others = [other for other in ALL_NAMES if not other.startswith(slot)]
                more["clashes"] = dict.fromkeys(draw(st.lists(st.sampled_from(others), max_size=2)), "said so")
                more["replaces"] = tuple(draw(st.lists(st.sampled_from(REPLACED_HOOKS), max_size=1)))
                needed = draw(st.lists(st.sampled_from([other for other in BUSY if other != slot]), max_size=1))
                more["needs_slots"] = {
                    other: tuple(draw(st.lists(st.sampled_from([*NAMES[other], f"base-{other}"]), min_size=1, max_size=2)))
                    for other in needed
                }
            catalog[name] = made(name, slot, tuple(Reason(kind, f"{name} {kind}") for kind in kinds), **more)
    return catalog


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    required, slots = draw(st.booleans()), {}
    for slot in BUSY:
        listed = draw(st.lists(st.sampled_from([*NAMES[slot], f"base-{slot}"]), unique=True, max_size=4))
        if listed:
            slots[slot] = tuple(LayerRequest(name, {}, "random.toml", required) for name in listed)
    return Profile("random", "", False, Match(), slots, "random.toml")


flag_sets = st.fixed_dictionaries({}, optional={slot: st.sampled_from(NAMES[slot]) for slot in BUSY})


def attempt(profile: Profile, catalog: dict[str, Layer], flags: dict[str, str] | None = None) -> Plan | PlanError:
    try:
        return resolve(profile, CPU, UNKNOWN, NARROW, World(), catalog, flags=flags)
    except PlanError as error:
        return error


@settings(max_examples=150, deadline=None)
@given(catalogs(), profiles(), flag_sets)
def test_resolution_ends_and_what_it_gives_can_stand_together(
    catalog: dict[str, Layer], profile: Profile, flags: dict[str, str]
) -> None:
    plan = attempt(profile, catalog, flags)
    if isinstance(plan, PlanError):
        assert "random cannot run on" in str(plan) and "\n  Try: " in str(plan)
        return
    assert tuple(plan.layers) == SLOTS
    chosen = [catalog[name] for name in plan.layers.values()]
    for index, one in enumerate(chosen):
        assert plan.layers[one.slot] == one.name
        assert all(plan.layers[slot] in allowed for slot, allowed in one.needs_slots.items())
        for other in chosen[index + 1 :]:
            assert other.name not in one.clashes and one.name not in other.clashes
            assert not set(one.replaces) & set(other.replaces)
    for slot, name in flags.items():
        assert plan.layers[slot] == name


@settings(max_examples=100, deadline=None)
@given(catalogs(conflicts=False), profiles(), flag_sets)
def test_without_conflicts_the_first_that_pays_wins_and_an_error_names_every_empty_slot(
    catalog: dict[str, Layer], profile: Profile, flags: dict[str, str]
) -> None:
    plan = attempt(profile, catalog, flags)
    expected: dict[str, str | None] = {}
    for slot in SLOTS:
        wants = profile.slots.get(slot, (LayerRequest(f"base-{slot}", {}, "baseline"),))
        if slot in flags:
            wants = (LayerRequest(flags[slot], {}, "flag", required=True),)
        kinds = {want.layer: [reason.kind for reason in catalog[want.layer].unmet(None, {})] for want in wants}  # type: ignore[arg-type]
        paying = [want.layer for want in wants if not kinds[want.layer]]
        able = [want.layer for want in wants if want.required and Kind.UNSUPPORTED not in kinds[want.layer]]
        expected[slot] = (paying + able or [None])[0]
    empty = [slot for slot, name in expected.items() if name is None]
    if isinstance(plan, PlanError):
        assert empty and [line.split()[0] for line in str(plan).splitlines()[1:-1]][::1]
        assert {line.split()[0] for line in str(plan).splitlines()[1:-1]} == set(empty)
    else:
        assert not empty and plan.layers == expected
        for choice in plan.choices:
            assert bool(choice.expected_slowdown) == any(
                reason.kind is Kind.SLOWER
                for reason in catalog[choice.layer].unmet(None, {})  # type: ignore[arg-type]
            )


def bare(**slots: list[str]) -> Profile:
    rows = {slot: tuple(LayerRequest(name, {}, "test.toml") for name in listed) for slot, listed in slots.items()}
    return Profile("test", "", False, Match(), rows, "test.toml")


def catalog_of(*layers: Layer) -> dict[str, Layer]:
    return {**BASELINES, **{layer.name: layer for layer in layers}}


def test_a_clash_strikes_the_later_slot() -> None:
    catalog = catalog_of(made("a", "precision"), made("b", "compile", clashes={"a": "no"}))
    plan = attempt(bare(precision=["a", "base-precision"], compile=["b", "base-compile"]), catalog)
    assert isinstance(plan, Plan)
    assert (plan.layers["precision"], plan.layers["compile"]) == ("a", "base-compile")
    assert reasons(plan, "compile", "b") == "a and b clash: no"


def test_a_clash_strikes_the_earlier_slot_where_the_later_has_nothing_else() -> None:
    never = Reason(Kind.UNSUPPORTED, "never")
    catalog = catalog_of(made("a", "precision"), made("b", "compile", clashes={"a": "no"}), made("c", "compile", (never,)))
    for later in (["b"], ["b", "c"]):  # an alternative that cannot run is none
        plan = attempt(bare(precision=["a", "base-precision"], compile=later), catalog)
        assert isinstance(plan, Plan)
        assert (plan.layers["precision"], plan.layers["compile"]) == ("base-precision", "b")


def test_a_clash_of_only_choices_is_an_error_of_the_later_slot() -> None:
    catalog = catalog_of(made("a", "precision"), made("b", "compile", clashes={"a": "no"}))
    error = attempt(bare(precision=["a"], compile=["b"]), catalog)
    assert isinstance(error, PlanError) and "compile  b: a and b clash: no" in str(error)


def test_two_replacements_of_a_verb_are_a_conflict() -> None:
    catalog = catalog_of(made("a", "parallel", replaces=("step",)), made("b", "update", replaces=("step", "clip")))
    plan = attempt(bare(parallel=["a"], update=["b", "base-update"]), catalog)
    assert isinstance(plan, Plan) and reasons(plan, "update", "b") == "a and b both replace step"


def test_a_need_is_met_by_a_later_slot_that_can_and_otherwise_strikes_who_needs() -> None:
    catalog = catalog_of(made("a", "precision", needs_slots={"compile": ("c",)}), made("c", "compile"))
    met = attempt(bare(precision=["a", "base-precision"], compile=["base-compile", "c"]), catalog)
    unmet = attempt(bare(precision=["a", "base-precision"]), catalog)
    assert isinstance(met, Plan) and isinstance(unmet, Plan)
    assert (met.layers["precision"], met.layers["compile"]) == ("a", "c")
    assert (unmet.layers["precision"], unmet.layers["compile"]) == ("base-precision", "base-compile")
    assert reasons(unmet, "precision", "a") == "a needs compile = c, not base-compile"


words = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=5)


@given(st.dictionaries(words, words, max_size=3), st.integers(0, 9), words)
def test_the_digest_ignores_what_is_a_ranks_own_and_nothing_else(environment: dict[str, str], node: int, other: str) -> None:
    plan = planned("cpu")
    base = replace(plan, environment=environment)
    assert replace(base, environment={**environment, "GPTOUGHTS_NUMA_NODE": str(node)}).digest() == base.digest()
    assert replace(base, environment={**environment, "X": environment.get("X", "") + "1" + other}).digest() != base.digest()
    assert replace(base, notes=("else",), machine="another").digest() == base.digest()
    assert replace(base, world_size=2).digest() != base.digest()
    for index, choice in enumerate(base.choices):
        for changed in (
            replace(choice, layer=f"{choice.layer}-{other}"),
            replace(choice, options={**choice.options, "new": other}),
        ):
            choices = (*base.choices[:index], changed, *base.choices[index + 1 :])
            assert replace(base, choices=choices).digest() != base.digest()


def test_options_are_part_of_a_baseline_too() -> None:
    catalog = catalog_of(made("a", "precision", options={"size": Option(1, "a size", int)}))
    plan = attempt(bare(precision=["a"]), catalog, {"precision.size": "3"})
    assert isinstance(plan, Plan) and plan.choice("precision").options == {"size": 3}

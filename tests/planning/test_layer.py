"""The contract of a layer without torch: options are read strictly, declared needs come before `fits`, wrong layers are refused."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.config.loader import load
from gptoughts.config.model_spec import UNKNOWN
from gptoughts.errors import ConfigError
from gptoughts.hardware.machine import read
from gptoughts.hardware.world import World
from gptoughts.layers import CATALOG
from gptoughts.planning.layer import (
    SLOTS,
    Case,
    Kind,
    Layer,
    Operator,
    Option,
    Phase,
    StepTrace,
    active,
    inactive,
    slower,
    unproven,
    unsupported,
)
from tests.support.golden_files import ROOT

RECIPE = load("quickstart").recipe


def case(name: str) -> Case:
    return Case(read(ROOT / "tests" / "machines" / f"{name}.json"), UNKNOWN, RECIPE, World())


def layer(**more: Any) -> Layer:
    values: dict[str, Any] = {"name": "mine", "slot": "loss", "card": "x", "verify": lambda *_: active("")}
    return Layer(apply=lambda *_: nullcontext(), **{**values, **more})


@pytest.mark.parametrize(
    ("option", "given_value", "read_value"),
    [
        (Option(None, "", int), "8", 8),
        (Option(None, "", int), 8, 8),
        (Option(None, "", int), 8.0, 8),
        (Option(None, "", int), "1e3", 1000),
        (Option(None, "", int), "None", None),
        (Option(None, "", int), None, None),
        (Option(0.5, "", float), "1", 1.0),
        (Option(0.5, "", float), 2, 2.0),
        (Option(False, "", bool), "Yes", True),
        (Option(True, "", bool), False, False),
        (Option("a", "", choices=("a", "b")), "b", "b"),
        (Option("a", ""), "12", "12"),
        (Option("a", ""), "none", "none"),
    ],
)
def test_options_that_are_read(option: Option, given_value: Any, read_value: Any) -> None:
    found = option.read(given_value, "here")
    assert found == read_value and type(found) is type(read_value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        (Option(1, "", int), "none", "needs an integer above 0. Found 'none'"),
        (Option(1, "", int), None, "needs an integer above 0. Found None"),
        (Option(1, "", int), "0", "needs an integer above 0. Found '0'"),
        (Option(1, "", int), -3, "above 0"),
        (Option(1, "", int), "2.5", "above 0"),
        (Option(1, "", int), 2.5, "above 0"),
        (Option(1, "", int), True, "above 0"),
        (Option(1, "", int), [1], "above 0"),
        (Option(1, "", int), "inf", "above 0"),
        (Option(1.0, "", float), "nan", "needs a number. Found 'nan'"),
        (Option(1.0, "", float), "fast", "needs a number"),
        (Option(True, "", bool), "maybe", "needs true or false. Found 'maybe'"),
        (Option(True, "", bool), 3, "needs true or false"),
        (Option("a", "", choices=("a", "b")), "c", "needs one of a, b. Found 'c'"),
        (Option("a", ""), 3, "needs text. Found 3"),
    ],
)
def test_options_that_are_refused(option: Option, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        option.read(value, "--layer.x.y")
    assert str(caught.value).startswith("--layer.x.y: ") and words in str(caught.value)


@given(st.integers(1, 10**30))
def test_whole_numbers_of_any_size_are_exact(number: int) -> None:
    assert Option(1, "", int).read(str(number), "here") == Option(1, "", int).read(number, "here") == number


def test_a_layers_options_are_told_all_at_once() -> None:
    mine = layer(options={"size": Option(4, "", int), "kind": Option("a", "", choices=("a",))})
    assert mine.read_options({"size": "8"}, "here") == {"size": 8, "kind": "a"}
    with pytest.raises(ConfigError) as caught:
        mine.read_options({"sise": 3, "kind": "b", "size": 0}, "my.toml")
    assert len(str(caught.value).splitlines()) == 3
    assert "my.toml: no option 'sise' (did you mean 'size'?). Options: size, kind" in str(caught.value)


def test_declared_needs() -> None:
    fp8 = layer(
        slot="precision", packages=(("a-package", "fp8"),), min_capability=(8, 9), unmet=lambda *_: [unsupported("more")]
    )
    assert [str(why) for why in fp8.rejections(case("cpu"), {})] == ["needs an NVIDIA GPU, found none"]
    assert [str(why) for why in fp8.rejections(case("mixed"), {})] == ["needs compute capability 8.9, found 8.6"]
    (why,) = fp8.rejections(case("h100"), {})
    assert str(why) == "needs the package a-package, not installed (pip install 'gptoughts[fp8]')"
    met = replace(fp8, packages=())
    assert [str(why) for why in met.rejections(case("h100"), {})] == ["more"], "fits is asked once the declared needs are met"
    unknown = case("h100")
    blind = replace(unknown.machine, gpus=(replace(unknown.machine.gpus[0], compute_capability=None),))
    assert "found unknown" in str(fp8.rejections(replace(unknown, machine=blind), {})[0])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"slot": "los"}, "layer mine: no slot 'los' (did you mean 'loss'?)"),
        ({"needs_slots": {"compiler": ("x",)}}, "no slot 'compiler'"),
        ({"replaces": ("forward_context",)}, "'forward_context' is not one of attach, backward, clip"),
        ({"wraps": ("forward",)}, "'forward' is not one of forward_context"),
    ],
)
def test_layers_that_cannot_be(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layer(**wrong)
    assert words in str(caught.value)


def test_moments_follow_slots() -> None:
    moments = [layer(slot=slot).when for slot in SLOTS]
    assert moments == sorted(moments, key=list(Phase).index)
    assert layer(slot="loader", phase=Phase.SHAPE).when is Phase.SHAPE


def test_the_catalog_is_in_order_with_one_baseline_a_slot() -> None:
    assert [name for name, one in CATALOG.items() if name != one.name] == []
    assert [one.slot for one in CATALOG.values()] == sorted((one.slot for one in CATALOG.values()), key=SLOTS.index)
    assert [one.slot for one in CATALOG.values() if one.baseline] == list(SLOTS)
    for one in CATALOG.values():
        assert one.card.strip() and one.measured
        assert set(one.clashes) <= set(CATALOG) and all(set(names) <= set(CATALOG) for names in one.needs_slots.values())
        for name, option in one.options.items():
            assert option.help and (option.default is None or option.read(option.default, name) == option.default)


def test_reasons_evidence_and_sight() -> None:
    assert str(slower("too small", "a paper")) == "too small [a paper]"
    assert (unsupported("x").kind, slower("x", "y").kind) == (Kind.UNSUPPORTED, Kind.SLOWER)
    assert [evidence.status for evidence in (active("a", n=1), inactive("b"), unproven("c"))] == [
        "active",
        "inactive",
        "unproven",
    ]
    operators = {"aten::mm": Operator("aten::mm", 3), "aten::addmm": Operator("aten::addmm", 2)}
    trace = StepTrace(operators, {"Gemm_E4M3": 5}, 0, 1, 1, True, True, 1.0, 0.0)
    assert (trace.calls("::mm"), trace.calls("mm"), trace.launches("e4m3"), trace.launches("none")) == (3, 5, 5, 0)
    assert math.isclose(active("a", share=0.5).figures["share"], 0.5)


def test_a_case_shares_the_batch() -> None:
    four = replace(case("cpu"), world=World(0, 0, 4, 4, "torchrun"))
    assert (four.rank_sequences, four.on_gpu, case("h100").on_gpu, four.takes("loss", "full-ce")) == (4, False, True, False)

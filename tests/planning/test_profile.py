"""Profiles: all ship, `auto` picks one by capability and memory, `extends` is one level, and mistakes name file and key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptoughts.errors import ConfigError, PlanError
from gptoughts.hardware.machine import Machine, read
from gptoughts.layers import CATALOG
from gptoughts.planning import profile
from gptoughts.planning.layer import SLOTS
from gptoughts.planning.profile import Match, Profile, pick
from tests.support.golden_files import ROOT

SHIPPED = ["a100-bf16", "ada", "ampere", "blackwell", "cpu", "h100-fp8", "hopper", "stable", "turing"]


def machine(name: str) -> Machine:
    return read(ROOT / "tests" / "machines" / f"{name}.json")


def written(tmp_path: Path, text: str, name: str = "mine") -> str:
    path = tmp_path / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_shipped() -> None:
    assert profile.names() == SHIPPED
    for name in SHIPPED:
        read_back = profile.read(name)
        assert read_back.name == name and read_back.note
        for slot, wants in read_back.slots.items():
            assert slot in SLOTS and all(CATALOG[want.layer].slot == slot for want in wants)
    assert [name for name in SHIPPED if not profile.read(name).auto] == ["h100-fp8", "stable"]


def test_every_profile_is_keyed_on_capability_and_memory_only() -> None:
    assert set(Match.model_fields) == {
        "gpu", "min_compute_capability", "max_compute_capability", "min_memory_gb", "max_memory_gb",
    }  # fmt: skip


def test_a_named_profile_demands_and_auto_prefers() -> None:
    here = machine("h100")
    assert all(want.required for wants in pick("hopper", here).slots.values() for want in wants)
    assert not any(want.required for wants in pick("auto", here).slots.values() for want in wants)


def test_unknown_capability_or_memory_holds_nothing() -> None:
    here = machine("a100x4-40gb")
    unknown = replace(here, gpus=(replace(here.gpus[0], compute_capability=None), *here.gpus[1:]))
    with pytest.raises(PlanError, match="no profile matches"):
        pick("auto", unknown)
    small = replace(here, gpus=(replace(here.gpus[0], memory_bytes=None), *here.gpus[1:]))
    assert pick("auto", small).name == "ampere"


def test_a_tie_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "two"):
        written(tmp_path, f'name = "{name}"\n[match]\ngpu = false\n', name)
    monkeypatch.setattr(profile, "folder", lambda: tmp_path)
    with pytest.raises(PlanError, match=r"one\.toml and .*two\.toml match CPU.*equally well\.\n  Try: --profile one"):
        pick("auto", machine("cpu"))


def test_extends_inherits_slots_and_conditions(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "mine"\nextends = "hopper"\n[slots]\nloss = ["full-ce"]\n')
    mine, base = profile.read(path), profile.read("hopper")
    assert mine.match == base.match and mine.slots["attention"] == base.slots["attention"]
    assert [want.layer for want in mine.slots["loss"]] == ["full-ce"] and mine.slots["loss"][0].origin == path


def test_extends_finds_a_file_beside_the_profile_and_never_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    written(folder, 'name = "base"\n[slots]\nmatmul = ["tf32"]\n', "base")
    for extends in ("base", "base.toml", "../mine/base.toml"):
        child = written(folder, f'name = "child"\nextends = "{extends}"\n', "child")
        assert list(profile.read(child).slots) == ["matmul"]
    same_name = written(folder, 'name = "hopper"\nextends = "hopper"\n', "hopper")
    assert profile.read(same_name).slots["precision"][0].layer == "fp8-torchao"
    monkeypatch.chdir(tmp_path)
    assert profile.read("mine/child.toml").path == "mine/child.toml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "m"\nextends = "none"', "extends 'none': profile 'none': no such profile"),
        ('name = "m"\nextends = "a100-bf16"', "which itself extends 'ampere'. Only one level is supported"),
        ('name = "m"\nextends = "mine.toml"', "no such file"),
        ("note = 1", "note: input should be a valid string. Found 1"),
        ("slot = 3", "slot: no such key (did you mean 'slots'?)"),
        ("slots = 3", "slots: must be a table. Found 3"),
        ('name = "m"\n[slots]\nloss = "full-ce"', "slots.loss: needs a list of layers"),
        ('name = "m"\n[slots]\nloss = []', "slots.loss: needs a list of layers; omit the key for the baseline"),
        ('name = "m"\n[slots]\nloss = [{tokens = 3}]', "slots.loss: needs a layer name or {layer = NAME, ...}"),
        ('name = "m"\n[slots]\nloss = ["full-ce", "full-ce"]', "slots.loss: full-ce is listed twice"),
        ('name = "m"\n[match]\nmin_compute_capability = 8.0', "match.min_compute_capability: input should be a valid string"),
        ('name = "m"\n[match]\nmin_compute_capability = "8"', "match.min_compute_capability: string should match pattern"),
        ('name = "m"\n[match]\nmin_memory = 3', "match.min_memory: no such key"),
        ("name =", "not valid TOML"),
    ],
)
def test_bad_profiles(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        profile.read(written(tmp_path, text))
    assert words in str(caught.value) and "mine.toml" in str(caught.value)


def test_all_problems_of_a_profile_at_once(tmp_path: Path) -> None:
    text = 'auto = "yes"\ncolor = 1\n[match]\ngpus = 1\n[slots]\nloss = []\nhost = [3]\n'
    with pytest.raises(ConfigError) as caught:
        profile.read(written(tmp_path, text))
    for words in (
        "auto: ",
        "color: no such key",
        "match.gpus: no such key",
        "slots.loss: ",
        "slots.host: ",
        "name: missing",
    ):
        assert words in str(caught.value)


def test_missing_profiles(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"profile 'hoper': no such profile \(did you mean 'hopper'\?\); shipped: a100-bf16"):
        profile.read("hoper")
    with pytest.raises(ConfigError, match=r"profile none/hopper.toml: no such file"):
        profile.read("none/hopper.toml")


def test_a_profile_without_conditions_holds_everywhere() -> None:
    assert Match().conditions == 0 and Match().holds(machine("cpu")) and Match().holds(machine("mixed"))
    assert Profile("x", "", True, Match(), {}, "x").slots == {}

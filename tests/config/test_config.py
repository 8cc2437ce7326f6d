"""Recipes: every shipped one loads, every mistake is told with its source, and what is written reads back."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.config.aliases import FOREIGN, WITHOUT, instead, our_flag, ours
from gptoughts.config.loader import Resolved, fields, from_values, load, recipe_names, type_word
from gptoughts.config.recipe import LENGTHS, OPTIMIZER_KEYS, SELECTIVE_KEYS, leaf_types
from gptoughts.errors import ConfigError

KINDS = {key: leaf_types(annotation) for key, annotation, _ in fields()}
MINIMAL = {"name": "mine", "train": {"steps": 10}}


def error_of(text: str, tmp_path: Path, flags: dict[str, Any] | None = None) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(str(path), flags)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_have_a_note_and_no_dropout(name: str) -> None:
    resolved = load(name)
    assert resolved.recipe.name == name and resolved.recipe.note and resolved.recipe.model.dropout == 0


def test_flags_are_laid_over_and_remembered() -> None:
    resolved = load("quickstart", {"model.depth": "3", "optim.learning_rate": 2e-3, "train.steps": "1e3"})
    assert (resolved.recipe.model.depth, resolved.recipe.optim.learning_rate, resolved.recipe.train.steps) == (3, 2e-3, 1000)
    assert resolved.sources["optim.learning_rate"] == "--optim.learning-rate"
    assert resolved.sources["model.width"].endswith("quickstart.toml")
    assert "seed" not in resolved.sources


@pytest.mark.parametrize("length", LENGTHS)
def test_a_length_replaces_the_recipes_whatever_its_unit(length: str) -> None:
    for resolved in (load("quickstart", {f"train.{length}": "2"}), from_values(MINIMAL, "x", {f"train.{length}": 2})):
        given = {name: getattr(resolved.recipe.train, name) for name in LENGTHS}
        assert {name for name, value in given.items() if value is not None} == {length}


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.path", "123", "123"),
        ("data.path", "1e5", "1e5"),
        ("data.path", "true", "true"),
        ("data.path", "none", "none"),
        ("sample.prompt", "0", "0"),
        ("data.cache", "None", None),
        ("data.train_bpe", "none", None),
        ("model.tied", "no", False),
        ("model.tied", "1", True),
        ("train.hours", "2", 2.0),
        ("optim.warmup_steps", "1e2", 100),
        ("seed", "0", 0),
    ],
)
def test_flags_are_read_as_their_field_wants(key: str, text: str, value: Any) -> None:
    found = load("quickstart", {key: text}).values()[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("train.steps", "ten"),
        ("train.steps", "0"),
        ("train.steps", "2.5"),
        ("train.steps", "true"),
        ("train.hours", "inf"),
        ("optim.weight_decay", "nan"),
        ("optim.weight_decay", "inf"),
        ("optim.beta1", "1"),
        ("model.tied", "maybe"),
        ("model.norm", "batchnorm"),
        ("seed", "-1"),
        ("train.global_batch", "none"),
    ],
)
def test_wrong_types_and_ranges(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: .*Found .*--{key.replace('_', '-')}"):
        load("quickstart", {key: text})


def test_every_problem_at_once_with_its_source(tmp_path: Path) -> None:
    text = """
name = "mine"
color = "blue"
lr = 0.1
[model]
width = 100
heads = 7
[data]
sequence_length = "long"
[trian]
steps = 3
[train]
batch_size = 8
steps = 10
tokens = 1000
[empty]
"""
    said = error_of(text, tmp_path, {"optim.beta2": "2"})
    for words in (
        "color: no such key",
        "lr: no such key; use optim.learning_rate",
        "model: width 100 is not divisible by 7 heads",
        "data.sequence_length: input should be a valid integer. Found 'long'",
        "trian.steps: no such key (did you mean 'train.steps' or 'diffusion.steps'?)",
        "train.batch_size: no such key; use train.global_batch",
        "train: needs one of steps, tokens, epochs, hours. Found steps, tokens",
        "empty: no such key",
        "optim.beta2: input should be less than 1. Found 2  (--optim.beta2)",
    ):
        assert words in said
    assert said.count("mine.toml)") == 8


def test_lengths_name_their_sources(tmp_path: Path) -> None:
    said = error_of('name = "m"\n[train]\nsteps = 1\ntokens = 2\n', tmp_path)
    assert said.endswith("Found steps, tokens  (" + str(tmp_path / "mine.toml") + ")")
    with pytest.raises(ConfigError, match=r"Found steps, hours  \(--train.steps, --train.hours\)"):
        load("quickstart", {"train.steps": "3", "train.hours": "1"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('name = "m"', "train: missing. Try: set one of train.steps"),
        ('name = "m"\n[train]', "train: missing"),
        ("[train]\nsteps = 3", "name: missing"),
        ('name = "m"\ntrain = 3', "train: must be a table. Found 3"),
        ('name = "m"\n[train]\nsteps = 3\n[model]\nwidth = {a = 1}', "model.width.a: no such key"),
        ("name = ", "not valid TOML"),
        ('name = "m"\nname = "n"', "not valid TOML"),
        ('name = "m"\n[train]\nsteps = 3\n[data]\npath = 5', "data.path: input should be a valid string. Found 5"),
        ('name = "m"\n[train]\nsteps = 3\n[optim]\nlearning_rate = "1e-3"', "Found '1e-3'"),
        ('name = "m"\n[train]\nsteps = 3\n[model]\nwidth = 30\nheads = 10', "rope needs an even head width. Found 30 / 10 = 3"),
        ('name = "m"\n[train]\nsteps = 3\n[model]\nkv_heads = 4', "6 heads are not divisible by 4 kv_heads"),
    ],
)
def test_bad_files(text: str, words: str, tmp_path: Path) -> None:
    said = error_of(text, tmp_path)
    assert words in said and "mine.toml" in said


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for name, words in (
        (str(binary), "not valid TOML"),
        ("x" * 300, "no such recipe"),
        (f"{'x' * 300}.toml", "no such file"),
        (str(tmp_path / "none.toml"), "none.toml: no such file"),
        (f"{tmp_path}/", "not a regular file"),
        ("quikstart", "recipe 'quikstart': no such recipe (did you mean 'quickstart'?); shipped: "),
        ("", "recipe '': no such recipe"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(name)
        assert words in str(caught.value)


def test_foreign_words_lead_to_keys_that_exist() -> None:
    known = {f"--{key.replace('_', '-')}" for key in KINDS}
    for word in FOREIGN:
        assert word not in KINDS
        first = our_flag(f"--{word.replace('_', '-')}").partition(" ")[0].rstrip(",;")
        assert (
            first in known
            or first in ("--profile", "--name", "--run-dir", "--resume", "RECIPE", "--collectives", "gptoughts")
            or first.startswith(("CUDA_VISIBLE_DEVICES", "--layer."))
        )
    assert ours("train.batch-size") == ours("--batch_size") != "" and ours("color") == ""


SFT_CONFIG = (
    "learning_rate", "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "chat_template_path", "dataset_text_field",
    "dataset_kwargs", "dataset_num_proc", "eos_token", "max_length", "truncation_mode", "shuffle_dataset", "packing", "packing_strategy",
    "padding_free", "pad_to_multiple_of", "eval_packing", "completion_only_loss", "assistant_only_loss", "loss_type",
    "activation_offloading", "pad_token",
)  # fmt: skip
"""Fields that TRL's SFTConfig (1.16) adds."""


def test_every_option_of_the_common_trainers_has_an_answer() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = [field.name for field in dataclasses.fields(transformers.TrainingArguments) if field.init]
    leaves = {key.rpartition(".")[2] for key in KINDS}
    words = [word for word in (*theirs, *SFT_CONFIG) if not word.startswith("_")]
    assert [word for word in words if not (ours(word) or instead(word) or word in leaves)] == []
    assert not FOREIGN.keys() & WITHOUT.keys()
    assert len(words) > 100


def test_an_option_without_counterpart_says_what_is_so_instead(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('name = "x"\n[train]\nsteps = 1\nlabel_smoothing_factor = 0.1\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="no such key: labels are not smoothed"):
        load(str(recipe))


def test_flag_words() -> None:
    words = {key: type_word(annotation) for key, annotation, _ in fields()}
    assert words["model.kv_heads"] == "int|none" and words["model.tied"] == "true|false"
    assert words["data.path"] == "text" and words["optim.schedule"] == "cosine|linear|wsd|constant"
    assert all(description for _, _, description in fields())


# What is written reads back.


@st.composite
def recipes(draw: st.DrawFn) -> Resolved:
    heads = draw(st.integers(1, 8))
    values: dict[str, Any] = {
        "name": draw(st.text()),
        "model.heads": heads,
        "model.width": heads * 2 * draw(st.integers(1, 64)),
        "model.kv_heads": draw(st.sampled_from([None, 1, heads])),
        f"train.{draw(st.sampled_from(LENGTHS))}": draw(st.integers(1, 10**5)),
    }
    unheard = {
        "optim.name",
        "optim.min_learning_rate",
        "optim.learning_rate",
        "model.remote_code",  # a file cannot set it
        *(f"optim.{key}" for key in SELECTIVE_KEYS if key not in OPTIMIZER_KEYS["adamw"]),
    }
    free = [key for key in KINDS if key not in values and key.removeprefix("train.") not in LENGTHS and key not in unheard]
    for key in draw(st.lists(st.sampled_from(free), unique=True)):
        values[key] = draw(value_of(KINDS[key]))
    sources = draw(st.dictionaries(st.sampled_from(list(KINDS)), st.text(), max_size=8))
    resolved = from_values(values, draw(st.text()))
    return Resolved(resolved.recipe, {**resolved.sources, **sources})


def value_of(kinds: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    by_type = {
        int: st.integers(1, 10**4),
        float: st.floats(1e-12, 0.999),
        bool: st.booleans(),
        str: st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60),  # also paths
        type(None): st.none(),
    }
    return st.one_of([st.just(kind) if isinstance(kind, str) else by_type[kind] for kind in kinds])


@settings(max_examples=200, deadline=None)
@given(recipes())
def test_what_is_written_reads_back(tmp_path_factory: pytest.TempPathFactory, resolved: Resolved) -> None:
    path = tmp_path_factory.mktemp("recipe", numbered=True) / "again.toml"
    path.write_text(resolved.to_toml(), encoding="utf-8")
    again = load(str(path))
    assert again.recipe == resolved.recipe
    assert set(tomllib.loads(resolved.to_toml())) >= {"name", "train"}


def test_written_lines_tell_sources() -> None:
    text = load("quickstart", {"train.steps": "7", "data.train_bpe": "none"}).to_toml()
    assert "steps = 7  # --train.steps" in text and 'train_bpe = "none"  # --data.train-bpe' in text
    assert "seed = 1337  # default" in text and "depth = 4  # gptoughts/recipes/quickstart.toml" in text

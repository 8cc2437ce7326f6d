"""Recipes: what to train. TOML and dotted flags become one frozen, typed Recipe in which every value knows where it came from.

A recipe holds the training problem (model, data, objective, batch, schedule, seed) and nothing about speed: that is the profile's.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gptoughts.errors import ConfigError, nearest

PACKAGED_RECIPES = Path(__file__).parent / "recipes"

FOREIGN_WORDS = {
    "batch_size": "train.global_batch (sequences per update, over all ranks)",
    "per_device_train_batch_size": "train.global_batch, and --layer.microbatch.sequences for what one GPU holds at once",
    "micro_batch_size": "--layer.microbatch.sequences",
    "gradient_accumulation_steps": "train.global_batch; accumulation follows from it and the micro-batch",
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "min_lr": "optim.min_learning_rate",
    "lr_scheduler_type": "optim.schedule",
    "warmup": "optim.warmup_steps",
    "warmup_iters": "optim.warmup_steps",
    "weight_decay": "optim.weight_decay",
    "grad_clip": "optim.clip_norm",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "num_train_epochs": "train.epochs",
    "epochs": "train.epochs",
    "block_size": "data.sequence_length",
    "max_length": "data.sequence_length",
    "seq_len": "data.sequence_length",
    "n_layer": "model.depth",
    "num_hidden_layers": "model.depth",
    "layers": "model.depth",
    "n_head": "model.heads",
    "num_attention_heads": "model.heads",
    "n_embd": "model.width",
    "hidden_size": "model.width",
    "model_name": "RECIPE, the first word after train; `gptoughts recipes` lists them",
    "model_type": "RECIPE, the first word after train; `gptoughts recipes` lists them",
    "file": "data.path",
    "dataset": "data.path",
    "output_dir": "--run-dir",
    "out_dir": "--run-dir",
    "fp16": "--layer.precision fp16",
    "bf16": "--layer.precision bf16",
    "use_fp8": "--profile h100-fp8, or --layer.precision fp8-te",
    "tf32": "--layer.matmul tf32",
    "gradient_checkpointing": "--layer.recompute recompute-blocks",
    "flash_attention": "--layer.attention sdpa",
    "attn_implementation": "--layer.attention",
    "torch_compile": "--layer.compile compile-blocks",
    "compile": "--layer.compile compile-blocks",
    "resume_from_checkpoint": "--resume",
    "dropout": "model.dropout",
    "eval_interval": "eval.every",
    "eval_steps": "eval.every",
    "save_steps": "save.every",
    "logging_steps": "log.every",
    "log_interval": "log.every",
}
"""Other tools' words and ours for the same thing."""


def _integral(value: Any) -> Any:
    """1e9 is a whole number to everyone but a type checker."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_integral), Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A frozen table of a recipe; a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class ModelConfig(Section):
    """The native GPT. The defaults are its modern form; GPT-2 is the same file with other words."""

    family: str = Field("gpt", description="model family: gpt, or one that a plugin brings")
    depth: Positive = Field(6, description="number of blocks")
    width: Positive = Field(384, description="size of the hidden state")
    heads: Positive = Field(6, description="attention heads")
    kv_heads: Positive | None = Field(None, description="key and value heads (grouped-query); as many as heads if not set")
    hidden: Positive | None = Field(
        None, description="inner width of the MLP; if not set 4 x width, for swiglu 8/3 x width rounded up to 64"
    )
    vocab_size: Positive | None = Field(
        None, description="rows of the embedding; if not set the tokenizer's count rounded up to a multiple of 64"
    )
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalisation")
    positions: Literal["rope", "learned"] = Field("rope", description="position encoding")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="kind of MLP; gelu is GPT-2's tanh form")
    qk_norm: bool = Field(True, description="normalise queries and keys per head")
    tied: bool = Field(True, description="embedding and head share one weight")
    bias: bool = Field(False, description="biases in linear layers and LayerNorm")
    rope_theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="base of the rotary frequencies")
    dropout: Share = Field(0.0, description="dropout; 0 in every shipped recipe")

    @property
    def key_value_heads(self) -> int:
        """Key and value heads, whether written or derived."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Inner width of the MLP, whether written or derived."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 64) * 64

    @model_validator(mode="after")
    def heads_divide_width(self) -> ModelConfig:
        """Heads must share the width evenly, key-value heads the heads."""
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} cannot be shared by {self.heads} heads; take a width divisible by {self.heads}"
            )
        if self.heads % self.key_value_heads:
            raise ValueError(f"{self.heads} heads cannot be grouped over {self.key_value_heads} kv_heads")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"rope needs an even head width, {self.width} / {self.heads} = {self.head_dim}")
        return self


class DataConfig(Section):
    """Where the tokens come from."""

    path: str = Field(
        "python-stdlib",
        description="text file, folder, glob, tokenised folder, Hugging Face dataset, or python-stdlib (this Python's own source)",
    )
    tokenizer: str = Field("bpe", description="bytes, chars, gpt2, bpe (trained on the text), or a tokenizer.json")
    train_bpe: Positive | None = Field(4096, description="vocabulary of the BPE that tokenizer = bpe trains")
    text_key: str = Field("text", description="field of a .jsonl, .parquet or dataset row that holds the text")
    sequence_length: Positive = Field(256, description="tokens of context per sample")
    val_fraction: Share = Field(0.05, description="share of the text kept for validation")
    val_from: Literal["auto", "tail", "documents"] = Field(
        "auto", description="validation takes the text's tail, or whole documents; auto: the tail where documents are few"
    )
    cache: str | None = Field(None, description="folder for shards tokenised by train; if not set ~/.cache/gptoughts/data")


class OptimConfig(Section):
    """Optimiser, schedule and clipping."""

    name: Literal["adamw"] = Field("adamw", description="optimiser")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(1e-4, description="learning rate at the end of the decay")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(100, description="updates of linear warm-up")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the run that wsd decays in")
    beta1: Share = Field(0.9, description="AdamW first-moment decay")
    beta2: Share = Field(0.95, description="AdamW second-moment decay")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decay of weights with two or more dimensions")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 does not clip")


class TrainConfig(Section):
    """How long, and in which batches."""

    steps: Positive | None = Field(None, description="length in optimiser updates")
    tokens: Positive | None = Field(None, description="length in tokens")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="length in passes over the training split")
    hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="length in hours of wall time; the schedule follows the clock"
    )
    global_batch: Positive = Field(16, description="sequences per optimiser update, over all ranks")

    @model_validator(mode="after")
    def one_length(self) -> TrainConfig:
        """Exactly one length."""
        given = [name for name in ("steps", "tokens", "epochs", "hours") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of steps, tokens, epochs, hours; here: {', '.join(given) or 'none'}")
        return self


class EvalConfig(Section):
    """Validation during training."""

    every: Annotated[int, Field(ge=0)] = Field(250, description="steps between validations; 0: only at the end")
    batches: Positive | None = Field(20, description="global batches per validation; if not set the whole split")


class SampleConfig(Section):
    """Text written during training."""

    every: Annotated[int, Field(ge=0)] = Field(0, description="steps between samples; 0: only at the end")
    prompt: str = Field("\n", description="start of the sample")
    tokens: Positive = Field(128, description="tokens to write")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0 takes the likeliest token")
    top_k: Annotated[int, Field(ge=0)] = Field(50, description="0 keeps every token")


class SaveConfig(Section):
    """Checkpoints."""

    every: Annotated[int, Field(ge=0)] = Field(500, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints to keep")
    keep_best: bool = Field(True, description="also keep the checkpoint with the lowest validation loss")


class LogConfig(Section):
    """Lines on the console and rows in metrics.jsonl."""

    every: Positive = Field(10, description="steps between rows")


class Recipe(Section):
    """One training problem."""

    name: str = Field(description="the recipe's name")
    note: str = Field("", description="what it is for")
    seed: Annotated[int, Field(ge=0)] = Field(1337, description="seed of initialisation, order and every other draw")
    objective: str = Field("next-token", description="what is learnt: next-token, or one that a plugin brings")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    sample: SampleConfig = SampleConfig()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()


def shown(path: Path) -> str:
    """`path` as a user knows it: relative to where they stand when it lies there."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf of the recipe: dotted key, annotation, description."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.annotation, info.description or ""


def type_word(annotation: Any) -> str:
    """What a flag of this annotation takes, in one word: `int`, `float`, `true|false`, or its choices."""
    parts = [part for part in get_args(annotation) if part is not type(None)] if _is_union(annotation) else [annotation]
    words = []
    for part in parts:
        if get_origin(part) is Annotated:
            words.append(type_word(get_args(part)[0]))
        elif get_origin(part) is Literal:
            words.append("|".join(map(str, get_args(part))))
        else:
            words.append({bool: "true|false", int: "int", float: "float"}.get(part, "text"))
    return "|".join(words)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


@dataclass(frozen=True)
class Resolved:
    """A recipe and, for every dotted key, where its value came from."""

    recipe: Recipe
    sources: Mapping[str, str]

    def values(self) -> dict[str, Any]:
        """Every leaf by its dotted key."""
        return _flatten(self.recipe.model_dump())

    def to_toml(self) -> str:
        """The recipe as TOML that `gptoughts train FILE` reads, each line with its source. None is left out."""
        lines, table = [], ""
        for key, value in self.values().items():
            head, _, leaf = key.rpartition(".")
            if head != table:
                table = head
                lines.append(f"\n[{table}]")
            if value is None:
                lines.append(f"# {leaf}: not set")
            else:
                lines.append(f"{leaf} = {json.dumps(value, ensure_ascii=False)}  # {self.sources.get(key, 'default')}")
        return "\n".join(lines) + "\n"


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in PACKAGED_RECIPES.glob("*.toml"))


def load(name: str, flags: Mapping[str, str] | None = None) -> Resolved:
    """The recipe `name` (a shipped one, or a path to a .toml file) with `flags` (dotted key -> text) laid over it.

    Raises ConfigError that lists every problem at once, each with its file or flag.
    """
    path = _find_recipe(name)
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(path)}: not TOML: {error}") from None
    values = _flatten(written)
    sources = dict.fromkeys(values, shown(path))
    kinds = {key: annotation for key, annotation, _ in fields()}
    lengths = [key for key in (flags or {}) if key.startswith("train.") and key.split(".")[1] in _LENGTHS]
    if lengths:  # a length on the command line replaces the recipe's, whatever its unit
        values = {key: value for key, value in values.items() if key.removeprefix("train.") not in _LENGTHS}
    for key, text in (flags or {}).items():
        values[key] = _read_flag(text, kinds.get(key, str))
        sources[key] = f"--{key}"
    return Resolved(_validate(values, sources, f"recipe {name}"), sources)


_LENGTHS = ("steps", "tokens", "epochs", "hours")


def from_values(values: Mapping[str, Any], origin: str) -> Resolved:
    """A recipe from nested or dotted values, as Python callers and checkpoints give them. Raises ConfigError."""
    flat = _flatten(dict(values))
    sources = dict.fromkeys(flat, origin)
    return Resolved(_validate(flat, sources, origin), sources)


def _find_recipe(name: str) -> Path:
    path = Path(name) if name.endswith(".toml") or "/" in name else PACKAGED_RECIPES / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(recipe_names())
        raise ConfigError(f"no recipe {name!r}{nearest(name, recipe_names())}; shipped: {known}, or a path to a .toml file")
    return path


def _read_flag(text: str, annotation: Any) -> Any:
    """Text from the command line as the value that its field wants; what cannot be read stays text, so that pydantic says why."""
    word = type_word(annotation)
    if text.lower() in ("none", "null") and type(None) in get_args(annotation):
        return None
    if "true|false" in word and text.lower() in ("true", "false", "yes", "no", "1", "0"):
        return text.lower() in ("true", "yes", "1")
    if "int" in word or "float" in word:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *tables, leaf = key.split(".")
        place = nested
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{key}: {table} is a value, not a table")
        place[leaf] = value
    return nested


def _validate(values: Mapping[str, Any], sources: Mapping[str, str], what: str) -> Recipe:
    try:
        return Recipe.model_validate(_nest(values))
    except ValidationError as error:
        known = [key for key, _, _ in fields()]
        lines = describe(error, known, sources)
        raise ConfigError(f"{what} cannot be used\n" + "\n".join(f"  {line}" for line in lines)) from None


def describe(error: ValidationError, known: list[str], sources: Mapping[str, str] | None = None) -> list[str]:
    """One line per problem: key, what is wrong, what is here, where it came from."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("function-"))
        source = next((sources[name] for name in (key, f"{key}.") if sources and name in sources), "")
        where = f"  ({source})" if source else ""
        if problem["type"] == "extra_forbidden":
            ours = FOREIGN_WORDS.get(key.rpartition(".")[2].replace("-", "_"))
            hint = f"; here that is {ours}" if ours else nearest(key, known)
            lines.append(f"{key}: no such key{hint}{where}")
        elif problem["type"] == "value_error":
            lines.append(f"{key}: {problem['ctx']['error']}{where}")
        elif problem["type"] == "missing":
            lines.append(f"{key}: must be given")
        else:
            lines.append(f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, here {problem['input']!r}{where}")
    return lines

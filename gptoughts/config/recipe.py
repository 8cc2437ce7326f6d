"""What to train: model, data, objective, batch, schedule and seed, typed and frozen. Speed is the profile's."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gptoughts.config.optim_validation import problems


def _integral(value: Any) -> Any:
    """1e9 is a whole number to everyone but a type checker."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Positive = Annotated[int, BeforeValidator(_integral), Field(gt=0)]
Count = Annotated[int, BeforeValidator(_integral), Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Disagreement(ValueError):
    """Values that are each allowed and not together. `keys` are their names within the table, so that the error can say whose they are."""

    def __init__(self, text: str, *keys: str) -> None:
        super().__init__(text)
        self.keys = keys


class Section(BaseModel):
    """A frozen table of a recipe; a key that it does not know is an error."""

    # defer_build: whoever only lists fields, as --help does, pays for no validators.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)


class ModelConfig(Section):
    """A native model by its sizes, or a Hugging Face one by its folder. The defaults are the modern GPT; GPT-2 is the same with other words."""

    family: str = Field(
        "gpt", description="gpt, llada, hf (taken where path or config names a Hugging Face model), or one that a plugin brings"
    )
    path: str | None = Field(
        None,
        description="pretrained weights: a folder, a hub name, a .gguf file, or package:NAME for a Python package with one",
    )
    config: str | None = Field(
        None, description="random weights of the model that a config.json describes: a file, a folder, or a shipped name"
    )
    remote_code: str | None = Field(None, description="hub name of a model whose own code may run; it must be model.path")
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
    norm: Literal["rmsnorm", "layernorm"] = Field("rmsnorm", description="normalization")
    positions: Literal["rope", "learned"] = Field("rope", description="position encoding")
    mlp: Literal["swiglu", "gelu"] = Field("swiglu", description="kind of MLP; gelu is GPT-2's tanh form")
    qk_norm: bool = Field(True, description="normalize queries and keys per head")
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
            raise Disagreement(
                f"width {self.width} cannot be shared by {self.heads} heads; take a width divisible by {self.heads}",
                "width",
                "heads",
            )
        if self.heads % self.key_value_heads:
            raise Disagreement(f"{self.heads} heads cannot be grouped over {self.kv_heads} kv_heads", "heads", "kv_heads")
        if self.positions == "rope" and self.head_dim % 2:
            raise Disagreement(
                f"rope needs an even head width, {self.width} / {self.heads} = {self.head_dim}", "width", "heads", "positions"
            )
        return self


class DataConfig(Section):
    """Where the tokens come from."""

    path: str = Field(
        "python-stdlib",
        description="text file, folder, glob, tokenized folder, Hugging Face dataset, or python-stdlib (this Python's own source)",
    )
    tokenizer: str = Field("bpe", description="bytes, chars, gpt2, bpe (trained on the text), or a tokenizer.json")
    train_bpe: Positive | None = Field(4096, description="vocabulary of the BPE that tokenizer = bpe trains")
    format: Literal["text", "chat", "squad"] = Field(
        "text", description="text, chat (JSONL of messages, or of prompt and response), or squad (questions about contexts)"
    )
    val_path: str | None = Field(None, description="chat, squad: a file for validation; if not set val_fraction of the rows")
    packing: bool = Field(True, description="chat: several conversations per row, which do not see each other")
    template: str | None = Field(None, description="chat: chatml, plain, or a Jinja file; if not set the tokenizer's own")
    train_on: Literal["answers", "all"] = Field("answers", description="chat: which tokens are learned")
    too_long: Literal["error", "drop", "cut"] = Field(
        "error", description="chat: conversations longer than sequence_length; drop leaves them out, cut learns their beginning"
    )
    stride: Count = Field(128, description="squad: tokens that windows of a long context share")
    text_key: str = Field("text", description="field of a .jsonl, .parquet or dataset row that holds the text")
    sequence_length: Positive = Field(256, description="tokens of context per sample")
    val_fraction: Share = Field(0.05, description="share of the text kept for validation")
    val_from: Literal["auto", "tail", "documents"] = Field(
        "auto", description="validation takes the text's tail, or whole documents; auto: the tail where documents are few"
    )
    cache: str | None = Field(None, description="folder for shards tokenized by train; if not set ~/.cache/gptoughts/data")


class OptimConfig(Section):
    """Optimizer, schedule and clipping."""

    name: Literal["adamw", "muon", "lion", "apollo", "apollo-mini", "ademamix", "schedule-free"] = Field(
        "adamw", description="optimizer"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="peak learning rate")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(1e-4, description="learning rate at the end of the decay")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: Count = Field(100, description="updates of linear warm-up")
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = Field(0.2, description="share of the run that wsd decays in")
    beta1: Share = Field(0.9, description="first-moment decay")
    beta2: Share = Field(0.95, description="second-moment decay")
    beta3: Share = Field(0.9999, description="ademamix: decay of its slow first moment")
    alpha: Annotated[float, Field(ge=0)] = Field(5.0, description="ademamix: weight of its slow first moment")
    momentum: Share = Field(0.95, description="muon: momentum")
    rank: Positive = Field(256, description="apollo: rank of the projected gradient; apollo-mini has 1")
    projection_gap: Positive = Field(200, description="apollo: updates between new projections")
    epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="epsilon")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decay of weights with two or more dimensions")
    clip_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="largest gradient norm; 0 does not clip")

    @model_validator(mode="after")
    def keys_are_heard(self) -> OptimConfig:
        """The optimizer uses what was written, and the schedule is one that it can follow."""
        for text, keys in problems(self):
            raise Disagreement(text, *keys)
        return self


LENGTHS = ("steps", "tokens", "epochs", "hours")


class TrainConfig(Section):
    """How long, and in which batches."""

    steps: Positive | None = Field(None, description="length in optimizer updates")
    tokens: Positive | None = Field(None, description="length in tokens")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="length in passes over the training split")
    hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="length in hours of wall time; the schedule follows the clock"
    )
    global_batch: Positive = Field(16, description="sequences per optimizer update, over all ranks")

    @model_validator(mode="after")
    def one_length(self) -> TrainConfig:
        """Exactly one length."""
        given = [name for name in LENGTHS if getattr(self, name) is not None]
        if len(given) != 1:
            raise Disagreement(f"give one of {', '.join(LENGTHS)}; here: {', '.join(given) or 'none'}", *given)
        return self


class EvalConfig(Section):
    """Validation during training."""

    every: Count = Field(250, description="steps between validations; 0: only at the end")
    batches: Count = Field(20, description="global batches per validation, spread over the split; 0: all")
    patience: Count = Field(0, description="stop after that many validations without a better one; 0: never")


class AdapterConfig(Section):
    """A few trained weights beside frozen ones (peft)."""

    kind: Literal["none", "lora", "rslora", "dora", "pissa"] = Field("none", description="none trains all weights")
    rank: Positive = Field(16, description="inner width of the adapter")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="scale: alpha / rank, rslora alpha / sqrt(rank)")
    dropout: Share = Field(0.0, description="dropout before the adapter")
    targets: str = Field("all-linear", description="all-linear (head left out), or names of projections, comma-separated")
    base: Literal["full", "nf4"] = Field("full", description="precision of the frozen weights; nf4 (QLoRA) needs bitsandbytes")


class DiffusionConfig(Section):
    """Masked diffusion: the noise that is learned from, and how text is written."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] = Field(1e-3, description="least share of masked tokens")
    crop: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="share of samples cut to a random length")
    mask_token: str | None = Field(None, description="the tokenizer's mask token; if not set it is looked for, else added")
    steps: Positive = Field(128, description="denoising steps of a sample")
    block_length: Positive | None = Field(None, description="tokens per block, written left to right; if not set one block")
    remasking: Literal["low-confidence", "random"] = Field("low-confidence", description="which tokens stay masked longer")
    guidance: Annotated[float, Field(ge=0)] = Field(0.0, description="classifier-free guidance; 0 has none")


class ExpertsConfig(Section):
    """Balance of a mixture-of-experts model."""

    balance_weight: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight of the balance loss; if not set what the model's config says, else 0"
    )
    bias_rate: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="step of the balancing bias after each update, where the router has one"
    )


class SampleConfig(Section):
    """Text written during training."""

    every: Count = Field(0, description="steps between samples; 0: only at the end")
    prompt: str = Field("\n", description="start of the sample")
    tokens: Positive = Field(128, description="tokens to write")
    temperature: Annotated[float, Field(ge=0)] = Field(0.8, description="0 takes the likeliest token")
    top_k: Count = Field(50, description="0 keeps every token")


class SaveConfig(Section):
    """Checkpoints."""

    every: Count = Field(500, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(2, description="newest checkpoints to keep")
    keep_best: bool = Field(True, description="also keep the checkpoint with the lowest validation loss")


class LogConfig(Section):
    """Lines on the console and rows in metrics.jsonl."""

    every: Positive = Field(10, description="steps between rows")


class Recipe(Section):
    """One training problem."""

    name: str = Field(description="the recipe's name")
    note: str = Field("", description="what it is for")
    seed: Count = Field(1337, description="seed of initialization, order and every other draw")
    objective: str = Field(
        "next-token",
        description="what is learned: next-token, masked-diffusion, question-answering, or one that a plugin brings",
    )
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


def fields(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every leaf of the recipe: dotted key, annotation, description."""
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info.annotation, info.description or ""


def leaf_types(annotation: Any) -> tuple[Any, ...]:
    """What a field may hold: `int`, `float`, `bool`, `str`, `type(None)` and words of a Literal."""
    if get_origin(annotation) is Annotated:
        return leaf_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(leaf for part in get_args(annotation) for leaf in leaf_types(part))
    return get_args(annotation) if get_origin(annotation) is Literal else (annotation,)


def type_word(annotation: Any) -> str:
    """What a flag of this annotation takes: `int`, `float`, `true|false`, `text` or its choices, and `none` where it may be unset."""
    names = {bool: "true|false", int: "int", float: "float", str: "text", type(None): "none"}
    return "|".join(leaf if isinstance(leaf, str) else names[leaf] for leaf in leaf_types(annotation))

"""A trained model as a folder that transformers opens, with proof: it is opened again and must give the same logits.

The folder gets its name only after that. Where the proof fails, or the layout cannot hold the model, nothing is left.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config import hf_spec
from gptoughts.config.loader import Recipe
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from gptoughts.engine.from_recipe import task_of
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.models.gpt import gpt2_layout, llada_layout, llama_layout
from gptoughts.models.gpt.gpt import GPT

MOST_TOKENS = 512
LARGEST_SHARE = 1e-3
"""Largest difference of two logits, as a share of the largest logit: a hundred times what other kernels in float32 make."""
LARGEST_KL = 1e-5
TOKENIZER_TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Proof:
    """How the opened folder compares with the model, over `tokens` of text."""

    max_difference: float
    largest: float
    kl: float
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether they are the same model. Not a number is not."""
        return self.max_difference <= LARGEST_SHARE * max(1.0, self.largest) and self.kl <= LARGEST_KL

    def __str__(self) -> str:
        return (
            f"logits over {self.tokens} tokens: largest difference {self.max_difference:.2g} (logits up to {self.largest:.3g}), "
            f"mean KL {self.kl:.2g} nats"
        )


def export(
    model: nn.Module,
    recipe: Recipe,
    tokenizer: Tokenizer,
    out: Path,
    text: str,
    origin: Path | None = None,
    mask_id: int | None = None,
) -> tuple[Proof, list[str]]:
    """Write `model` to `out`, open it again and compare logits on `text`. Returns the proof and remarks.

    `origin` is the checkpoint's folder, for the small files that it kept of its base; `mask_id` the mask of a model that denoises
    (LLaDA in its published layout; transformers needs code of that model to open it, so ours reads it back). Raises
    ConfigError where no layout can hold the model, CheckpointError where `out` is taken or the opened folder is another model.
    """
    ids = ids_of(text, tokenizer, model)
    model.eval()
    precision = precision_of(model, recipe)
    with torch.no_grad():
        ours = _logits(model.to(precision), ids)
    model.to(torch.float32)  # there and back is exact
    with fresh(out) as folder:
        if recipe.model.family == "hf":
            write: Callable[..., list[str]] = _write_hf
        elif isinstance(model, GPT) and model.causal:
            write = _write_native
        elif isinstance(model, GPT) and mask_id is not None:
            llada_layout.save(
                _values(model), model.config, folder, model.sequence_length, mask_id=mask_id, eot_id=tokenizer.eot_id
            )
            proof = compare(ours, _read_back(model, folder, ids))
            require(proof, out)
            if isinstance(tokenizer, JsonTokenizer):
                (folder / "tokenizer.json").write_bytes(tokenizer.canonical)
                _write_texts(folder, _trained_with(origin, {}))
            return proof, ["layout: llada"]
        else:
            raise ConfigError(
                f"a {type(model).__name__} of the family {recipe.model.family} has no layout that transformers opens"
            )
        notes = write(model, recipe, tokenizer, folder, origin)
        notes += _write_tokenizer(tokenizer, folder, origin, recipe, text)
        theirs = _reopened(folder, ids, recipe, next(model.parameters()).device, precision)
        proof = compare(ours, theirs)
        require(proof, out)
    return proof, notes


# --- proof


def compare(ours: Tensor, theirs: Tensor) -> Proof:
    """The differences of two models' logits over the same tokens, the last dimension a distribution."""
    if ours.shape != theirs.shape:
        raise CheckpointError(f"the opened folder gives logits {tuple(theirs.shape)}, the model {tuple(ours.shape)}")
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Proof(float((ours - theirs).abs().max()), float(ours.abs().max()), abs(kl), ours.shape[:-1].numel())


def require(proof: Proof, out: Path) -> None:
    """Raise CheckpointError where the folder is another model."""
    if not proof.holds:
        raise CheckpointError(f"{out} would not be the same model, so nothing was written: {proof}")


def precision_of(model: nn.Module, recipe: Recipe) -> torch.dtype:
    """In which precision the two are compared: an adapter beside its base rounds elsewhere than the merged weights, so in float64."""
    from gptoughts.models.adapters.adapter import adapter_layers

    return torch.float64 if adapter_layers(model) and recipe.adapter.base == "full" else torch.float32


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    found = model(ids.to(next(model.parameters()).device))
    return found.transpose(1, 2) if found.shape[-1] == 2 else found  # of an answer: a distribution over places


def _reopened(folder: Path, ids: Tensor, recipe: Recipe, device: torch.device, precision: torch.dtype) -> Tensor:
    import transformers

    from gptoughts.models.hf.config import quiet

    answers = recipe.objective == "question-answering"
    loader = transformers.AutoModelForQuestionAnswering if answers else transformers.AutoModelForCausalLM
    code = {"trust_remote_code": True} if recipe.model.remote_code else {}  # the same code, copied beside the weights
    try:
        with quiet():
            model: Any = loader.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager", **code
            )
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"transformers cannot open what was written: {error}") from error
    with torch.no_grad():
        found = model.to(device, precision).eval()(input_ids=ids.to(device))
    return torch.stack((found.start_logits, found.end_logits), dim=1) if answers else found.logits


def _read_back(model: GPT, folder: Path, ids: Tensor) -> Tensor:
    """Logits of the native model with the weights that a folder of LLaDA's layout holds."""
    source, read = llada_layout.load(folder), GPT(model.config, model.vocab_size, model.sequence_length, causal=False)
    with torch.no_grad():
        for name, parameter in read.named_parameters():
            value = source.tensor(name, parameter.shape)
            if value is None:
                raise CheckpointError(f"{name} is not in what was written")
            parameter.copy_(value)
        return _logits(read.to(next(model.parameters()).device).eval(), ids)


def passage_of(file: str | None) -> str:
    """The text that logits are compared on: the user's, else one that comes with Python. Raises ConfigError."""
    if file is not None:
        try:
            return Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--text {file}: cannot be read ({error})") from None
    for place in (Path(os.__file__).parent / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    return f"{sys.copyright}\n{os.__doc__}"


def ids_of(text: str, tokenizer: Tokenizer, model: nn.Module) -> Tensor:
    """The first tokens of `text`, one row, as many as the model has positions for. Raises ConfigError where there are too few."""
    length = min(MOST_TOKENS, getattr(model, "sequence_length", MOST_TOKENS))
    ids = [int(index) for index in tokenizer.encode(text)[:length]]
    if len(ids) < 2:
        raise ConfigError("the text to compare logits on has fewer than two tokens; give a longer one with --text")
    return torch.tensor([ids])


# --- folders


@contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name where the block ends well, and vanishes where it does not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there already and not empty; give another folder")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_hf(model: nn.Module, recipe: Recipe, tokenizer: Tokenizer, folder: Path, origin: Path | None) -> list[str]:
    """The transformers model with our values, which are shared and not copied, through its own `save_pretrained`."""
    from gptoughts.models.hf.config import quiet, whole_model

    values = _values(model)
    inner: Any = model.inner
    theirs = whole_model(recipe.model, task_of(recipe), inner.get_input_embeddings().weight.shape[0])
    state = theirs.state_dict()
    tied = theirs.get_expanded_tied_weights_keys(all_submodels=True)
    missing, extra = sorted(state.keys() - values.keys() - tied.keys()), sorted(values.keys() - state.keys())
    if missing or extra:
        raise CheckpointError(f"the model is not the one of its config.json; missing: {missing[:8]}, not of it: {extra[:8]}")
    theirs.load_state_dict(values, strict=False, assign=True)
    theirs.tie_weights()
    with quiet():
        theirs.save_pretrained(folder)
    kept = _kept(origin, recipe)
    if "generation_config.json" in kept:
        (folder / "generation_config.json").write_text(kept["generation_config.json"], encoding="utf-8")
    return []


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names that the model has without an adapter; one that it has is merged."""
    from gptoughts.models.adapters.adapter import adapter_layers, merge

    if adapter_layers(model):
        return merge(model)
    return {name: value.detach() for name, value in model.state_dict().items()}


def _kept(origin: Path | None, recipe: Recipe) -> dict[str, str]:
    """Small files of the base: those that the checkpoint kept, else those of the folder that the recipe names."""
    folder = None if origin is None else origin / "base"
    if folder is not None and folder.is_dir():
        return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir() if path.is_file()}
    return hf_spec.documents(recipe.model) if recipe.model.path else {}


def _write_native(model: nn.Module, recipe: Recipe, tokenizer: Tokenizer, folder: Path, origin: Path | None) -> list[str]:
    """The native GPT as GPT-2, Llama or Qwen3, whichever has its form."""
    from safetensors.torch import save_file

    assert isinstance(model, GPT)
    config, rows = model.config, model.vocab_size
    try:
        gpt2_layout.require_gpt2_form(config)
    except ConfigError as not_gpt2:
        if llama_layout.problems(config):
            differs = ", ".join(llama_layout.problems(config))
            raise ConfigError(f"no layout holds this model.\n  {not_gpt2}\n  those of Llama and Qwen3: {differs}") from None
        content = llama_layout.to_hf_config(config, rows, model.sequence_length, tokenizer.eot_id)
        state = llama_layout.to_hf_state(config, _values(model))
    else:
        content, state = gpt2_layout.to_hf_gpt2(config, _values(model), tokenizer.eot_id)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return [f"layout: {content['model_type']}"]


def _trained_with(origin: Path | None, kept: Mapping[str, str]) -> dict[str, str]:
    """The tokenizer's small files, those of the base overruled by the chat template that the run was trained with."""
    texts = {name: kept[name] for name in TOKENIZER_TEXTS if name in kept}
    own = None if origin is None else origin / "tokenizer"
    if own is None or not (own / "chat_template.jinja").is_file():
        return texts
    texts["chat_template.jinja"] = (own / "chat_template.jinja").read_text(encoding="utf-8")
    if (own / "tokenizer_config.json").is_file():
        words = json.loads((own / "tokenizer_config.json").read_text(encoding="utf-8"))
        base = json.loads(texts.get("tokenizer_config.json", "{}"))
        base.pop("chat_template", None)
        kind = base.get("tokenizer_class", words.get("tokenizer_class"))
        texts["tokenizer_config.json"] = json.dumps({**base, **words, "tokenizer_class": kind}, indent=2) + "\n"
    return texts


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, origin: Path | None, recipe: Recipe, text: str) -> list[str]:
    """tokenizer.json and what transformers wants beside it; read back and compared on `text`."""
    if not isinstance(tokenizer, JsonTokenizer):
        return [
            f"tokenizer: {tokenizer.kind} has no form that transformers reads; ids are as in {origin or 'the run'}/tokenizer"
        ]
    import transformers

    (folder / "tokenizer.json").write_bytes(tokenizer.canonical)
    kept = _trained_with(origin, _kept(origin, recipe) if recipe.model.family == "hf" else {})
    _write_texts(folder, kept)
    if "tokenizer_config.json" not in kept:
        end = next(
            (t["content"] for t in json.loads(tokenizer.canonical).get("added_tokens", []) if t["id"] == tokenizer.eot_id), None
        )
        words = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end, "bos_token": end} if end else {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    sample = text[:4000]
    wanted = [int(index) for index in tokenizer.encode(sample)]
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        read = loader.from_pretrained(folder, local_files_only=True)(sample, add_special_tokens=False)["input_ids"]
        if list(read) == wanted:
            other = loader is not transformers.AutoTokenizer
            # For some model types transformers puts its own splitting of words in the place of the file's.
            return [
                f"tokenizer: open it with PreTrainedTokenizerFast; AutoTokenizer changes it for {recipe.model.family}"
            ] * other
    raise CheckpointError("the written tokenizer gives other ids than the one that the model was trained with")

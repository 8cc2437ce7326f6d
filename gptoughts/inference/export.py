"""Export a trained model to a folder that transformers opens, and verify it: reopen it and compare logits.

The folder gets its name only after verification. On failure, or if no layout supports the model, nothing is written.
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
from gptoughts.config.tasks import task_of
from gptoughts.data.chat.template import read_json
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, Tokenizer
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.files import parse_json, read_limited
from gptoughts.models.gpt import gpt2_layout, llada_layout, llama_layout
from gptoughts.models.gpt.gpt import GPT

MAX_TOKENS = 512
MAX_RELATIVE_DIFFERENCE = 1e-3
"""Tolerance of a logit difference, relative to the largest logit: 100 times the difference between float32 kernels."""
MAX_KL = 1e-5
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Proof:
    """Logit differences between the reopened folder and the model, over `tokens` of text."""

    max_difference: float
    largest: float
    kl: float
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the differences are within tolerance. False for NaN."""
        return self.max_difference <= MAX_RELATIVE_DIFFERENCE * max(1.0, self.largest) and self.kl <= MAX_KL

    def __str__(self) -> str:
        return (
            f"logits over {self.tokens} tokens: maximum difference {self.max_difference:.2g} (logits up to {self.largest:.3g}), "
            f"mean KL {self.kl:.2g} nats"
        )


def export(
    model: nn.Module,
    recipe: Recipe,
    tokenizer: Tokenizer,
    out: Path,
    text: str,
    *,
    origin: Path | None = None,
    mask_id: int | None = None,
) -> tuple[Proof, list[str]]:
    """Write `model` to `out`, reopen it and compare logits on `text`. Returns the proof and notes.

    origin    folder of the checkpoint, for the small files it keeps of its base model
    mask_id   mask token of a masked-diffusion model, written in LLaDA's published layout and reopened by the native GPT, because
              transformers needs remote code for it

    Raises ConfigError if no layout supports the model, CheckpointError if `out` is not empty or the reopened model differs.
    """
    ids = ids_of(text, tokenizer, model)
    model.eval()
    dtype = comparison_dtype(model, recipe)
    with torch.no_grad():
        expected = _logits(model.to(dtype), ids)
    model.to(torch.float32)  # exact in both directions
    with fresh(out) as folder:
        if recipe.model.family == "hf":
            write: Callable[..., list[str]] = _write_hf
        elif isinstance(model, GPT) and model.causal:
            write = _write_native
        elif isinstance(model, GPT) and mask_id is not None:
            llada_layout.save(
                _weights(model), model.config, folder, model.sequence_length, mask_id=mask_id, eot_id=tokenizer.eot_id
            )
            proof = compare(expected, _native_logits(model, folder, ids))
            require(proof, out)
            if isinstance(tokenizer, JsonTokenizer):
                (folder / "tokenizer.json").write_bytes(tokenizer.canonical)
                _write_texts(folder, _tokenizer_files(origin, {}))
            return proof, ["layout: llada"]
        else:
            raise ConfigError(f"model.family: no transformers layout for {type(model).__name__}", found=recipe.model.family)
        notes = write(model, recipe, tokenizer, folder, origin)
        notes += _write_tokenizer(tokenizer, folder, origin, recipe, text)
        reopened = _reopened_logits(folder, ids, recipe, next(model.parameters()).device, dtype)
        proof = compare(expected, reopened)
        require(proof, out)
    return proof, notes


# --- proof


def compare(expected: Tensor, reopened: Tensor) -> Proof:
    """Return the differences between two models' logits on the same tokens; the last dimension is the distribution."""
    if expected.shape != reopened.shape:
        raise CheckpointError(
            f"export: reopened model must give logits of shape {tuple(expected.shape)}", found=tuple(reopened.shape)
        )
    expected, reopened = expected.double().cpu(), reopened.double().cpu()
    p, q = expected.log_softmax(-1), reopened.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    return Proof(float((expected - reopened).abs().max()), float(expected.abs().max()), abs(kl), expected.shape[:-1].numel())


def require(proof: Proof, out: Path) -> None:
    """Raise CheckpointError if the reopened model differs."""
    if not proof.holds:
        raise CheckpointError(f"{out}: reopened model differs beyond tolerance, nothing written", found=proof)


def comparison_dtype(model: nn.Module, recipe: Recipe) -> torch.dtype:
    """Return the dtype of the comparison: float64 for an adapter, whose rounding differs from that of merged weights."""
    from gptoughts.models.adapters.adapter import adapter_layers

    return torch.float64 if adapter_layers(model) and recipe.adapter.base == "full" else torch.float32


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids.to(next(model.parameters()).device))
    return logits.transpose(1, 2) if logits.shape[-1] == 2 else logits  # question answering: distributions over positions


def _reopened_logits(folder: Path, ids: Tensor, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the logits of the folder as opened by transformers. Raises CheckpointError."""
    import transformers

    from gptoughts.models.hf.config import quiet

    answers = task_of(recipe).head == "question-answering"
    loader = transformers.AutoModelForQuestionAnswering if answers else transformers.AutoModelForCausalLM
    code = recipe.model.remote_code is not None  # in the exported folder
    try:
        with quiet():
            model: Any = loader.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager", trust_remote_code=code
            )
    except (OSError, ImportError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"export: transformers cannot open the written folder: {error}") from error
    with torch.no_grad():
        out = model.to(device, dtype).eval()(input_ids=ids.to(device))
    return torch.stack((out.start_logits, out.end_logits), dim=1) if answers else out.logits


def _native_logits(model: GPT, folder: Path, ids: Tensor) -> Tensor:
    """Return the logits of the native GPT with the weights of a folder in LLaDA's layout."""
    source, read = llada_layout.load(folder), GPT(model.config, model.vocab_size, model.sequence_length, causal=False)
    with torch.no_grad():
        for name, parameter in read.named_parameters():
            value = source.tensor(name, parameter.shape)
            if value is None:
                raise CheckpointError(f"export: no weight {name} in the written folder")
            parameter.copy_(value)
        return _logits(read.to(next(model.parameters()).device).eval(), ids)


def passage_of(file: str | None) -> str:
    """Return the text for the comparison: the user's file, else one of the Python installation. Raises ConfigError."""
    if file is not None:
        try:
            return read_limited(Path(file)).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--text {file}: cannot be read ({error})") from None
    for place in (Path(os.__file__).parent / "LICENSE.txt", Path(sys.base_prefix) / "LICENSE.txt"):
        if place.is_file():
            return place.read_text(encoding="utf-8")
    return f"{sys.copyright}\n{os.__doc__}"


def ids_of(text: str, tokenizer: Tokenizer, model: nn.Module) -> Tensor:
    """Return the first tokens of `text`, (1, tokens), up to the model's context. Raises ConfigError for fewer than two."""
    length = min(MAX_TOKENS, getattr(model, "sequence_length", MAX_TOKENS))
    ids = [int(index) for index in tokenizer.encode(text)[:length]]
    if len(ids) < 2:
        raise ConfigError(
            "--text: needs at least two tokens to compare logits", found=len(ids), fix="--text FILE with a longer text"
        )
    return torch.tensor([ids])


# --- folders


@contextmanager
def fresh(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `out` after the block, and removed on an error. Raises CheckpointError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: folder exists and is not empty", fix="another folder")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_hf(model: nn.Module, recipe: Recipe, tokenizer: Tokenizer, folder: Path, origin: Path | None) -> list[str]:
    """Write the transformers model with our weights (shared, not copied) by its own `save_pretrained`."""
    from gptoughts.models.hf.config import quiet, vocabulary, whole_model

    weights = _weights(model)
    inner: Any = model.inner
    hf_model = whole_model(recipe.model, task_of(recipe).head, vocabulary(inner.config))
    state = hf_model.state_dict()
    tied = hf_model.get_expanded_tied_weights_keys(all_submodels=True)
    missing, extra = sorted(state.keys() - weights.keys() - tied.keys()), sorted(weights.keys() - state.keys())
    if missing or extra:
        raise CheckpointError(
            "model: weights do not match its config.json", found=f"missing {missing[:8]}, unexpected {extra[:8]}"
        )
    hf_model.load_state_dict(weights, strict=False, assign=True)
    hf_model.tie_weights()
    with quiet():
        hf_model.save_pretrained(folder)
    base_files = _base_files(origin, recipe)
    if "generation_config.json" in base_files:
        (folder / "generation_config.json").write_text(base_files["generation_config.json"], encoding="utf-8")
    return []


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by their names without an adapter; an adapter is merged."""
    from gptoughts.models.adapters.adapter import adapter_layers
    from gptoughts.models.adapters.merge import merge

    return merge(model) if adapter_layers(model) else {name: value.detach() for name, value in model.state_dict().items()}


def _base_files(origin: Path | None, recipe: Recipe) -> dict[str, str]:
    """Return the small files of the base model: from the checkpoint, else from the recipe's model folder."""
    folder = None if origin is None else origin / "base"
    if folder is not None and folder.is_dir():
        return hf_spec.kept_texts(folder, ("config.json", *hf_spec.KEPT))
    return hf_spec.documents(recipe.model) if recipe.model.path else {}


def _write_native(model: nn.Module, recipe: Recipe, tokenizer: Tokenizer, folder: Path, origin: Path | None) -> list[str]:
    """Write the native GPT as GPT-2, Llama or Qwen3, by its configuration."""
    from safetensors.torch import save_file

    assert isinstance(model, GPT)
    config, rows = model.config, model.vocab_size
    try:
        gpt2_layout.require_gpt2_form(config)
    except ConfigError as not_gpt2:
        if llama_layout.problems(config):
            differs = ", ".join(llama_layout.problems(config))
            raise ConfigError(
                f"model: no layout of transformers supports it\n  GPT-2: {not_gpt2}\n  Llama and Qwen3: {differs}"
            ) from None
        content = llama_layout.to_hf_config(config, rows, model.sequence_length, tokenizer.eot_id)
        state = llama_layout.to_hf_state(config, _weights(model))
    else:
        content, state = gpt2_layout.to_hf_gpt2(config, _weights(model), tokenizer.eot_id)
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return [f"layout: {content['model_type']}"]


def _tokenizer_files(origin: Path | None, base_files: Mapping[str, str]) -> dict[str, str]:
    """Return the tokenizer's small files: those of the base model, with the chat template of the run."""
    texts = {name: base_files[name] for name in TOKENIZER_FILES if name in base_files}
    own = None if origin is None else origin / "tokenizer"
    if own is None or not (own / "chat_template.jinja").is_file():
        return texts
    texts |= hf_spec.kept_texts(own, ("chat_template.jinja",))
    if (own / "tokenizer_config.json").is_file():
        config = read_json(own / "tokenizer_config.json")
        base = parse_json(texts.get("tokenizer_config.json", "{}"))
        base.pop("chat_template", None)
        kind = {"tokenizer_class": base.get("tokenizer_class", config.get("tokenizer_class"))}
        texts["tokenizer_config.json"] = json.dumps({**base, **config, **kind}, indent=2) + "\n"
    return texts


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_tokenizer(tokenizer: Tokenizer, folder: Path, origin: Path | None, recipe: Recipe, text: str) -> list[str]:
    """Write tokenizer.json and its configuration, reopen it with transformers and compare ids on `text`. Returns notes."""
    if not isinstance(tokenizer, JsonTokenizer):
        return [f"tokenizer: {tokenizer.kind} has no transformers format; ids as in {origin or 'the run'}/tokenizer"]
    import transformers

    (folder / "tokenizer.json").write_bytes(tokenizer.canonical)
    texts = _tokenizer_files(origin, _base_files(origin, recipe) if recipe.model.family == "hf" else {})
    _write_texts(folder, texts)
    if "tokenizer_config.json" not in texts:
        added = tokenizer.spec.get("added_tokens") or []
        end = next((token["content"] for token in added if token["id"] == tokenizer.eot_id), None)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": end, "bos_token": end} if end else {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    sample = text[:4000]
    expected = [int(index) for index in tokenizer.encode(sample)]
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        try:
            opened = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except ValueError:  # a tokenizer with code of its own, as AutoTokenizer sees it
            continue
        ids = opened(sample, add_special_tokens=False)["input_ids"]
        if list(ids) == expected:
            other = loader is not transformers.AutoTokenizer
            # For some model types transformers replaces the file's pre-tokenizer.
            return [f"tokenizer: open with PreTrainedTokenizerFast; AutoTokenizer changes it for {recipe.model.family}"] * other
    raise CheckpointError("export: the written tokenizer gives other ids than the training tokenizer")

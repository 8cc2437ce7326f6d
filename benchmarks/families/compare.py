"""Compare one causal model type with plain transformers: loss, gradient, logits, generation, packed documents, export.

Both sides have the same random weights, in float32. Plain transformers is `AutoModelForCausalLM` with its eager attention; ours is an
engine with the attention that the plan of this machine takes. A step of ours is watched, as in a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.families.tiny import config_of, tiny
from gptoughts.config.loader import ModelConfig, Recipe, from_values
from gptoughts.config.model_spec import spec_for
from gptoughts.data.tokenizers.tokenizer import ByteTokenizer
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.from_recipe import ModelBundle
from gptoughts.engine.objectives.base import NextToken
from gptoughts.engine.trainer import Progress, run_step
from gptoughts.errors import GptoughtsError
from gptoughts.hardware.machine import probe
from gptoughts.hardware.world import World
from gptoughts.inference.export import export
from gptoughts.inference.load import inference_engine
from gptoughts.layers import CATALOG
from gptoughts.models.hf.config import first_line, quiet, vocabulary
from gptoughts.models.hf.experts import BIAS_NAMES
from gptoughts.models.hf.family import HFModel, hf_family
from gptoughts.models.hf.weights import Pretrained
from gptoughts.models.sources import meta_model
from gptoughts.planning.profile import pick
from gptoughts.planning.resolve import Plan, resolve
from gptoughts.run.build import build_engine
from gptoughts.run.step_trace import trace_step

LENGTH, ROWS_OF_BATCH, NEW = 24, 3, 6
CUT = 9
"""Tokens of the first of two packed documents."""
NEAR = 2e-4
"""Largest relative difference of loss, gradient norm and logits that counts as equal: rounding of float32 in another order."""
EAGER = {"compile": "eager", "host": "system", "precision": "fp32"}
CPU = torch.device("cpu")
TEXT = "the quick brown fox jumps over the lazy dog"


class Different(Exception):
    """A result differs from plain transformers."""


def examine(kind: str, folder: Path, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a record of `kind`: `state` (equal, refused, different, failed, not built), `reason`, and the figures measured."""
    record: dict[str, Any] = {"type": kind}
    shutil.rmtree(folder, ignore_errors=True)
    try:
        content = content or tiny(kind)
        theirs = _saved(content, folder)
    except Exception as error:  # transformers cannot build, run or save it
        problem = f"transformers does not build it: {type(error).__name__}: {first_line(error)}"
        return {**record, "stage": "open", **_unbuilt(kind, content, folder, problem)}
    record["parameters"] = sum(parameter.numel() for parameter in theirs.parameters())
    stage = "open"
    try:
        for stage, figures in _stages(folder, theirs):  # noqa: B007  # the handlers read the stage
            record |= figures
        return {**record, "state": "equal", "reason": ""}
    except GptoughtsError as error:
        return {**record, "state": "refused", "stage": stage, "reason": str(error)}
    except Different as error:
        return {**record, "state": "different", "stage": stage, "reason": str(error)}
    except Exception as error:
        return {**record, "state": "failed", "stage": stage, "reason": f"{type(error).__name__}: {first_line(error)}"}


def _unbuilt(kind: str, content: dict[str, Any] | None, folder: Path, problem: str) -> dict[str, str]:
    """Return state and reason of a type that transformers does not build: refused if our error is one for users."""
    content = content or {"model_type": kind}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        hf_family(ModelConfig(family="hf", config=str(folder)))
    except GptoughtsError:
        return {"state": "refused", "reason": problem}
    except Exception as error:
        return {"state": "failed", "reason": f"{type(error).__name__}: {first_line(error)}, where {problem}"}
    return {"state": "not built", "reason": problem}


def _saved(content: dict[str, Any], folder: Path) -> Any:
    """Save a model with random weights away from their initial values, and return it as transformers opens it."""
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(config_of(content), dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            biases = [value for name, value in model.named_buffers() if name.endswith(BIAS_NAMES)]
            for tensor in [*model.parameters(), *biases]:
                tensor.add_(0.02 * torch.randn_like(tensor))
        model.save_pretrained(folder)
        del model
        if json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"] != content["model_type"]:
            # Of a model that reads images too, the config of the text part, which transformers does not open by itself.
            (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
        opened = plain(folder)
    with torch.no_grad():
        opened.eval()(_ids())
    return opened


def plain(folder: Path) -> Any:
    """Return the folder's model as transformers opens it, without dropout."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def _ids(rows: int = ROWS_OF_BATCH, columns: int = LENGTH) -> Tensor:
    return torch.randint(5, 250, (rows, columns), generator=torch.Generator().manual_seed(1))


def _recipe(folder: Path) -> Recipe:
    values = {
        "name": "tiny", "model": {"family": "hf", "path": str(folder)},
        "train": {"steps": 100, "global_batch": ROWS_OF_BATCH}, "data": {"sequence_length": LENGTH, "tokenizer": "bytes"},
        "optim": {"warmup_steps": 0, "learning_rate": 1e-3, "clip_norm": 0.0}, "experts": {"bias_rate": 0.0, "balance_weight": 0.0},
    }  # fmt: skip
    if not _has_experts(folder):
        values.pop("experts")
    return from_values(values, "benchmarks.families").recipe


def _has_experts(folder: Path) -> bool:
    text = (folder / "config.json").read_text(encoding="utf-8")
    return "expert" in text


def plan_of(recipe: Recipe) -> Plan:
    """Return the plan of this machine's profile, with eager float32 blocks."""
    machine = probe()
    return resolve(pick("auto", machine), machine, spec_for(recipe), recipe, World(), CATALOG, flags=EAGER)


def _stages(folder: Path, theirs: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of the next stage with the figures of the one before. Raises Different."""
    recipe, ids = _recipe(folder), _ids(columns=LENGTH + 1)
    yield "adopt", {}
    family = hf_family(recipe.model)
    rows = vocabulary(theirs.config)
    model = meta_model(recipe, family, rows)
    plan = plan_of(recipe)
    yield (
        "build",
        {"attention": plan.layers["attention"], "packs": model.packs, "caches": model.caches, "head": model.head_name},
    )
    batches = ((_batch(ids), number) for number in range(100))
    with build_engine(
        model, family, NextToken(), recipe, plan, CATALOG, ranks=Ranks(World(), CPU), batches=batches, source=Pretrained(folder)
    ) as engine:
        ours = engine.bare
        assert isinstance(ours, HFModel)
        yield "logits", {}
        yield "documents", {"logits": _logits(ours, theirs, ids[:, :-1])}
        yield "step", _documents(ours, engine, ids)
        yield "evidence", _step(engine, theirs, ids)
        yield "export", {"evidence": _evidence(engine, plan)}
        proof, _ = export(ours, recipe, ByteTokenizer(), folder / "exported", TEXT)
    yield "load", {"export": proof.max_difference}
    bundle = ModelBundle(family, NextToken(), rows, spec_for(recipe))
    loaded = inference_engine(recipe, bundle, meta_model(recipe, family, rows), CPU, Pretrained(folder / "exported"), "fused")
    yield "", _loaded(loaded.bare, plain(folder / "exported"), ids)


def _batch(ids: Tensor) -> dict[str, Tensor]:
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(torch.arange(ids.shape[1]) > torch.tensor([[LENGTH], [14], [20]]), -100),
    }


def _near(what: str, found: Any, wanted: Any) -> float:
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    far = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not far <= NEAR:
        raise Different(f"{what}: relative difference {far:.2g}")
    return far


def _theirs(theirs: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = theirs.eval()(input_ids=ids).logits
    return logits


def _logits(ours: HFModel, theirs: Any, ids: Tensor) -> float:
    """Compare logits in evaluation mode."""
    ours.eval()
    with torch.no_grad():
        found = ours(ids)
        far = _near("logits", found, _theirs(theirs, ids))
        moved = ids.clone()
        moved[:, CUT] = (moved[:, CUT] + 1) % 250
        before = _near("causality, logits before a changed token", ours(moved)[:, :CUT], found[:, :CUT])
    return max(far, before)


def _generated(ours: HFModel, theirs: Any, prompt: Tensor) -> str:
    """Compare greedy text, token by token; return what of transformers it equals. Raises Different.

    It is its `generate`. Some types' `generate` contradicts their own forward: by an inexact cache, or by positions that the forward
    counts otherwise. There ours must equal `generate` without a cache, or the largest logits of the forward.
    """
    theirs.generation_config = GenerationConfig(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(prompt)
    with torch.no_grad():
        theirs.eval()
        forward = prompt
        for _ in range(NEW):
            forward = torch.cat((forward, theirs(input_ids=forward, use_cache=False).logits[:, -1:].argmax(-1)), 1)
        wanted = {
            "generate": theirs.generate(prompt, attention_mask=mask),
            "generate without a cache": theirs.generate(prompt, attention_mask=mask, use_cache=False),
            "forward": forward,
        }
        read, written, unread = ours.reader().reading(), prompt[0].tolist(), prompt[0].tolist()
        for _ in range(NEW):
            unread = [int(read(unread).argmax())]
            written += unread
    for name, text in wanted.items():
        if text[0].tolist() == written:
            return name
    raise Different(
        f"greedy text: {written[prompt.shape[1] :]}, transformers {wanted['generate'][0, prompt.shape[1] :].tolist()}"
    )


def _loaded(ours: Any, theirs: Any, ids: Tensor) -> dict[str, Any]:
    """Compare the exported folder, loaded as `generate` and `eval` load it, with transformers."""
    with torch.no_grad():
        far = _near("logits of the exported folder", ours(ids[:, :-1]), _theirs(theirs, ids[:, :-1]))
    return {"reloaded": far, "generated": _generated(ours, theirs, ids[:1, :8])}


def _documents(ours: HFModel, engine: Engine, ids: Tensor) -> dict[str, Any]:
    """Compare two documents in a row with each alone; where the model does not take them, a padded row with the row alone."""
    ids = ids[:, :-1]
    positions = torch.cat((torch.arange(CUT), torch.arange(LENGTH - CUT))).expand(len(ids), -1)
    with torch.no_grad(), engine.eval_context():
        if not ours.packs:
            return {}
        together = ours(ids, positions=positions)
        apart = torch.cat((ours(ids[:, :CUT]), ours(ids[:, CUT:])), 1)
        return {"packed": _near("packed documents", together, apart)}


def _step(engine: Engine, theirs: Any, ids: Tensor) -> dict[str, Any]:
    """Compare loss and gradient norm of one update."""
    batch = _batch(ids)
    labels = batch["labels"][:, 1:].flatten()
    theirs.train()
    # Loading from a folder makes trainable what a constructor froze, such as sinusoidal positions.
    frozen = {name for name, parameter in engine.bare.named_parameters() if not parameter.requires_grad}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name not in frozen)
    logits = theirs(input_ids=ids[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels, ignore_index=-100)
    loss.backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    engine.model.train()
    _, stats = run_step(engine, Progress(), lambda _: 1e-3)
    found = float(stats.loss_sum / stats.weight)
    return {
        "loss": found, "loss_difference": _near("loss", found, loss.detach()),
        "gradient_difference": _near("gradient norm", stats.grad_norm, wanted),
    }  # fmt: skip


def _evidence(engine: Engine, plan: Plan) -> str:
    """Return the state of the attention layer in a watched step."""
    choice = plan.choice("attention")
    trace = trace_step(engine, lambda: run_step(engine, Progress(), lambda _: 1e-3))
    found = CATALOG[choice.layer].verify(engine, trace, choice.options)
    if found.status.value == "inactive":
        raise Different(f"attention={choice.layer} inactive: {found.text}")
    return str(found.status.value)

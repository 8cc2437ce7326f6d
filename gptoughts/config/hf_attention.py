"""Read from transformers' source whether a model's attention function can be replaced, without importing transformers.

A plan is made without torch, so it cannot run the model. transformers' attention modules call `attention_interface(module, query, key,
value, mask, ...)`; the keyword arguments of that call tell what a function would have to do beyond attention.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CALL = "attention_interface"
PLAIN = frozenset(
    ("attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions", "deterministic",
     "cache_position", "query", "key", "value", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
)  # fmt: skip
"""Arguments that need nothing beyond attention with a mask."""
SOFT_CAPS = ("attn_logit_softcapping", "attention_softcap")
"""Keys of config.json that cap attention scores."""
MEANINGS = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "position_bias": "a bias for each pair of positions",
    "softcap": "a cap on attention scores",
    "attention_mask": "a mask that it computes from its input",
}
GIVEN_MASKS = frozenset(("attention_mask", "causal_mask", "mask"))
"""Names of masks that the base model makes for all its layers."""
OTHER_INPUTS = re.compile(r"Vision|Audio|Image|Video|Speech|Patch|Perceiver|Depth|VQ|Vqvae|VAE")
"""Classes of the parts of a model that read no text."""


def attention_needs(config: Mapping[str, Any]) -> str | None:
    """Return what the attention of a model does beyond a replaceable attention function; None if nothing, or unknown."""
    source = _modeling_file(str(config.get("model_type")))
    if source is None:
        return None
    needs = _needs(source)
    if needs is None:
        return "code of its own, without transformers' attention interface"
    capped = any(config.get(key, "the default") for key in SOFT_CAPS)
    return ", ".join(dict.fromkeys(MEANINGS.get(name, name) for name in needs if name != "softcap" or capped)) or None


@lru_cache(maxsize=64)
def _modeling_file(kind: str) -> Path | None:
    """Return the source of the modeling module of a model type; None without transformers, or for an unknown type."""
    found = find_spec("transformers")
    if found is None or not found.submodule_search_locations or not re.fullmatch(r"[\w.-]{1,100}", kind):
        return None
    models = Path(found.submodule_search_locations[0]) / "models"
    module = _special_modules(models / "auto/auto_mappings.py").get(kind, kind.replace("-", "_").replace(".", "_"))
    path = models / module / f"modeling_{module}.py"
    return path if path.is_file() else None


@lru_cache(maxsize=4)
def _special_modules(path: Path) -> dict[str, str]:
    """Return model type -> module, where they differ, as transformers lists them."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return {}
    listed = text.partition("SPECIAL_MODEL_TYPE_TO_MODULE_NAME")[2].partition("\n)")[0]
    return dict(re.findall(r'\("([^"]+)", "([^"]+)"\)', listed))


@lru_cache(maxsize=64)
def _needs(path: Path) -> tuple[str, ...] | None:
    """Return the arguments of attention calls that are not `PLAIN`; None if no class calls an attention function."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ()
    calls = list(_calls(tree))
    if not calls:
        return None
    return tuple(word.arg for call in calls for word in call.keywords if word.arg is not None and not _is_plain(word))


def _is_plain(word: ast.keyword) -> bool:
    if isinstance(word.value, ast.Constant) and word.value.value is None:
        return True
    if word.arg == "attention_mask":
        return not isinstance(word.value, ast.Name) or word.value.id in GIVEN_MASKS
    return word.arg in PLAIN


def _calls(tree: ast.Module) -> Iterator[ast.Call]:
    for kind in tree.body:
        if isinstance(kind, ast.ClassDef) and not OTHER_INPUTS.search(kind.name):
            for node in ast.walk(kind):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == CALL:
                    yield node

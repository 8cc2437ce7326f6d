"""Rows in HellaSwag's format, written for the tests, and small models with a byte-level BPE of their text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gptoughts.data.tokenizers import bpe
from tests.models.hf.test_hf import saved

SUBJECTS = ("a man", "the woman", "a small dog", "two children", "the café's cook", "a player")
VERBS = ("paints the fence", "throws the ball", "washes a car", "plays the violin", "cuts the bread", "climbs the wall")
OTHERS = ("and then sleeps.", "while it rains [step] outside.", "with great care — twice.", "before anyone can answer, loudly.")


def row(number: int) -> dict[str, Any]:
    """Row `number`: half of them have the marks of the WikiHow part."""
    subject, verb = SUBJECTS[number % 6], VERBS[number // 2 % 6]
    wiki = number % 2 == 1
    first = (
        f"[header] How to start [title] {subject} {verb}.  Later, {subject} rests. [substeps]" if wiki else f"{subject} {verb}."
    )
    endings = [f"{VERBS[(number + place) % 6]} {OTHERS[(number + place) % 4]}" for place in range(4)]
    return {
        "ind": number, "activity_label": "Home and Garden" if wiki else "Outdoors", "ctx_a": first, "ctx_b": "" if wiki else subject,
        "ctx": first if wiki else f"{first} {subject}", "endings": endings, "source_id": f"test~{number}", "split": "val",
        "split_type": "indomain", "label": number * 7 % 4,
    }  # fmt: skip


ROWS = [row(number) for number in range(12)]
TEXT = "\n".join(f"{one['activity_label']}: {one['ctx']} {' '.join(one['endings'])}" for one in ROWS)


def written(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in (ROWS if rows is None else rows)), encoding="utf-8")
    return path


def tokenizer_json(add_begin: bool = False) -> str:
    """A tokenizer.json of 320 ids; with `add_begin` its post-processor puts end-of-text before every text."""
    spec = bpe.train([TEXT], 320)
    if add_begin:
        pieces = [{"SpecialToken": {"id": bpe.END_OF_TEXT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        spec["post_processor"] = {
            "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bpe.END_OF_TEXT: {"id": bpe.END_OF_TEXT, "ids": [0], "tokens": [bpe.END_OF_TEXT]}},
        }  # fmt: skip
    return json.dumps(spec)


def model_folder(path: Path, kind: str = "llama", add_begin: bool = False, **more: Any) -> Path:
    """A transformers model with random weights and its tokenizer, as a folder that transformers opens."""
    folder = saved(path, kind, **{"vocab_size": 320, "max_position_embeddings": 128, **more})
    (folder / "tokenizer.json").write_text(tokenizer_json(add_begin), encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": bpe.END_OF_TEXT, "bos_token": bpe.END_OF_TEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return folder

"""What a run reads: text as windows of a token stream, chat and questions as tables of rows, behind one port.

Whoever trains asks a corpus for batches, for its validation batches, for its tokenizer and for its size, and never looks behind it.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.config.loader import DataConfig, Recipe
from gptoughts.data.batches import Batch, Batches, Cursor, eval_batches, rank_rows, samples_in
from gptoughts.data.chat.rows import Shape, prepare_chat
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.data.squad.examples import Questions, prepare_squad
from gptoughts.data.table import Table
from gptoughts.data.text.folder import locked
from gptoughts.data.text.shards import Shards
from gptoughts.data.text.tokenize import cache_folder, prepare
from gptoughts.data.tokenizers.tokenizer import CARD, Tokenizer, bpe_from_files

Prepare = Callable[[Batch, np.ndarray], Batch]
"""What an objective does to a batch on the host, given the global positions of its samples."""


class Corpus(ABC):
    """One tokenized corpus with its splits."""

    folder: Path
    """Where it lies; for messages."""
    tokenizer: Tokenizer
    tokenizer_folder: Path
    """What a checkpoint keeps as its tokenizer."""
    fingerprint: str
    samples: int
    """Training samples of one epoch."""
    train_tokens: int
    validates: bool
    """Whether there is a validation split."""
    unigram_entropy: float | None = None
    """Entropy of the validation tokens' own distribution in nats per token; None where labels are not all tokens."""

    @abstractmethod
    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Endless training batches of this rank from `cursor` on; `rows` is the size of the model's vocabulary."""

    @abstractmethod
    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Validation batches of this rank, as many on every rank."""


class TextCorpus(Corpus):
    """Windows of a stream of tokens."""

    def __init__(self, folder: Path, sequence_length: int) -> None:
        self.shards = Shards.open(folder)
        self.folder, self.fingerprint = self.shards.folder, self.shards.fingerprint
        self.tokenizer, self.tokenizer_folder = self.shards.tokenizer(), self.shards.folder / "tokenizer"
        self.train_tokens = len(self.shards.split("train"))
        self.samples = samples_in(self.train_tokens, sequence_length)
        splits = self.shards.index.splits
        self.validates = "val" in splits
        self.unigram_entropy = splits["val"].unigram_entropy if self.validates else None

    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Windows in the order of the recipe's seed."""
        return iter(
            Batches(
                self.shards.split("train"),
                recipe.data.sequence_length,
                recipe.train.global_batch,
                recipe.seed,
                rank,
                world_size,
                cursor,
                vocab_size=rows,
            )
        )

    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Windows spread over the validation split."""
        return eval_batches(
            self.shards.split("val"),
            recipe.data.sequence_length,
            recipe.train.global_batch,
            rank,
            world_size,
            recipe.eval.batches or None,
            vocab_size=rows,
        )


class TableCorpus(Corpus):
    """Rows of fixed length: conversations, or windows over questions and contexts."""

    def __init__(self, data: DataConfig, tables: Mapping[str, Table], questions: Questions | None = None) -> None:
        self.folder, self.tables, self.questions = Path(data.path), tables, questions
        self.tokenizer = bpe_from_files(data.tokenizer)
        self.tokenizer_folder = kept_tokenizer(self.tokenizer, data)
        self.fingerprint = tables["train"].fingerprint
        self.samples = len(tables["train"])
        self.train_tokens = self.samples * data.sequence_length
        self.validates = "val" in tables and len(tables["val"]) > 0

    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Rows in the order of the recipe's seed."""
        return self.tables["train"].batches(recipe.train.global_batch, recipe.seed, rank, world_size, cursor)

    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Rows spread over the validation table."""
        return self.tables["val"].eval_batches(recipe.train.global_batch, rank, world_size, recipe.eval.batches or None)


def kept_tokenizer(tokenizer: Tokenizer, data: DataConfig) -> Path:
    """A folder with the tokenizer and its chat template alone, for checkpoints to copy: a model's own folder holds its weights, too."""
    template = ChatTokenizer.open(data.tokenizer, data.template).template if data.format == "chat" else None
    facts = json.dumps([template.source, template.tokens], sort_keys=True) if template else ""
    said = hashlib.sha256(facts.encode()).hexdigest()
    folder = cache_folder(data) / f"tokenizer-{tokenizer.hash[:16]}-{said[:8]}"
    with locked(folder):
        if not (folder / CARD).is_file():
            if template is not None:
                template.save(folder)
            tokenizer.save(folder)  # the card comes last, and says that all is there
    return folder


def text_corpus(data: DataConfig) -> TextCorpus:
    """The text that `data` names, tokenized now if it was not before."""
    return TextCorpus(prepare(data), data.sequence_length)


def opened(recipe: Recipe) -> Corpus:
    """What the recipe reads, tokenized now if it was not before. Raises DataError."""
    data = recipe.data
    if data.format == "text":
        return text_corpus(data)
    if data.format == "chat":
        shape: Shape = "masked-diffusion" if recipe.objective == "masked-diffusion" else "next-token"
        return TableCorpus(data, prepare_chat(data, data.tokenizer, shape=shape, too_long=data.too_long))
    tables, questions = prepare_squad(data, data.tokenizer)
    return TableCorpus(data, tables, questions.get("val"))


def prepared(
    batches: Iterator[tuple[Batch, Cursor]], prepare: Prepare | None, global_batch: int, rank: int, world_size: int
) -> Iterator[tuple[Batch, Cursor]]:
    """`batches` as the objective wants them. A cursor that stands behind a batch tells the global positions of its samples."""
    if prepare is None:
        yield from batches
        return
    first, end = rank_rows(global_batch, rank, world_size)
    rows = np.arange(first, end, dtype=np.int64)
    for batch, cursor in batches:
        yield prepare(batch, cursor.samples - global_batch + rows), cursor


def prepared_validation(
    batches: Iterator[Batch], prepare: Prepare | None, global_batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Validation batches as the objective wants them; their positions count from 0 at every validation."""
    if prepare is None:
        yield from batches
        return
    first, end = rank_rows(global_batch, rank, world_size)
    rows = np.arange(first, end, dtype=np.int64)
    for number, batch in enumerate(batches):
        yield prepare(batch, number * global_batch + rows)

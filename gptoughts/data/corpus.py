"""Training data behind one interface, `Corpus`: text as windows of a token stream, chat and SQuAD as tables of rows."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gptoughts.config.loader import DataConfig, Recipe
from gptoughts.config.tasks import FORMATS, load, task_of
from gptoughts.data.batches import Batch, Batches, Cursor, eval_batches, rank_rows, samples_in
from gptoughts.data.chat.rows import Shape, prepare_chat
from gptoughts.data.chat.tokenizer import ChatTokenizer
from gptoughts.data.squad.examples import Questions, prepare_squad
from gptoughts.data.table import Table
from gptoughts.data.text.folder import folder_lock
from gptoughts.data.text.shards import Shards
from gptoughts.data.text.tokenize import cache_folder, prepare
from gptoughts.data.text.verified import verify_once
from gptoughts.data.tokenizers.tokenizer import CARD, Tokenizer, load_tokenizer

Prepare = Callable[[Batch, np.ndarray], Batch]
"""Host-side transform of a batch by the objective, given the global positions of its samples."""


class Corpus(ABC):
    """A tokenized corpus with its splits."""

    folder: Path
    """Location, for messages."""
    tokenizer: Tokenizer
    tokenizer_folder: Path
    """Folder that checkpoints copy as their tokenizer."""
    fingerprint: str
    samples: int
    """Training samples per epoch."""
    train_tokens: int
    validates: bool
    """Whether the corpus has a validation split."""
    unigram_entropy: float | None = None
    """Entropy of the validation split's unigram distribution in nats per token; None if not every token is a label."""

    @abstractmethod
    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Yield this rank's training batches without end, starting at `cursor`. `rows` is the model's vocabulary size."""

    @abstractmethod
    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Yield this rank's validation batches, the same number on every rank."""


class TextCorpus(Corpus):
    """Windows of a token stream."""

    def __init__(self, folder: Path, sequence_length: int) -> None:
        self.shards = Shards.open(folder)
        verify_once(self.shards)
        self.folder, self.fingerprint = self.shards.folder, self.shards.fingerprint
        self.tokenizer, self.tokenizer_folder = self.shards.tokenizer(), self.shards.folder / "tokenizer"
        self.train_tokens = len(self.shards.split("train"))
        self.samples = samples_in(self.train_tokens, sequence_length)
        splits = self.shards.index.splits
        self.validates = "val" in splits
        self.unigram_entropy = splits["val"].unigram_entropy if self.validates else None

    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Yield windows in the order of the recipe's seed."""
        return iter(
            Batches(
                self.shards.split("train"),
                recipe.data.sequence_length,
                recipe.train.global_batch,
                recipe.seed,
                rank,
                world_size,
                cursor=cursor,
                vocab_size=rows,
            )
        )

    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Yield windows spread over the validation split."""
        return eval_batches(
            self.shards.split("val"),
            recipe.data.sequence_length,
            recipe.train.global_batch,
            rank,
            world_size,
            limit=recipe.eval.batches or None,
            vocab_size=rows,
        )


class TableCorpus(Corpus):
    """Rows of fixed length: conversations or SQuAD windows."""

    def __init__(self, data: DataConfig, tables: Mapping[str, Table], questions: Questions | None = None) -> None:
        self.folder, self.tables, self.questions = Path(data.path), tables, questions
        self.tokenizer = load_tokenizer(data.tokenizer)
        self.tokenizer_folder = cached_tokenizer(self.tokenizer, data)
        self.fingerprint = tables["train"].fingerprint
        self.samples = len(tables["train"])
        self.train_tokens = self.samples * data.sequence_length
        self.validates = "val" in tables and len(tables["val"]) > 0

    def train(self, recipe: Recipe, rank: int, world_size: int, cursor: Any, rows: int) -> Iterator[tuple[Batch, Cursor]]:
        """Yield rows in the order of the recipe's seed."""
        return self.tables["train"].batches(recipe.train.global_batch, recipe.seed, rank, world_size, cursor)

    def validation(self, recipe: Recipe, rank: int, world_size: int, rows: int) -> Iterator[Batch]:
        """Yield rows spread over the validation table."""
        return self.tables["val"].eval_batches(recipe.train.global_batch, rank, world_size, recipe.eval.batches or None)


def cached_tokenizer(tokenizer: Tokenizer, data: DataConfig) -> Path:
    """Return a cached folder with only the tokenizer and its chat template, for checkpoints to copy (a model folder also has weights)."""
    template = ChatTokenizer.open(data.tokenizer, data.template).template if data.format == "chat" else None
    content = json.dumps([template.source, template.tokens], sort_keys=True) if template else ""
    digest = hashlib.sha256(content.encode()).hexdigest()
    folder = cache_folder(data) / f"tokenizer-{tokenizer.hash[:16]}-{digest[:8]}"
    with folder_lock(folder):
        if not (folder / CARD).is_file():
            if template is not None:
                template.save(folder)
            tokenizer.save(folder)  # writes the card last; its presence marks the folder complete
    return folder


def open_text_corpus(data: DataConfig) -> TextCorpus:
    """Return the corpus of `data.path`, tokenizing it on first use."""
    return TextCorpus(prepare(data), data.sequence_length)


def open_corpus(recipe: Recipe) -> Corpus:
    """Return the recipe's corpus, tokenizing it on first use. Raises DataError."""
    corpus: Corpus = load(FORMATS[recipe.data.format].corpus)(recipe)
    return corpus


def text_corpus_of(recipe: Recipe) -> Corpus:
    """Return the corpus of `data.format text`."""
    return open_text_corpus(recipe.data)


def chat_corpus_of(recipe: Recipe) -> Corpus:
    """Return the corpus of `data.format chat`."""
    data, shape = recipe.data, "masked-diffusion" if task_of(recipe).masks_tokens else "next-token"
    return TableCorpus(data, prepare_chat(data, data.tokenizer, shape=cast("Shape", shape), too_long=data.too_long))


def squad_corpus_of(recipe: Recipe) -> Corpus:
    """Return the corpus of `data.format squad`."""
    tables, questions = prepare_squad(recipe.data, recipe.data.tokenizer)
    return TableCorpus(recipe.data, tables, questions.get("val"))


def prepare_batches(
    batches: Iterator[tuple[Batch, Cursor]], prepare: Prepare | None, global_batch: int, rank: int, world_size: int
) -> Iterator[tuple[Batch, Cursor]]:
    """Apply `prepare` to training batches. The cursor after a batch gives the global positions of its samples."""
    if prepare is None:
        yield from batches
        return
    first, end = rank_rows(global_batch, rank, world_size)
    rows = np.arange(first, end, dtype=np.int64)
    for batch, cursor in batches:
        yield prepare(batch, cursor.samples - global_batch + rows), cursor


def prepare_validation_batches(
    batches: Iterator[Batch], prepare: Prepare | None, global_batch: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Apply `prepare` to validation batches; positions count from 0 at every validation."""
    if prepare is None:
        yield from batches
        return
    first, end = rank_rows(global_batch, rank, world_size)
    rows = np.arange(first, end, dtype=np.int64)
    for number, batch in enumerate(batches):
        yield prepare(batch, number * global_batch + rows)

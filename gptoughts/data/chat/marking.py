"""Display training samples: decoded text with the learned tokens marked, and token counts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from gptoughts.console import COLORS, escaped

if TYPE_CHECKING:
    import numpy as np

    from gptoughts.config.recipe import Recipe
    from gptoughts.data.corpus import Corpus
    from gptoughts.data.table import Table
    from gptoughts.data.tokenizers.tokenizer import Tokenizer

IGNORED = -100
Style = Literal["color", "brackets"]
MARKS: dict[Style, tuple[str, str]] = {"color": COLORS, "brackets": ("⟦", "⟧")}


def first_rows(corpus: Corpus, recipe: Recipe, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the first samples of a run: array name -> row."""
    import numpy as np

    tables: Mapping[str, Table] | None = getattr(corpus, "tables", None)
    if tables is not None:
        table = tables["train"]
        batch = table.rows(table.order(np.arange(min(count, len(table)), dtype=np.int64), recipe.seed))
        yield from rows_of(batch)
        return
    remaining = count
    for batch, _ in corpus.train(recipe, 0, 1, None, corpus.tokenizer.vocab_size):
        for row in rows_of(batch):
            yield row
            remaining -= 1
            if not remaining:
                return


def rows_of(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the rows of a host batch."""
    for index in range(len(batch["input_ids"])):
        yield {name: array[index] for name, array in batch.items()}


def learned(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a row's labels aligned with its ids, -100 elsewhere: stored labels, all ids but the first, or the answer span."""
    import numpy as np

    ids = row["input_ids"].astype(np.int64)
    if "starts" in row:
        index = np.arange(len(ids))
        return np.where((index >= row["starts"]) & (index <= row["ends"]), ids, IGNORED)
    labels = row["labels"].astype(np.int64) if "labels" in row else ids.copy()
    if "positions" not in row:
        labels[0] = IGNORED
    return labels


def documents(row: Mapping[str, np.ndarray]) -> tuple[list[slice], int]:
    """Return the slices of a row's documents, and the number of padding tokens after them."""
    import numpy as np

    width = len(row["input_ids"])
    if "mask" in row:
        used = int(row["mask"].sum())
        return [slice(0, used)], width - used
    if "positions" not in row:
        return [slice(0, width)], 0
    edges = [*np.flatnonzero(row["positions"] == 0).tolist(), width]
    slices = [slice(start, end) for start, end in pairwise(edges)]
    labels, ids = row["labels"], row["input_ids"]
    last = slices[-1]
    # Padding is a document of one repeated token without labels.
    if len(slices) > 1 and (labels[last] == IGNORED).all() and (ids[last] == ids[last][0]).all():
        return slices[:-1], last.stop - last.start
    return slices, 0


def row_summary(row: Mapping[str, np.ndarray]) -> str:
    """Return a row's token counts as text."""
    parts, padding = documents(row)
    used = len(row["input_ids"]) - padding
    labels = int((learned(row) != IGNORED).sum())
    lengths = " + ".join(f"{part.stop - part.start:,}" for part in parts)
    several = f" in {len(parts)} conversations ({lengths})" if len(parts) > 1 else ""
    return f"{used:,} tokens{several}, {padding:,} padding, {labels:,} learned ({100 * labels / max(used, 1):.1f} %)"


def render_row(tokenizer: Tokenizer, row: Mapping[str, np.ndarray], style: Style) -> str:
    """Return a row's documents as text with the learned tokens marked, without padding."""
    labels = learned(row)
    return "\n· · ·\n".join(marked(tokenizer, row["input_ids"][part], labels[part], style) for part in documents(row)[0])


def render_ids(row: Mapping[str, np.ndarray], style: Style) -> str:
    """Return the token ids of a row's documents, one line each, with the learned ones marked, without padding."""
    begin, end = MARKS[style]
    labels = learned(row)
    lines = []
    for part in documents(row)[0]:
        pairs = zip(row["input_ids"][part].tolist(), (labels[part] != IGNORED).tolist(), strict=True)
        lines.append("ids " + " ".join(f"{begin}{index}{end}" if is_learned else str(index) for index, is_learned in pairs))
    return "\n".join(lines)


def marked(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray, style: Style) -> str:
    """Return the text of `ids` with marks around learned tokens (labels other than -100) and special tokens spelled out.

    Control characters are escaped, so that a sample cannot send terminal commands.
    """
    import numpy as np

    begin, end = MARKS[style]
    is_learned = labels != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(is_learned)) + 1).tolist(), len(ids)]
    out = []
    for start, stop in pairwise(edges):
        text = escaped(spelled(tokenizer, ids[start:stop].tolist()))
        out.append(f"{begin}{text}{end}" if stop > start and is_learned[start] else text)
    return "".join(out)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of `ids` with end-of-text spelled out."""
    from gptoughts.data.chat.tokenizer import token_name
    from gptoughts.data.tokenizers.tokenizer import JsonTokenizer

    name = token_name(tokenizer, tokenizer.eot_id) if isinstance(tokenizer, JsonTokenizer) else "<|endoftext|>"
    parts: list[list[int]] = [[]]
    for index in ids:
        if index == tokenizer.eot_id:
            parts.append([])
        else:
            parts[-1].append(index)
    return name.join(tokenizer.decode(part) if part else "" for part in parts)


def split_summaries(corpus: Corpus, recipe: Recipe) -> Iterator[str]:
    """Yield lines of statistics per split."""
    tables: Mapping[str, Table] | None = getattr(corpus, "tables", None)
    if tables is None:
        yield f"train  {corpus.train_tokens:,} tokens, all learned, in {corpus.samples:,} samples of {recipe.data.sequence_length}"
        return
    for name, table in tables.items():
        stats: Mapping[str, Any] = table.stats
        if "fill" not in stats:
            yield f"{name:<6} {len(table):,} rows of {table.arrays['input_ids'].shape[1]}"
            continue
        yield (
            f"{name:<6} {stats['conversations']:,} conversations, {stats['answers']:,} answers, {stats['tokens']:,} tokens, "
            f"{100 * stats['learned'] / stats['tokens']:.1f} % learned"
        )
        yield (
            f"       {len(table):,} rows of {stats['width']:,}, {100 * stats['fill']:.1f} % full; length median {stats['median']:,}, "
            f"95 % {stats['95 %']:,}, maximum {stats['longest']:,}"
        )

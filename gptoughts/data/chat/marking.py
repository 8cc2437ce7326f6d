"""Samples as a reader can check them: decoded, with the learned tokens marked, and in figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal
from unicodedata import category

if TYPE_CHECKING:
    import numpy as np

    from gptoughts.config.recipe import Recipe
    from gptoughts.data.corpus import Corpus
    from gptoughts.data.table import Table
    from gptoughts.data.tokenizers.tokenizer import Tokenizer

IGNORED = -100
Style = Literal["color", "brackets"]
MARKS: dict[Style, tuple[str, str]] = {"color": ("\x1b[32m", "\x1b[0m"), "brackets": ("⟦", "⟧")}


def first_rows(corpus: Corpus, recipe: Recipe, count: int) -> Iterator[dict[str, np.ndarray]]:
    """The first samples of a run, one row of each of the batch's arrays."""
    import numpy as np

    tables: Mapping[str, Table] | None = getattr(corpus, "tables", None)
    if tables is not None:
        table = tables["train"]
        batch = table.rows(table.order(np.arange(min(count, len(table)), dtype=np.int64), recipe.seed))
        yield from rows_of(batch)
        return
    left = count
    for batch, _ in corpus.train(recipe, 0, 1, None, corpus.tokenizer.vocab_size):
        for row in rows_of(batch):
            yield row
            left -= 1
            if not left:
                return


def rows_of(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a host batch."""
    for index in range(len(batch["input_ids"])):
        yield {name: array[index] for name, array in batch.items()}


def learned(row: Mapping[str, np.ndarray]) -> np.ndarray:
    """What a row teaches, aligned with its ids, -100 where nothing: its labels; all but the first id; or the span of an answer."""
    import numpy as np

    ids = row["input_ids"].astype(np.int64)
    if "starts" in row:
        place = np.arange(len(ids))
        return np.where((place >= row["starts"]) & (place <= row["ends"]), ids, IGNORED)
    labels = row["labels"].astype(np.int64) if "labels" in row else ids.copy()
    if "positions" not in row:
        labels[0] = IGNORED
    return labels


def documents(row: Mapping[str, np.ndarray]) -> tuple[list[slice], int]:
    """Where a row's documents stand, and how many places behind them are padding."""
    import numpy as np

    width = len(row["input_ids"])
    if "mask" in row:
        used = int(row["mask"].sum())
        return [slice(0, used)], width - used
    if "positions" not in row:
        return [slice(0, width)], 0
    edges = [*np.flatnonzero(row["positions"] == 0).tolist(), width]
    found = [slice(start, end) for start, end in pairwise(edges)]
    labels, ids = row["labels"], row["input_ids"]
    last = found[-1]
    # Padding is a document of its own: one token again and again, none of it learned.
    if len(found) > 1 and (labels[last] == IGNORED).all() and (ids[last] == ids[last][0]).all():
        return found[:-1], last.stop - last.start
    return found, 0


def said(row: Mapping[str, np.ndarray]) -> str:
    """A row in figures."""
    parts, padding = documents(row)
    used = len(row["input_ids"]) - padding
    taught = int((learned(row) != IGNORED).sum())
    lengths = " + ".join(f"{part.stop - part.start:,}" for part in parts)
    several = f" in {len(parts)} conversations ({lengths})" if len(parts) > 1 else ""
    return f"{used:,} tokens{several}, {padding:,} of padding, {taught:,} learned ({100 * taught / max(used, 1):.1f} %)"


def shown(tokenizer: Tokenizer, row: Mapping[str, np.ndarray], style: Style) -> str:
    """A row's documents as text with the learned tokens marked, without its padding."""
    labels = learned(row)
    return "\n· · ·\n".join(marked(tokenizer, row["input_ids"][part], labels[part], style) for part in documents(row)[0])


def marked(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray, style: Style) -> str:
    """The text of `ids` with marks around what is learned (labels that are not -100). Special tokens are written out.

    Control characters are shown as escapes: a sample must not steer the terminal.
    """
    import numpy as np

    begin, end = MARKS[style]
    taught = labels != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(taught)) + 1).tolist(), len(ids)]
    out = []
    for start, stop in pairwise(edges):
        text = harmless(spelled(tokenizer, ids[start:stop].tolist()))
        out.append(f"{begin}{text}{end}" if stop > start and taught[start] else text)
    return "".join(out)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of `ids`, end-of-text written out."""
    from gptoughts.data.chat.tokenizer import name_of
    from gptoughts.data.tokenizers.tokenizer import JsonTokenizer

    name = name_of(tokenizer, tokenizer.eot_id) if isinstance(tokenizer, JsonTokenizer) else "<|endoftext|>"
    parts: list[list[int]] = [[]]
    for index in ids:
        if index == tokenizer.eot_id:
            parts.append([])
        else:
            parts[-1].append(index)
    return name.join(tokenizer.decode(part) if part else "" for part in parts)


def harmless(text: str) -> str:
    """Text whose control and format characters, but line ends, tabs and the joiner of emoji, are written as escapes."""
    kept = "\n\t\u200d"
    return "".join(
        sign if sign in kept or category(sign)[0] != "C" else sign.encode("unicode_escape", "surrogatepass").decode("ascii")
        for sign in text
    )


def totals(corpus: Corpus, recipe: Recipe) -> Iterator[str]:
    """What each split holds, a line each."""
    tables: Mapping[str, Table] | None = getattr(corpus, "tables", None)
    if tables is None:
        yield f"train  {corpus.train_tokens:,} tokens, all learned, in {corpus.samples:,} samples of {recipe.data.sequence_length}"
        return
    for name, table in tables.items():
        facts: Mapping[str, Any] = table.facts
        if "fill" not in facts:
            yield f"{name:<6} {len(table):,} rows of {table.arrays['input_ids'].shape[1]}"
            continue
        yield (
            f"{name:<6} {facts['conversations']:,} conversations, {facts['answers']:,} answers, {facts['tokens']:,} tokens of which "
            f"{100 * facts['learned'] / facts['tokens']:.1f} % are learned"
        )
        yield (
            f"       {len(table):,} rows of {facts['width']:,}, {100 * facts['fill']:.1f} % full; lengths: median {facts['median']:,}, "
            f"95 % up to {facts['95 %']:,}, longest {facts['longest']:,}"
        )

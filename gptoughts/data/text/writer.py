"""Write shards so that a kill at any time loses no token recorded in the journal.

An open shard grows in `{split}_{index:06d}.npy.part`. A full one gets its header, is synced, read back (hash, counts, document
starts) and renamed. Data is synced before the journal records it.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from gptoughts.data.text.shards import HEADER_BYTES, JOURNAL, Shard, npy_header
from gptoughts.errors import DataError
from gptoughts.files import replacing, sha256_of, sync, sync_folder

READ_TOKENS = 1 << 22


class SplitWriter:
    """Writer of one split's shards of `shard_tokens` tokens each; the last one can be shorter.

    `resume(state())` continues after a kill; the files are identical to those of an uninterrupted run.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], vocab_size: int, eot_id: int, shard_tokens: int) -> None:
        self.folder, self.split, self.dtype = folder, split, dtype
        self.eot_id, self.shard_tokens = eot_id, shard_tokens
        self.finished: list[Shard] = []
        self.histogram = np.zeros(vocab_size, dtype=np.int64)
        self.tokens_open = 0
        self.file: Any = None

    @property
    def tokens(self) -> int:
        """Number of tokens written so far, in finished shards and the open one."""
        return sum(shard.tokens for shard in self.finished) + self.tokens_open

    def path(self, index: int, end: str = ".npy") -> Path:
        """Return the file name of shard `index`."""
        return self.folder / f"{self.split}_{index:06d}{end}"

    def append(self, tokens: np.ndarray) -> None:
        """Append tokens; start a new shard when one is full."""
        done = 0
        while done < len(tokens):
            if self.file is None:
                self.file = self.path(len(self.finished), ".npy.part").open("wb", buffering=1 << 20)
                self.file.write(bytes(HEADER_BYTES))
            part = tokens[done : done + self.shard_tokens - self.tokens_open]
            self.file.write(part.data)
            self.tokens_open += len(part)
            done += len(part)
            if self.tokens_open == self.shard_tokens:
                self.finish_shard()

    def finish_shard(self) -> None:
        """Close the open shard, if any: header, sync, read back, rename."""
        if self.file is None:
            return
        index, part = len(self.finished), self.path(len(self.finished), ".npy.part")
        self.file.seek(0)
        self.file.write(npy_header(self.dtype, self.tokens_open))
        sync(self.file)
        self.file.close()
        self.file, self.tokens_open = None, 0
        shard, starts = self.read_back(index, part)
        with replacing(self.folder / shard.docs_file, durable=True) as temporary:
            temporary.write_bytes(npy_header(np.dtype(np.int64), len(starts)) + starts.astype("<i8").tobytes())
        os.replace(part, self.path(index))
        sync_folder(self.folder)
        self.finished.append(shard)

    def read_back(self, index: int, path: Path) -> tuple[Shard, np.ndarray]:
        """Read a shard from disk: return its index entry and document starts (int64), and add its tokens to the histogram."""
        digest = hashlib.sha256()
        starts, tokens, max_id = [], 0, 0
        with path.open("rb") as file:
            digest.update(file.read(HEADER_BYTES))
            while raw := file.read(READ_TOKENS * self.dtype.itemsize):
                digest.update(raw)
                part = np.frombuffer(raw, dtype=self.dtype)
                self.histogram += np.bincount(part, minlength=len(self.histogram))
                # Encoded text never holds the end-of-text id, so each one marks the start of a document.
                starts.append(np.flatnonzero(part == self.eot_id) + tokens)
                tokens, max_id = tokens + len(part), max(max_id, int(part.max()))
        documents = np.concatenate(starts)
        docs = npy_header(np.dtype(np.int64), len(documents)) + documents.astype("<i8").tobytes()
        names = (self.path(index).name, self.path(index, ".docs.npy").name)
        shard = Shard(names[0], tokens, len(documents), max_id, digest.hexdigest(), names[1], hashlib.sha256(docs).hexdigest())
        return shard, documents

    def state(self) -> dict[str, int]:
        """Sync the open shard and return the position as plain values."""
        if self.file is not None:
            sync(self.file)
        return {"shards": len(self.finished), "tokens_open": self.tokens_open}

    def resume(self, state: dict[str, int]) -> None:
        """Return to `state`: read finished shards again, truncate the open one to its recorded length, remove later files."""
        count, tokens = state["shards"], state["tokens_open"]
        for index in range(count):
            if not self.path(index).exists():
                raise DataError(f"{self.path(index)}: missing, but listed in {JOURNAL}", fix="tokenize again with --overwrite")
            shard, _ = self.read_back(index, self.path(index))
            if not self.path(index, ".docs.npy").exists() or sha256_of(self.path(index, ".docs.npy")) != shard.docs_sha256:
                raise DataError(f"{self.path(index, '.docs.npy')}: missing or damaged", fix="tokenize again with --overwrite")
            self.finished.append(shard)
        open_shard = self.path(count, ".npy.part")
        if tokens and not open_shard.exists() and self.path(count).exists():
            os.replace(self.path(count), open_shard)  # It was finished after the last journal entry.
        for path in sorted(self.folder.glob(f"{self.split}_*")):
            if path != open_shard and path.name[: len(self.split) + 7] >= open_shard.name[: len(self.split) + 7]:
                path.unlink()
        if tokens == 0:
            open_shard.unlink(missing_ok=True)
            return
        size = HEADER_BYTES + tokens * self.dtype.itemsize
        if not open_shard.exists() or open_shard.stat().st_size < size:
            raise DataError(f"{open_shard}: shorter than recorded in {JOURNAL}", fix="tokenize again with --overwrite")
        os.truncate(open_shard, size)
        self.file, self.tokens_open = open_shard.open("r+b", buffering=1 << 20), tokens
        self.file.seek(size)


def entropy(histogram: np.ndarray) -> float:
    """Return the entropy of the unigram distribution, in nats per token: the loss of a model that knows token frequencies only."""
    counts = [int(count) for count in histogram[histogram > 0]]
    total = sum(counts)
    return round(math.fsum(count * math.log(total / count) for count in counts) / total, 9) if total else 0.0

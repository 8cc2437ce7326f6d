"""Measure the data pipeline: batches from warm pages, and tokenizing against raw tiktoken on the same text.

python -m benchmarks.data --to docs/measurements/cpu/data.json
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks import front
from gptoughts.data.batches import Batches
from gptoughts.data.text.shards import Shards
from gptoughts.data.text.sources import Document, Source, open_source
from gptoughts.data.text.tokenize import tokenize
from gptoughts.data.tokenizers.tokenizer import JsonTokenizer, build_tokenizer
from gptoughts.diagnostics.bench.figures import machine_figures
from gptoughts.errors import DataError
from gptoughts.hardware.machine import probe


def bench_batches(
    sequence_length: int = 1024, global_batch: int = 64, tokens: int = 100_000_000, rounds: int = 7, shards: int = 1
) -> dict[str, Any]:
    """Measure shuffled uint16 batches from memory-mapped shards with warm pages: median and range in Mtok/s, one process."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        # One token per byte, so the corpus has exactly `tokens` tokens.
        text = rng.integers(97, 123, tokens, dtype=np.uint8).tobytes().decode("ascii")
        documents = [Document("random letters", text)]
        source = Source("random letters", (), lambda _: iter(documents))
        tokenize(source, "bytes", folder, val_fraction=0, processes=1, shard_tokens=-(-(tokens + 1) // shards))
        del source
        stream = Shards.open(folder).split("train")
        for array in stream.arrays:
            np.bincount(array[::2048])  # touch one token of each page
        batches = iter(Batches(stream, sequence_length, global_batch, seed=1))
        count = max(1, 200_000_000 // (sequence_length * global_batch))
        rates = []
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in range(count):
                next(batches)
            rates.append(count * sequence_length * global_batch / (time.perf_counter() - begun) / 1e6)
    shape = {"sequence_length": sequence_length, "global_batch": global_batch, "tokens": tokens, "shards": shards}
    return {**shape, "dtype": "uint16", "rounds": rounds, **spread("mtok_per_second", rates)}


def bench_tokenize(source: str = "python-stdlib", tokenizer: str = "gpt2", repeat: int = 4, rounds: int = 5) -> dict[str, Any]:
    """Measure whole tokenizing runs, from documents in memory to synced shards, interleaved with tiktoken's `encode_ordinary`.

    The corpus is `source`, `repeat` times. `tokenizer` is gpt2, bpe (4096 ids) or a file or folder that tiktoken can run.
    Ratios are medians over rounds of ours / tiktoken within a round; process start is included. CPU seconds are the sum over
    all processes, independent of the machine's load.
    """
    original = open_source(source)
    built = build_tokenizer(tokenizer, original, 4096)
    if not isinstance(built, JsonTokenizer) or built.encoding is None:
        raise DataError("--tokenizer: not supported by tiktoken", found=repr(tokenizer), fix="--tokenizer gpt2")
    documents = list(original.documents()) * repeat
    texts = [document.text for document in documents]
    corpus = Source(f"{source} x {repeat}", (), lambda _: iter(documents))
    encoding = built.encoding
    tokens = sum(len(encoding.encode_ordinary(text)) for text in texts)
    seconds: dict[str, list[float]] = {"tiktoken": [], "one_process": [], "two_processes": []}
    work: dict[str, list[float]] = {name: [] for name in seconds}
    for number in range(rounds):
        order = list(seconds) if number % 2 == 0 else list(reversed(seconds))
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                wall, cpu = timed(run_of(name, encoding, texts, corpus, built, Path(folder)))
            seconds[name].append(wall)
            work[name].append(cpu)
    rates = {name: [tokens / value / 1e6 for value in values] for name, values in seconds.items()}
    pairs = {
        "one_process_to_tiktoken": [a / b for a, b in zip(rates["one_process"], rates["tiktoken"], strict=True)],
        "two_processes_to_one": [a / b for a, b in zip(rates["two_processes"], rates["one_process"], strict=True)],
    }
    figures: dict[str, Any] = {
        "source": source,
        "repeat": repeat,
        "tokenizer": built.kind,
        "vocab_size": built.vocab_size,
    }
    figures |= {
        "tokens": tokens,
        "bytes": sum(len(text.encode()) for text in texts),
        "documents": len(texts),
        "rounds": rounds,
    }
    for name, values in rates.items():
        figures |= spread(f"{name}_mtok_per_second", values)
    for name, values in pairs.items():
        figures |= spread(name, values)
    for name, values in work.items():
        figures |= spread(f"{name}_cpu_seconds", values)
    return figures


def run_of(
    name: str, encoding: Any, texts: list[str], corpus: Source, tokenizer: JsonTokenizer, folder: Path
) -> Callable[[], None]:
    """Return the function to time."""
    if name == "tiktoken":

        def raw() -> None:
            for text in texts:
                encoding.encode_ordinary(text)

        return raw

    def ours() -> None:
        tokenize(corpus, tokenizer, folder, processes=1 if name == "one_process" else 2)

    return ours


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of `call`, child processes included. Runs the garbage collector first."""
    gc.collect()
    before, begun = os.times(), time.perf_counter()
    call()
    wall, after = time.perf_counter() - begun, os.times()
    return wall, sum(after[:4]) - sum(before[:4])


def spread(name: str, values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum under three keys."""
    return {
        name: round(statistics.median(values), 3),
        f"{name}_min": round(min(values), 3),
        f"{name}_max": round(max(values), 3),
    }


@click.command()
@click.option("--source", default="python-stdlib", show_default=True, metavar="PATH", help="text to tokenize")
@click.option(
    "--tokenizer", default="bpe", show_default=True, metavar="NAME", help="bpe (trained on the text), gpt2 or a folder"
)
@click.option("--to", "out", metavar="FILE", help="write JSON to FILE")
def _command(source: str, tokenizer: str, out: str | None) -> None:
    """Measure tokenizing and batches."""
    machine, path = machine_figures(probe()), front.target(out)
    for what, measure in (("batches", bench_batches), ("tokenize", partial(bench_tokenize, source, tokenizer))):
        figures = measure()
        print(what, *(f"  {name:<34} {value}" for name, value in figures.items()), sep="\n", flush=True)
        run = {"what": what, "command": front.typed("benchmarks.data"), "machine": machine, **figures}
        front.write(path, run, ("what",))


def main(arguments: list[str] | None = None) -> None:
    """Run `python -m benchmarks.data`."""
    front.run(_command, "benchmarks.data", arguments)


if __name__ == "__main__":
    main()

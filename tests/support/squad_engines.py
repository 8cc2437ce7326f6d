"""A small encoder and a small set of questions for the tests of question answering, alone or as one of several ranks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptoughts.config.loader import Recipe, from_values
from gptoughts.data.device import to_device
from gptoughts.data.squad.examples import Questions, prepare_squad
from gptoughts.data.table import Table
from gptoughts.engine.distributed.process_group import process_group
from gptoughts.engine.distributed.ranks import Ranks
from gptoughts.engine.engine import Engine
from gptoughts.engine.objectives.span_qa import QuestionAnswering
from gptoughts.engine.optim.param_groups import adamw
from gptoughts.hardware.world import World, world_from_environment
from gptoughts.inference.eval.squad import evaluate, predict
from gptoughts.models.family import custom_family

LENGTH, BATCH = 32, 8


class Encoder(nn.Module):
    """Two blocks that read both ways."""

    def __init__(self, rows: int = 96, width: int = 32) -> None:
        super().__init__()
        self.embed, self.kinds, self.places = nn.Embedding(rows, width), nn.Embedding(2, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: Tensor, token_types: Tensor, mask: Tensor) -> Tensor:
        """Logits B T 2."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        hidden = self.embed(input_ids) + self.kinds(token_types) + self.places(places)
        for block in self.blocks:
            hidden = block(hidden, src_key_padding_mask=~mask)
        return self.head(hidden)


def recipe_of(folder: Path, **data: Any) -> Recipe:
    """A recipe over `folder`/train.json, held out by articles."""
    values = {"path": str(folder / "train.json"), "cache": str(folder / "cache"), "sequence_length": LENGTH, "stride": 4}
    values |= {"format": "squad", "val_fraction": 0.3, **data}
    optim = {"learning_rate": 3e-3, "warmup_steps": 0, "weight_decay": 0.0}
    train = {"steps": 100_000, "global_batch": BATCH}
    return from_values({"name": "tiny", "data": values, "optim": optim, "train": train}, "the test").recipe


def write_questions(folder: Path, tokenizer: Any, unanswerable: bool = True) -> None:
    """Ninety questions about thirty contexts, some of several windows: which number follows the letter that is asked for?"""
    articles = []
    for n in range(30):
        words = [f"{letter} {(7 * n + 3 * k) % 10}{(n + k) % 10}" for k, letter in enumerate("abcde")]
        context = ". ".join(words + ["h i"] * (8 * (n % 3)))
        asked = []
        for k, letter in enumerate("abz" if unanswerable else "abc"):
            start = context.find(f"{letter} ") + 2
            answers = [{"text": context[start : start + 2], "answer_start": start}] if letter in context else []
            asked.append({"id": f"{n}-{k}", "question": f"{letter}?", "answers": answers, "is_impossible": not answers})
        articles.append({"title": f"title {n}", "paragraphs": [{"context": context, "qas": asked}]})
    (folder / "train.json").write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")
    tokenizer(folder / "model")


def engine_for(folder: Path, ranks: Ranks | None = None, **data: Any) -> tuple[Engine, dict[str, Table], dict[str, Questions]]:
    """An engine that can step, and the questions of `folder`."""
    recipe, device = recipe_of(folder, **data), torch.device("cpu")
    ranks = ranks or Ranks(World(), device)
    tables, questions = prepare_squad(recipe.data, folder / "model")
    torch.manual_seed(0)
    model, objective = Encoder(), QuestionAnswering()

    def batches() -> Iterator[Any]:
        for batch, cursor in tables["train"].batches(BATCH, 0, ranks.world.rank, ranks.size):
            yield to_device(objective.prepare(batch, torch.arange(len(batch["starts"])).numpy()), device), cursor

    engine = Engine(model, custom_family(model), objective, recipe, ranks, device, batches=batches())
    engine.optimizer = adamw(model, recipe.optim)
    return engine, tables, questions


def main(folder: str, out: str) -> None:
    """One rank: evaluates the untrained encoder and writes what this rank was told."""
    world = world_from_environment(os.environ)
    with process_group(world, torch.device("cpu")) as ranks:
        engine, tables, questions = engine_for(Path(folder), ranks)
        readings = [
            [reading.null, *(span.score for span in reading.spans)]
            for reading in predict(engine, tables["val"], questions["val"])
        ]
        told = evaluate(engine, tables["val"], questions["val"], out=f"{out}-files-{world.rank}")
        Path(f"{out}-{world.rank}.json").write_text(json.dumps([told, readings]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

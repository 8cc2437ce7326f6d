"""`gptoughts data show`: print training samples of a recipe, decoded, with the learned tokens marked."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from gptoughts.config.loader import load
from gptoughts.config.resolve import resolve_recipe
from gptoughts.console import print_result
from gptoughts.errors import ConfigError


def show(recipe: str | None, fields: Mapping[str, str], layers: Mapping[str, str], count: int = 3, ids: bool = False) -> int:
    """Print the first `count` samples in the recipe's data order, with `ids` their token ids, and the size of the splits.

    Raises ConfigError, DataError.
    """
    if layers:
        raise ConfigError(f"--layer.{next(iter(layers))}: data show uses no layers")
    from gptoughts.data.chat.marking import MARKS, Style, first_rows, render_ids, render_row, row_summary, split_summaries
    from gptoughts.data.corpus import open_corpus

    resolved = resolve_recipe(load(recipe or "quickstart", fields)).recipe
    corpus = open_corpus(resolved)
    style: Style = "color" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else "brackets"
    begin, end = MARKS[style]
    print_result(
        f"recipe {resolved.name}, data {resolved.data.path} ({resolved.data.format}); {begin}learned tokens{end} are marked"
    )
    for number, row in enumerate(first_rows(corpus, resolved, count), 1):
        print_result(f"--- sample {number}: {row_summary(row)}")
        print_result(render_row(corpus.tokenizer, row, style))
        if ids:
            print_result(render_ids(row, style))
    print_result("---")
    for line in split_summaries(corpus, resolved):
        print_result(line)
    return 0

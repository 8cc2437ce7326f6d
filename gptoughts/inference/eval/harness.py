"""Run tasks of lm-evaluation-harness on a loaded model: its prompts, its metrics, our forwards.

The only file that imports `lm_eval`. Token ids, truncation and scores are those of its model `hf` on the exported folder, except that
special tokens that a text spells out are encoded as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from gptoughts.data.text.sources import first_line
from gptoughts.engine.engine import Engine
from gptoughts.errors import ConfigError, DataError, nearest
from gptoughts.inference.eval.continuations import Encoder, Pair, Report, buckets, padded
from gptoughts.inference.generate.autoregressive import next_logits, reader_of
from gptoughts.inference.generate.sampling import sample
from gptoughts.models.eager import eager_inference

GENERATED = 256
"""Maximum number of new tokens where a task names none, as in lm-evaluation-harness."""
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding gives the continuation."""


class _Model:
    """The methods that lm-evaluation-harness calls on a causal language model; mixed into its `TemplateLM`."""

    backend = "causal"

    def __init__(self, engine: Engine, encoder: Encoder, batch: int, report: Report) -> None:
        super().__init__()
        self.engine, self.encoder, self.batch, self.report = engine, encoder, batch, report
        self.max_length = engine.recipe.data.sequence_length

    @property
    def eot_token_id(self) -> int:
        """End-of-text."""
        return self.encoder.end

    @property
    def prefix_token_id(self) -> int:
        """Id that stands for an empty context."""
        return self.encoder.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return the ids of a text; with `add_special_tokens` False without those that transformers puts before it."""
        ids = self.encoder.ids([string])[0]
        return ids[len(self.encoder.start) :] if add_special_tokens is False else ids

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any) -> list[Scored]:
        """Return the score of each (texts, context ids, continuation ids)."""
        pairs = [Pair(context, continuation) for _, context, continuation in requests]
        found: list[Scored] = [(0.0, False)] * len(pairs)
        longest = max((len(pair.continuation) for pair in pairs), default=0)
        if longest > self.max_length:
            raise DataError(f"--tasks: a text to score exceeds the context of {self.max_length} tokens", found=longest)
        done = 0
        with eager_inference(self.engine.bare), self.engine.eval_context():
            for chunk in buckets(pairs, self.batch):
                for index, scored in zip(chunk, self._score([pairs[index] for index in chunk]), strict=True):
                    found[index] = scored
                done += len(chunk)
                self.report(done, len(pairs))
        return found

    def _score(self, pairs: list[Pair]) -> Iterator[Scored]:
        inputs, labels = padded(pairs, self.max_length)
        logits = self.engine.bare(inputs.to(self.engine.device))  # B T V
        for row, targets in zip(logits, labels.to(self.engine.device), strict=True):
            scored = targets >= 0
            shares, wanted = row[scored].log_softmax(dim=-1, dtype=torch.float32), targets[scored]  # L V, L
            total = shares.gather(1, wanted[:, None]).double().sum()
            yield float(total), bool((shares.argmax(dim=-1) == wanted).all())

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text, in windows that score every token once."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        parts, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                parts.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context up to the first stop text, greedily unless the task asks to sample."""
        texts = []
        with eager_inference(self.engine.bare), self.engine.eval_context():
            for number, request in enumerate(requests, 1):
                context, settings = request.args
                texts.append(self._generate(context, settings))
                self.report(number, len(requests))
        return texts

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        count = int(next((settings[name] for name in LENGTH_NAMES if settings.get(name) is not None), GENERATED))
        room = self.max_length - count
        if room < 1:
            raise ConfigError(
                f"--tasks: a task generates up to {count} tokens", found=f"a model with a context of {self.max_length} tokens"
            )
        until = settings.get("until") or []
        stops = [text for text in ([until] if isinstance(until, str) else until) if text]
        temperature = 0.0 if settings.get("do_sample") is False else float(settings.get("temperature") or 0.0)
        generator = torch.Generator("cpu").manual_seed(self.engine.recipe.seed)
        ids: list[int] = []
        tokenizer, text = self.encoder.tokenizer, ""
        reader = reader_of(self.engine.bare)
        limit = min(tokenizer.vocab_size, reader.vocab_size)
        for logits in next_logits(reader, self.tok_encode(context)[-room:] or [self.prefix_token_id], ids):
            token = sample(
                logits, temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0), generator, limit
            )
            if token == self.encoder.end:
                break
            ids.append(token)
            text = tokenizer.decode(ids)
            if len(ids) == count or any(stop in text for stop in stops):
                break
        for stop in stops:
            text = text.split(stop)[0]
        return text


def demand_harness() -> None:
    """Raise ConfigError with the pip command if lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("gptoughts eval lm: needs the package lm-eval", fix="pip install 'gptoughts[lm-eval]'")


def _untrusted(named: str) -> ConfigError:
    """Build the error for task files that may be code: `!function`, Jinja outside a sandbox, loaders of pickles, other files by `include`."""
    problem = "task files can run code (!function, templates, data loaders), and --task-code is not set"
    return ConfigError(f"{named}: {problem}", fix="--task-code, if you trust these files and all that they include")


def evaluate(
    engine: Engine,
    encoder: Encoder,
    tasks: Sequence[str],
    *,
    batch: int,
    limit: int | None = None,
    few_shot: int | None = None,
    include: Path | None = None,
    trusted: bool = False,
    report: Report = lambda done, total: None,
) -> dict[str, Any]:
    """Return what `lm_eval.simple_evaluate` returns: `results`, `versions`, `n-shot`, `samples` and more.

    tasks     names of lm-evaluation-harness, or paths of task files (.yaml)
    limit     rows per task, the first ones
    few_shot  examples in the prompt; None takes the task's own number
    include   folder with more task files
    trusted   run the code of task files that are not lm-eval's own

    Raises ConfigError for unknown tasks and task files that are not trusted, DataError where their data cannot be loaded.
    """
    demand_harness()
    if include is not None and not trusted:
        raise _untrusted(f"--include {include}")
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.task_index and not Path(task).is_file()]
    if unknown:
        raise ConfigError(
            f"--tasks: lm-eval {version('lm_eval')} has no task {', '.join(map(repr, unknown))}"
            f"{nearest(unknown[0], manager.all_tasks)}",
            fix="lm-eval ls tasks, or --include FOLDER with task files",
        )
    files = [task for task in tasks if task not in manager.task_index]
    if files and not trusted:
        raise _untrusted(f"--tasks {files[0]}")
    try:
        loaded = manager.load(list(tasks))
    except Exception as error:  # Data sets of the Hub raise errors of many types.
        raise DataError(f"--tasks {','.join(tasks)}: data cannot be loaded ({first_line(error)})") from error
    manager.load = lambda task_list: loaded
    model = type("GptoughtsModel", (_Model, TemplateLM), {})(engine, encoder, batch, report)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), num_fewshot=few_shot, limit=limit, task_manager=manager
    )
    return found


def score_rows(results: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Return (task, metric, value, standard error or None) of all numbers in `results`; filters other than none follow the metric."""
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            name, _, filtered = key.partition(",")
            if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = found.get(f"{name}_stderr,{filtered}")
            shown = name if filtered == "none" else f"{name} ({filtered})"
            rows.append((task, shown, float(value), float(error) if isinstance(error, int | float) else None))
    return rows

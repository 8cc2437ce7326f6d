"""lm-evaluation-harness on our models: its digits on a folder of transformers, on a run and on the run's export, and one line for errors."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptoughts
from gptoughts.errors import ConfigError, DataError
from gptoughts.inference.eval import harness
from gptoughts.inference.eval.continuations import encoder_of, log_likelihoods, tokenizer_settings
from gptoughts.inference.eval.hellaswag import accuracies, prepare, read_examples
from gptoughts.inference.export_adapter import export_checkpoint
from gptoughts.inference.load import LoadedModel, load
from tests.support.harness_tasks import generation_task, local_hellaswag, rolling_task
from tests.support.hellaswag_rows import TEXT, model_folder, written

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install lm-eval")
PLAIN = {"compile": "eager", "host": "system", "precision": "fp32"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name, folder in (("XDG_CACHE_HOME", "cache"), ("HF_DATASETS_CACHE", "datasets"), ("HF_MODULES_CACHE", "modules")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path


def theirs(folder: Path, tasks: Path, names: list[str]) -> dict[str, Any]:
    """What the harness finds by its own model for folders of transformers."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return dict(lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0))


def ours(loaded: LoadedModel, tasks: Path, names: list[str]) -> dict[str, Any]:
    encoder = encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder))
    return harness.evaluate(loaded.engine, encoder, names, batch=5, include=tasks, trusted=True)


def likelihoods(found: dict[str, Any], task: str) -> np.ndarray:
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return np.array([float(answer[0]) for sample in samples for answer in sample["filtered_resps"]])


@pytest.mark.parametrize("add_begin", [False, True])
def test_both_give_the_harness_digits_on_a_folder(add_begin: bool, here: Path) -> None:
    """The length of 44 tokens cuts some contexts."""
    folder = model_folder(here / "model", "llama", add_begin, max_position_embeddings=44)
    rows = written(here / "rows.jsonl")
    tasks = local_hellaswag(here / "tasks", rows)
    expected = theirs(folder, tasks, ["local_hellaswag"])
    loaded = load(str(folder))
    encoder = encoder_of(loaded.tokenizer, tokenizer_settings(loaded.recipe, loaded.folder))
    benchmark = prepare(encoder, loaded.recipe.data.sequence_length, read_examples(str(rows)))
    assert 0 < benchmark.truncated < len(benchmark.pairs)
    values = log_likelihoods(loaded.engine, benchmark.pairs, batch=7)
    assert values == pytest.approx(likelihoods(expected, "local_hellaswag"), abs=1e-4)
    scores = accuracies(benchmark.examples, values, [len(pair.continuation) for pair in benchmark.pairs])
    through = ours(loaded, tasks, ["local_hellaswag"])
    for name in ("acc", "acc_norm"):
        assert expected["results"]["local_hellaswag"][f"{name},none"] == scores[name]
        assert through["results"]["local_hellaswag"][f"{name},none"] == scores[name]
    rows_shown = harness.score_rows(through)
    assert [(task, metric) for task, metric, _, _ in rows_shown] == [
        ("local_hellaswag", "acc"),
        ("local_hellaswag", "acc_norm"),
    ]
    assert all(error is not None for *_, error in rows_shown)


def test_a_run_and_its_export_have_the_digits_of_the_harness(here: Path) -> None:
    """Multiple choice, a rolling likelihood over more than one window, and greedy generation up to a stop."""
    Path("text.txt").write_text(TEXT * 8, encoding="utf-8")
    values = {
        "name": "tiny", "data.path": "text.txt", "data.train_bpe": 300, "data.sequence_length": 64, "train.steps": 8,
        "train.global_batch": 4, "optim.warmup_steps": 0, "optim.learning_rate": 0.01, "eval.batches": 1, "sample.tokens": 4,
        "model.depth": 2, "model.width": 64, "model.heads": 2, "model.qk_norm": False,
    }  # fmt: skip
    run = gptoughts.train(values, layers=PLAIN, run="tiny", verbose=False).checkpoint
    assert run is not None
    export_checkpoint(str(run), here / "exported")
    tasks = local_hellaswag(here / "tasks", written(here / "rows.jsonl"))
    names = ["local_hellaswag", rolling_task(tasks, TEXT), generation_task(tasks, ["Outdoors: a man", "Home and Garden: How"])]
    expected = theirs(here / "exported", tasks, names)
    for place in (run, here / "exported"):
        found = ours(load(str(place)), tasks, names)
        for name in names:
            for key, value in expected["results"][name].items():
                if isinstance(value, float):
                    assert found["results"][name][key] == pytest.approx(value, rel=1e-5), (place, name, key)
        written_texts = [sample["filtered_resps"] for sample in found["samples"][names[2]]]
        assert written_texts == [sample["filtered_resps"] for sample in expected["samples"][names[2]]] and all(written_texts)


def test_unknown_tasks_and_data_that_cannot_be_loaded_are_one_line(here: Path) -> None:
    loaded = load(str(model_folder(here / "model")))
    tasks = local_hellaswag(here / "tasks", here / "absent.jsonl")
    with pytest.raises(
        ConfigError, match=r"--tasks: lm-eval .* has no task 'local_helaswag' \(did you mean 'local_hellaswag'\?\)"
    ):
        ours(loaded, tasks, ["local_helaswag"])
    with pytest.raises(DataError, match=r"--tasks local_hellaswag: data cannot be loaded"):
        ours(loaded, tasks, ["local_hellaswag"])
    generation_task(tasks, ["Outdoors"], count=128)
    with pytest.raises(ConfigError, match=r"generates up to 128 tokens. Found a model with a context of 128 tokens"):
        ours(loaded, tasks, ["local_generation"])


def test_greedy_decoding_is_told_from_other_likelihoods(here: Path) -> None:
    loaded = load(str(model_folder(here / "model")))
    model = harness._Model(loaded.engine, encoder_of(loaded.tokenizer, None), 4, lambda done, total: None)
    context = [1, 2, 3]
    with torch.no_grad():
        best = int(loaded.model(torch.tensor([context]))[0, -1].argmax())
    found = model._loglikelihood_tokens([("", context, [best]), ("", context, [(best + 1) % 320])])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]
    assert model.tok_encode("ab", add_special_tokens=False) == model.tok_encode("ab")

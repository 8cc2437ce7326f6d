"""Task files of lm-evaluation-harness run code only with consent. The controls show that the harness alone runs it."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gptoughts.errors import ConfigError
from gptoughts.inference.eval import harness

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install lm-eval")
DATA = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\noutput_type: generate_until\n"
ESCAPE = "{{ cycler.__init__.__globals__.os.system('echo x > $MARK') }}"
TASKS = {
    "function": "doc_to_text: !function u.text\ndoc_to_target: a\n",
    "tag by a directive": "doc_to_text: !f!tion u.text\ndoc_to_target: a\n",
    "template": f'doc_to_text: "{ESCAPE}"\ndoc_to_target: a\n',
    "class": "class: !function u.text\n",
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that planted code writes; the current folder has the rows of the tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rows.jsonl").write_text('{"a": "b"}\n')
    return tmp_path / "mark"


def planted(kind: str, place: Path) -> Path:
    """A folder with a task file and the code that it names."""
    folder = place / "tasks"
    folder.mkdir()
    (folder / "u.py").write_text("import os\nopen(os.environ['MARK'], 'a').write('x')\ndef text(doc): return 'a'\n")
    head = "%TAG !f! !func\n---\n" if "directive" in kind else ""
    (folder / "t.yaml").write_text(head + DATA + TASKS[kind])
    return folder


def evaluated(**options: Any) -> None:
    harness.evaluate(None, None, batch=1, **options)  # type: ignore[arg-type]  # refused before a model is used


def test_a_task_file_runs_no_code_without_consent(mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # The index of all tasks of the harness takes seconds.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    folder = planted("function", tmp_path)
    with pytest.raises(ConfigError, match=r"--tasks tasks/t.yaml: task files can run code [^\0]*Try: --task-code"):
        evaluated(tasks=["tasks/t.yaml"])
    with pytest.raises(ConfigError, match=r"--include .*tasks: task files can run code"):
        evaluated(tasks=["t"], include=folder)
    assert not mark.exists()


@pytest.mark.parametrize("kind", TASKS)
def test_control_the_harness_runs_it(kind: str, mark: Path, tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    planted(kind, tmp_path)
    try:
        loaded = TaskManager(include_defaults=False).load(["tasks/t.yaml"])
        task = next(iter(loaded["tasks"].values()))
        task.doc_to_text(task.test_docs()[0])
    except (TypeError, ValueError, AttributeError):
        assert kind == "class", "the module of a class that is none has been imported"
    assert mark.read_text() and os.path.exists("rows.jsonl")

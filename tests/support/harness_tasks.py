"""Tasks of lm-evaluation-harness on local rows: its own definitions, with another place of the data."""

from __future__ import annotations

import json
from pathlib import Path


def local_hellaswag(folder: Path, rows: Path) -> Path:
    """Write a folder with the task `local_hellaswag`: the harness's `hellaswag` on the JSON Lines file `rows`."""
    import lm_eval.tasks

    original = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"include: {original}",
        "task: local_hellaswag",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{validation: {rows.resolve()}}}}}",
        "training_split: null",
    ]
    (folder / "local_hellaswag.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def rolling_task(folder: Path, text: str) -> str:
    """Add a task with the perplexity of one text per byte and word; returns its name."""
    (folder / "rolling.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    return _task(
        folder,
        "rolling",
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
    )


def generation_task(folder: Path, prompts: list[str], count: int = 12) -> str:
    """Add a task that continues each prompt greedily up to a line's end or `count` tokens; returns its name."""
    rows = "".join(json.dumps({"prompt": prompt, "answer": "a dog"}) + "\n" for prompt in prompts)
    (folder / "generation.jsonl").write_text(rows, encoding="utf-8")
    return _task(
        folder,
        "generation",
        "output_type: generate_until\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{answer}}'\n"
        f'generation_kwargs: {{until: ["\\n", dog], max_gen_toks: {count}, do_sample: false}}\n'
        "metric_list: [{metric: exact_match}]",
    )


def _task(folder: Path, name: str, lines: str) -> str:
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {(folder / f'{name}.jsonl').resolve()}}}}}\ntest_split: test"
    (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{data}\n{lines}\n", encoding="utf-8")
    return f"local_{name}"

"""No file makes a reader raise anything but an error of ours, hang or fill the memory. The long search is `python -m tests.fuzz`."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoughts.processes import LimitedChild, LimitExceeded
from tests.fuzz.__main__ import MOST_STEPS, new_child
from tests.fuzz.child import ADDRESS_SPACE
from tests.fuzz.mutations import NAMES
from tests.fuzz.readers import HERE, READERS

EXAMPLES = 80
FEWER = {"gguf": 3, "config": 40}
"""Cases of readers that take longer."""
CASES = sorted(path for path in (HERE / "cases").glob("*/*") if path.is_file())


@pytest.fixture(scope="module")
def child() -> Iterator[LimitedChild]:
    """One child for all readers: it imports torch and transformers once."""
    made = new_child()
    yield made
    made.close()


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_refused(name: str, child: LimitedChild) -> None:
    seeds = child.ask({"reader": name})["seeds"]
    for seed in range(seeds):
        found = child.ask({"reader": name, "seed": seed, "steps": []})
        assert found["outcome"] == "read" or name == "deepspeed", f"the control: an unchanged file is read: {found}"
    steps = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2**32 - 1)), min_size=1, max_size=MOST_STEPS)

    @settings(max_examples=FEWER.get(name, EXAMPLES), derandomize=True, database=None)
    @given(seed=st.integers(0, seeds - 1), steps=steps)
    def search(seed: int, steps: list[tuple[str, int]]) -> None:
        found = child.ask({"reader": name, "seed": seed, "steps": steps})
        assert found["outcome"] != "crash", f"{found['error']}\n{found['trace']}"

    search()


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_files_that_once_crashed_a_reader(path: Path, child: LimitedChild) -> None:
    seed = int(path.name.partition("-")[0])
    request = {"reader": path.parent.name, "seed": seed, "content": base64.b64encode(path.read_bytes()).decode()}
    found = child.ask(request)
    assert found["outcome"] != "crash", f"{found['error']}\n{found['trace']}"


def test_control_the_harness_finds_what_no_reader_may_do() -> None:
    child = LimitedChild("tests.fuzz.child", "answering", 2, ADDRESS_SPACE)
    steps = [("flip", 1)]
    for name, said in (("traceback", "TypeError"), ("greedy", "MemoryError"), ("panic", "PanicException")):
        found = child.ask({"reader": name, "seed": 0, "steps": []})
        assert found["outcome"] == "crash" and said in found["error"]
    with pytest.raises(LimitExceeded, match="takes too long"):
        child.ask({"reader": "endless", "seed": 0, "steps": steps})
    child.close()

"""Memory that runs out: one process goes on with the same batch in smaller forwards, several leave together and are started again with less."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptoughts.engine.objectives.base import Objective, WrappedObjective
from gptoughts.engine.oom import ReducedMicroBatch, is_out_of_memory, next_micro_batch, read_reduced, write_reduced
from gptoughts.errors import RunError
from tests.engine.test_ddp import launch
from tests.support.engines import engine_of, plan_of, random_batches, recipe_of, steps

GREEDY = """
import os
import torch
from gptoughts.engine.objectives.base import NextToken

class Greedy(NextToken):
    '''Asks for more memory than there is where more than so many sequences come at once, and at a chosen rank only.'''

    def __call__(self, model, batch):
        if len(batch["input_ids"]) > int(os.environ["MOST"]) and os.environ.get("RANK", "0") == os.environ.get("GREEDY_RANK", "0"):
            torch.empty(2**46)
        return super().__call__(model, batch)

OBJECTIVES = {"greedy": Greedy}
"""


def test_an_allocation_that_cannot_be_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46)
    assert is_out_of_memory(caught.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit")) and not is_out_of_memory(ValueError("can't allocate memory"))


@given(st.integers(1, 512), st.integers(1, 512))
def test_the_smaller_micro_batch_cuts_the_share_evenly(sequences: int, share: int) -> None:
    found = next_micro_batch(sequences, share)
    if found is None:
        assert sequences == 1
    else:
        assert share % found == 0 and 1 <= found <= sequences / 2


class Greedy(WrappedObjective):
    """An objective that asks for more memory than there is, for so many sequences, in a chosen forward."""

    def __init__(self, inner: Objective, most: int) -> None:
        super().__init__(inner)
        self.most, self.refused = most, 0

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = self.objective(model, batch)
        if len(batch["input_ids"]) > self.most:
            self.refused += 1
            torch.empty(2**46)
        return loss


class _Kept(torch.autograd.Function):
    """Saves what it passes on, and waits in the backward's queue while what was computed after it fails."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
        ctx.saved = saved
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.empty(2**46)


class GreedyBackward(Greedy):
    """Fails in the backward, and tells at the next forward which of the failed one's tensors are still there."""

    saved: weakref.ref[torch.Tensor] | None = None

    def __call__(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert self.saved is None or self.saved() is None, "the failed backward's activations are still held"
        loss = self.objective(model, batch)
        if len(batch["input_ids"]) > self.most:
            self.refused += 1
            activation = torch.ones(1000)
            self.saved = weakref.ref(activation)
            kept = _Kept.apply(loss, activation)
            return kept + _Fails.apply(loss)  # type: ignore[no-any-return, no-untyped-call]
        return loss


def test_a_backward_that_failed_holds_nothing() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.objective = GreedyBackward(engine.objective, 1)
        steps(engine, 2)
        assert engine.objective.refused == 2 and engine.micro_batch == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_batch_comes_again_in_smaller_forwards(dropout: float, caplog: pytest.LogCaptureFixture) -> None:
    """Losses and weights are to the bit those of a run that had the small micro-batch from the start, draws of dropout among them."""
    recipe = recipe_of("modern")
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dropout": dropout})})
    results = []
    caplog.set_level(logging.INFO, "gptoughts")
    for size, most in ((4, 1), (1, 4)):
        torch.manual_seed(3)
        layers = {"microbatch": "fixed", "microbatch.sequences": size}
        with engine_of(recipe, plan_of(recipe, layers), random_batches(recipe, ragged=True)) as engine:
            engine.objective = Greedy(engine.objective, most)
            losses = steps(engine, 3)
            results.append((losses, [parameter.detach().clone() for parameter in engine.parameters()]))
            assert engine.objective.refused == (2 if size == 4 else 0)  # type: ignore[attr-defined]
            assert engine.counters.micro_batches == 3 * 4
    assert results[0][0] == results[1][0]
    assert all(torch.equal(one, other) for one, other in zip(results[0][1], results[1][1], strict=True))
    said = caplog.text
    assert "memory ran out with 4 sequences per forward; the same batch again with 2" in said
    assert "memory ran out with 2 sequences per forward; the same batch again with 1" in said


def test_loads_of_experts_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that is taken again moves the routers' biases as much as one that was taken once."""
    recipe, biases = recipe_of("deepseek", experts={"balance_weight": 0.0, "bias_rate": 0.01}), []
    for size, most in ((4, 2), (2, 4)):
        with engine_of(recipe, plan_of(recipe, {"microbatch": "fixed", "microbatch.sequences": size})) as engine:
            engine.objective = Greedy(engine.objective, most)
            steps(engine, 2)
            biases.append([buffer.clone() for name, buffer in engine.bare.named_buffers() if "bias" in name])
    assert biases[0] and all(torch.equal(one, other) for one, other in zip(*biases, strict=True))


def test_one_sequence_that_is_too_much_is_one_message() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.objective = Greedy(engine.objective, 0)
        with pytest.raises(RunError, match=r"out of memory with one sequence per forward: .*allocate.*\n  Try: gptoughts plan"):
            steps(engine, 1)


def test_weights_that_moved_in_the_backward_are_not_moved_twice() -> None:
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.repeatable = False
        engine.objective = Greedy(engine.objective, 2)
        with pytest.raises(
            RunError,
            match=r"with 4 sequences per forward, after this backward updated some weights(.|\n)*--layer.update after-clip",
        ):
            steps(engine, 1)


def test_what_was_written_down_holds_for_the_same_plan_only(tmp_path: Path) -> None:
    assert read_reduced(tmp_path, 8) is None
    write_reduced(tmp_path, ReducedMicroBatch(2, 8))
    assert read_reduced(tmp_path, 8) == ReducedMicroBatch(2, 8) and read_reduced(tmp_path, 4) is None
    (tmp_path / "micro_batch.json").write_text("{")
    with pytest.raises(RunError, match=r"micro_batch.json: not readable (.|\n)*Try: rm "):
        read_reduced(tmp_path, 8)


def test_ranks_that_run_out_together_all_write_it_down(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from gptoughts.engine.oom import ReducedMicroBatch, write_reduced
for _ in range(300):
    write_reduced(Path(sys.argv[1]), ReducedMicroBatch(2, 8))
"""
    ranks = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    told = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    assert read_reduced(tmp_path, 8) == ReducedMicroBatch(2, 8) and len(list(tmp_path.iterdir())) == 1


LIMITED = textwrap.dedent(
    """
    import logging, resource, sys, torch
    from tests.support import engines
    logging.basicConfig(stream=sys.stdout, level=logging.INFO)
    engines.LENGTH = 512
    from tests.support.engines import engine_of, plan_of, recipe_of, steps
    recipe = recipe_of("modern")
    with engine_of(recipe, plan_of(recipe)) as engine:
        engine.micro_batch = 1
        steps(engine, 1)
        engine.micro_batch = None
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20),) * 2)
        loss = steps(engine, 1)[0]
    print("micro-batch", engine.reduced_from, loss == loss)
    """
)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the size of the process from /proc")
def test_a_process_whose_memory_is_limited_goes_on() -> None:
    """A limit of the operating system, a real allocator, and a step that finishes: one sequence fits in 30 MiB more and two do not in 50."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what was freed goes back to the system, not into holes that no later tensor fits
    }
    ran = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "the same batch again with 1," in ran.stdout and "micro-batch 4 True" in ran.stdout


TINY = (
    "--plugin {folder}/greedy.py --objective greedy --data.path {folder}/text.txt --data.tokenizer bytes --data.sequence-length 16 "
    "--model.depth 1 --model.width 32 --model.heads 2 --train.steps 2 --train.global-batch 8 --eval.batches 1 --sample.tokens 4 "
    "--numerics off --layer.microbatch fixed --layer.microbatch.sequences 4"
)


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a tiny run whose objective is greedy."""
    (tmp_path / "greedy.py").write_text(GREEDY, encoding="utf-8")
    (tmp_path / "text.txt").write_text("so much text that two ranks find enough in it\n" * 200, encoding="utf-8")
    return shlex.split(TINY.format(folder=tmp_path))


def test_ranks_leave_together_and_are_started_again_with_less(tmp_path: Path, flags: list[str]) -> None:
    words = ["-m", "gptoughts", "train", "quickstart", "--name", "two", *flags]
    first = launch(2, *words, cwd=tmp_path, MOST="2", GREEDY_RANK="1")
    assert first.returncode != 0
    assert "out of memory on rank 1 with 4 sequences per forward" in first.stderr
    assert "trainer.py" not in first.stderr, "a rank printed a traceback; torchrun prints one of its own"
    assert "exitcode  : 75" in first.stderr
    assert json.loads((tmp_path / "out" / "two" / "micro_batch.json").read_text()) == {"sequences": 2, "planned": 4}
    again = launch(2, *words, cwd=tmp_path, MOST="2", GREEDY_RANK="1")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "micro-batch of 2 sequences instead of 4: an earlier attempt ran out of memory" in again.stdout


@pytest.mark.slow
def test_the_script_starts_ranks_again(tmp_path: Path, flags: list[str]) -> None:
    """Until the micro-batch fits: 4, then 2, then 1."""
    script = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    command = [str(script), "2", "quickstart", "--run-dir", f"{tmp_path}/two", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MOST": "1", "VIRTUAL_ENV": sys.prefix}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("restarting with the smaller micro-batch") == 2
    assert "micro-batch of 1 sequences instead of 4" in done.stdout

"""Ranks that `gptoughts train` starts: how many, refused numbers, words that reach them, exit codes, signals."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts.api import decide
from gptoughts.engine.distributed.elastic import exit_code
from gptoughts.errors import ConfigError, PlanError
from tests.cli.test_main import MACHINES, here, said  # noqa: F401 - a fixture
from tests.support.golden_files import ROOT

EIGHT, CPU = str(MACHINES / "h100x8.json"), str(MACHINES / "cpu.json")


def ranks(machine: str, recipe: str = "gpt-1b", **words: object) -> tuple[int, int]:
    world = decide(recipe, machine=machine, every_gpu=True, **words).world  # type: ignore[arg-type]
    return world.world_size, world.local_world_size


def test_all_gpus_by_default_and_fewer_on_request() -> None:
    assert ranks(EIGHT) == (8, 8)
    assert ranks(EIGHT, gpus=1) == ranks(EIGHT, ranks=1) == (1, 1)
    assert ranks(EIGHT, gpus=4) == ranks(EIGHT, ranks=4) == (4, 4)
    assert ranks(EIGHT, ranks=16) == (16, 8), "two machines, to plan for"
    assert ranks(CPU, "quickstart") == (1, 1)
    assert ranks(CPU, "quickstart", ranks=2) == (2, 2)
    assert decide("gpt-1b", machine=EIGHT).world.world_size == 1, "a Python process uses one"


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"--gpus: 9 GPUs on 8 x (.|\n)*Found 8(.|\n)*--gpus 8"):
        ranks(EIGHT, gpus=9)
    with pytest.raises(ConfigError, match=r"--gpus: 2 GPUs on (.|\n)*--ranks 2"):
        ranks(CPU, "quickstart", gpus=2)
    with pytest.raises(PlanError, match=r"--train.global-batch 8 or 16, or --gpus 6"):
        ranks(EIGHT, fields={"train.global_batch": "12"})


def test_ranks_of_a_launcher_are_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ranks(EIGHT) == ranks(EIGHT, ranks=2) == (2, 2)
    with pytest.raises(ConfigError, match=r"--ranks 4: torchrun started another number of ranks. Found 2"):
        ranks(EIGHT, ranks=4)


def test_the_old_name_of_a_flag(here: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    code, _, err = said("train quickstart --data.path none.txt --run .hidden", capsys)
    assert code == 2 and err.count("note: --run is now --name") == 1
    assert "--name: '.hidden' is not a folder name" in err


def test_the_first_failure_decides_the_exit_code() -> None:
    assert exit_code([-15, 2, 1]) == 2
    assert exit_code([-9, -15]) == 137


def test_torchrun_takes_none_of_our_flags_for_its_own() -> None:
    from torch.distributed.run import parse_args

    words = shlex.split("train gpt-1b --name first --ranks 8 --gpus 8 --run-dir d --resume never --strict --profile auto")
    given = parse_args(["--nproc-per-node", "8", "-m", "gptoughts", *words])
    assert given.training_script_args == words


TINY = (
    "--data.path text.txt --data.cache cache --data.tokenizer bytes --data.sequence-length 16 --model.depth 1 --model.width 32 "
    "--model.heads 2 --train.steps 2 --train.global-batch 8 --eval.batches 1 --sample.tokens 4 --numerics off"
)


@pytest.mark.slow
def test_two_ranks_train_and_user_errors_exit_with_2_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("so much text that two ranks find enough in it\n" * 200, encoding="utf-8")

    def train(words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gptoughts", "train", "quickstart", "--ranks", "2", *shlex.split(f"{TINY} {words}")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("OMP_NUM_THREADS", None)
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=400)

    ran = train("--name two")
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "two" / "plan.json").read_text())["world_size"] == 2
    assert ran.stdout.count("step 2/2") == 1 and "overrides the plan's" not in ran.stdout
    wrong = train("--name two --resume nowhere")
    assert wrong.returncode == 2, wrong.stderr[-3000:]
    assert wrong.stderr.count("error: ") == 1 and "Traceback" not in wrong.stderr and "ChildFailedError" not in wrong.stderr

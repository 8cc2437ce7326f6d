"""`gptoughts launch`: the job file, the commands of mpirun and torchrun, and that what is printed is what is run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_main import here, said

__all__ = ["here"]

RUN = "gpt-1b --profile h100-fp8 --train.steps 5 --layer.microbatch.sequences 4"
TRAIN = ["train", "gpt-1b", "--profile", "h100-fp8", "--train.steps", "5", "--layer.microbatch.sequences", "4"]


def test_a_job_file_is_shell_with_every_setting(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "site.toml").write_text(
        '[slurm]\npartition = "gpu"\naccount = "mine"\ntime = "8:00:00"\nmodules = ["cuda/12"]\noptions = ["--exclusive"]\n'
        'environment = "my env.sh"\n', encoding="utf-8"
    )  # fmt: skip
    line = f"launch slurm {RUN} --name 'a b' --site site.toml --nodes 2 --gpus-per-node 8 --qos high"
    code, out, err = said(f"{line} --dry-run", capsys)
    assert (code, err) == (0, "")
    assert not (here / "logs").exists()
    subprocess.run(["bash", "-n"], input=out, text=True, check=True)
    options = [row.removeprefix("#SBATCH ") for row in out.splitlines() if row.startswith("#SBATCH")]
    assert {"--job-name='a b'", "--partition=gpu", "--account=mine", "--time=8:00:00", "--qos=high", "--nodes=2", "--ntasks-per-node=8",
            "--gpus-per-node=8", "--signal=B:USR1@120", "--requeue", "--exclusive"} <= set(options)  # fmt: skip
    assert "module load cuda/12\n. 'my env.sh'\n" in out
    started = next(row for row in out.splitlines() if " -m gptoughts " in row)
    assert shlex.split(started.partition("<")[0]) == ["python", "-P", "-m", "gptoughts", *TRAIN, "--name", "a b"]
    code, written, err = said(line, capsys)
    assert code == 0 and written.splitlines()[-1] == "next        sbatch 'logs/a b.sbatch'"
    assert (here / "logs" / "a b.sbatch").read_text(encoding="utf-8") == out


def test_submit_hands_the_file_to_sbatch(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{here}:{os.environ['PATH']}")
    (here / "sbatch").write_text('#!/bin/sh\necho "Submitted $1"\nexit 7\n', encoding="utf-8")
    (here / "sbatch").chmod(0o755)
    code, out, _ = said("launch slurm quickstart --name x --to jobs/x.sbatch --submit", capfd)
    assert (code, out.splitlines()[-1]) == (7, "Submitted jobs/x.sbatch")


@pytest.mark.parametrize(
    ("line", "begins"),
    [
        (
            "launch mpi RUN --ranks 4 --hostfile hosts --name x --dry-run",
            ["mpirun", "-np", "4", "--bind-to", "none", "--hostfile", "hosts"],
        ),
        ("launch torchrun RUN --ranks 8 --name x", ["-P", "-m", "gptoughts", "train"]),
    ],
)
def test_other_launchers(line: str, begins: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(line.replace("RUN", RUN), capsys)
    assert (code, err) == (0, "")
    words = [word for word in shlex.split(out) if word != sys.executable]
    assert words[: len(begins)] == begins
    words = words[:-2] if words[-2:] == ["--ranks", "8"] else words
    assert words[-len(TRAIN) - 2 :] == [*TRAIN, "--name", "x"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("launch slurm quikstart", "no such recipe (did you mean 'quickstart'?)"),
        ("launch slurm quickstart --partitoin x", "--partitoin: no such flag (did you mean '--partition'?)"),
        ("launch slurm quickstart --train.steps x", "train.steps"),
        ("launch slurm quickstart --time soon", "slurm.time: "),
        ("launch slurm quickstart --site none.toml", "--site none.toml: no such file"),
        ("launch torchrun quickstart", "Missing option '--ranks'"),
        ("launch mpi quikstart --ranks 2", "no such recipe"),
    ],
)
def test_mistakes_write_no_file(line: str, expected: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(line, capsys)
    assert code == 2 and expected in err and "Traceback" not in err
    assert not list(here.iterdir())


def test_without_sbatch_the_error_names_the_way_out(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(here))
    code, _, err = said("launch slurm quickstart --name x --submit", capsys)
    assert code == 2 and "sbatch: not found on this machine" in err


@pytest.mark.parametrize("place", ["folder", "file/x", "/proc/none/x"])
def test_a_job_file_that_cannot_be_written_is_one_error(place: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "folder").mkdir()
    (here / "file").touch()
    code, out, err = said(f"launch slurm quickstart --to {place}", capsys)
    assert (code, out) == (2, "") and err.startswith(f"error: --to {place}: cannot be written (")

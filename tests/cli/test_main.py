"""The command line: what is printed, and one message with exit code 2 for what cannot be, with nothing written."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from gptoughts import __version__
from gptoughts.cli.main import main
from gptoughts.layers import CATALOG
from tests.support.golden_files import ROOT

MACHINES = ROOT / "tests" / "machines"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line; MACHINES stands for the folder of fake machines."""
    code = 0
    try:
        main([word.replace("MACHINES", str(MACHINES)) for word in shlex.split(line)])
    except SystemExit as left:
        code = int(left.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


BAD = [
    ("train quikstart", ["recipe 'quikstart': no such recipe (did you mean 'quickstart'?)", "shipped: "]),
    ("train none/mine.toml", ["recipe none/mine.toml: no such file"]),
    ("plan quickstart --profile hoper", ["profile 'hoper': no such profile (did you mean 'hopper'?)"]),
    ("plan quickstart --profile none/x.toml", ["profile none/x.toml: no such file"]),
    ("plan quickstart --machine none.json", ["machine file none.json: no such file"]),
    ("train quickstart --plugin none.py", ["--plugin none.py: no such file"]),
    ("train quickstart --batch_size 3 --lr=4", ["--batch_size: no such flag. Try: --train.global-batch", "--optim.learning-rate"]),
    ("train quickstart --use-fp8", ["Try: --profile h100-fp8, or --layer.precision fp8-te"]),
    ("train --model_name gpt2", ["Try: --model.path (a folder, a hub name"]),
    ("train --depth 3 --model.dept 3", ["--depth: no such flag (did you mean --model.depth?)", "did you mean '--model.depth'?"]),
    ("train --optim.lr 3", ["--optim.lr: no such flag. Try: --optim.learning-rate"]),
    ("train --layer.precison bf16", ["--layer.precison: no such flag (did you mean '--layer.precision'?)"]),
    ("train quickstart --layer.precision bf61", ["--layer.precision: no layer 'bf61'", "did you mean 'bf16'?"]),
    ("train quickstart --layer.attention bf16", ["bf16 belongs to slot precision"]),
    ("train quickstart --layer.microbatch.sequences none-at-all", ["--layer.microbatch.sequences: needs an integer above 0"]),
    ("train quickstart --layer.precision.scaling fast", ["--layer.precision.scaling: needs one of delayed, current"]),
    ("train quickstart --layer.precision bf16 --layer.precision.scaling current", ["--layer.precision.scaling: bf16: no such option"]),
    ("train quickstart --collectives mpi", ["--collectives mpi: not started by mpirun. Found launcher single, 1 ranks", "Try: mpirun -np 2"]),
    ("train quickstart --collectives smoke", ["'smoke' is not one of 'auto', 'gloo', 'nccl', 'mpi'"]),
    ("train quickstart --train.steps ten", ["train.steps: input should be a valid integer", "(--train.steps)"]),
    ("train quickstart --train.steps -1", ["train.steps: input should be greater than 0. Found -1"]),
    ("train quickstart --train.steps 3 --train.hours 1", ["needs one of steps, tokens, epochs, hours. Found steps, hours"]),
    ("train quickstart --model.heads 7", ["width 256 is not divisible by 7 heads", "quickstart.toml, --model.heads"]),
    ("train quickstart --model.vocab-size 100", ["model.vocab_size: smaller than the tokenizer's vocabulary of 2048. Found 100"]),
    ("train quickstart extra", ["extra"]),
    ("train quickstart --train.steps", ["--train.steps", "requires an argument"]),
    ("plan quickstart --ranks 0", ["--ranks", "0 is not in the range"]),
    ("plan quickstart --ranks 12 --machine MACHINES/h100x8.json", ["must be a multiple of the 8 GPUs of a machine. Found 12"]),
    ("trian quickstart", ["No such command 'trian'"]),
    ("layers sdap", ["no layer 'sdap' (did you mean 'sdpa'?)"]),
    ("recipes nothing", ["recipe 'nothing': no such recipe"]),
    ("profiles nothing", ["profile 'nothing': no such profile"]),
    ("tokenize x --batch-size 3", ["--batch-size: no such flag"]),
    ("tokenize x", ["--to"]),
    ("tokenize x --to y --val-fraction 1", ["--val-fraction"]),
    ("generate x --top-p 0", ["--top-p"]),
    ("eval perplxity x", ["perplxity"]),
    ("doctor --jsn", ["--jsn: no such flag (did you mean '--json'?)"]),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), BAD, ids=[line for line, _ in BAD])
def test_bad_input(line: str, words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(line, capsys)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and "Traceback" not in err
    for word in words:
        assert word in err
    assert list(here.iterdir()) == []


def test_all_mistakes_at_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan quickstart --machine none.json --plugin none.py --train.steps x --model.depth 0"
    code, _, err = said(line, capsys)
    assert code == 2
    for words in ("none.json: no such file", "none.py: no such file", "train.steps: ", "model.depth: "):
        assert words in err
    code, _, err = said("plan nothing --machine MACHINES/cpu.json --layer.loss x --profile hoper", capsys)
    assert code == 2 and "recipe 'nothing': no such recipe" in err and "profile 'hoper': no such profile" in err


def test_a_profile_that_cannot_run_here(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said("plan gpt2-124m --profile h100-fp8 --gpus 1 --machine MACHINES/a100x8-80gb.json", capsys)
    assert code == 2
    first, second, third = err.splitlines()
    assert first == "error: profile h100-fp8 cannot run on 8 x NVIDIA A100-SXM4-80GB (sm 8.0)"
    assert second.startswith("  precision  fp8-te: needs compute capability 8.9, found 8.0    (") and second.endswith(
        "h100-fp8.toml)"
    )
    assert third == "  Try: --profile auto   (takes a100-bf16: precision=bf16, attention=sdpa)"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "empty"),
        (b"\x00\x01\xff" * 100, "binary"),
        (b"\xff\xfe\xff" * 99, "UTF-8"),
        (b"a", "too short"),
    ],
    ids=["missing", "empty", "binary", "not-utf-8", "short"],
)
def test_bad_data_is_an_error_of_the_data(
    content: bytes | None, words: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = here / "text.txt"
    if content is not None:
        text.write_bytes(content)
    places = shlex.join(["--data.path", f"{text}", "--data.cache", f"{here / 'cache'}", "--run-dir", f"{here / 'run'}"])
    line = f"train shakespeare-char {places} --layer.host system"
    code, _, err = said(line, capsys)
    assert code == 2 and "error: " in err and words in err and "Traceback" not in err
    assert not list(here.rglob("metrics.jsonl")) and not list(here.rglob("*.npy"))


def test_plan_as_json_and_for_ranks(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said("plan gpt-1b --profile h100-fp8 --machine MACHINES/h100x8.json --ranks 16 --json", capsys)
    plan = json.loads(out)
    assert code == 0 and (plan["recipe"], plan["world_size"]) == ("gpt-1b", 16)
    layers = {row["slot"]: row["layer"] for row in plan["choices"]}
    assert (layers["precision"], layers["parallel"]) == ("fp8-te", "ddp")


def test_underscores_and_hyphens_are_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dash in "_-":
        flags = f"--train.global{dash}batch 8 --layer.optimizer{dash}offload with-weights"
        code, out, _ = said(f"plan quickstart --machine MACHINES/cpu.json --ranks 8 {flags}", capsys)
        assert code == 0 and "ddp" in out


def test_without_a_recipe_the_machine_decides(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said("plan --machine MACHINES/cpu.json", capsys)[1].startswith("recipe quickstart\n")
    assert said("plan --machine MACHINES/h100.json", capsys)[1].startswith("recipe gpt-1b\n")


def test_recipe_and_profile_by_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.toml").write_text('name = "mine"\n[train]\nsteps = 5\n')
    (here / "sub").mkdir()
    (here / "sub" / "box.toml").write_text('name = "box"\nextends = "cpu"\n[slots]\nprecision = ["fp32"]\n')
    code, out, err = said("plan mine.toml --profile sub/box.toml --machine MACHINES/cpu-avx512-bf16.json", capsys)
    assert code == 0, err
    assert "recipe mine\nprofile box on CPU" in out and "\nprecision          fp32" in out
    assert said("recipes mine.toml", capsys)[1] == (here / "mine.toml").read_text()
    assert said("profiles sub/box.toml", capsys)[1] == (here / "sub" / "box.toml").read_text()


def test_a_plugins_layer_and_its_options_are_flags(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.layers.test_plugins import LAYER

    (here / "mine.py").write_text(LAYER)
    start = "plan quickstart --machine MACHINES/cpu.json --plugin mine.py"
    assert "probe (size=4)" in said(f"{start} --layer.offload probe --layer.offload.size 4", capsys)[1]
    assert "probe (size=5)" in said(f"{start} --layer.offload.size=5", capsys)[1], "its option demands it"
    code, _, err = said(f"{start} --layer.offload probe --layer.offload.sise 4", capsys)
    assert code == 2 and "--layer.offload.sise: probe: no such option (did you mean 'size'?)" in err
    assert said("plan quickstart --layer.offload.size 4", capsys)[0] == 2


def test_lists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for noun, known in (("recipes", "gpt2-124m"), ("profiles", "h100-fp8"), ("layers", "fused-ce")):
        code, out, _ = said(noun, capsys)
        assert code == 0 and known in out
        code, one, _ = said(f"{noun} {known}", capsys)
        assert code == 0 and known in one and one != out
    assert "by name only" in said("profiles", capsys)[1]
    assert len(said("layers", capsys)[1].splitlines()) == len(CATALOG) + 1


def test_profiles_are_listed_where_none_matches(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptoughts.cli import lists
    from gptoughts.hardware.machine import Machine, read

    old = json.loads((MACHINES / "t4.json").read_text())
    old["gpus"][0]["compute_capability"] = [6, 1]
    assert read(MACHINES / "t4.json") != Machine.from_json(old)
    monkeypatch.setattr(lists, "probe", lambda: Machine.from_json(old))
    code, out, _ = said("profiles", capsys)
    assert code == 0 and "no profile matches 1 x Tesla T4" in out and "hopper" in out


def test_help(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said("", capsys)
    assert code == 0 and out.startswith("Usage: gptoughts") and all(noun in out for noun in ("recipe", "profile", "run"))
    for line in ("train --help", "plan -h", "bench layers --help"):
        code, out, _ = said(line, capsys)
        assert code == 0 and "--model.depth int" in out and "--layer.attention NAME" in out and "Recipe, [optim]" in out
    assert said("bench", capsys)[0] == said("eval", capsys)[0] == 0
    assert said("--version", capsys)[1].strip() == __version__


def test_as_a_module_and_a_closed_pipe(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m gptoughts layers --markdown | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "# Layers\n" and "Traceback" not in done.stderr

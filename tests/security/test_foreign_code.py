"""Code that came along with data, a model or a checkpoint does not run. Each control shows that it would without the guard."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from gptoughts.cli.generate import offloaded
from gptoughts.cli.main import main
from gptoughts.config.loader import load as load_recipe
from gptoughts.config.recipe import ModelConfig
from gptoughts.errors import CheckpointError, ConfigError
from gptoughts.inference import load as loading
from gptoughts.models.hf.config import open_config, without_kernels
from gptoughts.processes import Child
from tests.inference.test_load import folder, here, trained  # noqa: F401 - a fixture
from tests.support.golden_files import ROOT

SHADOWS = ("numpy", "torch", "gguf", "transformers", "typing", "click", "pydantic", "tokenizers", "safetensors", "jinja2")
PLANTED = "import os\nopen(os.environ['MARK'], 'a').write(__name__ + '\\n')\nraise SystemExit('planted code ran')\n"
CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"

    def __init__(self, *arguments, **keywords):
        open(os.environ["MARK"], "a").write("own code ran")
        super().__init__(*arguments, **keywords)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that planted code writes."""
    path = tmp_path / "mark"
    monkeypatch.setenv("MARK", str(path))
    return path


# --- modules beside data, a model or a run


@pytest.fixture
def planted(tmp_path: Path, mark: Path) -> Path:
    """A folder with a text, a broken GGUF file, and modules named as ours are."""
    place = tmp_path / "data set"
    place.mkdir()
    for name in SHADOWS:
        (place / f"{name}.py").write_text(PLANTED)
    (place / "a.txt").write_text("some text\n" * 200)
    (place / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    return place


def python(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONSAFEPATH", None)
    return subprocess.run(
        [sys.executable, *words], check=False, cwd=place, env=variables, capture_output=True, text=True, timeout=120
    )


TOKENIZE = ("tokenize", "a.txt", "--to", "tokens", "--tokenizer", "bytes", "--processes", "2")


@pytest.mark.parametrize(
    "start",
    [("-m", "gptoughts"), ("-P", "-c", "from gptoughts.cli.main import main; main()")],
    ids=["python -m gptoughts", "gptoughts"],
)
def test_modules_beside_the_data_are_not_imported(start: tuple[str, ...], planted: Path, mark: Path) -> None:
    done = python(planted, *start, *TOKENIZE)
    assert done.returncode == 0, done.stderr
    assert not mark.exists()


def test_control_modules_beside_the_data_run_with_the_folder_on_the_path(planted: Path, mark: Path) -> None:
    done = python(planted, "-c", "import sys; assert '' in sys.path; from gptoughts.cli.main import main; main()", *TOKENIZE)
    assert done.returncode and mark.exists()


CONVERT = "from gptoughts.config.model_path import resolve_model_folder; resolve_model_folder('a.gguf')"


def test_modules_beside_a_model_that_is_converted_are_not_imported(planted: Path, mark: Path, here: Path) -> None:  # noqa: F811
    done = python(planted, "-P", "-c", CONVERT)
    assert "a.gguf: conversion failed: " in done.stderr and "planted" not in done.stderr
    assert not mark.exists()


def test_control_modules_beside_a_model_run_with_dash_m(planted: Path, mark: Path) -> None:
    done = python(planted, "-m", "gptoughts.models.hf.gguf", "a.gguf", "out")
    assert done.returncode and mark.exists()


def test_no_child_process_looks_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    for environment in (None, {"PATH": os.environ["PATH"]}):
        with Child("tests.support.child_path", "write", str(tmp_path / "path"), environment=environment) as child:
            assert child.process.wait() == 0, child.output(5)
        path, variable = json.loads((tmp_path / "path").read_text())
        assert str(tmp_path) not in path and "" not in path and variable == "1"
    with Child("tests.support.child_path", "write", str(tmp_path / "path"), paths=["", *sys.path]) as child:
        assert child.process.wait() == 0
    assert "" in json.loads((tmp_path / "path").read_text())[0], "the control"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_modules_beside_a_run_are_not_imported(ranks: int, planted: Path, mark: Path) -> None:
    small = "--model.depth 1 --model.width 32 --model.heads 2 --data.sequence-length 16 --train.steps 2 --train.global-batch 2"
    more = "--data.tokenizer bytes --data.path a.txt --eval.batches 1 --sample.tokens 4 --layer.compile eager --numerics off"
    done = python(planted, "-m", "gptoughts", "train", "quickstart", "--ranks", str(ranks), *small.split(), *more.split())
    assert done.returncode == 0, done.stderr[-3000:]
    assert not mark.exists()


# --- a model's own code


def own_code(name: str) -> Path:
    """A model folder whose code leaves a mark."""
    made = folder(name)
    content = json.loads((made / "config.json").read_text())
    content |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    content["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (made / "config.json").write_text(json.dumps(content))
    (made / "own.py").write_text(CODE)
    return made


@pytest.fixture
def own(here: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A checkpoint, as if downloaded, of a run that executed its model's code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    own_code("own")
    made = trained("one", **{"model.path": "./own", "model.remote_code": "./own"})
    assert mark.exists()
    mark.unlink()
    return made


VERBS = ("generate one --tokens 2", "eval perplexity one --data text.txt --length 8", "export one --to whole")


def test_a_checkpoint_cannot_allow_its_own_code(
    own: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as end:
            main(verb.split())
        told = capsys.readouterr().err
        assert end.value.code == 2 and "trained with the model's own code" in told and "--remote-code ./own" in told
        assert not mark.exists(), verb
    with pytest.raises(ConfigError, match=r"--remote-code ./other: not the model of"):
        loading.load("one", remote_code="./other")
    assert not mark.exists()
    loading.load("one", remote_code="./own")  # consent of this command
    assert mark.exists()
    mark.unlink()
    monkeypatch.setattr(loading, "consent", lambda folder, path, given, needed: path)
    loading.load("one")
    assert mark.exists(), "the control: the checkpoint decides"


def test_a_recipe_file_cannot_allow_code(here: Path, mark: Path) -> None:  # noqa: F811
    own_code("own")
    text = 'name = "x"\n[model]\npath = "./own"\nremote_code = "./own"\n[train]\nsteps = 1\n'
    Path("came-along.toml").write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"came-along.toml: model.remote_code: a file cannot allow code to run(.|\n)*--model.remote-code ./own",
    ):
        load_recipe("came-along.toml")
    assert not mark.exists()
    allowed = load_recipe("came-along.toml", {"model.remote_code": "./own"}).recipe.model
    assert allowed.remote_code == "./own"
    Path("none.toml").write_text(text.replace('remote_code = "./own"', 'remote_code = "none"'))
    assert load_recipe("none.toml").recipe.model.remote_code is None


def test_an_unknown_model_is_refused_without_a_question(here: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(here / "modules"))
    asked: list[str] = []

    def answer(text: str = "") -> str:
        asked.append(text)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    own_code("own")
    with pytest.raises((ConfigError, CheckpointError), match="model_type unknown to transformers"):
        offloaded("own", 1.0, None)
    with pytest.raises((ConfigError, CheckpointError)):
        loading.load("own")
    assert not asked and not mark.exists()
    AutoModelForCausalLM.from_pretrained("own", local_files_only=True)
    assert asked and mark.exists(), "the control: transformers asks, and a `y` runs the code"


def test_a_config_cannot_choose_kernels_of_a_hub(here: Path) -> None:  # noqa: F811
    made = folder("named")
    content = json.loads((made / "config.json").read_text())
    content |= {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/kernel", "use_kernels": True}
    (made / "config.json").write_text(json.dumps({**content, "text_config": {"_attn_implementation_internal": "owner/kernel"}}))
    config, _ = open_config(ModelConfig(family="hf", path="named"))
    assert "owner/kernel" not in json.dumps(config.to_dict(), default=str)
    assert "owner/kernel" not in str(config._attn_implementation)
    assert without_kernels([{"a": {"experts_implementation": 1, "b": 2}}]) == [{"a": {"b": 2}}]


OPENERS = ("from_pretrained", "from_config")
ELSEWHERE = {"PeftModel"}
"""Classes whose loaders take no such argument; an adapter holds no code."""


def test_every_loader_of_transformers_is_told_about_code() -> None:
    silent = []
    for path in (ROOT / "gptoughts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr not in OPENERS:
                continue
            names = {keyword.arg for keyword in node.keywords}
            if "trust_remote_code" in names or ast.unparse(node.func.value).rpartition(".")[2] in ELSEWHERE:
                continue
            spread = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
            if spread != ["kwargs"]:  # of model_class, or the dict of the converter
                silent.append(f"{path.name}:{node.lineno}")
    assert silent == []

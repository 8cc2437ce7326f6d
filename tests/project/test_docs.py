"""The documentation is true: its commands run, its links lead somewhere, its tree is the tree.

Every ```bash block of README.md and docs/ is run by bash, the blocks of a page in order and in one scratch folder. Two things differ from
a user's shell, and nothing else does:

- `gptoughts` is a small program that makes a training run short before it hands the line on (`shortened`, below), in a process that has
  imported torch already, as Python blocks are, too (tests/support/warm.py);
- lines that begin with one of `ELSEWHERE` are left out; each is tested where that table says.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gptoughts.cli.main import build_cli
from gptoughts.run.tracking.metrics import metrics_table
from tests.support import warm

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PYTHON_PAGES = ["checkpoints.md", "python.md"]
EXAMPLE = ROOT / "examples" / "gc_freeze.py"

ELSEWHERE = {
    "launch/quickstart.sh": "tests/project/test_launch.py",
    "launch/test.sh": "tests/project/test_launch.py; it is what runs this test",
    "launch/torchrun.sh": "tests/project/test_launch.py",
    "launch/mpirun.sh": "tests/project/test_launch.py",
    "launch/train_": "tests/project/test_presets.py",
    "sbatch": "tests/project/test_slurm.py",
    "squeue": "tests/support/slurm_cluster.py",
    "scontrol": "tests/support/slurm_cluster.py",
    "tail -f": "tests/cli/test_commands.py; it would not end",
    "ssh": "tests/project/test_slurm.py; there is no second machine",
    "tensorboard --logdir": "tests/run/tracking/test_trackers.py; it would not end",
    "python -m gptoughts.run.tracking.wandb_workspace MY_TEAM": "tests/run/tracking/test_system.py; there is no account",
    "python -m http.server": "tests/project/test_slurm.py; it would not end",
    "pip install": "tests/project/test_wheel.py installs; a registry is not asked here",
    "gptoughts train gpt-1b --gpus": "tests/cli/test_launch.py; there is no GPU here",
}
"""First words of lines that this test leaves out, and where they are tested instead."""

SMALL = {
    "model.depth": "1",
    "model.width": "64",
    "model.heads": "2",
    "data.sequence-length": "32",
    "train.global-batch": "4",
    "train.steps": "5",
    "eval.batches": "1",
    "sample.tokens": "5",
}
"""What a training run gets unless its line says otherwise."""

FEW_LAYERS = {"layer.host": "system", "layer.attention": "math", "layer.precision": "fp32", "layer.compile": "eager"}
"""Layers of `bench layers`, `parity` and `scaling`, where every variant is a process, unless a line names them."""

BENCH = {
    "step": {"rounds": "2", "steps": "2"},
    "layers": {"rounds": "1", "steps": "1"},
    "parity": {"steps": "6", "seeds": "0"},
    "gemm": {"largest": "256"},
    "scaling": {"rounds": "1", "steps": "1"},
}
"""How long a measurement is, whatever its line says."""


STARTED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.project.test_docs import shortened
from gptoughts.cli.main import main
sys.argv = ["gptoughts", *shortened(sys.argv[1:])]
main()
"""


def shortened(words: list[str]) -> list[str]:
    """`train` and `trace` on a tiny model, with steps and periods that are given divided by 100; `bench` for a round or two; the rest as it is.

    A model that is named has its own sizes, a length that is given stays, and denoising keeps a context that holds its blocks.
    """
    if words[:1] not in (["train"], ["trace"], ["bench"]):
        return words
    given = {word.lstrip("-").partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    short = []
    for number, word in enumerate(words):
        divided = number > 0 and words[number - 1] in ("--train.steps", "--save.every", "--eval.every")
        short.append(str(max(2, int(word) // 100)) if divided else word)
    if words[0] == "bench":
        lengths = BENCH.get(words[1], {})
        given -= set(lengths)  # the last of two flags counts, and what a line gives would still be long
        sizes = {key: SMALL[key] for key in SMALL if key.startswith(("model", "data"))} if "steps" in lengths else {}
        small = {**lengths, **sizes, **(FEW_LAYERS if words[1] in ("layers", "parity", "scaling") else {})}
    else:
        small = fitting(words, given)
    return [*short, *(part for key, value in small.items() if key not in given for part in (f"--{key}", value))]


def fitting(words: list[str], given: set[str]) -> dict[str, str]:
    """What of `SMALL` suits a `train` line."""
    file = ROOT / "gptoughts" / "recipes" / f"{words[1]}.toml"
    recipe = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    left_out = set()
    if {"model.path", "model.config"} & given or {"path", "config"} & set(recipe.get("model", {})):
        left_out |= {"model.depth", "model.width", "model.heads"}
    if {"train.tokens", "train.epochs", "train.hours"} & given:
        left_out.add("train.steps")
    denoises = recipe.get("objective") == "masked-diffusion"
    if denoises:
        left_out.add("data.sequence-length")
    small = {key: value for key, value in SMALL.items() if key not in left_out}
    return {**small, "sample.tokens": "32", "diffusion.steps": "4"} if denoises else small


# --- what stands in the pages


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def is_elsewhere(line: str) -> bool:
    return any(line.startswith(first) for first in ELSEWHERE)


def runnable(block: str) -> str:
    """The block without the lines that are tested elsewhere."""
    return "".join(line for line in block.splitlines(keepends=True) if not is_elsewhere(line.strip()))


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all pages, so that a text is tokenized once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def shell(tmp_path: Path, cache: Path) -> tuple[Path, dict[str, str]]:
    """A folder that looks like a checkout, and an environment in which everything lands in it."""
    here, programs = tmp_path / "checkout", tmp_path / "programs"
    here.mkdir(), programs.mkdir()
    for name in ("docs", "examples", "launch", "profiles", "tests", "README.md"):
        (here / name).symlink_to(ROOT / name)
    program = programs / "gptoughts"
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(cache),
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
    }
    # By way of sh, because the first line of a script cannot name an interpreter whose path holds a space.
    program.write_text(f'#!/bin/sh\nexec {shlex.join(warm.script(STARTED, environment))} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return here, environment


def run(words: list[str], here: Path, environment: dict[str, str], what: str) -> str:
    done = subprocess.run(words, check=False, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
    told = textwrap.indent(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}", "    ")
    assert done.returncode == 0, f"{what} left with {done.returncode}:\n{words[-1]}\n{told}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_commands_and_python_run(page: Path, shell: tuple[Path, dict[str, str]]) -> None:
    here, environment = shell
    scripts = [text for text in map(runnable, blocks(page, "bash")) if text.strip()]
    for script in scripts:
        run(["bash", "-euo", "pipefail", "-c", script], here, environment, f"a bash block of {page.name}")
    if page.name in PYTHON_PAGES:
        for script in blocks(page, "python"):
            run(warm.script(script, environment), here, environment, f"a python block of {page.name}")
    out = [path for path in (ROOT / "out", ROOT / "checkpoints") if len(list(path.iterdir())) > 1]
    assert (here / "out").is_dir() or not any("gptoughts train" in script for script in scripts), out


@pytest.mark.slow
def test_write_a_layer_is_the_example_and_its_control_says_no(shell: tuple[Path, dict[str, str]]) -> None:
    page = ROOT / "docs" / "write-a-layer.md"
    pieces = re.findall(r"^\*file\*\n\n```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shown, written = ("".join(text.split("\n")) for text in ("\n".join(pieces), EXAMPLE.read_text(encoding="utf-8")))
    assert shown == written, "put together, the blocks of docs/write-a-layer.md are examples/gc_freeze.py"

    here, environment = shell
    # By its path: where a name cannot be started, the next of PATH is, which here would be gptoughts at full size.
    line = [str(here.parent / "programs" / "gptoughts"), "train", "quickstart", "--plugin", "examples/gc_freeze.py"]
    for layer, code, word in (("gc-freeze", 0, "active"), ("gc-control", 3, "inactive")):
        done = subprocess.run(
            [*line, "--layer.host", layer, "--name", layer],
            check=False,
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, done.stderr[-2000:]
        lines = json.loads((here / "out" / layer / "evidence.json").read_text(encoding="utf-8"))["layers"]
        assert {one["layer"]: one["status"] for one in lines}[layer] == word
    assert "host=gc-control: the collector is on" in done.stderr


def test_every_skipped_line_is_in_use() -> None:
    lines = {line.strip() for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()}
    lines |= {line.strip() for block in blocks(ROOT / "CONTRIBUTING.md", "bash") for line in block.splitlines()}
    unused = [first for first in ELSEWHERE if not any(line.startswith(first) for line in lines)]
    assert unused == []
    for where in ELSEWHERE.values():
        for name in re.findall(r"tests/[\w/]+\.py", where):
            assert (ROOT / name).is_file(), where


def test_shortening_keeps_what_was_asked_for() -> None:
    assert shortened(["plan", "quickstart"]) == ["plan", "quickstart"]
    words = shortened(["train", "x", "--train.steps", "600", "--model.width=128", "--name", "a"])
    assert words[:7] == ["train", "x", "--train.steps", "6", "--model.width=128", "--name", "a"]
    assert "--model.depth" in words and words.count("--train.steps") == 1 and "--model.width" not in words
    words = shortened(["bench", "parity", "x", "--layer.precision", "bf16", "--steps", "200", "--seeds", "2"])
    assert words[words.index("--layer.precision") + 1] == "bf16" and words.count("--layer.precision") == 1
    assert words[len(words) - words[::-1].index("--steps")] == "6" and "--layer.attention" in words
    assert shortened(["bench", "gemm"]) == ["bench", "gemm", "--largest", "256"]
    assert shortened(["bench", "data"]) == ["bench", "data"]
    assert "--model.depth" in shortened(["trace", "quickstart"])


# --- links, verbs, words


def anchors(page: Path) -> set[str]:
    """Headings as GitHub makes them into anchors."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", TEXT_PAGES, ids=[page.name for page in TEXT_PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text.replace("\n", " ")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}; headings: {sorted(anchors(file))}"


def leaf_verbs(command: click.Command, words: str = "") -> Iterator[str]:
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from leaf_verbs(inner, f"{words} {name}".strip())
    else:
        yield words


def test_every_verb_is_mentioned() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [verb for verb in leaf_verbs(build_cli()) if f"gptoughts {verb}" not in text]
    assert missing == []


def test_every_module_stands_on_a_floor() -> None:
    floors = blocks(ROOT / "docs" / "architecture.md", "text")[0]
    words = set(re.findall(r"[\w/]+", floors))
    package = ROOT / "gptoughts"
    modules = {path.stem for path in package.glob("[!_]*.py")} | {
        f"{path.parent.name}/" for path in package.glob("*/__init__.py")
    }
    assert sorted(modules - words) == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name != "index.md" and f"({page.name})" not in index] == []


def test_every_extra_is_in_the_readme() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in extras if f"`{extra}`" not in table] == []


def test_the_table_of_metrics_is_the_generated_one() -> None:
    """Fix a difference by pasting the output of `metrics_table()` between the markers."""
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert page.split("<!-- metrics -->\n")[1].split("<!-- /metrics -->")[0] == metrics_table()


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[\[<>= ]", one)[0] for one in listed} - {"gptoughts"}
    reasons = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    assert sorted(name for name in names if f"`{name}" not in reasons) == []


# --- the tree


def tracked() -> list[str]:
    """Files of the repository, those about to be added too."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return sorted({name for name in done.stdout.splitlines() if (ROOT / name).is_file()})


def test_the_tree_of_the_readme_has_one_line_per_folder() -> None:
    """Top-level folders and the folders of the package, each with a description, and nothing else."""
    files = tracked()
    folders = {f"{name.split('/')[0]}/" for name in files if "/" in name and not name.startswith(".")}
    inside = {f"gptoughts/{name.split('/')[1]}/" for name in files if name.startswith("gptoughts/") and name.count("/") > 1}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- tree -->")[1].split("```text\n")[1].split("```")[0]
    rows = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in block.splitlines())
    assert set(rows) == folders | inside


@pytest.mark.parametrize("page", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"], ids=lambda page: page.name)
def test_no_command_of_ours_starts_a_launcher_that_listens_on_all_addresses(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line.startswith("torchrun --standalone") and "gptoughts" in line]

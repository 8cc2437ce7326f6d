"""The documentation is true: its commands run, its links lead somewhere, its tree is the tree.

Every ```bash block of README.md and docs/ is run by bash, the blocks of a page in order and in one scratch folder. Two things differ from
a user's shell, and nothing else does:

- `gptoughts` is a small program that makes a training run short before it hands the line on (`shortened`, below), in a process that has
  imported torch already, as Python blocks are, too (tests/warm.py);
- lines that begin with one of `ELSEWHERE` are left out; each is tested where that table says.

`python tests/test_docs.py` prints the tree of README.md as it should be, with `--write` it puts it there.
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

from gptoughts.cli import verbs
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT_PAGES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PYTHON_PAGES = ["checkpoints.md", "python.md"]
EXAMPLE = ROOT / "examples" / "gc_freeze.py"

ELSEWHERE = {
    "launch/quickstart.sh": "tests/test_launch.py",
    "launch/test.sh": "tests/test_launch.py; it is what runs this test",
    "launch/torchrun.sh": "tests/test_launch.py",
    "pip install": "tests/test_wheel.py installs; a registry is not asked here",
    "torchrun": "tests/test_ddp.py",
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
"""Layers of `bench layers` and `bench parity`, where every variant is a process, unless a line names them."""

BENCH = {
    "step": {"rounds": "2", "steps": "2"},
    "layers": {"rounds": "1", "steps": "1"},
    "parity": {"steps": "6", "seeds": "0"},
    "gemm": {"largest": "256"},
}
"""How long a measurement is, whatever its line says."""


STARTED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.test_docs import shortened
from gptoughts.cli import main
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
        small = {**lengths, **sizes, **(FEW_LAYERS if words[1] in ("layers", "parity") else {})}
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
    """One cache for all pages, so that a text is tokenised once."""
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
            [*line, "--layer.host", layer, "--run", layer],
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
        for name in re.findall(r"tests/\w+\.py", where):
            assert (ROOT / name).is_file(), where


def test_shortening_keeps_what_was_asked_for() -> None:
    assert shortened(["plan", "quickstart"]) == ["plan", "quickstart"]
    words = shortened(["train", "x", "--train.steps", "600", "--model.width=128", "--run", "a"])
    assert words[:7] == ["train", "x", "--train.steps", "6", "--model.width=128", "--run", "a"]
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
    missing = [verb for verb in leaf_verbs(verbs()) if f"gptoughts {verb}" not in text]
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


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    names = {re.split(r"[\[<>= ]", one)[0] for one in listed} - {"gptoughts"}
    reasons = (ROOT / "docs" / "decisions.md").read_text(encoding="utf-8")
    assert sorted(name for name in names if f"`{name}" not in reasons) == []


# --- the tree

FOLDERS = {
    "gptoughts": "the package",
    "gptoughts/bench": "measuring",
    "gptoughts/commands": "the verbs of the command line, one file each",
    "gptoughts/data": "text to shards, shards to batches",
    "gptoughts/evals": "judging a trained model",
    "gptoughts/generate": "writing text",
    "gptoughts/health": "what doctor tries",
    "gptoughts/layers": "the optimisations, one file each, and the catalog",
    "gptoughts/models": "architectures",
    "gptoughts/recipes": "what to train",
    "gptoughts/report": "pages made from the code",
    "gptoughts/track": "what a run leaves behind",
    "profiles": "how to train on which hardware",
    "launch": "scripts to start from",
    "examples": "plugins to copy from",
    "docs": "documentation",
    "docs/measurements": "measured figures, each with machine, versions and command",
    "docs/notebooks": "notebooks",
    "tests": "tests, which mirror the package",
    "tests/data": "tests of gptoughts/data",
    "tests/generate": "tests of gptoughts/generate",
    "tests/models": "tests of gptoughts/models",
    "tests/nvml": "a small libnvidia-ml.so that stands for a driver",
    "tests/machines": "boxes that are not here, as plan --machine takes them",
    "tests/golden": "plans as they should be, for every profile and machine",
    "tests/traces": "kernels and operators by name, as a profiler gives them",
    "tests/device": "what only a GPU can show",
}
FILES_LISTED = ("gptoughts/", "profiles/", "launch/", "examples/", "docs/")
ONLY_FOLDERS = ("tests/", "docs/measurements/")
COLUMN = 32


def tracked() -> list[str]:
    """Files of the repository, those about to be added too."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return sorted({name for name in done.stdout.splitlines() if (ROOT / name).is_file()})


def listed(files: list[str]) -> dict[str, list[str]]:
    """Folder -> the names that the tree must show in it, folders first."""
    shown: dict[str, list[str]] = {}
    for name in files:
        *folders, leaf = name.split("/")
        if not folders or not name.startswith((*FILES_LISTED, "tests/")):
            continue
        depth = 2 if name.startswith(ONLY_FOLDERS) else len(folders)
        for level in range(1, depth):
            if level < len(folders):
                parent = "/".join(folders[:level])
                if f"{folders[level]}/" not in shown.setdefault(parent, []):
                    shown[parent].append(f"{folders[level]}/")
        shown.setdefault("/".join(folders[:depth]), [])
        if not name.startswith(ONLY_FOLDERS) and leaf != "__init__.py":
            shown["/".join(folders)].append(leaf)
    return {folder: sorted(names, key=lambda name: (not name.endswith("/"), name)) for folder, names in shown.items()}


def walk(shown: dict[str, list[str]], folder: str, depth: int = 0) -> Iterator[tuple[int, str]]:
    """(depth, path) of every line; a folder's path ends with a slash."""
    yield depth, f"{folder}/"
    for name in shown[folder]:
        if name.endswith("/"):
            yield from walk(shown, f"{folder}/{name[:-1]}", depth + 1)
        else:
            yield depth + 1, f"{folder}/{name}"


def tree_lines() -> list[tuple[int, str]]:
    shown = listed(tracked())
    tops = [top.rstrip("/") for top in (*FILES_LISTED, "tests/") if top.rstrip("/") in shown]
    return [line for top in tops for line in walk(shown, top)]


def written_tree() -> dict[str, str]:
    """Path -> description, as README.md has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("<!-- tree:")[1].split("```text\n")[1].split("```")[0]
    found, above = {}, []
    for line in block.splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name.rstrip("/")]
        found["/".join(above) + ("/" if name.endswith("/") else "")] = words.strip()
    return found


def first_words(path: Path) -> str:
    """What a file says of itself, up to the first full stop."""
    text = path.read_text(encoding="utf-8") if path.suffix in (".py", ".sh", ".toml", ".md") else ""
    found = {
        ".py": re.search(r'^"""(.+?)(?:\. |\.?"""|\.?$)', text, re.MULTILINE),
        ".sh": re.search(r"^# (?!shellcheck)(.+?)(?:\. |\.?$)", text, re.MULTILINE),
        ".toml": re.search(r'^note = "(.+?)(?:\. |\.?"$)', text, re.MULTILINE),
        ".md": re.search(r"^# (.+)$", text, re.MULTILINE),
    }.get(path.suffix)
    return short(found[1]) if found else ""


def short(words: str) -> str:
    """At most 100 characters, cut where the sentence allows it."""
    while len(words) > 100:
        words = max((words.rpartition(mark)[0] for mark in (": ", "; ", ", ", " ")), key=lambda cut: (len(cut) > 25, -len(cut)))
    return words


def tree() -> str:
    """The tree as README.md should have it: words that are there are kept, new files speak for themselves."""
    known = written_tree()
    lines = []
    for depth, path in tree_lines():
        name = path.rstrip("/").rpartition("/")[2] + ("/" if path.endswith("/") else "")
        words = known.get(path) or (FOLDERS.get(path[:-1], "") if path.endswith("/") else first_words(ROOT / path))
        lines.append(f"{'  ' * depth + name:<{COLUMN}}{words}".rstrip())
    return "\n".join(lines) + "\n"


def test_tree_of_the_readme_is_the_tree() -> None:
    known, wanted = written_tree(), [path for _, path in tree_lines()]
    assert list(known) == wanted, "python tests/test_docs.py --write"
    assert [path for path, words in known.items() if not words] == [], "every line says what it is"


if __name__ == "__main__":
    made = tree()
    if "--write" in sys.argv:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        before, marker, after = readme.partition("<!-- tree:")
        head, fence, rest = after.partition("```text\n")
        (ROOT / "README.md").write_text(before + marker + head + fence + made + rest[rest.index("```") :], encoding="utf-8")
    else:
        print(made, end="")

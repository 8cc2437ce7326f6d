"""The table [slurm]: where it may stand, what overrides what, and every mistake named with its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoughts.config.loader import find_recipe, load
from gptoughts.config.site import SlurmSite, read_site
from gptoughts.errors import ConfigError

SITE = '[slurm]\npartition = "gpu"\naccount = "mine"\ntime = "1-00:00:00"\nmodules = ["cuda/12", "python"]\n'


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(SITE, encoding="utf-8")
    return path


def test_options_override_the_site_file_and_that_the_recipe(site: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    text = find_recipe("quickstart").read_text(encoding="utf-8")
    recipe.write_text(f'{text}\n[slurm]\npartition = "cpu"\nnodes = 2\nqos = "low"\n', encoding="utf-8")
    found = read_site(str(recipe), str(site), {"qos": "high", "gpus_per_node": 4})
    assert found == SlurmSite(partition="gpu", account="mine", qos="high", time="1-00:00:00", nodes=2, gpus_per_node=4,
                              modules=["cuda/12", "python"])  # fmt: skip
    assert found.ranks_per_node == 4
    assert read_site("quickstart", None, {"tasks_per_node": 3}).ranks_per_node == 3


@pytest.mark.parametrize(
    "line",
    [
        'environment = "./evil.sh"',
        "options = ['--wrap=./evil.sh']",
        "options = []",
        'modules = ["cuda", "./evil"]',
        'modules = ["/evil"]',
    ],
)
def test_a_recipe_cannot_choose_what_the_job_runs(line: str, tmp_path: Path) -> None:
    recipe, own = tmp_path / "mine.toml", tmp_path / "site.toml"
    recipe.write_text(f"{find_recipe('quickstart').read_text(encoding='utf-8')}\n[slurm]\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a recipe cannot choose what the job runs. Found .*evil|options: a recipe cannot"):
        read_site(str(recipe), None, {})
    own.write_text(f"[slurm]\n{line}\n", encoding="utf-8")
    assert read_site("quickstart", str(own), {}) != SlurmSite() or line == "options = []", "the control"


def test_a_value_cannot_add_an_option_to_its_line(site: Path) -> None:
    for value in ("gpu --output=/home/me/.bashrc", "gpu\t--x", "'gpu'"):
        with pytest.raises(ConfigError, match=r"slurm.partition: "):
            read_site("quickstart", str(site), {"partition": value})
    assert read_site("quickstart", str(site), {"constraint": "[rack1*2&rack2*4]"}).constraint == "[rack1*2&rack2*4]"


def test_the_table_does_not_change_the_training(tmp_path: Path) -> None:
    recipe = tmp_path / "quickstart.toml"
    text = find_recipe("quickstart").read_text(encoding="utf-8")
    recipe.write_text(f"{text}\n{SITE}", encoding="utf-8")
    assert load(str(recipe)).recipe == load("quickstart").recipe
    assert "slurm" not in load(str(recipe)).to_toml()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[slurm]\npartitoin = 'x'", ["slurm.partitoin: no such key (did you mean 'partition'?)", "site.toml"]),
        ("[slurm]\nqueue = 'x'", ["slurm.queue: no such key; use slurm.partition"]),
        ("[slurm]\nnodes = 0", ["slurm.nodes: input should be greater than or equal to 1. Found 0"]),
        ("[slurm]\nnodes = '2'", ["slurm.nodes: input should be a valid integer. Found '2'"]),
        ("[slurm]\ntime = 'soon'\ncpus_per_task = 0", ["slurm.time: ", "Found 'soon'", "slurm.cpus_per_task: "]),
        ('[slurm]\npartition = "a\\n#SBATCH --x"', ["slurm.partition: ", "must be one line"]),
        ("slurm = 3", ["slurm: must be a table. Found 3"]),
        ("[slrm]\nnodes = 2", ["has no table [slurm]"]),
    ],
)
def test_mistakes_are_named(text: str, expected: list[str], site: Path) -> None:
    site.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_site("quickstart", str(site), {})
    assert all(part in str(error.value) for part in expected), str(error.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"--site none\.toml: no such file"):
        read_site(None, "none.toml", {})

"""Settings of a cluster: the table [slurm] of a recipe file or of a site file. Training does not read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gptoughts.config.loader import describe, find_recipe, read_toml, shown
from gptoughts.errors import ConfigError, listed
from gptoughts.errors import describe as problem_line

TABLE = "slurm"
ALIASES = {
    "walltime": "time", "time_limit": "time", "queue": "partition", "project": "account", "gpus": "gpus_per_node", "gres": "gpus_per_node",
    "module": "modules", "ntasks_per_node": "tasks_per_node", "env": "environment", "signal": "save_seconds",
}  # fmt: skip
"""Names of other tools, and ours."""
OWN = ("environment", "options")
"""Keys that choose what the job runs, which a recipe that came from elsewhere must not."""
WORD = r"^[^\s'\"\\#]+$"
"""A value that cannot add a second option to its line of the job file."""


class SlurmSite(BaseModel):
    """Where and how a job runs. `None` leaves a setting to the cluster."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    partition: str | None = Field(None, pattern=WORD)
    account: str | None = Field(None, pattern=WORD)
    qos: str | None = Field(None, pattern=WORD)
    constraint: str | None = Field(None, pattern=WORD)
    time: str | None = Field(None, pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    """One rank per GPU."""
    tasks_per_node: int = Field(1, ge=1)
    """Ranks per node without GPUs."""
    cpus_per_task: int | None = Field(None, ge=1)
    modules: list[str] = []
    environment: str | None = None
    """File that the job sources first."""
    save_seconds: int = Field(120, ge=30)
    """Seconds before the time limit at which the run saves."""
    options: list[str] = []
    """Further options of sbatch, such as `--exclusive`."""

    @field_validator("*", mode="before")
    @classmethod
    def _one_line(cls, value: Any) -> Any:
        """Refuse line breaks: every value stands on one line of the job file."""
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and ("\n" in text or "\r" in text):
                raise ValueError("must be one line")
        return value

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.gpus_per_node or self.tasks_per_node


def _refuse_commands(table: Mapping[str, Any], file: str) -> None:
    """Raise ConfigError for a recipe's table that chooses a script, options of sbatch, or a module file by its path."""
    modules = table.get("modules")
    paths = [name for name in modules if str(name).startswith((".", "/", "~", "-"))] if isinstance(modules, list) else []
    for key, value in [*((key, table[key]) for key in OWN if key in table), *(("modules", name) for name in paths)]:
        problem = f"{file}: {TABLE}.{key}: a recipe cannot choose what the job runs"
        raise ConfigError(
            problem, found=repr(value)[:200], fix=f"the table [{TABLE}] of a file of your own, with --site FILE.toml"
        )


def read_site(recipe: str | None, file: str | None, given: Mapping[str, Any]) -> SlurmSite:
    """Return the settings of the recipe's table, overridden by the site file's, then by `given`. Raises ConfigError."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    paths = [find_recipe(recipe)] if recipe else []
    if file is not None:
        if not Path(file).is_file():
            raise ConfigError(f"--site {file}: no such file")
        paths.append(Path(file))
    for path in paths:
        table = read_toml(path).get(TABLE, {})
        if not isinstance(table, dict):
            raise ConfigError(problem_line(f"{shown(path)}: {TABLE}: must be a table", repr(table)))
        if path == paths[-1] and file is not None and not table:
            raise ConfigError(f"--site {file}: has no table [{TABLE}]")
        if recipe and path == paths[0]:
            _refuse_commands(table, shown(path))
        values |= table
        sources |= dict.fromkeys(table, shown(path))
    values |= given
    sources |= {key: f"--{key.replace('_', '-')}" for key in given}
    problems = [f"{TABLE}.{key}: no such key; use {TABLE}.{ALIASES[key]}  ({sources[key]})" for key in values if key in ALIASES]
    try:
        site = SlurmSite.model_validate({key: value for key, value in values.items() if key not in ALIASES})
    except ValidationError as error:
        problems += [f"{TABLE}.{line}" for line in describe(error, list(SlurmSite.model_fields), sources)]
    if problems:
        raise listed(f"table [{TABLE}]", problems)
    return site

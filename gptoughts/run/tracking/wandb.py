"""Weights & Biases: offline unless `track.online` is set and a login is found. The only file that imports wandb.

Rows carry our `step` and are drawn over it; wandb's own step is a mere row number, because it drops rows that arrive behind it, as a row
of training does that is read back after a validation. System metrics are drawn over `sample`.

Every attempt has the same run id. Offline, each attempt writes one folder with the whole run, made again from the JSON lines, and removes
the folder of the attempt before: uploading the newest one gives every step once. Online, the run continues, and steps that the server
has are not sent again.
"""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Mapping
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from gptoughts.console import LOGGER, Redactor, note
from gptoughts.run.tracking.figures import numbers_and_texts
from gptoughts.run.tracking.jsonl import replay
from gptoughts.run.tracking.metrics import GATHERED, METRICS
from gptoughts.run.tracking.sink import RunInfo, Sink


class Wandb(Sink):
    """Sends rows to one wandb run."""

    _wandb: Any = None
    _run: Any = None
    _folder: Path | None = None
    """Folder of an offline run."""
    _known: Mapping[str, float] = {}
    """Newest `step` and `sample` that the server has of this run."""

    def start(self, run: RunInfo) -> None:
        """Open the run; send what earlier attempts recorded and wandb does not have. Raises ImportError without the package."""
        import wandb

        self._wandb, self._redact = wandb, Redactor()
        online = self._is_online(run)
        self._run = self._init(run, "online" if online else "offline")
        for name, axis in axes().items():
            self._run.define_metric(name, step_metric=axis)
        for name in ("step", "sample"):
            self._run.define_metric(name, summary="max")
        if self._run.settings.mode == "offline":
            self._folder = Path(self._run.dir).parent
        elif run.attempt > 1:
            self._known = {name: newest(self._run.summary.get(name)) for name in ("step", "sample")}
        if run.attempt > 1:
            replay(run, self)
        if self._folder is not None:
            self._remove_older(self._folder, run.run_id)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send a row."""
        if step > self._known.get("step", -1):
            numbers, texts = numbers_and_texts(values)
            self._run.log({"step": step, **numbers, **self._redact(texts)})

    def sample(self, index: int, values: Mapping[str, Any]) -> None:
        """Send a sample."""
        if index > self._known.get("sample", -1):
            self._run.log({"sample": index, **numbers_and_texts(values)[0]})

    def text(self, step: int, name: str, text: str) -> None:
        """Send a generated text, unformatted."""
        if step > self._known.get("step", -1):
            shown = self._wandb.Html(f"<pre>{html.escape(self._redact(text))}</pre>", inject=False)
            self._run.log({"step": step, f"samples/{name}": shown})

    def close(self) -> None:
        """Finish the run; say how to upload one that is offline."""
        if self._run is not None:
            self._run.finish()
        if self._folder is not None:
            note(f"wandb: offline; upload with: wandb sync {self._folder}")

    def _is_online(self, run: RunInfo) -> bool:
        """Return whether the run is online: asked for, not forbidden by WANDB_MODE, and there is a key."""
        if not run.settings.get("online") or os.environ.get("WANDB_MODE", "online") != "online":
            return False
        if not has_login(os.environ):
            note("wandb: not logged in (wandb login, or WANDB_API_KEY); the run is kept offline")
            return False
        return True

    def _init(self, run: RunInfo, mode: str) -> Any:
        """Start the run; where the server does not answer, start it offline."""
        settings = run.settings
        tags = [tag.strip() for tag in settings.get("tags", "").split(",") if tag.strip()]
        try:
            return self._wandb.init(
                id=run.run_id or None,
                name=run.name,
                dir=str(run.out),
                project=settings.get("project") or "gptoughts",
                entity=settings.get("entity"),
                group=settings.get("group"),
                tags=tags or None,
                config=self._redact({"recipe": run.recipe, "plan": run.plan}),
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=self._wandb.Settings(
                    x_disable_stats=True,  # our sampler reads the job's GPUs only
                    x_disable_meta=True,  # command line, host and git remote may hold secrets
                    disable_git=True,
                    save_code=False,
                    console="off",
                    silent=True,
                ),
            )
        except self._wandb.Error as error:
            if mode == "offline":
                raise
            LOGGER.warning("wandb: cannot start online (%s); the run is kept offline", self._redact(str(error)))
            return self._init(run, "offline")

    def _remove_older(self, folder: Path, run_id: str) -> None:
        """Remove the offline folders of earlier attempts: this one holds their rows."""
        for other in folder.parent.glob(f"offline-run-*-{run_id}*"):  # two that start in one second differ by a last number
            if other.name != folder.name:
                shutil.rmtree(other)


def has_login(environment: Mapping[str, str]) -> bool:
    """Return whether WANDB_API_KEY is set or the netrc file has an entry for the server. wandb itself would ask at the terminal."""
    if environment.get("WANDB_API_KEY"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return netrc(Path(environment.get("NETRC") or "~/.netrc").expanduser()).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def axes() -> dict[str, str]:
    """Return the x-axis of every key, `step` or `sample`; a key that ends in `*` stands for all that begin so."""
    keys = {metric.key: metric.axis for metric in METRICS if "/" in metric.key}
    # Endings are named one by one: wandb takes any of two patterns that match a key.
    return keys | {f"{key}_{end}": axis for key, axis in keys.items() if axis == "sample" for end in GATHERED}


def newest(found: Any) -> float:
    """Return the maximum that a run's summary tells of a key, -1 if it tells none."""
    if found is None:
        return -1
    return float(found if isinstance(found, int | float) else found.get("max", -1))

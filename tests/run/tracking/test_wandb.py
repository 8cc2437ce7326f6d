"""What goes to a wandb server, against a stand-in for the package; the real package is used offline in test_trackers.py."""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoughts.console import Console
from gptoughts.run.tracking.jsonl import Jsonl
from gptoughts.run.tracking.sink import RunInfo
from gptoughts.run.tracking.wandb import Wandb, axes, has_login


class Server:
    """As much of wandb as the sink uses. `summary` is what the server has of the run; `down` makes it unreachable."""

    class Error(Exception):
        """Its base class of errors."""

    def __init__(self, folder: Path, summary: dict[str, Any] | None = None, down: bool = False) -> None:
        self.folder, self.summary, self.down = folder, summary or {}, down
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {}

    def init(self, **arguments: Any) -> Any:
        self.inits.append(arguments)
        if self.down and arguments["mode"] == "online":
            raise self.Error("timed out; key abcdefgh12345678")
        return SimpleNamespace(
            settings=SimpleNamespace(mode=arguments["mode"]),
            dir=str(self.folder / "wandb" / "offline-run-2-me" / "files"),
            summary=self.summary,
            log=self.logged.append,
            define_metric=lambda name, **how: self.metrics.setdefault(name, how),
            finish=lambda: None,
        )

    Settings = Html = staticmethod(lambda *positional, **named: named or positional[0])


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sends a resumed run to a server: steps 1 to 5 are recorded, attempt 2 begins at step 3. Returns what was printed."""
    monkeypatch.setenv("WANDB_API_KEY", "abcdefgh12345678")
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def sent(server: Server, **settings: Any) -> str:
        monkeypatch.setitem(sys.modules, "wandb", server)  # type: ignore[arg-type]
        first = Jsonl()
        first.start(RunInfo("run", server.folder, 1))
        for step in range(1, 6):
            first.log(step, {"train/loss": float(step)})
            first.sample(step, {"step": step, "cpu/load": 1.0})
        first.close()
        text, sink = StringIO(), Wandb()
        with Console(text).logging():
            sink.start(RunInfo("run", server.folder, 2, run_id="me", step=3, settings={"online": True, **settings}))
            for step in (4, 5, 6):
                sink.log(step, {"train/loss": float(step)})
            sink.sample(6, {"step": 6, "cpu/load": 2.0})
            sink.close()
        return text.getvalue()

    return sent


def test_an_online_run_continues_and_gets_each_step_once(online: Any, tmp_path: Path) -> None:
    """The server has steps 1 and 2 of 5: killed before the rest was sent."""
    server = Server(tmp_path, {"step": {"max": 2}, "sample": {"max": 5}})
    assert online(server, tags="a, b", entity="team") == ""
    (arguments,) = server.inits
    assert (arguments["mode"], arguments["resume"], arguments["id"]) == ("online", "allow", "me")
    assert (arguments["tags"], arguments["entity"], arguments["project"]) == (["a", "b"], "team", "gptoughts")
    assert arguments["settings"]["x_disable_stats"] and arguments["settings"]["disable_git"]
    assert [row["step"] for row in server.logged if "train/loss" in row] == [3, 4, 5, 6]
    assert [row["sample"] for row in server.logged if "sample" in row] == [6]
    assert server.metrics["gpu/utilization"] == {"step_metric": "sample"} and server.metrics["step"] == {"summary": "max"}


def test_steps_that_the_server_has_are_not_sent_again(online: Any, tmp_path: Path) -> None:
    server = Server(tmp_path, {"step": 5, "sample": 5})
    online(server)
    assert [row["step"] for row in server.logged if "train/loss" in row] == [6]


def test_a_server_that_is_down_means_offline_and_no_secret_in_the_message(online: Any, tmp_path: Path) -> None:
    server = Server(tmp_path, down=True)
    older = tmp_path / "wandb" / "offline-run-1-me"
    older.mkdir(parents=True)
    said = online(server)
    assert [arguments["mode"] for arguments in server.inits] == ["online", "offline"] and server.inits[1]["resume"] is None
    assert "cannot start online (timed out; key [redacted])" in said and "upload with: wandb sync" in said
    assert [row["step"] for row in server.logged if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert not older.exists(), "the folder of the attempt before, whose rows this one has"


def test_without_a_login_the_run_stays_offline(online: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    server = Server(tmp_path)
    assert "wandb: not logged in" in online(server)
    assert [arguments["mode"] for arguments in server.inits] == ["offline"]


def test_logins(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    assert has_login({"WANDB_API_KEY": "x"}) and has_login({"NETRC": str(file)})
    assert not has_login({"NETRC": str(file), "WANDB_BASE_URL": "https://wandb.example.org"})
    assert not has_login({"NETRC": str(tmp_path / "none")})
    file.write_text("machine\n")
    assert not has_login({"NETRC": str(file)}), "damaged"


def test_no_key_is_named_by_two_patterns() -> None:
    """wandb takes any of the patterns that match, in no order."""
    patterns = [name for name in axes() if name.endswith("*")]
    assert [(one, other) for one in patterns for other in patterns if one != other and fnmatchcase(one, other)] == []
    assert [name for name, axis in axes().items() if axis == "sample" and any(fnmatchcase(name, one) for one in patterns)] == []

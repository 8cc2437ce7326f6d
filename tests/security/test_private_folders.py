"""Folders of runs, checkpoints and caches are made for this user alone, and nobody else writes the code that a cache holds."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptoughts
from gptoughts.errors import LayerError, RunError
from gptoughts.files import make_private, open_to_all
from gptoughts.layers.support.graph_cache import cached_graphs
from gptoughts.run.storage import CACHE_VARIABLES, check_temporary


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def train(run: str) -> None:
    values = {
        "name": "tiny", "model.depth": 1, "model.width": 16, "model.heads": 2, "data.path": "text.txt", "data.tokenizer": "bytes",
        "data.sequence_length": 16, "train.steps": 1, "train.global_batch": 2, "optim.warmup_steps": 0, "eval.batches": 1,
        "sample.tokens": 2,
    }  # fmt: skip
    gptoughts.train(values, layers={"compile": "eager", "host": "system", "precision": "fp32"}, run=run, numerics="off")


def test_a_run_makes_its_folders_for_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text("some text of a small corpus\n" * 200)
    train("one")
    made = ["out", "out/one", "checkpoints", "checkpoints/one", "cache", "cache/gptoughts", "cache/gptoughts/data"]
    assert {name: oct(mode(Path(name))) for name in made} == dict.fromkeys(made, "0o700")
    tokenized = [path for path in Path("cache/gptoughts/data").iterdir() if path.is_dir()]
    assert tokenized and {oct(mode(path)) for path in tokenized} == {"0o700"}
    for name in ("out/two", "checkpoints/two"):
        Path(name).mkdir(mode=0o755)
    train("two")
    assert mode(Path("out/two")) == mode(Path("checkpoints/two")) == 0o755, "a folder that exists keeps its mode"


def test_a_folder_below_a_groups_folder_is_the_groups(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    make_private(shared / "a" / "b")
    assert [mode(shared / name) & 0o777 for name in ("a", "a/b")] == [0o750, 0o750], "rights of the group within the umask"
    shared.chmod(0o775)
    make_private(shared / "c")
    assert mode(shared / "c") == 0o700, "without the bit it is only a folder with a loose mode"


def test_a_folder_that_must_be_new_is_not_taken_over(tmp_path: Path) -> None:
    make_private(tmp_path / "a", new=True)
    make_private(tmp_path / "a")
    with pytest.raises(FileExistsError):
        make_private(tmp_path / "a", new=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        make_private(tmp_path / "file" / "below")


def test_the_parent_in_which_everybody_can_replace_a_folder_is_found(tmp_path: Path) -> None:
    inner = tmp_path / "parent" / "cache"
    inner.mkdir(parents=True)
    assert open_to_all(inner) is None and open_to_all(inner / "missing") is None
    inner.parent.chmod(0o777)
    assert open_to_all(inner) == inner.parent and open_to_all(inner / "missing") == inner.parent
    inner.parent.chmod(0o1777)
    assert open_to_all(inner) is None and open_to_all(inner.parent) == inner.parent
    link = tmp_path / "link"
    link.symlink_to(inner)
    inner.chmod(0o777)
    assert open_to_all(link) == inner


def test_a_compile_cache_that_everybody_can_write_is_refused(tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for name in CACHE_VARIABLES:
        check_temporary({name: str(loose)})
    with cached_graphs("own", {"TORCHINDUCTOR_CACHE_DIR": str(loose)}):
        pass
    loose.chmod(0o777)
    for name in CACHE_VARIABLES:
        with pytest.raises(
            RunError, match=f"{name}: everybody can write .*loose, and cached code is executed.\n  Try: chmod o-w"
        ):
            check_temporary({name: str(loose)})
    for cache in ("own", "torch"):
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(loose)}
        with pytest.raises(LayerError, match="everybody can write"), cached_graphs(cache, environment):
            pass
        assert environment == {"TORCHINDUCTOR_CACHE_DIR": str(loose)}
    own = {"XDG_CACHE_HOME": str(loose)}
    with pytest.raises(LayerError, match="everybody can write"), cached_graphs("own", own):
        pass
    with cached_graphs("off", {"TORCHINDUCTOR_CACHE_DIR": str(loose)}):
        pass


def test_torchs_own_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoughts.layers.support.graph_cache.default_graph_cache", lambda: str(tmp_path))
    with cached_graphs("torch", {}):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LayerError, match="belongs to another user"), cached_graphs("torch", {}):
        pass


def test_a_compile_cache_of_a_group_or_another_user_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.WARNING, "gptoughts"):
        check_temporary({"TRITON_CACHE_DIR": str(tmp_path)})
        assert caplog.messages == []
        groups = [12345] if os.geteuid() == 0 else [group for group in os.getgroups() if group != os.geteuid()]
        if groups:
            os.chown(tmp_path, -1, groups[0])
            tmp_path.chmod(0o770)
            check_temporary({"TRITON_CACHE_DIR": str(tmp_path)})
            assert caplog.messages == [f"TRITON_CACHE_DIR: group {groups[0]} can write {tmp_path}, and cached code is executed"]
        caplog.clear()
        if os.geteuid() == 0:
            os.chown(tmp_path, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        owner = tmp_path.stat().st_uid
        check_temporary({"TRITON_CACHE_DIR": str(tmp_path)})
        assert caplog.messages == [f"TRITON_CACHE_DIR: {tmp_path} belongs to user {owner}, and cached code is executed"]

"""On one machine no process of a job can be reached from another one; torchrun's own rendezvous, as the control, can."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from gptoughts.engine.distributed import elastic, rendezvous
from gptoughts.engine.distributed.process_group import own_group  # noqa: F401 - imported by the worker
from gptoughts.errors import ConfigError
from gptoughts.hardware.endpoint import MEETING_FILE, Endpoint, endpoint, private_folder
from gptoughts.hardware.world import World
from tests.support.golden_files import ROOT
from tests.support.listeners import listening

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
LOCAL = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
WORKER = [sys.executable, "-m", "tests.support.listeners"]


def written(folder: Path) -> set[str]:
    """Addresses at which any process of the job listened."""
    return {line for path in folder.iterdir() for line in path.read_text(encoding="ascii").split()}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_ranks_of_our_launcher_listen_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "module_words", lambda name: WORKER)
    assert elastic.run_ranks(2, [str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    assert written(tmp_path) and written(tmp_path) <= LOCAL
    assert MEETING_FILE not in os.environ


@pytest.mark.slow
def test_the_control_listens_on_all_addresses(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *WORKER[1:], str(tmp_path)]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert written(tmp_path) - LOCAL, "torchrun --standalone became private: our own rendezvous may go"


@pytest.mark.slow
def test_a_single_process_listens_on_loopback(tmp_path: Path) -> None:
    subprocess.run([*WORKER, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert written(tmp_path) <= LOCAL


def test_the_store_of_one_machine_listens_on_loopback_and_torchs_own_does_not() -> None:
    before = listening([os.getpid()])
    world = World(0, 0, 1, 1, "srun")
    store = rendezvous._store(world, Endpoint("a-host", 0, "test", serves=True), 5)
    assert [one for one in listening([os.getpid()]) if one not in before] == ["127.0.0.1"]
    store.set("a", "b")
    assert store.get("a") == b"b"
    control = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert set(listening([os.getpid()])) - LOCAL, "the control"
    del control


def test_ranks_that_we_start_meet_in_a_private_file(tmp_path: Path) -> None:
    with elastic._meeting_place():
        file = Path(os.environ[MEETING_FILE])
        assert file.parent.stat().st_mode & 0o077 == 0
        assert endpoint(World(0, 0, 2, 2, "torchrun"), os.environ).file == file
        elsewhere = endpoint(World(0, 0, 4, 2, "torchrun"), {**os.environ, "MASTER_ADDR": "first"})
        assert elsewhere.file is None, "several machines share no file"


@pytest.mark.parametrize("kind", ["link", "open to others", "file"])
def test_a_folder_that_another_user_may_have_made_is_refused(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind == "link":
        (tmp_path / "other").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "other")
    elif kind == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777)
    with pytest.raises(ConfigError, match=f"{place}: must be a folder of this user alone"):
        private_folder(place)
    assert private_folder(private_folder(tmp_path / "new")).stat().st_mode & 0o777 == 0o700

"""A SLURM of two virtual nodes with fake GPUs on this machine: munged, slurmctld and two slurmd, as root, without systemd.

Everything lives in one folder; `SLURM_CONF` points its clients there. Debian packages: `PACKAGES`; launch/test.sh installs them.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
SBIN = "/usr/sbin:/sbin"


def missing() -> str:
    """Return why a cluster cannot be started here, or an empty string."""
    if os.geteuid() != 0:
        return "slurmctld and slurmd need root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}") is None]
    return f"not installed: {', '.join(absent)} (apt-get install {' '.join(PACKAGES)})" if absent else ""


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def slurm_conf(folder: Path, ports: list[int], gpus: int) -> str:
    """Return slurm.conf for two nodes of this machine, `gpus` fake ones each."""
    host, control, *nodes = socket.gethostname().partition(".")[0], *ports
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    return "\n".join(
        [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={control}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            # A requeued job waits for as long as a credential lives: 120 s by default.
            f"AuthInfo=socket={folder}/munge.socket,cred_expire=10",
            "CredType=cred/munge",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "ReturnToService=2",
            "SlurmdParameters=config_overrides",  # 4 CPUs per node, however many there are
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool-%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={folder}/slurmctld.log",
            f"SlurmdLogFile={folder}/slurmd-%n.log",
            "JobAcctGatherType=jobacct_gather/none",
            "MpiDefault=none",
            "KillWait=5",
            *(["GresTypes=gpu"] if gpus else []),
            *(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4{gres} State=UNKNOWN"
                for name, port in zip(NODES, nodes, strict=True)
            ),
            f"PartitionName=all Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO",
            "",
        ]
    )


@dataclass(frozen=True)
class Cluster:
    """A running cluster. `environment` holds the variables that its clients need."""

    folder: Path
    environment: Mapping[str, str]

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a client such as squeue and return its output."""
        return subprocess.run(
            words, cwd=cwd, env={**self.environment, **variables}, capture_output=True, text=True, check=False, timeout=60
        )

    def submit(self, *words: str, cwd: Path, **variables: str) -> str:
        """Submit with sbatch and return the job id."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what `scontrol show job` prints, by name."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, number: str, seconds: float = 300) -> dict[str, str]:
        """Wait for the end of a job and return it as `job` does; after `seconds` cancel it and raise TimeoutError."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number)).get("JobState") in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED"):
            if time.monotonic() > deadline:
                self.run("scancel", number)
                raise TimeoutError(f"job {number}: {job}")
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        """Return the last lines of the daemons' logs."""
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(self.folder.glob("*.log"))
        )


def _fake_gpus(folder: Path, count: int) -> int:
    """Write gres.conf with device files like /dev/null; return their number, 0 where none can be made."""
    try:
        for number in range(count):
            os.mknod(folder / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        return 0
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{count - 1}]\n", encoding="utf-8")
    return count


@contextmanager
def cluster(folder: Path, gpus: int = 2) -> Iterator[Cluster]:
    """Start a cluster for the block. Raises TimeoutError with the logs if its nodes do not become idle."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    made = _fake_gpus(folder, gpus)
    (folder / "slurm.conf").write_text(slurm_conf(folder, free_ports(1 + len(NODES)), made), encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SALLOC_"))}
    known = {**clean, "PATH": f"{os.environ['PATH']}:{SBIN}", "SLURM_CONF": str(folder / "slurm.conf")}
    munge = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
    ]  # fmt: skip
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    here = Cluster(folder, known)
    try:
        for words in commands:
            with (folder / f"{words[0]}-{len(started)}.log").open("wb") as log:
                started.append(subprocess.Popen(words, env=known, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
            if words is munge:
                _until((folder / "munge.socket").exists, "munged", here)
        _until(lambda: _idle(here), "two idle nodes", here)
        yield here
    finally:
        here.run("scancel", "--state=RUNNING", "--user=root")
        for process in reversed(started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            if process.poll() is None:
                process.kill()
                process.wait()


def _idle(here: Cluster) -> bool:
    states = here.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split()
    return len(states) == len(NODES) and set(states) == {"idle"}


def _until(holds: Callable[[], bool], what: str, here: Cluster, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s\n{here.logs()}")
        time.sleep(0.2)

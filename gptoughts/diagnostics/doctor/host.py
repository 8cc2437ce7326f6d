"""Check the host: NUMA nodes, limits of process and container, shared memory, the compiler for torch.compile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from gptoughts.console import GIB, bytes_in_words
from gptoughts.diagnostics.doctor.finding import Check, Finding
from gptoughts.hardware.cpu import cgroup_cpu_quota, cgroup_memory_limit
from gptoughts.hardware.machine import Machine

# NCCL and worker processes pass data through /dev/shm; containers have 64 MiB by default.
LEAST_SHM_BYTES = GIB
# RDMA pins its buffers; NCCL's documentation recommends no limit. Below this the first communicator can fail.
LEAST_LOCKED_BYTES = 64 << 20
# A shard stays open while it is mapped: 1,024 files are 100 billion tokens at 100 million per shard.
LEAST_FILES = 1024
EMPTY_PATH = "GPTOUGHTS_EMPTY_PYTHONPATH"
"""Environment variable that `gptoughts.__main__` sets where it took an empty entry off PYTHONPATH."""
COMPILE_COSTS = "eager instead of compiled: 1.01x to 1.53x in bf16, 1.00x to 1.39x in float32 on a CPU"
COMPILE_SOURCE = "docs/measurements/cpu/widths.json"
GPU_COMPILE_COSTS = "eager instead of compiled: +15.7 % for an 8 B model on H100s"
GPU_COMPILE_SOURCE = "published, torchtitan"


def path_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Return a finding if PYTHONPATH had an empty entry, which is the current folder."""
    if not environment.get(EMPTY_PATH):
        return []
    what = "PYTHONPATH has an empty entry: Python runs a sitecustomize.py of the current folder"
    return [Finding(what, 'export PYTHONPATH="${PYTHONPATH#:}", without an empty entry', "minor")]


def own_limits() -> dict[str, int | None]:
    """Return the limits of open files and of locked memory in bytes of this process; None is no limit."""
    import resource

    def soft(which: int) -> int | None:
        number = resource.getrlimit(which)[0]
        return None if number == resource.RLIM_INFINITY else number

    return {"files": soft(resource.RLIMIT_NOFILE), "locked": soft(resource.RLIMIT_MEMLOCK)}


def check(machine: Machine, allowed: Mapping[str, int | None], root: Path, headers: Path | None) -> Check:
    """Check the host. `root` holds /proc and /sys; `headers` is the folder of Python.h, None if unknown."""
    quota, limit = cgroup_cpu_quota(root), cgroup_memory_limit(root)
    total = _total_memory(root)
    findings = [
        *_numa_findings(machine),
        *_limit_findings(machine, allowed, root),
        *_container_findings(machine, quota, limit, total),
        *_compiler_findings(machine, headers),
    ]
    locked, files = allowed["locked"], allowed["files"]
    opened = "no limit" if files is None else f"{files:,}"
    words = f"{opened} open files, {'no limit' if locked is None else bytes_in_words(locked)} locked memory"
    if quota is not None or limit is not None:
        cores = "no limit" if quota is None else f"{quota:g} cores"
        words += f"; container: {cores}, {'no limit' if limit is None else bytes_in_words(limit)}"
    nodes = machine.cpu.numa_nodes
    numa = f"; {nodes} NUMA {'node' if nodes == 1 else 'nodes'}"
    figures = {**allowed, "cgroup_cores": quota, "cgroup_memory_bytes": limit, "memory_bytes": total, "numa_nodes": nodes}
    return Check("limits", (words + numa,), tuple(findings), figures)


def _total_memory(root: Path) -> int | None:
    """Return the RAM of the machine in bytes, regardless of container limits."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    rows = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    words = rows.get("MemTotal", "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def _numa_findings(machine: Machine) -> Iterator[Finding]:
    """Yield findings for GPUs on NUMA nodes that this process is not allowed to run on: every copy crosses sockets."""
    if machine.cpu.numa_nodes < 2:
        return
    cores = machine.cpu.numa_cores
    for node in sorted({gpu.numa_node for gpu in machine.gpus if gpu.numa_node is not None}):
        if node < len(cores) and cores[node]:
            continue
        gpus = ", ".join(str(gpu.index) for gpu in machine.gpus if gpu.numa_node == node)
        what = f"GPU {gpus}: on NUMA node {node}, but this process is bound to other nodes"
        mend = f"numactl --cpunodebind={node} --membind={node} gptoughts train"
        yield Finding(what, mend, "costs")
    if machine.gpus and all(gpu.numa_node is None and not gpu.mig for gpu in machine.gpus):
        what = f"{machine.cpu.numa_nodes} NUMA nodes, the node of each GPU is unknown"
        yield Finding(what, "numactl --cpunodebind=N --membind=N gptoughts train; nvidia-smi topo -m shows N", "minor")


def _limit_findings(machine: Machine, allowed: Mapping[str, int | None], root: Path) -> Iterator[Finding]:
    locked, files = allowed["locked"], allowed["files"]
    rdma = root / "sys/class/infiniband"
    if machine.gpus and locked is not None and locked < LEAST_LOCKED_BYTES and rdma.is_dir() and any(rdma.iterdir()):
        what = f"locked memory limit {bytes_in_words(locked)}: NCCL over InfiniBand locks its buffers"
        yield Finding(
            what,
            "ulimit -l unlimited, or docker run --ulimit memlock=-1",
            "costs",
            "NCCL fails or runs without RDMA",
            "NCCL user guide",
        )
    if files is not None and files < LEAST_FILES:
        yield Finding(f"open file limit {files}: a corpus has one file per 100 M tokens", "ulimit -n 65536", "minor")


def _container_findings(machine: Machine, quota: float | None, limit: int | None, total: int | None) -> Iterator[Finding]:
    if quota is not None and quota < machine.cpu.logical_cores:
        what = f"container limit: {quota:g} of {machine.cpu.logical_cores} cores"
        yield Finding(what, f"docker run --cpus={machine.cpu.logical_cores} ...", "minor")
    if limit is not None and total is not None and limit < total:
        what = f"container limit: {bytes_in_words(limit)} of {bytes_in_words(total)} memory, page cache included"
        yield Finding(what, f"docker run --memory={total >> 30}g ...", "minor")


def _compiler_findings(machine: Machine, headers: Path | None) -> Iterator[Finding]:
    """Yield findings if torch.compile cannot build: C++ for CPU kernels, C for Triton's launchers."""
    if machine.system != "linux":
        return
    costs = (GPU_COMPILE_COSTS, GPU_COMPILE_SOURCE) if machine.gpus else (COMPILE_COSTS, COMPILE_SOURCE)
    if "c++" not in machine.packages:
        yield Finding("no C++ compiler: torch.compile cannot run", "apt-get install g++", "costs", *costs)
    elif headers is not None and not (headers / "Python.h").is_file():
        package = f"python{'.'.join(machine.python.split('.')[:2])}-dev"
        what = f"Python.h: not in {headers}, torch.compile cannot build"
        yield Finding(what, f"apt-get install {package}", "costs", *costs)


def shared_memory_findings(shm_bytes: int | None) -> Iterator[Finding]:
    """Yield a finding if /dev/shm is too small for several ranks."""
    if shm_bytes is not None and shm_bytes < LEAST_SHM_BYTES:
        what = f"/dev/shm: {bytes_in_words(shm_bytes)}, several ranks need {bytes_in_words(LEAST_SHM_BYTES)}"
        yield Finding(what, "docker run --shm-size=8g ..., or mount -o remount,size=8g /dev/shm", "minor")

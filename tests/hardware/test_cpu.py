"""CPU, memory and limits, read from trees of plain files that stand for other machines."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from gptoughts.hardware import cpu
from gptoughts.hardware.cpu import (
    Cpu,
    cgroup_cpu_quota,
    cgroup_memory_limit,
    parse_cores,
    read_cpu,
    read_memory_bytes,
    read_numa,
)

GIB = 1 << 30


def tree(root: Path, files: dict[str, str]) -> Path:
    """`root` with these files in it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "0::/user.slice/job_7\n"
V1 = "4:memory:/slurm/job_7\n3:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/\n"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job_7/cpu.max": "400000 100000\n"}, 4.0),
        # a parent's limit holds for its children
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/job_7/cpu.max": "max 100000\n",
                "sys/fs/cgroup/user.slice/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        # in a container the host's path does not exist, the mount's root is the container
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        ({"proc/self/cgroup": "0::/../../up\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3.0),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_quota_us": "800000\n",
                "sys/fs/cgroup/cpu,cpuacct/slurm/job_7/cpu.cfs_period_us": "100000\n",
            },
            8.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
        # a hybrid box keeps version 2 beside version 1
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/unified/job/cpu.max": "100000 100000\n"}, 1.0),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "lots\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
        ({"proc/self/cgroup": "nonsense\n\n::\n", "sys/fs/cgroup/cpu.max": ""}, None),
    ],
)
def test_cgroup_cpu_quota(tmp_path: Path, files: dict[str, str], cores: float | None) -> None:
    assert cgroup_cpu_quota(tree(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job_7/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user.slice/job_7/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/user.slice/job_7/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/user.slice/memory.max": f"{4 * GIB}\n",
            },
            4 * GIB,
        ),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/slurm/job_7/memory.limit_in_bytes": f"{GIB}\n"}, GIB),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    ],
)
def test_cgroup_memory_limit(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    assert cgroup_memory_limit(tree(tmp_path, files)) == limit


def test_memory_is_the_lower_of_ram_and_limit(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n"}
    assert read_memory_bytes("linux", tree(tmp_path / "a", meminfo)) == 16 * GIB
    limited = meminfo | {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{2 * GIB}\n"}
    assert read_memory_bytes("linux", tree(tmp_path / "b", limited)) == 2 * GIB
    assert read_memory_bytes("linux", tmp_path / "nothing") is None


def test_cpuinfo_of_x86(tmp_path: Path) -> None:
    core = "processor\t: {}\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 fma avx512f avx512_bf16 amx_tile amx_bf16\n\n"
    root = tree(tmp_path, {"proc/cpuinfo": core.format(0) + core.format(1)})
    assert cpu.read_cpuinfo(root) == ("Some Xeon", ("avx2", "fma", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16"))


@pytest.mark.parametrize(("part", "model"), [("0xd4f", "Neoverse-V2"), ("0xd40", "Neoverse-V1"), ("0xfff", os.uname().machine)])
def test_cpuinfo_of_arm(tmp_path: Path, part: str, model: str) -> None:
    text = f"processor : 0\nFeatures : fp asimd asimdhp sve bf16 i8mm\nCPU implementer : 0x41\nCPU part : {part}\n"
    found = cpu.read_cpuinfo(tree(tmp_path, {"proc/cpuinfo": text}))
    assert found == (model, ("asimd", "asimdhp", "sve", "i8mm", "bf16"))


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0-3,8", (0, 1, 2, 3, 8)), ("5\n", (5,)), ("", ()), ("\n", ()), ("a-b", ()), ("0-1,", ()), ("3-1", ())],
)
def test_core_lists(text: str, cores: tuple[int, ...]) -> None:
    assert parse_cores(text) == cores


def test_numa_lists_are_indexed_by_node_number(tmp_path: Path) -> None:
    node = "sys/devices/system/node/node{}/cpulist"
    # As on Grace Hopper: node 1 is memory of the GPU; node 3 has cores, node 2 does not exist.
    root = tree(tmp_path, {node.format(0): "0-1\n", node.format(1): "\n", node.format(3): "2-3\n"})
    assert read_numa(root) == ((0, 1), (), (), (2, 3))
    assert read_numa(tmp_path / "nothing") == ()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_usable_cores_keep_to_affinity_and_quota(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    one = min(before)
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    assert read_cpu("linux", root).usable_cores == 1
    try:
        os.sched_setaffinity(0, {one})
        pinned = read_cpu("linux", tmp_path / "nothing")
    finally:
        os.sched_setaffinity(0, before)
    assert pinned.usable_cores == 1
    assert pinned.logical_cores == os.cpu_count()
    assert pinned.numa_cores == ((one,),)


def test_a_quota_of_part_of_a_core_rounds_down(tmp_path: Path) -> None:
    cores = read_cpu("linux", tmp_path / "nothing").usable_cores
    root = tree(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "199000 100000\n"})
    assert read_cpu("linux", root).usable_cores == 1
    (root / "sys/fs/cgroup/cpu.max").write_text("9900000 100000\n")
    assert read_cpu("linux", root).usable_cores == min(cores, 99)


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An Apple M2: no affinity call, and a `sysctl` on the path that answers as macOS does."""
    answers = {
        "machdep.cpu.brand_string": "Apple M2 Pro",
        "hw.memsize": "34359738368",
        "hw.optional.AdvSIMD": "1",
        "hw.optional.arm.FEAT_BF16": "1",
        "hw.optional.arm.FEAT_SME": "0",
    }
    cases = "".join(f"  {key}) echo '{value}';;\n" for key, value in answers.items())
    program = tmp_path / "sysctl"
    program.write_text(f'#!/bin/sh\ncase "$2" in\n{cases}  *) echo "unknown oid" >&2; exit 1;;\nesac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)


@pytest.mark.usefixtures("mac")
def test_macos() -> None:
    found = read_cpu("darwin")
    assert found.model == "Apple M2 Pro"
    assert found.instruction_sets == ("asimd", "bf16")
    assert found.usable_cores == found.logical_cores == os.cpu_count()
    assert found.numa_nodes == 1
    assert read_memory_bytes("darwin") == 32 * GIB
    assert found.label().endswith("Apple M2 Pro, bf16")


def test_macos_without_sysctl_and_an_unknown_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for system in ("darwin", "win32", "freebsd14"):
        assert read_cpu(system, tmp_path).usable_cores >= 1
        assert read_memory_bytes(system, tmp_path) is None


@pytest.mark.parametrize(
    ("sets", "end"),
    [
        (("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"), "avx512_bf16, amx_bf16"),
        (("avx2", "fma", "avx512f"), "avx512f"),
        (("avx2", "fma"), "avx2"),
        (("asimd",), "asimd"),
        ((), "a model"),
    ],
)
def test_label(sets: tuple[str, ...], end: str) -> None:
    assert Cpu("a model", 2, 4, sets).label().startswith("2 cores, a model")
    assert Cpu("a model", 2, 4, sets).label().endswith(end)
    assert Cpu("a model", 1, 4, sets).label().startswith("1 core, ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_this_machine() -> None:
    found = read_cpu()
    assert 1 <= found.usable_cores <= found.logical_cores
    assert (read_memory_bytes() or 0) > 0

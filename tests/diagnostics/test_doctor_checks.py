"""Checks of doctor: each runs for real here where a CPU can, and is judged on machines that are not here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoughts.diagnostics.doctor import clocks, disk, forks, host, imports, ranks, speed
from gptoughts.diagnostics.doctor.finding import Finding, worst_first
from gptoughts.diagnostics.doctor.forks import Job, Outcome
from gptoughts.hardware.machine import Machine, probe, read
from tests.support.golden_files import ROOT

HERE = "tests.diagnostics.test_doctor_checks"


def box(stem: str) -> Machine:
    return read(ROOT / f"tests/machines/{stem}.json")


def done(name: str, **figures: Any) -> dict[str, Outcome]:
    return {name: Outcome(name, figures, 0, "", 1.0)}


# Jobs that end in every way.


def fine(word: str) -> dict[str, Any]:
    return {"word": word, "variable": os.environ.get("A_VARIABLE"), "group": os.getpgid(0) == os.getpid()}


def raises() -> None:
    raise RuntimeError("cuDNN is not there")


def crashes() -> None:
    print("about to fall", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(path: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    Path(path).write_text(str(child.pid))
    print("waiting for rank 2", flush=True)
    time.sleep(100)


def kills_the_server() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


@pytest.fixture(scope="module", autouse=True)
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Servers of this file find an empty torch, unless a test takes it away: what they are tested for needs none."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "torch.py").write_text("")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder)
    yield folder
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.is_file() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_every_end_of_a_job_is_an_outcome(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    found = forks.run(
        [
            Job("fine", HERE, "fine", ("a",), environment={"A_VARIABLE": "b"}),
            Job("raises", HERE, "raises"),
            Job("crashes", HERE, "crashes"),
            Job("hangs", HERE, "hangs", (str(note),), seconds=2.0),
            Job("missing", "no.such.module", "f"),
        ],
        at_once=2,
    )
    assert found["fine"].figures == {"word": "a", "variable": "b", "group": True} and not found["fine"].trouble
    assert found["raises"].trouble == "exit code 1: RuntimeError: cuDNN is not there"
    assert found["crashes"].trouble == "killed by SIGSEGV: about to fall"
    assert found["hangs"].trouble == "timed out after 2 s: waiting for rank 2"
    assert "ModuleNotFoundError" in found["missing"].trouble
    assert os.environ.get("A_VARIABLE") is None
    if sys.platform == "linux":
        assert not alive(int(note.read_text())), "what a job started ends with it"


def test_a_dead_server_leaves_what_it_had(tmp_path: Path) -> None:
    order = [Job("first", HERE, "fine", ("a",), together="1"), Job("kill", HERE, "kills_the_server", together="2")]
    found = forks.run([*order, Job("last", HERE, "fine", ("a",), together="3")], at_once=2)
    assert found["first"].figures and not found["last"].tried
    assert found["last"].trouble.startswith("killed by SIGKILL")
    assert forks.run([], 1) == {}


def test_a_module_in_the_users_folder_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert forks.run([Job("fine", HERE, "fine", ("a",))], 1)["fine"].figures


# Imports.


@pytest.fixture
def broken(without_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose packages break in every way that was seen, on PYTHONPATH, beside an empty torch."""
    symbol = "/lib/flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2ENS"
    for name, text in {
        "triton": "__version__ = '3.0'",
        "transformer_engine/__init__": "",
        "transformer_engine/pytorch": "raise RuntimeError('Could not find shared object file: transformer_engine')",
        "flash_attn": f"raise ImportError({symbol!r})",
        "torchao/__init__": "",
        "torchao/float8": "print('loading kernels', flush=True)\nimport os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "bitsandbytes": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "peft": "import time\ntime.sleep(60)",
        "mpi4py/__init__": "",
        "mpi4py/MPI": "raise SystemExit(3)",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(without_torch))))
    names = ("triton", "transformer-engine", "flash-attn", "torchao", "bitsandbytes", "peft", "mpi4py")
    return replace(box("h100"), packages=dict.fromkeys(names, "1.0") | {"torch": "2.13.0+cu130"})


def test_broken_packages_are_findings_with_their_own_words(broken: Machine) -> None:
    jobs = [replace(job, seconds=6.0) for job in imports.jobs(broken) if job.name != "import torch"]
    check = imports.judge(broken, forks.run(jobs, 4))
    said = {finding.what.split()[0]: finding for finding in check.findings}
    assert set(said) == {"transformer-engine", "flash-attn", "torchao", "bitsandbytes", "peft", "mpi4py"}
    engine = said["transformer-engine"]
    assert "RuntimeError: Could not find shared object file: transformer_engine" in engine.what
    assert (engine.weight, engine.costs.split(":")[0]) == ("costs", "FP8 off") and "LLMQ" in engine.source
    assert "undefined symbol" in said["flash-attn"].what and "a different torch than 2.13.0+cu130" in said["flash-attn"].what
    assert said["flash-attn"].mend.endswith("flash-attn") and "--no-build-isolation" in said["flash-attn"].mend
    assert "killed by SIGSEGV: loading kernels" in said["torchao"].what
    assert "shared library missing" in said["bitsandbytes"].what
    assert "timed out after 6 s" in said["peft"].what
    assert "SystemExit: 3" in said["mpi4py"].what and said["mpi4py"].weight == "minor"
    assert check.figures["triton"]["version"] == "3.0" and "triton 3.0" in check.rows[0]
    assert all(finding.mend for finding in check.findings)


def test_a_torch_that_ends_its_process_is_one_finding_that_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, sys, signal\nprint('no luck', file=sys.stderr, flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    machine = replace(probe(), packages={"torch": "2.13.0", "peft": "1.0"})
    (found,) = imports.judge(machine, forks.run(imports.jobs(machine), 2)).findings
    assert found.weight == "stops" and "torch 2.13.0: import failed: killed by SIGSEGV: no luck" in found.what
    assert found.mend.startswith("pip install --force-reinstall 'torch")


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"cuda": "13.0", "gpus": 1, "architectures": ["sm_80", "sm_90", "sm_120"]}, None),
        ({"cuda": "13.0", "gpus": 1, "architectures": ["sm_80", "sm_90a"]}, None),
        ({"cuda": "13.0", "gpus": 1, "architectures": ["sm_80", "sm_100"]}, "no kernels for sm 9.0"),
        ({"cuda": "13.0", "gpus": 0, "architectures": []}, "CUDA reports no device"),
        (
            {"cuda": "13.0", "gpus": 0, "cuda_error": "RuntimeError: Error 803: system"},
            "torch cannot use the GPU: RuntimeError: Error 803",
        ),
        ({"cuda": "13.0", "gpus": 1, "architectures": ["sm_80", "compute_80"]}, None),
        ({"cuda": "13.0", "gpus": 1, "architectures": ["sm_80", "compute_120"]}, "no kernels for sm 9.0"),
        ({"cuda": None}, "built without CUDA"),
    ],
)
def test_torch_and_the_gpu(figures: dict[str, Any], said: str | None) -> None:
    check = imports.judge(box("h100"), done("import torch", version="2.13.0", **figures))
    assert [said in finding.what for finding in check.findings if said] == ([True] if said else [])
    assert bool(check.findings) == bool(said)


def test_a_cpu_build_is_told_once() -> None:
    machine = replace(box("h100"), packages={"torch": "2.13.0+cpu"})
    assert imports.judge(machine, done("import torch", version="2.13.0+cpu", cuda=None)).findings == ()


# What runs here for real: the import of torch, the disk, products, copies, a sum over two ranks.


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="copies within one machine through lo")
def test_on_this_machine(with_torch: None, tmp_path: Path) -> None:
    machine = replace(probe({"CUDA_VISIBLE_DEVICES": ""}), packages={"torch": "here"})
    jobs = [*imports.jobs(machine), *disk.jobs(tmp_path), *speed.jobs(machine), *ranks.jobs(machine, str(tmp_path))]
    half, missing = tmp_path / "half", tmp_path / "missing"
    # Two ranks of three: the third never comes, so the others wait for it for ever.
    jobs += [
        Job(
            f"rank {rank}",
            ranks.__name__,
            "child",
            (rank - 3, 3, "cpu", str(half)),
            4.0,
            "ranks hang",
            {"GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in (3, 4)
    ]
    jobs += [Job("no disk", disk.__name__, "child", (str(missing),))]
    found = forks.run(jobs, 2)

    assert imports.judge(machine, found).findings == ()
    assert (found["import torch"].figures and found["import torch"].figures["cuda"] is None) or probe().gpus
    written = disk.judge(tmp_path, found["disk"], None)
    assert found["disk"].figures and found["disk"].figures["wrong_blocks"] == 0 and found["disk"].figures["write_mb_s"] > 0
    assert [finding.weight for finding in written.findings] in ([], ["minor"]) and list(tmp_path.glob("tmp*")) == []
    (stops,) = disk.judge(missing, found["no disk"], None).findings
    assert stops.weight == "stops" and "No such file or directory" in stops.what

    quick = speed.judge(machine, found)
    assert quick.findings == () and "GFLOP/s" in quick.rows[0] and "no table" in quick.rows[0]
    assert all(rate > 0 for rate in quick.figures["cpu"]["tflops"].values()) and quick.figures["cpu"]["copy_gb_s"] > 0

    together = ranks.judge(machine, {name: found[name] for name in ("peers", "rank 0", "rank 1")}, {})
    assert together.findings == ()
    assert together.rows[0].startswith("2 copies between devices, all correct") and "(gloo): correct" in together.rows[1]
    assert found["rank 0"].figures and found["rank 0"].figures["bus_gb_s"] > 0

    hung = {"rank 0": found["rank 3"], "rank 1": found["rank 4"]}
    (finding,) = ranks.judge(machine, hung, {}).findings
    assert "timed out after 4 s" in finding.what and finding.weight == "minor"
    (finding,) = ranks.judge(box("h100x8"), hung, {}).findings
    assert finding.weight == "stops" and "NCCL_DEBUG=INFO" in finding.mend


# Copies and sums, judged.


def lost(target: Any, source: Any) -> None:
    """What an RTX 4090 without peer-to-peer support does: no error, and zeros."""
    target.zero_()


def test_copies_that_arrive_as_zeros_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "CPU_BYTES", 1 << 12)
    good, bad = ranks.peers(["cpu", "cpu", "cpu"]), ranks.peers(["cpu", "cpu"], lost)
    nothing = ranks.peers(["cpu", "cpu"], lambda target, source: None)  # nothing arrived: not zeros, and not right
    assert [(pair["from"], pair["to"]) for pair in good["pairs"]] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    assert all(pair["right"] for pair in good["pairs"]) and all(pair["zeros"] for pair in bad["pairs"])
    assert [pair["zeros"] or pair["right"] for pair in nothing["pairs"]] == [False, False]
    machine = box("h100x8")
    assert ranks.judge(machine, done("peers", **good), {}).findings == ()
    check = ranks.judge(machine, done("peers", **bad), {})
    (found,) = check.findings
    assert found.weight == "stops" and "return zeros without an error: 0 -> 1, 1 -> 0" in found.what
    assert found.mend == "export NCCL_P2P_DISABLE=1" and "WRONG" in check.rows[0]
    (found,) = ranks.judge(machine, done("peers", **bad), {"NCCL_P2P_DISABLE": "1"}).findings
    assert found.weight == "minor"
    (found,) = ranks.judge(machine, done("peers", **nothing), {}).findings
    assert "return wrong data" in found.what
    (found,) = ranks.judge(machine, {"peers": Outcome("peers", None, None, "", 60.0)}, {}).findings
    assert "timed out after 60 s" in found.what and found.mend == "export NCCL_P2P_DISABLE=1"
    (found,) = ranks.judge(machine, {"peers": Outcome("peers", None, 1, "RuntimeError: CUDA error", 1.0)}, {}).findings
    assert "RuntimeError: CUDA error" in found.what and "dmesg" in found.mend


def sums(count: int = 8, right: bool = True, rate: float = 400.0, ring: bool = True) -> dict[str, Outcome]:
    return {
        name: outcome
        for rank in range(count)
        for name, outcome in done(f"rank {rank}", backend="nccl", right=right, ring=ring, bus_gb_s=rate).items()
    }


def test_sums_over_ranks() -> None:
    machine = box("h100x8")
    check = ranks.judge(machine, sums(), {})
    assert check.findings == () and check.rows == ("all-reduce over 8 ranks (nccl): correct, 400.0 GB/s bus bandwidth",)
    for wrong in (sums(right=False), sums(ring=False)):
        (found,) = ranks.judge(machine, wrong, {}).findings
        assert found.weight == "stops" and "is wrong" in found.what
    (found,) = ranks.judge(machine, sums(right=False), {}, {f"{name} again": one for name, one in sums().items()}).findings
    assert found.mend == "export NCCL_P2P_DISABLE=1" and "; correct without peer-to-peer copies" in found.what
    (found,) = ranks.judge(machine, sums(rate=40.0), {}).findings
    assert found.weight == "costs" and ": 40 GB/s, links 450 GB/s" in found.what
    assert ranks.judge(box("h100"), sums(1), {}).rows == ("all-reduce over 1 rank (nccl): correct",)
    pcie = replace(machine, gpus=tuple(replace(gpu, links=("pcie",) * 7) for gpu in machine.gpus))
    assert ranks.judge(pcie, sums(rate=4.0), {}).findings == (), "there is no table for PCIe"


def test_jobs_follow_the_machine(tmp_path: Path) -> None:
    assert [job.name for job in ranks.jobs(box("h100"), "x")] == ["rank 0"]
    names = [job.name for job in ranks.jobs(box("h100x8"), "x", ranks.NO_P2P, " again")]
    assert names == ["peers again", *(f"rank {number} again" for number in range(8))]
    assert all(job.environment["NCCL_P2P_DISABLE"] == "1" for job in ranks.jobs(box("h100x8"), "x", ranks.NO_P2P))
    assert [job.arguments[0] for job in speed.jobs(box("h100x8"))] == [f"cuda:{number}" for number in range(8)]
    assert len({job.together for job in speed.jobs(box("h100x8"))}) == 8, "one after the other"
    modules = {job.arguments[0] for job in imports.jobs(box("h100"))}
    assert {"torch", "transformer_engine.pytorch", "flash_attn"} <= modules and "deepspeed" not in modules


# Speed, judged.


def rates(count: int, tflops: float, copy: float, **slow: float) -> dict[str, Outcome]:
    return {
        name: outcome
        for index in range(count)
        for name, outcome in done(
            f"speed {index}",
            tflops={"bfloat16": slow.get(f"gpu{index}", tflops)},
            copy_gb_s=copy,
            threads=8,
            to_gpu_gb_s=50.0,
            from_gpu_gb_s=50.0,
        ).items()
    }


def test_speed_beside_the_table() -> None:
    machine = box("h100")
    check = speed.judge(machine, rates(1, 750.0, 3000.0))
    assert check.findings == ()
    assert check.rows == ("gpu 0: bfloat16 750 TFLOP/s (76% of 989.4), copy 3,000 GB/s (90% of 3,350), host 50/50 GB/s",)
    # 0.7 x 0.78 x 989.4 = 540.2 TFLOP/s; 0.7 x 0.92 x 3350 = 2157 GB/s
    assert speed.judge(machine, rates(1, 541.0, 2158.0)).findings == ()
    slow = speed.judge(machine, rates(1, 539.0, 2156.0)).findings
    assert [finding.weight for finding in slow] == ["costs", "costs"]
    assert "expected 772" in slow[0].what and "70% of the expected rate" in slow[0].costs and "torchao" in slow[0].source


def test_an_unknown_part_is_not_judged() -> None:
    machine = box("h100")
    unknown = replace(machine, gpus=(replace(machine.gpus[0], name="NVIDIA H20"),))
    check = speed.judge(unknown, rates(1, 1.0, 1.0))
    assert check.findings == () and "peak n/a" in check.rows[0]


def test_a_slow_gpu_among_equal_ones_is_named() -> None:
    (found,) = speed.judge(box("h100x8"), rates(8, 750.0, 3000.0, gpu3=600.0)).findings
    assert found.what == "GPU 3: matmul at 80% of an equal GPU of this machine"
    assert "CUDA_VISIBLE_DEVICES=0,1,2,4,5,6,7" in found.mend and "20% of a step" in found.costs
    assert speed.judge(box("mixed"), rates(2, 140.0, 800.0, gpu0=60.0)).findings == (), "unequal parts are not compared"


def test_a_gpu_that_fails_and_a_cpu_that_fails() -> None:
    outcome = {"speed 0": Outcome("speed 0", None, 1, "RuntimeError: CUDA error: out of memory", 1.0)}
    (found,) = speed.judge(box("h100"), outcome).findings
    assert "GPU 0: matmul failed" in found.what and "out of memory" in found.what
    (found,) = speed.judge(box("cpu"), {"speed cpu": Outcome("speed cpu", None, -4, "", 1.0)}).findings
    assert "SIGILL" in found.what
    assert speed.judge(box("cpu"), {}).rows == ()


# The host.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "proc/meminfo": "MemTotal: 263882790 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
        "Python.h": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


FREE: dict[str, int | None] = {"files": None, "locked": None}


def whats(machine: Machine, tree: Path, allowed: dict[str, int | None] = FREE) -> list[str]:
    check = host.check(machine, allowed, tree, tree)
    assert all(finding.mend for finding in check.findings) and len(check.rows) == 1
    return [finding.what for finding in check.findings]


@pytest.mark.parametrize("stem", [path.stem for path in sorted((ROOT / "tests/machines").glob("*.json"))])
def test_nothing_is_found_on_a_good_host(tree: Path, stem: str) -> None:
    assert whats(box(stem), tree) == ([] if "c++" in box(stem).packages else ["no C++ compiler: torch.compile cannot run"])


def test_limits(tree: Path) -> None:
    machine, low = box("h100x8"), {"files": 256, "locked": 65536}
    assert whats(machine, tree, low) == ["open file limit 256: a corpus has one file per 100 M tokens"]
    (tree / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    assert "InfiniBand" in whats(machine, tree, low)[0]
    check = host.check(machine, low, tree, tree)
    assert check.rows[0].startswith("256 open files, 64 KiB locked memory")
    assert host.own_limits().keys() == FREE.keys()


def test_a_container_below_its_machine(tree: Path) -> None:
    machine = box("h100")
    (tree / "sys/fs/cgroup/cpu.max").write_text("400000 100000\n")
    (tree / "sys/fs/cgroup/memory.max").write_text(str(32 << 30))
    cores, memory = host.check(machine, FREE, tree, tree).findings
    assert cores.what == "container limit: 4 of 26 cores" and cores.weight == "minor"
    assert "32.00 GiB of 251.66 GiB" in memory.what and "--memory=251g" in memory.mend
    assert "container: 4 cores, 32.00 GiB" in host.check(machine, FREE, tree, tree).rows[0]


def test_a_gpu_on_a_node_that_the_process_may_not_use(tree: Path) -> None:
    machine = box("h100x8")
    assert machine.cpu.numa_nodes == 2
    bound = replace(machine, cpu=replace(machine.cpu, numa_cores=(machine.cpu.numa_cores[0], ())))
    (what,) = whats(bound, tree)
    there = [str(gpu.index) for gpu in machine.gpus if gpu.numa_node == 1]
    assert what == f"GPU {', '.join(there)}: on NUMA node 1, but this process is bound to other nodes"
    (found,) = host.check(bound, FREE, tree, tree).findings
    assert found.mend == "numactl --cpunodebind=1 --membind=1 gptoughts train"
    untold = replace(machine, gpus=tuple(replace(gpu, numa_node=None) for gpu in machine.gpus))
    assert "the node of each GPU is unknown" in whats(untold, tree)[0]


def test_no_compiler_and_no_headers(tree: Path) -> None:
    machine = box("h100")
    without = replace(machine, packages={name: one for name, one in machine.packages.items() if name != "c++"})
    (found,) = host.check(without, FREE, tree, tree).findings
    assert found.mend == "apt-get install g++" and "torchtitan" in found.source
    (found,) = host.check(machine, FREE, tree, tree / "nowhere").findings
    assert found.mend == "apt-get install python3.12-dev"
    (found,) = host.check(replace(without, gpus=()), FREE, tree, tree).findings
    assert (found.costs, found.source) == (host.COMPILE_COSTS, host.COMPILE_SOURCE)


def test_what_no_compiler_costs_is_what_was_measured() -> None:
    runs = json.loads((ROOT / host.COMPILE_SOURCE).read_text())["runs"]
    half = [run["bf16_compiled"] / run["bf16_eager"] for run in runs]
    full = [run["float32_compiled"] for run in runs]
    told = f"{min(half):.2f}x to {max(half):.2f}x in bf16, {min(full):.2f}x to {max(full):.2f}x in float32"
    assert told in host.COMPILE_COSTS


# The disk.


def test_disk_in_memory_and_where_nothing_fits() -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shutil.disk_usage(shared).free < 2 * disk.SIZE_BYTES:
        pytest.skip("no memory file system")
    figures = disk.child(str(shared))
    assert figures["read_mb_s"] > 0 and figures["cache"] in ("avoided", "asked to forget", "not avoided")
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match="No space left"):
            disk._rates(os.open("/dev/full", os.O_WRONLY))


def test_disk_judged(tmp_path: Path) -> None:
    figures = {"written_mb": 256.0, "write_mb_s": 500.0, "read_mb_s": 900.0, "cache": "avoided", "wrong_blocks": 0}

    def judged(**changes: Any) -> Any:
        return disk.judge(tmp_path, done("disk", **{**figures, **changes})["disk"], 1 << 40)

    assert judged().findings == () and judged().rows == ("writes 500 MB/s, reads 900 MB/s (page cache bypassed)",)
    assert "(page cache included)" in judged(cache="not avoided").rows[0]
    assert "page cache possibly included" in judged(cache="asked to forget", read_mb_s=None).rows[0]
    (slow,) = judged(write_mb_s=20.0).findings
    assert slow.weight == "minor" and slow.costs.startswith("600 s per checkpoint of a billion parameters")
    (wrong,) = judged(wrong_blocks=1).findings
    assert wrong.weight == "stops"


# Clocks, through the real nvidia-ml-py on the fake library.

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
CHILD = (
    "import json; from dataclasses import asdict; from gptoughts.diagnostics.doctor.clocks import Watch;"
    "from gptoughts.hardware.machine import probe;"
    "watch = Watch(probe()); watch(); print(json.dumps([asdict(watch.check()), [asdict(state) for state in watch.before]]))"
)
A, B = "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-8932aaaa-d72c-4106-c12f-20bd9faed9f6"
H100 = "9 0 85520809984 700000 0 NVIDIA H100 80GB HBM3"
WELL = {
    "reasons": 1, "clock": 1980, "maxclock": 1980, "celsius": 45, "usual": 700000, "persistent": 1, "ecc": 1, "uncorrected": 0,
    "width": 16, "maxwidth": 16, "used": 500 << 20,
}  # fmt: skip


def gpu(uuid: str, bus: str, **states: int) -> str:
    return f"gpu {uuid} {bus} {H100}\n" + "".join(f"state {name} {number}\n" for name, number in states.items())


@pytest.fixture
def seen(tmp_path: Path) -> Any:
    if not COMPILER or sys.platform != "linux":
        pytest.skip("no C compiler for the fake NVML")
    source = ROOT / "tests/nvml/fake_nvml.c"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(tmp_path / "libnvidia-ml.so.1"), str(source)], check=True)

    def run(text: str) -> tuple[list[Finding], tuple[str, ...], list[dict[str, Any]]]:
        (tmp_path / "box").write_text(text)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "PYTHONPATH"))}
        fake = {"FAKE_NVML": str(tmp_path / "box"), "LD_LIBRARY_PATH": str(tmp_path)}
        words = [sys.executable, "-c", CHILD]
        finished = subprocess.run(words, env={**kept, **fake}, cwd=ROOT, capture_output=True, text=True, check=False)
        assert finished.returncode == 0 and not finished.stderr, finished.stderr
        check, states = json.loads(finished.stdout)
        return [Finding(**one) for one in check["findings"]], tuple(check["rows"]), states

    return run


def test_clocks_of_a_gpu_that_is_well(seen: Any) -> None:
    findings, rows, states = seen(gpu(A, "00000000:3B:00.0", **WELL))
    assert findings == [] and rows == ("gpu 0: 1980 of 1980 MHz, 45 C, throttle reasons: none; ECC on",)
    assert states[0]["used_bytes"] == 500 << 20 and states[0]["limit"] == states[0]["usual_limit"] == 700.0


def test_everything_that_holds_a_gpu_down(seen: Any) -> None:
    ill = {
        "reasons": 0x2 | 0x4 | 0x40 | 0x80, "clock": 1200, "celsius": 91, "usual": 750000, "persistent": 0,
        "uncorrected": 3, "width": 8, "used": 20 << 30,
    }  # fmt: skip
    findings, rows, _ = seen(gpu(B, "00000000:5E:00.0", **WELL) + gpu(A, "00000000:3B:00.0", **{**WELL, **ill}))
    text = "\n".join(f"{one.what} | {one.costs} | {one.mend}" for one in findings)
    for words in (
        "GPU 1: thermal throttling at 91 C | clock 1200 of 1980 MHz",
        "GPU 1: power brake or hardware slowdown",
        "application clocks are set below the maximum",
        "power limit 700 W, default 750 W | clock 1200 of 1980 MHz | sudo nvidia-smi -i 1 -pl 750",
        "3 uncorrectable ECC errors",
        "8 of 16 PCIe lanes | copies to and from the host at 50% of their rate",
        "GPU 1: other processes use 20.00 GiB",
        "CUDA_VISIBLE_DEVICES=0",
        "sudo nvidia-smi -pm 1",
    ):
        assert words in text
    assert not any("GPU 0" in one.what for one in findings)
    assert (
        rows[1]
        == "gpu 1: 1200 of 1980 MHz, 91 C, throttle reasons: application clocks, power cap, heat (hardware), power brake; ECC on"
    )
    assert worst_first(findings)[-1].weight == "minor"


def test_what_nvml_does_not_tell_is_unknown(seen: Any) -> None:
    findings, rows, _ = seen(gpu(A, "00000000:3B:00.0"))
    assert findings == [] and rows == ("gpu 0: n/a of n/a MHz, n/a, throttle reasons: n/a; ECC n/a",)
    findings, rows, _ = seen(gpu(A, "00000000:3B:00.0", reasons=0x20, clock=900))
    assert [(one.what, one.costs) for one in findings] == [("GPU 0: thermal throttling", "n/a")]


def test_a_watch_keeps_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = box("h100")
    states = iter([
        [clocks.State(0, (), 300, 1980, 40, used_bytes=1)],
        [clocks.State(0, ("heat (software)",), 1100, 1980, 90, used_bytes=9 << 30)],
        [clocks.State(0, (), 1980, 1980, 80, used_bytes=9 << 30)],
    ])  # fmt: skip
    monkeypatch.setattr(clocks, "read_states", lambda _: next(states))
    monkeypatch.setattr(clocks, "EVERY_SECONDS", 0.0)
    watch = clocks.Watch(machine)
    watch()
    watch()
    check = watch.check()
    assert check.rows == ("gpu 0: 1100 of 1980 MHz, 90 C, throttle reasons: heat (software); ECC n/a",)
    (found,) = check.findings  # what we used ourselves is nobody else's
    assert found.costs == "clock 1100 of 1980 MHz"

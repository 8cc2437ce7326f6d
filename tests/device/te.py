"""Transformer Engine on a machine without network: joins a wheel that came in parts, installs it, builds the torch half, tries it.

python -m tests.device.te part FILE... | build [--dry-run] | status | check

docs/measurements/README.md says what has to be brought, and how. Everything lies in $TE_DIR (/tmp/te), which lasts from stage to stage:
parts, wheels, the source, `build.log`, `status`. Packages go to $SITE (/tmp/site), which run.sh puts on the path.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.device.kept import Deadline, Kept

PART = ".part-"
HEADERS = ("cuda_runtime.h", "cublasLt.h", "cuda_fp8.h", "crt/host_config.h", "nv/target", "cudnn.h", "nccl.h")
"""What its C++ files include besides torch's own; the first five from the toolkit, the others from the packages beside torch."""
REQUIRED = ("setuptools", "wheel", "ninja", "pybind11", "packaging", "torch", "pydantic", "einops", "onnx", "onnxscript")
BUILD = {
    "NVTE_PYTORCH_FORCE_BUILD": "TRUE",  # otherwise it first asks the network for a wheel
    "NVTE_FRAMEWORK": "pytorch",
    "NVTE_NO_LOCAL_VERSION": "1",  # inside a git repository it would name a core package that does not exist
    "NVTE_WITH_NCCL_EP": "0",  # expert parallelism over NCCL, which needs headers of a newer torch
}


def place() -> Path:
    """Where everything lies from stage to stage."""
    path = Path(os.environ.get("TE_DIR", "/tmp/te"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def site() -> Path:
    """Where packages are installed."""
    return Path(os.environ.get("SITE", "/tmp/site"))


def note(words: str) -> None:
    """Say how far it is, here and in the file that the next stage reads."""
    (place() / "status").write_text(words + "\n", encoding="utf-8")
    print(f"te: {words}", flush=True)


def part(files: list[str]) -> int:
    """Take over what one upload brought: parts of the wheel, small wheels, the source, the checksum."""
    for name in files:
        source = Path(name)
        target = place() / source.name
        shutil.copyfile(source, target.with_name(target.name + ".new"))
        target.with_name(target.name + ".new").replace(target)
    held = sorted(place().glob(f"*{PART}*"))
    print(
        f"te: {len(held)} parts, {sum(path.stat().st_size for path in held):,} bytes: {', '.join(path.name for path in held)}"
    )
    return 0


def joined(where: Path) -> list[Path]:
    """The wheels out of their parts, each checked against its NAME.whl.sha256. Raises SystemExit with what is missing."""
    sums = sorted(where.glob("*.whl.sha256"))
    if not sums:
        raise SystemExit(f"te: needs a NAME.whl.sha256 in {where} for every wheel that came in parts, found none")
    return [_joined(where, *path.read_text(encoding="utf-8").split()[:2]) for path in sums]


def _joined(where: Path, wanted: str, name: str) -> Path:
    wheel = where / Path(name).name
    parts = sorted(where.glob(f"{wheel.name}{PART}*"))
    if not wheel.exists() or digest(wheel) != wanted:
        with wheel.with_name("joining").open("wb") as whole:
            for piece in parts:
                with piece.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        wheel.with_name("joining").replace(wheel)
    found = digest(wheel)
    if found != wanted:
        raise SystemExit(
            f"te: {wheel.name}: {len(parts)} parts, {wheel.stat().st_size:,} bytes, sha256 {found}, wanted {wanted}"
        )
    for piece in parts:
        piece.unlink()
    return wheel


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def include_folders() -> list[Path]:
    """Folders with headers: the toolkit's, and those of the packages that torch brought."""
    roots = [Path(entry) / "nvidia" for entry in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]) if entry]
    found = [path for root in roots if root.is_dir() for path in sorted(root.glob("*/include"))]
    toolkit = cuda_home()
    found = [*([toolkit / "include"] if toolkit else []), *found]
    return [path for folder in found for path in (folder, folder / "cccl") if path.is_dir()]


def cuda_home() -> Path | None:
    """The toolkit around nvcc, None where there is none."""
    for nvcc in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        home = Path(nvcc).resolve().parent.parent if nvcc else None
        if home and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def build_environment() -> dict[str, str]:
    """The variables of the build. CPATH is read by g++ itself, so that no setup script has to know of these folders."""
    folders, toolkit = include_folders(), cuda_home()
    more = {"CUDA_HOME": str(toolkit)} if toolkit else {"NVTE_BUILD_USE_NVIDIA_WHEELS": "1"}
    jobs = str(min(16, os.cpu_count() or 1))
    cudnn = next((folder.parent for folder in folders if (folder / "cudnn.h").exists()), None)
    more |= {"CUDNN_PATH": str(cudnn), "CUDNN_HOME": str(cudnn)} if cudnn else {}
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return {**BUILD, **more, "MAX_JOBS": jobs, "CPATH": ":".join(map(str, folders)), "PATH": path}


def findings() -> list[str]:
    """What the build would miss here."""
    folders = include_folders()
    problems = [f"header {name}: not found" for name in HEADERS if not any((folder / name).exists() for folder in folders)]
    problems += [f"package {name}: not installed" for name in REQUIRED if find_spec(name) is None]
    problems += [] if shutil.which("g++") else ["g++: not found"]
    return problems


def pip(*words: str) -> list[str]:
    """pip without network and without dependencies, which are there already or not needed."""
    return [sys.executable, "-m", "pip", *words, "--no-index", "--no-deps", "--no-cache-dir"]


def build(dry: bool) -> int:
    """Join, install, and build the torch half in the background, or install it where it was brought as a wheel."""
    where = place()
    for problem in findings():
        print(f"te: {problem}", flush=True)
    for name, value in build_environment().items():
        print(f"te: {name}={value[:400]}", flush=True)
    if dry:
        return rehearsed()
    last = (where / "status").read_text(encoding="utf-8").strip() if (where / "status").exists() else ""
    if last.startswith("building"):
        return wait()
    if last.startswith(("built", "works")):
        return check()
    large = joined(where)
    note("joined")
    whole = sorted(where.glob("transformer_engine_torch-*.whl"))
    wheels = [*large, *(path for path in sorted(where.glob("*.whl")) if path not in large)]
    # In one call: pip replaces a folder that two wheels share as a whole, and the second would take the first's library away.
    done = subprocess.run(pip("install", "-q", "--upgrade", "--target", str(site()), *map(str, wheels)), check=False)
    if done.returncode:
        note("failed: pip could not install the wheels")
        return 1
    if not any(path.name.startswith("transformer_engine_cu") for path in wheels):
        note(f"installed, without Transformer Engine: {', '.join(path.name for path in wheels)}")
        return 0
    if whole:
        note("built elsewhere and installed")
        return check()
    sources = sorted(where.glob("transformer_engine_torch-*.tar.gz"))
    if not sources:
        note("failed: neither transformer_engine_torch-*.whl nor its source is here")
        return 1
    with tarfile.open(sources[-1]) as archive:
        archive.extractall(where / "source", filter="data")
    setup = next((where / "source").glob("*/setup.py")).parent
    command = pip("install", "-v", "--no-build-isolation", "--upgrade", "--target", str(site()), str(setup))
    script = f"{_quoted(command)} && echo built > status || echo failed: see build.log > status"
    note(f"building since {time.strftime('%H:%M:%S')}")
    with (where / "build.log").open("ab") as log:
        # A session of its own, so that it goes on after this stage has ended.
        subprocess.Popen(
            ["bash", "-c", script], cwd=where, env={**os.environ, **build_environment()}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    return 0


def rehearsed() -> int:
    """Three parts of something small, taken over one by one, joined and checked: what a real wheel goes through."""
    before = os.environ.get("TE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TE_DIR"] = str(Path(folder) / "te")
        whole, name = os.urandom(100_000), "rehearsal-1-py3-none-any.whl"
        brought = Path(folder)
        (brought / f"{name}.sha256").write_text(f"{hashlib.sha256(whole).hexdigest()}  {name}\n", encoding="utf-8")
        for number, letter in enumerate("abc"):
            (brought / f"{name}{PART}a{letter}").write_bytes(whole[40_000 * number : 40_000 * (number + 1)])
        for path in sorted(brought.glob("rehearsal*")):
            part([str(path)])
        same = joined(place())[0].read_bytes() == whole
    os.environ.pop("TE_DIR")
    if before is not None:
        os.environ["TE_DIR"] = before
    print(f"te: rehearsed, {'the parts make the whole' if same else 'the parts do NOT make the whole'}", flush=True)
    return 0 if same else 1


def _quoted(command: list[str]) -> str:
    import shlex

    return shlex.join(command)


def wait() -> int:
    """Until the build is over or this stage's time is."""
    deadline, where = Deadline(float(os.environ.get("DEVICE_SECONDS", "420"))), place()
    while deadline.left():
        now = (where / "status").read_text(encoding="utf-8").strip()
        if not now.startswith("building"):
            print(f"te: {now}", flush=True)
            return check() if now == "built" else 1
        time.sleep(1)
    log = where / "build.log"
    print(log.read_text(encoding="utf-8", errors="replace")[-800:] if log.exists() else "no log", flush=True)
    return 1


def check() -> int:
    """Import it in a fresh process and run one FP8 product forward and backward; its answer goes to te.json."""
    kept = Kept("te")
    variables = {**os.environ, "PYTHONPATH": f"{site()}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "tests.device.te_product"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=variables, timeout=300)
    if done.returncode:
        kept.keep_failure("product", done.stdout + done.stderr)
        note("failed: " + (done.stderr.strip().splitlines() or ["no words"])[-1][:300])
        return 1
    kept.keep("product", json.loads(done.stdout.strip().splitlines()[-1]))
    note("works: " + done.stdout.strip().splitlines()[-1][:1500])
    return 0


def main(words: list[str]) -> int:
    """The verb and its words."""
    if words[:1] == ["part"] and words[1:]:
        return part(words[1:])
    if words[:1] == ["build"]:
        return build("--dry-run" in words[1:])
    if words[:1] == ["check"]:
        return check()
    if words[:1] == ["status"]:
        path = place() / "status"
        print(path.read_text(encoding="utf-8") if path.exists() else "nothing yet", end="")
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Import every installed vendor package, each in a child process.

Package metadata does not show whether a package works: a broken Transformer Engine raises RuntimeError, flash-attn built for a different
torch fails with an undefined symbol, and either can crash the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gptoughts.diagnostics.doctor.finding import UNKNOWN, Check, Finding, Weight
from gptoughts.diagnostics.doctor.forks import Job, Outcome
from gptoughts.diagnostics.doctor.packages import LOST, cuda_of_build, wheels
from gptoughts.hardware.machine import Machine

IMPORT_SECONDS = 60.0
REBUILD = "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir"


@dataclass(frozen=True)
class Vendor:
    """A module to import if `distribution` is installed, its fix, and the cost of losing it."""

    module: str
    distribution: str
    mend: str
    weight: Weight = "costs"
    costs: str = UNKNOWN
    source: str = ""


_FA3 = ("FlashAttention 3 off: +9 % tokens/s end to end on an H100", "published, nanochat dev/LOG.md")
_FP8 = ("FP8 off: 1.24x at 1.5 B, 1.36x at 7 B on an H100", "published, LLMQ README")

VENDORS = (
    Vendor("torch", "torch", "pip install --force-reinstall 'torch>=2.10,<2.14'", "stops", "everything"),
    Vendor("triton", "triton", "pip install --force-reinstall triton"),
    Vendor(
        "transformer_engine.pytorch", "transformer-engine", f"{REBUILD} 'transformer-engine[pytorch]'", "costs", *_FP8
    ),
    Vendor("flash_attn", "flash-attn", f"{REBUILD} flash-attn"),
    Vendor("flash_attn_interface", "flash-attn-3", f"{REBUILD} flash-attn-3", "costs", *_FA3),
    Vendor("flash_attn_interface", "tokenspeed-fa3", "pip install --force-reinstall --no-deps tokenspeed-fa3", "costs", *_FA3),
    Vendor("flash_attn.cute", "flash-attn-4", "pip install --force-reinstall flash-attn-4"),
    Vendor(
        "torchao.float8", "torchao", "pip install --force-reinstall --no-deps torchao", "costs",
        "FP8 through torchao off: +10 % (row-wise) to +25 % (tensor-wise), Llama 3 8B on 8 H100", "published, torchao training docs",
    ),
    Vendor(
        "liger_kernel.transformers", "liger-kernel", "pip install --force-reinstall --no-deps liger-kernel", "costs",
        "fused loss off: 27.6 GB against 5.8 GB at 32k tokens and 128k vocabulary, A100", "published, Liger benchmark data",
    ),
    Vendor("bitsandbytes", "bitsandbytes", "pip install --force-reinstall --no-deps bitsandbytes"),
    Vendor("deepspeed", "deepspeed", "DS_BUILD_OPS=0 pip install --force-reinstall --no-deps deepspeed"),
    Vendor("transformers.modeling_utils", "transformers", "pip install --force-reinstall 'transformers>=5.17,<6'"),
    Vendor("peft", "peft", "pip install --force-reinstall --no-deps peft"),
    Vendor("wandb", "wandb", "pip install --force-reinstall wandb", "minor"),
    Vendor(
        "mpi4py.MPI", "mpi4py", "apt-get install openmpi-bin libopenmpi-dev && pip install --no-cache-dir --force-reinstall mpi4py",
        "minor",
    ),
)  # fmt: skip


def jobs(machine: Machine) -> list[Job]:
    """Return one import job per installed package; torch runs first, alone."""
    return [
        Job(f"import {vendor.distribution}", __name__, "child", (vendor.module, vendor.distribution), IMPORT_SECONDS, group)
        for vendor in VENDORS
        if vendor.distribution in machine.packages
        for group in (["torch" if vendor.module == "torch" else ""])
    ]


def child(module: str, distribution: str) -> dict[str, Any]:
    """Import `module` in this process; return its version and seconds, or its error."""
    from importlib import import_module, metadata
    from time import perf_counter

    began = perf_counter()
    try:
        found = import_module(module)
    except BaseException as error:  # imports can raise anything, even SystemExit
        return {"error": _one_line(error)}
    version = getattr(found, "__version__", None) or metadata.version(distribution)
    figures: dict[str, Any] = {"version": str(version)}
    # torch was imported before the fork: no seconds.
    return figures | (_cuda() if module == "torch" else {"seconds": round(perf_counter() - began, 2)})


def _cuda() -> dict[str, Any]:
    """Return torch's view of the GPUs. Initializes CUDA, so this process must not fork afterwards."""
    import torch

    figures: dict[str, Any] = {"cuda": torch.version.cuda, "gpus": 0, "architectures": []}
    if torch.version.cuda is None:
        return figures
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return figures | {"cuda_error": _one_line(error)}
    return figures | {"gpus": torch.cuda.device_count(), "architectures": torch.cuda.get_arch_list()}


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


def judge(machine: Machine, outcomes: dict[str, Outcome]) -> Check:
    """Return versions of imported packages and a finding per failed import."""
    words: list[str] = []
    findings: list[Finding] = []
    figures: dict[str, Any] = {}
    for vendor in VENDORS:
        outcome = outcomes.get(f"import {vendor.distribution}")
        if outcome is None:
            continue
        if not outcome.tried and vendor.module != "torch":
            words.append(f"{vendor.distribution} not run")
        elif outcome.trouble:
            words.append(f"{vendor.distribution} broken")
            findings.append(_broken(vendor, outcome, machine))
            figures[vendor.distribution] = {"error": outcome.trouble}
        else:
            words.append(f"{vendor.distribution} {(outcome.figures or {}).get('version', '')}".rstrip())
            figures[vendor.distribution] = outcome.figures
            if vendor.module == "torch":
                findings += _gpu_findings(machine, outcome.figures or {})
    return Check("imports", _wrapped(words or ["nothing to import"]), tuple(findings), figures)


def _broken(vendor: Vendor, outcome: Outcome, machine: Machine) -> Finding:
    trouble, hint = outcome.trouble, ""
    if "undefined symbol" in trouble:
        hint = f" (built for a different torch than {machine.packages.get('torch', UNKNOWN)})"
    elif "cannot open shared object file" in trouble:
        hint = " (shared library missing)"
    mend = vendor.mend
    if vendor.module == "torch" and machine.system == "linux":
        mend += f" --index-url https://download.pytorch.org/whl/{wheels(machine) if machine.driver else 'cpu'}"
    what = f"{vendor.distribution} {machine.packages.get(vendor.distribution, '')}: import failed"
    return Finding(f"{what}: {trouble}{hint}", mend, vendor.weight, vendor.costs, vendor.source)


def _gpu_findings(machine: Machine, figures: dict[str, Any]) -> Iterator[Finding]:
    """Yield findings if torch cannot use the GPUs that NVML lists. CPU builds named so are reported by `torch_findings`."""
    if not machine.gpus:
        return
    mend = f"pip install --force-reinstall 'torch>=2.10,<2.14' --index-url https://download.pytorch.org/whl/{wheels(machine)}"
    if figures.get("cuda") is None:
        if "+cpu" not in machine.packages.get("torch", ""):
            yield Finding("torch is built without CUDA", mend, "costs", LOST)
        return
    if figures.get("cuda_error") or not figures.get("gpus"):
        why = figures.get("cuda_error") or "CUDA reports no device"
        build = cuda_of_build(machine.packages.get("torch", ""))
        newer = build is not None and machine.cuda is not None and build[0] > int(machine.cuda.split(".")[0])
        yield Finding(
            f"torch cannot use the GPU: {why}",
            mend if newer else "nvidia-smi && dmesg | grep -i nvrm",
            "costs",
            LOST,
        )
        return
    known = figures.get("architectures", [])
    for capability in sorted({gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability}):
        if known and not any(_runs_on(name, capability) for name in known):
            words = f"torch {machine.packages.get('torch', UNKNOWN)} has no kernels for sm {capability[0]}.{capability[1]}"
            yield Finding(f"{words} (built for {', '.join(known)})", mend, "costs", LOST)


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    """Return whether kernels named `sm_90a` run there: same major, equal or higher minor; `compute_90` is compiled for later GPUs."""
    kind, _, number = name.partition("_")
    digits = number.rstrip("af")
    if not digits.isdigit():
        return True  # unknown name format: assume that it runs
    least = int(digits[:-1]), int(digits[-1])
    return capability >= least and (kind == "compute" or capability[0] == least[0])


def _wrapped(words: list[str]) -> tuple[str, ...]:
    """Join words by commas, in rows of at most 100 characters."""
    rows = [""]
    for word in words:
        if rows[-1] and len(rows[-1]) + len(word) + 2 > 100:
            rows[-1] += ","
            rows.append("")
        rows[-1] += f", {word}" if rows[-1] else word
    return tuple(rows)

"""Check copies between devices and an all-reduce over ranks: correct values and rates.

On some machines a copy from one GPU to another returns zeros without an error (NVIDIA/nccl-tests issue 117, RTX 4090). Without a GPU
the same code runs over gloo with two processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from gptoughts.diagnostics.doctor.finding import UNKNOWN, Check, Finding
from gptoughts.diagnostics.doctor.forks import Job, Outcome
from gptoughts.hardware.machine import Machine

GPU_BYTES, CPU_BYTES = 256 << 20, 16 << 20
# Eight GPUs have 56 pairs, each compared on the host.
PAIR_BYTES = 64 << 20
SUM_SECONDS = 60.0
PEER_SECONDS = 60.0
NO_P2P = {"NCCL_P2P_DISABLE": "1"}
GLOO = "GLOO_SOCKET_IFNAME"
NO_P2P_LINE = "export NCCL_P2P_DISABLE=1"
# Per link and direction: 25 GB/s for NVLink 2 to 4, 50 for NVLink 5 (NVIDIA's architecture papers).
LINK_GB_S, LINK_GB_S_BLACKWELL = 25.0, 50.0
LEAST_SHARE = 0.5


def jobs(machine: Machine, folder: str, environment: dict[str, str] | None = None, tag: str = "") -> list[Job]:
    """Return jobs for copies between all pairs of GPUs (one process), then one rank per GPU; two ranks on a CPU.

    `folder` is empty and new: it holds the FileStore of the ranks, so that the rendezvous needs no port.
    """
    names = [f"cuda:{gpu.index}" for gpu in machine.gpus] or ["cpu", "cpu"]
    own = environment or {}
    found = [Job(f"peers{tag}", __name__, "peers", (names,), PEER_SECONDS, f"peers{tag}", own)] if len(names) > 1 else []
    # On one machine gloo works without name resolution.
    alone = {"GLOO_SOCKET_IFNAME": "lo"} if machine.system == "linux" and GLOO not in os.environ else {}
    meeting = f"{folder}/ranks{tag}"
    return found + [
        Job(f"rank {rank}{tag}", __name__, "child", (rank, len(names), name, meeting), SUM_SECONDS, f"ranks{tag}", alone | own)
        for rank, name in enumerate(names)
    ]


def peers(names: list[str], copy: Callable[[Any, Any], Any] | None = None) -> dict[str, Any]:
    """Copy a pattern between every two devices in both directions; return GB/s and whether it arrived intact."""
    import torch

    pairs = []
    for number, source_name in enumerate(names):
        for other, target_name in enumerate(names):
            if number == other:
                continue
            source, target = torch.device(source_name), torch.device(target_name)
            size = PAIR_BYTES if source.type == "cuda" else CPU_BYTES
            # A different pattern per pair, so that stale memory is not mistaken for it.
            sent = (torch.arange(size // 4, dtype=torch.int32, device=source) * 7 + number * 1000 + other).contiguous()
            into = torch.full((size // 4,), -1, dtype=torch.int32, device=target)
            send = copy or (lambda there, here: there.copy_(here))
            seconds = _timed(lambda s=sent, t=into, f=send: f(t, s), [source, target])  # type: ignore[misc]
            arrived, wanted = into.cpu(), sent.cpu()
            right = bool((arrived == wanted).all())
            pairs.append({
                "from": number, "to": other, "right": right, "zeros": not right and not bool(arrived.any()), "gb_s": size / 1e9 / seconds,
            })  # fmt: skip
    return {"devices": names, "pairs": pairs}


def child(rank: int, world_size: int, name: str, meeting: str) -> dict[str, Any]:
    """Run one rank: all-reduce a pattern and pass one on in a ring; return whether both are correct, and the bus bandwidth."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device(name)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(meeting, world_size)
    wait = timedelta(seconds=SUM_SECONDS / 2)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=wait)
    try:
        size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
        pattern = (torch.arange(size // 4, device=device) % 251).float()
        mine = pattern * (rank + 1)
        dist.all_reduce(mine)
        # Integers below 2^24: exact in any summation order.
        right = bool(torch.equal(mine, pattern * (world_size * (world_size + 1) // 2)))
        seconds = _timed(lambda: dist.all_reduce(mine), [device])
        ring = _ring(dist, torch, rank, world_size, pattern[: 1 << 20])
    finally:
        dist.destroy_process_group()
    # Bus bandwidth as defined by NVIDIA's nccl-tests: a ring moves 2 (n-1)/n of the bytes.
    moved = 2 * (world_size - 1) / world_size * size / 1e9
    return {"backend": backend, "right": right, "ring": ring, "bus_gb_s": moved / seconds}


def _ring(dist: Any, torch: Any, rank: int, world_size: int, pattern: Any) -> bool:
    """Send this rank's pattern to the next rank; return whether the previous rank's arrived intact."""
    if world_size == 1:
        return True
    before, behind = (rank - 1) % world_size, (rank + 1) % world_size
    sent, into = pattern + rank, torch.empty_like(pattern)
    requests = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, behind), dist.P2POp(dist.irecv, into, before)])
    for request in requests:
        request.wait()
    return bool(torch.equal(into, pattern + before))


def _timed(work: Callable[[], Any], devices: list[Any]) -> float:
    """Return the minimum seconds of three calls, after one warm-up."""
    from time import perf_counter

    import torch

    def wait() -> None:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    times = []
    for _ in range(4):
        wait()
        began = perf_counter()
        work()
        wait()
        times.append(perf_counter() - began)
    return max(min(times[1:]), 1e-9)


def judge(
    machine: Machine, outcomes: dict[str, Outcome], environment: dict[str, str], mended: dict[str, Outcome] | None = None
) -> Check:
    """Return findings on copies and all-reduce. `mended` are the outcomes of a second try without peer-to-peer, if any."""
    findings = [*_peer_findings(machine, outcomes.get("peers"), environment), *_sum_findings(machine, outcomes, mended)]
    rows = [row for row in (_peer_row(outcomes.get("peers")), _sum_row(outcomes)) if row]
    figures = {name: outcome.figures or {"error": outcome.trouble} for name, outcome in outcomes.items()}
    return Check("ranks", tuple(rows), tuple(findings), figures)


def _ranks(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if name.startswith("rank ")}


def _peer_row(outcome: Outcome | None) -> str:
    if outcome is None or outcome.figures is None:
        return ""
    rates = [pair["gb_s"] for pair in outcome.figures["pairs"]]
    wrong = sum(not pair["right"] for pair in outcome.figures["pairs"])
    words = f"{len(rates)} copies between devices, {f'{wrong} WRONG' if wrong else 'all correct'}"
    return f"{words}, {min(rates):,.1f} to {max(rates):,.1f} GB/s"


def _sum_row(outcomes: dict[str, Outcome]) -> str:
    ranks = _ranks(outcomes)
    figures = [outcome.figures for outcome in ranks.values() if outcome.figures is not None]
    if not ranks:
        return ""
    if len(figures) < len(ranks):
        return f"all-reduce over {len(ranks)} ranks: not measured"
    state = "correct" if all(one["right"] and one["ring"] for one in figures) else "WRONG"
    rate = f", {min(one['bus_gb_s'] for one in figures):,.1f} GB/s bus bandwidth" if len(ranks) > 1 else ""
    return f"all-reduce over {len(ranks)} {'rank' if len(ranks) == 1 else 'ranks'} ({figures[0]['backend']}): {state}{rate}"


def _peer_findings(machine: Machine, outcome: Outcome | None, environment: dict[str, str]) -> Iterator[Finding]:
    if outcome is None:
        return
    off = environment.get("NCCL_P2P_DISABLE") == "1"
    mend = NO_P2P_LINE
    source = "NVIDIA/nccl-tests issue 117"
    if outcome.trouble:
        what = f"copies between devices: {outcome.trouble}"
        hung = outcome.code is None
        line = mend if hung else "nvidia-smi; dmesg | grep -i -e nvrm -e xid"
        yield Finding(what, line, "minor" if off or not machine.gpus else "stops", UNKNOWN, source if hung else "")
        return
    wrong = [pair for pair in (outcome.figures or {})["pairs"] if not pair["right"]]
    if not wrong:
        return
    pairs = ", ".join(f"{pair['from']} -> {pair['to']}" for pair in wrong[:4]) + (", ..." if len(wrong) > 4 else "")
    what = f"copies between GPUs return {'zeros' if all(pair['zeros'] for pair in wrong) else 'wrong data'} without an error: {pairs}"
    if off:
        yield Finding(
            f"{what}; NCCL_P2P_DISABLE=1 is set, NCCL avoids them",
            "keep NCCL_P2P_DISABLE=1",
            "minor",
            "all-reduce goes through host memory",
            source,
        )
    else:
        yield Finding(what, mend, "stops", "wrong gradients with several GPUs", source)


def _sum_findings(machine: Machine, outcomes: dict[str, Outcome], mended: dict[str, Outcome] | None) -> Iterator[Finding]:
    ranks = _ranks(outcomes)
    if not ranks:
        return
    several = len(machine.gpus) > 1
    backend = "NCCL" if machine.gpus else "gloo"
    mend = (
        "NCCL_DEBUG=INFO gptoughts doctor --json"
        if machine.gpus
        else f"unset {GLOO}"
        if GLOO in os.environ
        else "ip link set lo up"
    )
    mend = NO_P2P_LINE if several and _is_right(mended) else mend
    proven = "; correct without peer-to-peer copies" if several and _is_right(mended) else ""
    troubled = {name: outcome for name, outcome in ranks.items() if outcome.trouble}
    if troubled:
        name, outcome = next(iter(troubled.items()))
        what = f"all-reduce over {len(ranks)} ranks ({backend}) failed: {name}: {outcome.trouble}{proven}"
        yield Finding(what, mend, "stops" if several else "minor", "training on several ranks")
        return
    figures = [outcome.figures or {} for outcome in ranks.values()]
    if not all(one["right"] and one["ring"] for one in figures):
        yield Finding(
            f"all-reduce over {len(ranks)} ranks ({backend}) is wrong{proven}",
            mend,
            "stops",
            "wrong gradients on several ranks",
        )
    elif several:
        yield from _slow_links(machine, min(one["bus_gb_s"] for one in figures))


def _slow_links(machine: Machine, rate: float) -> Iterator[Finding]:
    """Compare the all-reduce with the NVLinks if every GPU has the same ones; PCIe is not in the table."""
    links = {link for gpu in machine.gpus for link in gpu.links}
    if len(links) != 1 or not (link := links.pop()).startswith("nvlink x"):
        return
    each = LINK_GB_S_BLACKWELL if (machine.min_capability() or (0, 0)) >= (10, 0) else LINK_GB_S
    possible = int(link.removeprefix("nvlink x")) * each
    # GPUs connected without a switch split their links among the others.
    if rate < LEAST_SHARE * possible:
        what = f"all-reduce over {len(machine.gpus)} GPUs: {rate:,.0f} GB/s, links {possible:,.0f} GB/s"
        yield Finding(
            what,
            "NCCL_DEBUG=INFO gptoughts doctor --json; nvidia-smi nvlink -s",
            "costs",
            f"{rate / possible:.0%} of the link rate",
            "NVIDIA's link rates",
        )


def _is_right(outcomes: dict[str, Outcome] | None) -> bool:
    ranks = _ranks(outcomes or {})
    return bool(ranks) and all(
        one.figures is not None and one.figures["right"] and one.figures["ring"] for one in ranks.values()
    )

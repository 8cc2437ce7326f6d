"""Addresses at which processes listen, from /proc, and a worker that writes those of its job: `python -m tests.support.listeners`."""

from __future__ import annotations

import ipaddress
import os
import struct
import sys
from pathlib import Path


def listening(processes: list[int]) -> list[str]:
    """Return the addresses, without ports, of the TCP sockets at which these processes listen; sorted."""
    inodes = set()
    for process in processes:
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        rows = [line.split() for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]]
        found += [address(row[1].split(":")[0]) for row in rows if row[3] == "0A" and row[9] in inodes]
    return sorted(found)


def address(text: str) -> str:
    """Return an address of /proc/net/tcp: words of four bytes in the machine's order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    return str(ipaddress.ip_address(struct.pack(f"={len(words)}I", *words)))


def work(out: str) -> None:
    """Open the process group of this rank, or of a single process, and write where it and its agent listen."""
    import torch

    from gptoughts.engine.distributed.process_group import own_group, process_group
    from gptoughts.hardware.world import world_from_environment

    world, cpu = world_from_environment(os.environ), torch.device("cpu")
    with own_group(cpu) if world.world_size == 1 else process_group(world, cpu):
        torch.distributed.all_reduce(torch.ones(1))
        processes = [os.getpid(), *([os.getppid()] if world.launched else [])]
        Path(out, str(world.rank)).write_text("\n".join(listening(processes)), encoding="ascii")
        torch.distributed.all_reduce(torch.ones(1))


if __name__ == "__main__":
    work(sys.argv[1])

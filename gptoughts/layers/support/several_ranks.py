"""What every layer that uses several ranks needs: more than one, and a global batch that divides among them."""

from __future__ import annotations

from collections.abc import Iterator

from gptoughts.planning.layer import Case, Reason, unsupported


def rank_reasons(case: Case, least: int = 2) -> Iterator[Reason]:
    """Yield reasons against fewer than `least` ranks, and against a global batch that the ranks do not divide."""
    ranks, batch = case.world.world_size, case.recipe.train.global_batch
    if ranks < least:
        yield unsupported("needs more than one process", remedy="gptoughts train ... --ranks N")
    elif batch % ranks:
        below = batch // ranks * ranks
        near = f"{below} or {below + ranks}" if below else f"{ranks}"
        yield unsupported(
            f"train.global_batch = {batch} is not divisible by {ranks} ranks",
            remedy=f"--train.global-batch {near}, or {_fewer(case)}",
        )


def _fewer(case: Case) -> str:
    """Return the flag for the most ranks that divide the global batch."""
    batch = case.recipe.train.global_batch
    most = next(ranks for ranks in range(case.world.world_size, 0, -1) if batch % ranks == 0)
    return f"--gpus {most}" if case.on_gpu and most <= case.world.local_world_size else f"--ranks {most}"

"""gptoughts: train and fine-tune language models, take what the GPU can give, and prove it.

From Python: `gptoughts.train(recipe)`, `gptoughts.plan(recipe)`, `gptoughts.fit(model, objective, batches)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["__version__", "fit", "plan", "train"]

if TYPE_CHECKING:
    from gptoughts.api import fit, plan, train


def __getattr__(name: str) -> Any:
    # Lazy, so that `gptoughts --help` pays for nothing that it does not need.
    if name in ("fit", "train", "plan"):
        import gptoughts.api as api

        return getattr(api, name)
    raise AttributeError(f"module 'gptoughts' has no attribute {name!r}")

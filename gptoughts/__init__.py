"""gptoughts: train and fine-tune language models with optimizations that prove themselves.

From Python: `gptoughts.train(recipe)`, `gptoughts.plan(recipe)`, `gptoughts.fit(model, objective, batches)`.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

__all__ = ["Callback", "__version__", "fit", "plan", "train"]

TYPE_CHECKING = False  # typing is not imported: `python -m gptoughts` would look for it in the current folder
if TYPE_CHECKING:
    from gptoughts.api import fit, plan, train
    from gptoughts.engine.callback import Callback


def __getattr__(name: str) -> object:
    # Lazy, so that `gptoughts --help` imports only what it needs.
    if name in ("fit", "train", "plan"):
        return getattr(import_module("gptoughts.api"), name)
    if name == "Callback":
        return import_module("gptoughts.engine.callback").Callback
    raise AttributeError(f"module 'gptoughts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""`gptoughts export`: a checkpoint as a folder that other tools open, with proof that it gives the same logits."""

from __future__ import annotations


def export(checkpoint: str, out: str, base: str | None, adapter_only: bool, text: str | None) -> int:
    """Write the folder, open it again as its users will, compare, and print the differences."""
    from gptoughts.inference.export_adapter import export_checkpoint

    print(export_checkpoint(checkpoint, out, base=base, adapter_only=adapter_only, text=text))
    return 0

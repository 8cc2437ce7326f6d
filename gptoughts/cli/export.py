"""`gptoughts export`: write a checkpoint as a folder for other tools, and check that its logits are equal."""

from __future__ import annotations

from gptoughts.console import print_result


def export(checkpoint: str, out: str, base: str | None, adapter_only: bool, text: str | None, remote_code: str | None) -> int:
    """Write the folder, load it as its users will, compare the logits, and print the differences."""
    from gptoughts.inference.export_adapter import export_checkpoint

    print_result(export_checkpoint(checkpoint, out, base, adapter_only, text, remote_code))
    return 0

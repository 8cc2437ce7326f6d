"""The wandb workspace: sections and panels for the keys of a run. Not seen online.

python -m gptoughts.run.tracking.wandb_workspace                  print the definition as JSON
python -m gptoughts.run.tracking.wandb_workspace ENTITY PROJECT   save it as a view of the project; needs a login
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from gptoughts.console import print_line, print_result
from gptoughts.run.tracking.metrics import GATHERED, METRICS

SECTIONS = {
    "loss": ("train/loss", "eval/loss", "train/grad_norm", "train/learning_rate"),
    "speed": ("perf/tokens_per_second", "perf/tflops_per_gpu", "perf/mfu", "perf/of_gemm"),
    "GPU": (
        "gpu/utilization", "gpu/power_watts", "gpu/sm_clock_mhz", "gpu/temperature_celsius", "gpu/throttle", "gpu/energy_joules",
        "gpu/pcie_rx_bytes_per_second", "gpu/nvlink_rx_bytes_per_second", "cpu/process_percent", "cpu/load",
    ),
    "memory": ("gpu/memory_bytes", "memory/measured_bytes", "memory/process_bytes", "memory/system_available_bytes"),
    "data": ("perf/data_wait", "train/num_tokens", "train/epoch"),
    "evaluation": ("eval/*",),
}  # fmt: skip
"""Section -> key of each panel; a key that ends in `*` stands for a panel of all keys that begin so."""
VIEW = "gptoughts"


def definition() -> dict[str, list[dict[str, Any]]]:
    """Return the panels of each section: title, x-axis and keys, or a pattern of keys."""
    metrics = {metric.key: metric for metric in METRICS}
    sections: dict[str, list[dict[str, Any]]] = {}
    for name, keys in SECTIONS.items():
        panels = sections[name] = []
        for key in keys:
            metric = metrics[key]
            panel: dict[str, Any] = {"title": f"{key} ({metric.unit})", "x": metric.axis}
            spread = [f"{key}_{end}" for end in GATHERED if "rank" not in end] if metric.axis == "sample" else []
            panels.append(panel | ({"pattern": key.replace("*", ".*")} if key.endswith("*") else {"keys": [key, *spread]}))
    return sections


def workspace(entity: str, project: str) -> Any:
    """Build the workspace, without sending it. Raises ImportError without the package wandb-workspaces."""
    from wandb_workspaces.reports.v2 import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

    sections = [
        Section(
            name=name,
            is_open=True,
            panels=[
                LinePlot(title=panel["title"], x=panel["x"], y=panel.get("keys", []), metric_regex=panel.get("pattern"))
                for panel in panels
            ],
        )
        for name, panels in definition().items()
    ]
    return Workspace(entity=entity, project=project, name=VIEW, sections=sections)


def main(arguments: Sequence[str]) -> int:
    """Print the definition, or save it in a project. Returns the exit code."""
    if not arguments:
        print_result(json.dumps(definition(), indent=1), raw=True)
        return 0
    if len(arguments) != 2:
        print_line(__doc__, sys.stderr)
        return 2
    saved = workspace(*arguments).save()
    print_result(saved.url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

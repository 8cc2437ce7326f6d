"""Check installed packages against known advisories: for each, the first version without one that a file or a user of ours could reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoughts.diagnostics.doctor.finding import Finding
from gptoughts.diagnostics.doctor.packages import release

AS_OF = "2026-12-01"
"""Day on which the table was compared with the advisories of GitHub and NVD."""


@dataclass(frozen=True)
class Advisory:
    """`package` below `fixed` has the problem `what`, published as `number`."""

    package: str
    fixed: str
    number: str
    what: str


ADVISORIES = (
    Advisory("torch", "2.10.0", "CVE-2026-24747", "torch.load with weights_only=True writes outside its memory"),
    Advisory("torch", "2.6.0", "CVE-2025-32434", "torch.load with weights_only=True runs code"),
    Advisory("transformers", "5.10.0", "CVE-2026-9856", "the name of a chat template leads out of the folder that is saved"),
    Advisory("transformers", "5.5.0", "CVE-2026-5241", "a config.json allows the model's own code"),
    Advisory("transformers", "5.3.0", "CVE-2026-4372", "a config.json chooses kernels of a hub, which run as code"),
    Advisory("jinja2", "3.1.6", "CVE-2025-27516", "a template leaves the sandbox by way of the filter attr"),
    Advisory("pyarrow", "14.0.1", "CVE-2023-47248", "a Parquet file runs code"),
    Advisory("deepspeed", "0.15.1", "CVE-2024-43497", "a file of a checkpoint runs code"),
)
"""Newest first for each package. What is reachable only by functions that gptoughts and its libraries do not call is left out."""


def advisory_findings(packages: Mapping[str, str]) -> Iterator[Finding]:
    """Yield one finding per installed package with a known advisory; the fix is its newest first safe version."""
    for package in dict.fromkeys(one.package for one in ADVISORIES):
        version = packages.get(package)
        if version is None or not release(version):
            continue
        open_ = [one for one in ADVISORIES if one.package == package and release(version) < release(one.fixed)]
        if open_:
            what = f"{package} {version} has known advisories: " + "; ".join(f"{one.what} ({one.number})" for one in open_)
            yield Finding(what, f"pip install '{package}>={open_[0].fixed}'", "costs", "security", f"as of {AS_OF}")

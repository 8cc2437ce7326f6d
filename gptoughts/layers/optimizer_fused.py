"""The AdamW update of a parameter group in one kernel instead of a dozen per parameter.

It reads and writes each weight and moment once; results differ from `plain` in the last bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.planning.layer import Case, Engine, Evidence, Layer, Options, Reason, StepTrace, active, inactive, unsupported

FUSED = "aten::_fused_adamw_"
UNFUSED = ("aten::addcdiv_", "aten::_foreach_addcdiv_")


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """AdamW only."""
    name = case.recipe.optim.name
    if name != "adamw":
        yield unsupported(f"torch fuses AdamW only, optim.name is {name}", "--layer.optimizer plain")


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Set torch's fused AdamW over the recipe's parameter groups."""
    from gptoughts.engine.optim.factory import attached

    with attached(engine, "fused"):
        yield


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require one fused call per parameter group, no unfused update, and changed weights."""
    groups = len(engine.optimizer.param_groups) if engine.optimizer else 0
    fused, unfused = trace.calls(FUSED), sum(trace.operators[name].calls for name in UNFUSED if name in trace.operators)
    if fused < max(1, groups) or unfused:
        return inactive(f"{fused} fused updates for {groups} parameter groups, {unfused} unfused", fused=fused, groups=groups)
    if not trace.weights_moved:
        return inactive(f"{fused} fused updates, no weight changed", fused=fused, groups=groups)
    return active(f"{fused} fused updates for {groups} parameter groups", fused=fused, groups=groups)


LAYER = Layer(
    name="fused",
    slot="optimizer",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    unmet=unmet,
    changes_numerics=True,
    measured="docs/measurements/cpu/layers.json on a CPU; not measured on a GPU",
)

"""Settings that runs must share before their speeds are compared, as found in the running process, not as asked for.

A speed-up between runs that differ in TF32, dropout or batch is not one of parallelism (docs/scaling.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gptoughts.errors import listed

if TYPE_CHECKING:
    from gptoughts.engine.engine import Engine
    from gptoughts.run.session import TrainingJob

UNEQUAL_SLOT = "parallel"
"""The slot whose layer is compared."""
GLOBAL_BATCH = "recipe.train.global_batch"


def settings_of(engine: Engine, job: TrainingJob) -> dict[str, Any]:
    """Return recipe, layers and what the process really does as flat keys. Size of the world and slot `parallel` are left out."""
    import torch

    from gptoughts.models.torch_internals import dropout_type

    recipe = job.recipe.model_dump(mode="json", exclude={"name", "note"})
    layers = {
        choice.slot: {"layer": choice.layer, **choice.options} for choice in job.plan.choices if choice.slot != UNEQUAL_SLOT
    }
    model = list(engine.bare.modules())
    rates = {float(vars(module)["p"]) for module in model if isinstance(module, dropout_type())}
    asleep = sum(not module.training for module in model)
    on_gpu = engine.device.type == "cuda"
    live = {
        "threads per rank": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "modules in evaluation mode": asleep,
        "dropout rates": ", ".join(map(str, sorted(rates))) or "none",
        "dtypes of weights": ", ".join(sorted({str(parameter.dtype) for parameter in engine.parameters()})),
        "device": torch.cuda.get_device_name(engine.device) if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    return dict(_flat({"recipe": recipe, "layer": layers})) | live


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def refuse_unequal(found: Mapping[str, Sequence[Mapping[str, Any]]], batches: Mapping[str, int]) -> dict[str, Any]:
    """Return the settings that all ranks of all runs share; the global batch must be the one in `batches`.

    found    run -> the settings of each of its ranks; the first run is the one that others are compared with

    Raises ConfigError with both values of every setting that differs.
    """
    base = next(iter(found))
    shared = {key: value for key, value in found[base][0].items() if key != GLOBAL_BATCH}
    problems = []
    for name, ranks in found.items():
        for number, settings in enumerate(ranks):
            who = name if len(ranks) == 1 else f"{name}, rank {number}"
            expected = {**shared, GLOBAL_BATCH: batches[name]}
            problems += [
                f"{key}: {expected.get(key)!r} in {base}, {settings.get(key)!r} in {who}"
                for key in sorted({*expected, *settings})
                if expected.get(key) != settings.get(key)
            ]
    if problems:
        raise listed("bench scaling: settings differ, so the speeds are not compared", dict.fromkeys(problems))
    return shared

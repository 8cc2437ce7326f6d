"""What differs between runs in recipe and plan, and whether their losses can be compared at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptoughts.diagnostics.report.run_data import RunData

DATA_KEYS = ("path", "format", "val_path", "val_fraction", "val_from", "text_key")
TOKEN_KEYS = ("tokenizer", "train_bpe")
LABEL_KEYS = ("sequence_length", "packing", "template", "train_on", "too_long", "stride")
"""Keys of the table [data] that decide which text is read, how it becomes tokens, and which labels a loss is a mean over."""
NOT_COMPARED = ("name", "note", "data.cache")
"""Recipe keys that change nothing in a training."""
UNKNOWN = "n/a"


@dataclass(frozen=True)
class Difference:
    """One setting that the runs do not share."""

    name: str
    values: tuple[str, ...]
    """Of every run; n/a where it is unknown."""


def recipe_differences(runs: list[RunData]) -> list[Difference]:
    """Return the recipe keys that differ, in the order of the first recipe that has them."""
    keys = dict.fromkeys(key for run in runs for key in run.recipe if key not in NOT_COMPARED)
    return _differing({key: tuple(_shown(run.recipe, key) for run in runs) for key in keys})


def plan_differences(runs: list[RunData]) -> list[Difference]:
    """Return what differs in the plans: profile, machine, ranks, the layer of each slot with its options, environment."""
    plans = [plan_values(run) for run in runs]
    keys = dict.fromkeys(key for plan in plans for key in plan)
    return _differing({key: tuple(plan.get(key, UNKNOWN) for plan in plans) for key in keys})


def plan_values(run: RunData) -> dict[str, str]:
    """Return the plan as name -> text."""
    plan = run.plan
    values = {
        name: _shown(plan, key) for name, key in (("profile",) * 2, ("machine",) * 2, ("ranks", "world_size")) if key in plan
    }
    values |= layers(run)
    environment = plan.get("environment")
    if isinstance(environment, Mapping):
        values |= {f"environment {name}": str(value) for name, value in environment.items()}
    return values


def layers(run: RunData) -> dict[str, str]:
    """Return slot -> layer with its options."""
    choices = run.plan.get("choices")
    found = {}
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, Mapping):
            options = choice.get("options")
            given = options.items() if isinstance(options, Mapping) else ()
            words = ", ".join(f"{name}={value}" for name, value in given if value is not None)
            found[str(choice.get("slot"))] = f"{choice.get('layer')} ({words})" if words else str(choice.get("layer"))
    return found


def cautions(runs: list[RunData]) -> list[str]:
    """Return why losses of these runs are not comparable, or why that is unknown; empty if they are."""
    if len(runs) < 2:
        return []
    found = _data_cautions(runs)
    known = [run for run in runs if run.recipe]
    objectives = _values(known, "objective")
    if len(set(objectives)) > 1:
        found.append(f"objectives differ ({_listed(known, objectives)}): their losses are different quantities")
    without = [run.name for run in runs if not run.recipe]
    if without and len(without) < len(runs):
        found.append(f"no recipe.toml in {', '.join(without)}: unknown whether data and tokenizer are the same")
    elif without:
        found.append("no run has a recipe.toml: unknown whether data and tokenizer are the same")
    return found


def _data_cautions(runs: list[RunData]) -> list[str]:
    known = [run for run in runs if run.recipe]
    prints = [run.fingerprint for run in known]
    found = []
    if len(known) > 1 and None not in prints:
        # The fingerprint covers the tokens, so a corpus that only lies in another folder is the same.
        if len(set(prints)) > 1:
            found.append(
                _differ(known, DATA_KEYS, "training data differ") or "training data differ: other tokens under equal settings"
            )
    elif words := _differ(known, DATA_KEYS, "data settings differ"):
        found.append(words)
    for keys, words in ((TOKEN_KEYS, "tokenizers differ"), (LABEL_KEYS, "samples and labels differ")):
        if text := _differ(known, keys, words):
            found.append(text)
    return found


def _differ(runs: list[RunData], keys: tuple[str, ...], words: str) -> str:
    """Return one line that names the keys of [data] that differ, with their values; empty if none does."""
    apart = [(key, values) for key in keys if len(set(values := _values(runs, f"data.{key}"))) > 1]
    if "train_bpe" in dict(apart) and not any("bpe" in str(one) for one in _values(runs, "data.tokenizer")):
        apart = [(key, values) for key, values in apart if key != "train_bpe"]  # the size of a tokenizer that is not trained
    texts = [f"data.{key} ({_listed(runs, values)})" for key, values in apart]
    return f"{words}: {', '.join(texts)}" if texts else ""


def _values(runs: list[RunData], key: str) -> list[str]:
    return [_shown(run.recipe, key) for run in runs]


def _listed(runs: list[RunData], values: list[str]) -> str:
    return ", ".join(f"{run.name}: {value}" for run, value in zip(runs, values, strict=True))


def _differing(values: Mapping[str, tuple[str, ...]]) -> list[Difference]:
    return [Difference(name, texts) for name, texts in values.items() if len(set(texts)) > 1]


def _shown(values: Mapping[str, Any], key: str) -> str:
    return str(values[key]) if key in values else UNKNOWN

"""Compute the gains of single layers, their product, the gain of the whole plan, and the interaction of layers.

Products are of medians: one disturbed round of plan or baseline would enter every factor of a product within rounds. Ranges are the 5th
to 95th percentile over bootstrap resamples of the rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from gptoughts.diagnostics.bench.figures import paired

BASELINE, PLAN = "baseline", "plan"


def without(layer: str) -> str:
    """Return the name of the plan without `layer`."""
    return f"{PLAN} without {layer}"


def with_(layer: str) -> str:
    """Return the name of the baseline with `layer`."""
    return f"{BASELINE} with {layer}"


Seconds = Mapping[str, Sequence[float]]
Pair = tuple[str, str]

DRAWS = 300
EXACT = 1e-3
"""Tolerance for overlapping ranges: figures are rounded."""


def gains(parts: Mapping[str, str], seconds: Seconds) -> dict[str, Any]:
    """Return `gains` (per slot, alone and in the plan) and `whole` (plan / baseline, both products, summary lines).

    `seconds` are seconds per step of each round by variant; a gain is a ratio of speeds within a round, above 1 if the layer is faster.
    """
    rows = {}
    pairs: dict[str, list[Pair]] = {"alone": [], "in_plan": []}
    for slot, layer in parts.items():
        alone, beside = (BASELINE, with_(layer)), (without(layer), PLAN)
        rows[slot] = {"layer": layer, "alone": _ratio(seconds, alone), "in_plan": _ratio(seconds, beside)}
        rows[slot] |= {"interaction": _interaction(seconds, alone, beside)}
        pairs["alone"].append(alone)
        pairs["in_plan"].append(beside)
    products = {
        how: {
            "product": _ranged(seconds, [pair for pair in found if _known(seconds, pair)]),
            "without": [row["layer"] for row in rows.values() if not row[how]],
        }
        for how, found in pairs.items()
    }
    ends = (BASELINE, PLAN)
    whole = _ratio(seconds, ends)
    ranged = _ranged(seconds, [ends] if whole else [])
    words = _words(rows, ranged, products)
    return {"gains": rows, "whole": {"measured": whole, "range": ranged, "products": products, "words": words}}


def _known(seconds: Seconds, pair: Pair) -> bool:
    return all(name in seconds and len(seconds[name]) > 0 for name in pair)


def _ratio(seconds: Seconds, pair: Pair) -> dict[str, float] | None:
    """Return speed of the second / speed of the first."""
    return paired(seconds[pair[0]], seconds[pair[1]]) if _known(seconds, pair) else None


def _interaction(seconds: Seconds, alone: Pair, beside: Pair) -> dict[str, float] | None:
    """Return gain in the plan / gain alone."""
    if not (_known(seconds, alone) and _known(seconds, beside)):
        return None
    return _drawn(seconds, [alone, beside], lambda rounds: _middle(seconds, beside, rounds) / _middle(seconds, alone, rounds))


def _ranged(seconds: Seconds, pairs: Sequence[Pair]) -> dict[str, float] | None:
    """Return the product of the pairs' median gains."""
    if not pairs:
        return None
    return _drawn(seconds, pairs, lambda rounds: math.prod(_middle(seconds, pair, rounds) for pair in pairs))


def _middle(seconds: Seconds, pair: Pair, rounds: Sequence[int]) -> float:
    slow, fast = seconds[pair[0]], seconds[pair[1]]
    return median([slow[number] / fast[number] for number in rounds])


def _drawn(seconds: Seconds, pairs: Sequence[Pair], figure: Callable[[Sequence[int]], float]) -> dict[str, float]:
    """Return a figure of all rounds with its 5th to 95th percentile over resampled rounds, with a fixed seed."""
    count, generator = min(len(seconds[name]) for pair in pairs for name in pair), random.Random(0)
    results = [figure(generator.choices(range(count), k=count)) for _ in range(DRAWS if count > 1 else 2)]
    ends = quantiles(results, n=20, method="inclusive")
    return {"value": round(figure(range(count)), 4), "low": round(ends[0], 4), "high": round(ends[-1], 4)}


def _words(rows: Mapping[str, Mapping[str, Any]], whole: dict[str, float] | None, products: Mapping[str, Any]) -> list[str]:
    """Summarize the figures in lines."""
    if whole is None:
        return ["plan / baseline: n/a, one of them was not measured"]
    words = [f"plan / baseline: {_ranged_text(whole)}"]
    for how, label in (("alone", "alone"), ("in_plan", "in the plan")):
        product, missing = products[how]["product"], products[how]["without"]
        if product is None:
            continue
        left = f" without {', '.join(missing)} (not measured)" if missing else ""
        words.append(f"product of gains {label}{left}: {_ranged_text(product)}, {_verdict(how, whole, product)}")
    words += list(_partners(rows))
    return [*words, "ranges: 5th to 95th percentile over resampled rounds"]


def _ranged_text(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _verdict(how: str, whole: Mapping[str, float], product: Mapping[str, float]) -> str:
    """Compare a product of gains with the whole plan: overlapping layers count twice alone and not at all in the plan."""
    if product["low"] <= whole["high"] * (1 + EXACT) and whole["low"] <= product["high"] * (1 + EXACT):
        return "equal to the whole within the ranges"
    more = product["value"] > whole["value"]
    if how == "alone":
        return (
            "above the whole: layers overlap (they save the same time)"
            if more
            else "below the whole: layers help each other (in a shorter step the same saving is a larger share)"
        )
    return (
        "above the whole: layers help each other (removing one also reduces the gain of others)"
        if more
        else "below the whole: layers overlap (another layer still saves the time)"
    )


def _partners(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line per layer whose gain in the plan differs from its gain alone."""
    for row in rows.values():
        found = row["interaction"]
        if found is None or (found["low"] <= 1 + EXACT and found["high"] >= 1 - EXACT):
            continue
        how = "more" if found["value"] > 1 else "less"
        yield f"{row['layer']} gains {how} in the plan than alone: {_ranged_text(found)} times"

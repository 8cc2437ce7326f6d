"""Gains of single layers, their product, the gain of all together, and why the two differ: computed from the rounds, told in words.

The product is that of medians. A single disturbed round of an end would enter every factor of a product of that round; how far medians can
be trusted is told by drawing the rounds again, with replacement, and looking where nine of ten results lie.
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
    """The name of the plan without `layer`."""
    return f"{PLAN} without {layer}"


def with_(layer: str) -> str:
    """The name of the baseline with `layer`."""
    return f"{BASELINE} with {layer}"


Seconds = Mapping[str, Sequence[float]]
Pair = tuple[str, str]

DRAWS = 300
EXACT = 1e-3
"""Ranges that come as near as this meet: figures are rounded."""


def gains(parts: Mapping[str, str], seconds: Seconds) -> dict[str, Any]:
    """`gains`: per slot what its layer gives alone and in the plan. `whole`: both ends, the two products, and words.

    `seconds` are seconds per step of each round by variant; a gain is a ratio of speeds within a round: above 1 the layer is faster.
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
    """The speed of the second over that of the first."""
    return paired(seconds[pair[0]], seconds[pair[1]]) if _known(seconds, pair) else None


def _interaction(seconds: Seconds, alone: Pair, beside: Pair) -> dict[str, float] | None:
    """The gain in the plan over the gain alone."""
    if not (_known(seconds, alone) and _known(seconds, beside)):
        return None
    return _drawn(seconds, [alone, beside], lambda rounds: _middle(seconds, beside, rounds) / _middle(seconds, alone, rounds))


def _ranged(seconds: Seconds, pairs: Sequence[Pair]) -> dict[str, float] | None:
    """The product of the pairs' median gains."""
    if not pairs:
        return None
    return _drawn(seconds, pairs, lambda rounds: math.prod(_middle(seconds, pair, rounds) for pair in pairs))


def _middle(seconds: Seconds, pair: Pair, rounds: Sequence[int]) -> float:
    slow, fast = seconds[pair[0]], seconds[pair[1]]
    return median([slow[number] / fast[number] for number in rounds])


def _drawn(seconds: Seconds, pairs: Sequence[Pair], figure: Callable[[Sequence[int]], float]) -> dict[str, float]:
    """A figure of the rounds as they were, and where nine of ten lie when rounds are drawn again. The draws are always the same."""
    count, generator = min(len(seconds[name]) for pair in pairs for name in pair), random.Random(0)
    results = [figure(generator.choices(range(count), k=count)) for _ in range(DRAWS if count > 1 else 2)]
    ends = quantiles(results, n=20, method="inclusive")
    return {"value": round(figure(range(count)), 4), "low": round(ends[0], 4), "high": round(ends[-1], 4)}


def _words(rows: Mapping[str, Mapping[str, Any]], whole: dict[str, float] | None, products: Mapping[str, Any]) -> list[str]:
    """Sentences about these figures; each says only what they show."""
    if whole is None:
        return ["One of the two ends was not measured, so there is no whole to compare the parts with."]
    words = [f"The whole plan is {_told(whole)} times the baseline."]
    for how, said in (("alone", "added alone to the baseline"), ("in_plan", "taken alone out of the plan")):
        product, missing = products[how]["product"], products[how]["without"]
        if product is None:
            continue
        left = f", without {', '.join(missing)}, which could not be measured," if missing else ""
        words.append(f"The gains of layers {said}{left} multiply to {_told(product)}: {_verdict(how, whole, product)}.")
    words += list(_partners(rows))
    return [*words, "Ranges in brackets hold nine of ten results when the rounds are drawn again."]


def _told(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _verdict(how: str, whole: Mapping[str, float], product: Mapping[str, float]) -> str:
    """Why a product is not the whole: what overlaps is counted twice from below and lost from above, and the reverse."""
    if product["low"] <= whole["high"] * (1 + EXACT) and whole["low"] <= product["high"] * (1 + EXACT):
        return "these rounds cannot tell that from the whole"
    more = product["value"] > whole["value"]
    if how == "alone":
        return (
            "more than the whole, because layers overlap: two that save the same time save it once"
            if more
            else "less than the whole, because layers help each other: a step that one has shortened leaves the next a larger share"
        )
    return (
        "more than the whole, because layers help each other: taking one away costs what it gave the others, too"
        if more
        else "less than the whole, because layers overlap: what one no longer saves, another still does"
    )


def _partners(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The layers whose gain depends on the company, as far as the rounds can tell."""
    for row in rows.values():
        found = row["interaction"]
        if found is None or (found["low"] <= 1 + EXACT and found["high"] >= 1 - EXACT):
            continue
        how = "more" if found["value"] > 1 else "less"
        yield f"{row['layer']} gives {how} among the other layers than alone: its gain there is {_told(found)} times its gain on the baseline."

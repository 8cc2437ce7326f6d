"""The parts of the page that are text: results, differences, plan and evidence, bars of time, limiter, ranks, scores, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from gptoughts.console import bytes_in_words, duration, share
from gptoughts.diagnostics.report.charts import describe, title_of
from gptoughts.diagnostics.report.differences import Difference, layers, plan_differences, plan_values, recipe_differences
from gptoughts.diagnostics.report.markup import Markup, element, joined, table
from gptoughts.diagnostics.report.run_data import RunData
from gptoughts.diagnostics.report.summary import goodput_parts, results, step_parts, wall_seconds

COLORS = 10
"""Colors that the style sheet defines for runs and parts."""


def swatch(number: int) -> Markup:
    """Return a square in the color of a run or part."""
    return element("span", class_=f"swatch c{number % COLORS}")


def run_heads(runs: Sequence[RunData]) -> list[Markup]:
    """Return the name of each run with its color."""
    return [joined([swatch(number), run.name]) for number, run in enumerate(runs)]


def result_table(runs: list[RunData]) -> Markup:
    """Return the results, each later run with its change from the first."""
    rows = []
    for figure in results(runs):
        changes = ["", *figure.changes()]
        cells = [joined([text, " ", element("small", change)]) for text, change in zip(figure.texts(), changes, strict=True)]
        rows.append([figure.name, *cells])
    return table(["", *run_heads(runs)], rows, "figures")


def difference_tables(runs: list[RunData]) -> Markup:
    """Return what differs between several runs in recipe and plan."""
    parts: list[Markup] = []
    for title, found in (("Recipe", recipe_differences(runs)), ("Plan", plan_differences(runs))):
        parts.append(element("h3", title))
        parts.append(_differences(runs, found) if found else element("p", "No difference.", class_="quiet"))
    return joined(parts)


def _differences(runs: Sequence[RunData], found: Iterable[Difference]) -> Markup:
    return table(["", *run_heads(runs)], [[one.name, *one.values] for one in found])


def machine_table(runs: Sequence[RunData]) -> Markup:
    """Return machine, profile, ranks and expected memory of each run."""
    values = [plan_values(run) for run in runs]
    rows = [[name, *(value.get(name, "n/a") for value in values)] for name in ("machine", "ranks", "profile")]
    budgets = [run.plan.get("memory") for run in runs]
    for name in ("peak", "memory_bytes"):
        found = [budget.get(name) if isinstance(budget, Mapping) else None for budget in budgets]
        words = {"peak": "expected peak of a step", "memory_bytes": "memory of a rank"}
        rows.append([words[name], *(bytes_in_words(one if isinstance(one, int | float) else None) for one in found)])
    return table(["", *run_heads(runs)], rows)


def evidence_table(run: RunData) -> Markup:
    """Return slot, layer, status and proof of the watched step, and why other layers were not taken."""
    chosen, reasons = layers(run), _reasons(run)
    lines = run.evidence.get("layers")
    judged = {str(one.get("slot")): one for one in lines if isinstance(one, Mapping)} if isinstance(lines, list) else {}
    rows = []
    for slot in dict.fromkeys([*chosen, *judged]):
        one = judged.get(slot, {})
        status = str(one.get("status", "n/a"))
        proof = str(one.get("proof", "n/a"))
        shown = "" if proof == "baseline" else element("span", status, class_=f"badge {_badge(status)}")
        rows.append([slot, chosen.get(slot, str(one.get("layer", "n/a"))), shown, joined([proof, reasons.get(slot, "")])])
    return table(["slot", "layer", "status", "proof in the watched step"], rows)


def _badge(status: str) -> str:
    return {"active": "good", "inactive": "bad"}.get(status, "open")


def _reasons(run: RunData) -> dict[str, Markup]:
    """Return slot -> the layers that were not taken, with reasons, folded."""
    found: dict[str, Markup] = {}
    choices = run.plan.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, Mapping):
            continue
        texts = [f"expected slowdown: {one}" for one in _list(choice.get("expected_slowdown"))]
        for one in _list(choice.get("rejected")):
            if isinstance(one, Mapping):
                why = "; ".join(str(reason.get("text")) for reason in _list(one.get("reasons")) if isinstance(reason, Mapping))
                texts.append(f"not {one.get('layer')}: {why}")
        if texts:
            items = element("ul", *(element("li", text) for text in texts))
            found[str(choice.get("slot"))] = element("details", element("summary", "reasons"), items)
    return found


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def step_time_bars(runs: Sequence[RunData]) -> Markup | None:
    """Return how the mean step divides, one bar per run; None if no run measured it."""
    return _bars(runs, [step_parts(run) for run in runs], lambda value: f"{1000 * value:.2f} ms", "a step")


def goodput_bars(runs: Sequence[RunData]) -> Markup | None:
    """Return how the wall time of all attempts divides, one bar per run; None if no run has a goodput.json."""
    bars = _bars(runs, [goodput_parts(run) for run in runs], duration, "wall time")
    walls = [(run.name, wall_seconds(run), sum(goodput_parts(run).values())) for run in runs]
    apart = [
        f"{name}: the parts sum to {duration(total)} of {duration(wall)} wall time"
        for name, wall, total in walls
        if wall and total and abs(total / wall - 1) > 0.01
    ]
    return bars and joined([bars, *(element("p", text, class_="caution") for text in apart)])


def _bars(runs: Sequence[RunData], parts: list[dict[str, float]], shown: Callable[[float], str], what: str) -> Markup | None:
    every = list(dict.fromkeys(name for part in parts for name in part))
    # A part keeps its color, that of its curve too, also where others are left out.
    names = [(place, name) for place, name in enumerate(every) if any(part.get(name, 0) > 0 for part in parts)]
    if not names:
        return None
    bars = []
    for run, part in zip(runs, parts, strict=True):
        total = sum(part.values())
        if total > 0:
            pieces = [
                element(
                    "span", class_=f"c{place % COLORS}", style=f"width:{100 * part.get(name, 0) / total:.3f}%",
                    title=f"{name}: {shown(part.get(name, 0))}, {share(part.get(name, 0) / total)}",
                )
                for place, name in names
            ]  # fmt: skip
            label = f"{run.name}: {shown(total)}"
            bars.append(
                element("div", element("span", label, class_="label"), element("div", *pieces, class_="bar"), class_="bars")
            )
    rows = [
        [
            joined([swatch(place), name.replace("_", " ")]),
            *(_share_cell(part.get(name), sum(part.values()), shown) for part in parts),
        ]
        for place, name in names
    ]
    return joined([*bars, table([what, *(run.name for run in runs)], rows, "figures")])


def _share_cell(value: float | None, total: float, shown: Callable[[float], str]) -> str:
    return "n/a" if value is None or total <= 0 else f"{shown(value)} ({share(value / total)})"


MOST_WORDS = 12
"""Different texts of a key that a table shows, the most frequent first."""


def word_tables(runs: Sequence[RunData], prefix: str) -> list[Markup]:
    """Return how often each text of the text keys with a prefix was logged, such as the limiter's verdicts."""
    found = []
    held = [{**run.metrics.words, **run.system.words} for run in runs]
    for key in dict.fromkeys(key for words in held for key in words if key.startswith(prefix)):
        counted: list[tuple[dict[str, int], int]] = [
            (words.get(key, {}), _rows_of(run, key)) for words, run in zip(held, runs, strict=True)
        ]
        frequent = sorted(
            {word for words, _ in counted for word in words}, key=lambda word: -sum(one[0].get(word, 0) for one in counted)
        )
        rows = [[word, *(_rows_with(words.get(word, 0), total) for words, total in counted)] for word in frequent[:MOST_WORDS]]
        title = (
            f"{title_of(key)}, in rows of {'system.jsonl' if any(key in run.system.words for run in runs) else 'metrics.jsonl'}"
        )
        found += [
            element("h3", title),
            element("p", describe(key)[1], class_="quiet"),
            table(["", *run_heads(runs)], rows, "figures"),
        ]
    return found


def _rows_of(run: RunData, key: str) -> int:
    """Return how many rows could have a text: all of the file for lists, else those that have one."""
    for kept in (run.metrics, run.system):
        if key in kept.words:
            return kept.rows if key in kept.listed else sum(kept.words[key].values())
    return 0


def _rows_with(rows: int, total: int) -> str:
    return f"{rows:,} ({share(rows / total)})" if total else "n/a"


def rank_table(runs: Sequence[RunData], prefix: str) -> Markup | None:
    """Return which rank had the lowest and highest value in the newest sample; None for runs that did not gather them."""
    rows = []
    endings = tuple(f"_{end}_rank" for end in ("min", "max"))
    names = [key for run in runs for key in run.system.keys if key.startswith(prefix) and key.endswith(endings)]
    for base in dict.fromkeys(name.removesuffix(endings[0]).removesuffix(endings[1]) for name in names):
        cells = [
            " ".join(f"{word} {_rank(run, base + end)}" for word, end in zip(("lowest", "highest"), endings, strict=True))
            for run in runs
        ]
        rows.append([title_of(base), *cells])
    if not rows:
        return None
    return element(
        "details",
        element("summary", "ranks with the lowest and highest value, newest sample"),
        table(["", *run_heads(runs)], rows),
    )


def _rank(run: RunData, key: str) -> str:
    found = run.system.keys.get(key)
    return f"rank {found.last:.0f}" if found and found.last is not None else "n/a"


def sample_list(run: RunData) -> Markup:
    """Return the generated texts of a run, the newest open."""
    parts = []
    for place, sample in enumerate(reversed(run.samples)):
        title = f"step {sample['step']:,.0f} {sample['name']}".strip()
        parts.append(
            element(
                "details", element("summary", title), element("pre", sample["text"]), **({"open": ""} if place == 0 else {})
            )
        )
    return joined([element("h3", run.name), *parts])

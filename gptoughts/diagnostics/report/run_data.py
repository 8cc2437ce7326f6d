"""Load what a report shows of one run: curves, plan, evidence, recipe, goodput, samples. Every file may be missing or cut off."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from gptoughts.diagnostics.report.decimate import Curve
from gptoughts.diagnostics.report.locate import FILE, RunPlace
from gptoughts.diagnostics.report.rows import ends_of_attempts, lines, number, parsed, position
from gptoughts.files import parse_json, parse_toml, regular

MOST_WINDOWS = 500
"""A curve holds this many windows to twice as many, each with its minimum and maximum; a chart is about as many pixels wide."""
MOST_KEYS = 2000
"""Keys of a run that get a curve."""
MOST_WORDS = 50
"""Different values of a text key that are counted."""
LARGEST = 1e300
"""Values that are not below it count as not finite."""
MOST_SAMPLES = 20
MOST_BYTES_OF_A_DOCUMENT = 1 << 25
PLACES = ("step", "attempt", "sample", "time")
"""Keys that place a row instead of measuring something."""


@dataclass
class Key:
    """Everything kept of one key: its curve and figures over all of its values."""

    curve: Curve
    total: float = 0.0
    count: int = 0
    """Values in `total`, without the first row of each attempt, whose step compiles."""
    not_finite: int = 0

    @property
    def mean(self) -> float | None:
        """Mean without the first row of each attempt."""
        return self.total / self.count if self.count else None

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        return self.curve.last.y if self.curve.last else None


@dataclass
class Table:
    """The keys of a JSON lines file."""

    keys: dict[str, Key] = field(default_factory=dict)
    words: dict[str, Counter[str]] = field(default_factory=dict)
    """Key with text values -> rows with each text."""
    last_word: dict[str, str] = field(default_factory=dict)
    listed: set[str] = field(default_factory=set)
    """Text keys whose values are lists: a row can have several texts, or none."""
    rows: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out -> how often."""

    def add(self, x: float, row: Mapping[str, Any], steady: bool = True) -> None:
        """Take a row at `x`. A list of numbers becomes its minimum, mean and maximum, texts are counted."""
        self.rows += 1
        keys = self.keys
        for name, value in row.items():
            kind = type(value)
            if (kind is float or kind is int) and name in keys and -LARGEST < value < LARGEST:
                key = keys[name]  # the usual case: a known key with a number
                key.curve.add(x, value)
                if steady:
                    key.total += value
                    key.count += 1
            elif value is not None and name not in PLACES:
                self._add(name, x, value, steady)

    def _add(self, name: str, x: float, value: Any, steady: bool) -> None:
        amount = number(value)
        if amount is not None:
            self._number(name, x, amount, steady)
        elif isinstance(value, str):
            self._word(name, value)
        elif isinstance(value, list):
            amounts = [one for one in map(number, value) if one is not None]
            if amounts and len(amounts) == len(value):
                for ending, one in (("min", min(amounts)), ("mean", sum(amounts) / len(amounts)), ("max", max(amounts))):
                    self._number(f"{name} {ending}", x, one, steady)
            else:
                self.listed.add(name)
                for one in value:
                    self._word(name, str(one))
        elif isinstance(value, bool):
            self._word(name, str(value).lower())
        else:
            self.notes["values that are neither number nor text"] += 1

    def _number(self, name: str, x: float, amount: float, steady: bool) -> None:
        key = self.keys.get(name)
        if key is None:
            if len(self.keys) >= MOST_KEYS:
                self.notes[f"values of keys after the first {MOST_KEYS}"] += 1
                return
            key = self.keys[name] = Key(Curve(MOST_WINDOWS))
        if not abs(amount) < LARGEST:  # also not a number
            key.not_finite += 1
            return
        key.curve.add(x, amount)
        if steady:
            key.total += amount
            key.count += 1

    def _word(self, name: str, word: str) -> None:
        if name not in self.words and len(self.words) >= MOST_KEYS:
            return
        counted = self.words.get(name)
        if counted is None:
            counted = self.words[name] = Counter()
        word = word[:400]
        counted[word if word in counted or len(counted) < MOST_WORDS else "others"] += 1
        self.last_word[name] = word


@dataclass
class RunData:
    """One run."""

    name: str
    place: RunPlace
    metrics: Table
    """x is the step."""
    system: Table
    """x is seconds since the first sample, by the wall clock."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    evidence: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""
    goodput: Mapping[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    fingerprint: str | None = None
    """Of the tokenized training data, from the newest checkpoint; None if there is none."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""


def load_run(place: RunPlace) -> RunData:
    """Read every file of a run. Files that are missing or damaged are named in `notes`."""
    run = RunData(place.name, place, Table(), Table())
    for name in ("plan", "evidence", "goodput"):
        setattr(run, name, _document(place.out / f"{name}.json", run.notes))
    run.recipe = _recipe(place.out / "recipe.toml", run.notes)
    run.fingerprint = _fingerprint(place.checkpoints)
    ends = ends_of_attempts(place.out / FILE)
    run.attempts = max(ends, default=0)
    _read_metrics(run, ends)
    _read_system(run)
    run.samples = _samples(run, ends)
    if not (place.out / FILE).is_file():
        run.notes.append(f"{FILE}: missing")
    for file, table in ((FILE, run.metrics), ("system.jsonl", run.system)):
        run.notes += [f"{file}: {count:,} {what} left out" for what, count in table.notes.items()]
    return run


def _read_metrics(run: RunData, ends: Mapping[int, float]) -> None:
    table, previous = run.metrics, 0
    for row, step, attempt in _kept(run.place.out / FILE, ends, table.notes):
        table.add(step, row, steady=attempt == previous)
        if "train/loss" in row:
            previous = attempt


def _kept(path: Path, ends: Mapping[int, float], notes: Counter[str]) -> Iterator[tuple[dict[str, Any], float, int]]:
    """Yield rows with step and attempt, without those that a later attempt made again."""
    for line in lines(path, notes):
        row = parsed(line, notes)
        if row is None:
            continue
        place = position(row)
        if place is None:
            notes["rows without a step"] += 1
        elif place[0] < ends.get(place[1], float("inf")):
            yield row, *place


def _read_system(run: RunData) -> None:
    table, start = run.system, None
    for line in lines(run.place.out / "system.jsonl", table.notes):
        row = parsed(line, table.notes)
        if row is None:
            continue
        time = number(row.get("time"))
        if time is None or not abs(time) < LARGEST:
            table.notes["samples without a time"] += 1
            continue
        start = time if start is None else start
        step = number(row.get("step"))
        table.add(time - start, {**row, **({"training step": step} if step is not None else {})})


def _samples(run: RunData, ends: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return the first and the newest generated texts."""
    first: list[dict[str, Any]] = []
    newest: deque[dict[str, Any]] = deque(maxlen=MOST_SAMPLES - 1)
    notes: Counter[str] = Counter()
    for row, step, _ in _kept(run.place.out / "samples.jsonl", ends, notes):
        text = row.get("text")
        if isinstance(text, str) and text:
            kept = {"step": step, "name": str(row.get("name", "")), "text": text[:4000]}
            (newest if first else first).append(kept)
    run.notes += [f"samples.jsonl: {count:,} {what} left out" for what, count in notes.items()]
    return [*first, *newest]


def _text(path: Path) -> str | None:
    try:
        if regular(path).stat().st_size > MOST_BYTES_OF_A_DOCUMENT:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def _document(path: Path, notes: list[str]) -> Mapping[str, Any]:
    text = _text(path)
    if text is None:
        return {}
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{path.name}: cut off or damaged, left out")
        return {}
    return found


def _recipe(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the recipe by dotted key; of a file that is cut off, what its whole lines say."""
    text = _text(path)
    if text is None:
        return {}
    whole = text.splitlines()
    for end in chain(range(len(whole), max(0, len(whole) - 3), -1), [0]):
        try:
            tables = parse_toml("\n".join(whole[:end]))
        except ValueError:
            continue
        if end < len(whole):
            notes.append(f"{path.name}: cut off or damaged, read to line {end}")
        return dict(flattened(tables))
    return {}


def flattened(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested mappings."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fingerprint(checkpoints: Path) -> str | None:
    """Return the fingerprint of the training data in the newest checkpoint, None if it is unknown."""
    found = sorted(checkpoints.glob("step-*/state.json")) if checkpoints.is_dir() else []
    state: Any = _document(found[-1], []) if found else {}
    for key in ("run", "progress", "cursor", "fingerprint"):
        state = state.get(key) if isinstance(state, dict) else None
    return state if isinstance(state, str) and state else None


def load_named(places: list[RunPlace]) -> list[RunData]:
    """Load several runs. Runs of one name get the name of the folder above theirs, or a number, to be distinct."""
    runs = [load_run(place) for place in places]
    names = [run.name for run in runs]
    for number_, run in enumerate(runs):
        if names.count(run.name) > 1:
            longer = f"{run.place.out.resolve().parent.name}/{run.name}"
            same = [one for one in places if f"{one.out.resolve().parent.name}/{one.name}" == longer]
            run.name = longer if len(same) == 1 else f"{run.name} ({number_ + 1})"
    return runs

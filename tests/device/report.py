"""What the stages kept, as a page that a person reads, and the list of cards and files that it should change."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptoughts.hardware.peak_flops import peaks
from gptoughts.layers import CATALOG
from tests.device.contract import FAMILIES
from tests.device.kept import folder, write
from tests.device.turns import parity_of

ROOT = Path(__file__).resolve().parents[2]
BULKY = ("all_kernels", "operators")
GOALS = (
    ("GPT-2 124M", "gpt2-124m", "tokens_per_second", 500_000),
    ("GPT-2 1.5B", "gpt2-xl", "tokens_per_second", 60_000),
    ("GPT-2 1.5B, share of the GEMM", "gpt2-xl", "share", 0.70),
    ("GPT-2 1.5B in FP8", "fp8", "tokens_per_second", 73_000),
    ("Llama 1.1B beside the Trainer", "trainer", "ratio", 1.3),
)
Table = list[tuple[Any, ...]]


def write_report(tiny: bool) -> int:
    """docs/measurements/GPU/README.md and the JSON beside it; with `tiny`, into the folder of the stages. 1 where nothing is held."""
    held = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder() / "kept").glob("*.json"))}
    kept = {name.removesuffix("-tiny"): values for name, values in held.items() if _wanted(name, tiny)}
    if not kept:
        print("report: no stage has kept anything yet")
        return 1
    machine = next(values["machine"] for values in kept.values() if values.get("machine"))
    name = re.sub(r"[^a-z0-9]+", "-", (machine.get("gpu") or "cpu").lower().removeprefix("nvidia ")).strip("-")
    place = folder() / "report" if tiny else ROOT / "docs" / "measurements" / name
    place.mkdir(parents=True, exist_ok=True)
    for stage, values in kept.items():
        write(place / f"{stage}.json", _slim(values))
    (place / "README.md").write_text("\n".join(page(kept, machine)) + "\n", encoding="utf-8")
    print(f"written: {place / 'README.md'} and {len(kept)} JSON files beside it")
    for line in to_refresh(kept, place):
        print(line)
    return 0


def _wanted(name: str, tiny: bool) -> bool:
    return ".older-" not in name and name.endswith("-tiny") == tiny


def _slim(values: dict[str, Any]) -> dict[str, Any]:
    """Without the long lists, which only the tests' recorded traces are made from."""
    rows = {name: {key: value for key, value in row.items() if key not in BULKY} for name, row in values["runs"].items()}
    return {**values, "runs": rows}


def page(kept: dict[str, Any], machine: dict[str, Any]) -> Iterator[str]:
    """The whole page."""
    facts, clocks = machine.get("gpu_facts") or {}, machine.get("clocks_at_start") or {}
    yield f"# {machine['label']}"
    yield ""
    yield "Written by `tests/device/run.sh report` from the JSON files beside it. Every figure is a median; spreads stand in the files."
    yield ""
    rows: Table = [
        (
            "python, torch, driver, CUDA",
            f"{machine['python']}, {machine['torch']}, {machine['driver']}, {machine['cuda_of_driver']}",
        )
    ]
    rows += [("power limit", f"{facts.get('power_limit_watts')} W"), ("commit", machine.get("commit"))]
    rows += [("clocks at the start", ", ".join(f"{key} {value}" for key, value in clocks.items()) or "n/a")]
    wanted = ("transformers", "transformer-engine", "torchao", "triton", "liger-kernel", "tokenspeed-fa3", "accelerate")
    rows += [(package, machine["packages"][package]) for package in wanted if package in machine["packages"]]
    yield from table(("machine", ""), rows)
    ceiling = _ceilings(kept)
    yield from _ceiling_lines(ceiling)
    yield from _goals(kept, machine, ceiling)
    for stage, lines in (("bf16", _speeds), ("fp8", _speeds), ("ablation", _speeds)):
        if stage in kept:
            yield from lines(stage, kept[stage], machine, ceiling)
    if "contract" in kept:
        yield from _contract(kept["contract"])
    for name, text in _failures(kept):
        yield f"- {name}: {text}"


def table(head: tuple[str, ...], rows: Table) -> Iterator[str]:
    """Rows as Markdown; nothing without rows."""
    if not rows:
        return
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield (
            "| "
            + " | ".join("n/a" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in row)
            + " |"
        )
    yield ""


def _ceilings(kept: dict[str, Any]) -> dict[str, Any]:
    found = [values["runs"]["ceilings"] for values in kept.values() if "ceilings" in values["runs"]]
    return found[0] if found else {}


def _ceiling_lines(ceiling: dict[str, Any]) -> Iterator[str]:
    rows = [
        (name.removesuffix("_tflops"), f"{value:.0f} TFLOP/s")
        for name, value in ceiling.items()
        if name.endswith("_tflops") and value
    ]
    if ceiling.get("copy_gb_per_second"):
        rows.append(("copy, read and written", f"{ceiling['copy_gb_per_second']:.0f} GB/s"))
    if rows:
        yield "## What the box can do"
        yield ""
        yield from table((f"square product of {ceiling.get('size')}", "measured"), rows)


def share_of_product(job: dict[str, Any], machine: dict[str, Any], ceiling: dict[str, Any]) -> float | None:
    """The model's arithmetic as a share of the bf16 product measured in that sitting."""
    facts = machine.get("gpu_facts") or {}
    peak = peaks(machine["gpu"], facts.get("memory_bytes")) if machine.get("gpu") else None
    if not job.get("mfu") or not ceiling.get("bf16_tflops") or peak is None or peak.bf16_tflops is None:
        return None
    return float(job["mfu"]) * peak.bf16_tflops / float(ceiling["bf16_tflops"])


def jobs_of(values: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Measurement, job and figures."""
    for name, row in values["runs"].items():
        for job, figures in row.get("jobs", {}).items():
            yield name, job, figures


def _speeds(stage: str, values: dict[str, Any], machine: dict[str, Any], ceiling: dict[str, Any]) -> Iterator[str]:
    yield f"## {stage}"
    yield ""
    rows: Table = []
    for name, job, figures in jobs_of(values):
        share, memory = share_of_product(figures, machine, ceiling), figures.get("peak_memory_bytes")
        idle = [line["layer"] for line in figures.get("evidence", []) if line["status"] != "active"]
        rows.append((
            name, job, f"{figures['tokens_per_second']:,.0f}", _percent(figures.get("mfu")), _percent(share),
            f"{memory / 2**30:.1f} GiB" if memory else None, figures.get("micro_batch"), _layers(figures), ", ".join(idle) or "none",
        ))  # fmt: skip
    head = ("measurement", "variant", "tok/s", "MFU", "of the product", "peak memory", "micro-batch", "layers", "not active")
    yield from table(head, rows)
    pairs: Table = []
    for name, row in values["runs"].items():
        for what, ratio in row.get("ratios", {}).items():
            if what == "loss":
                pairs.append(
                    (
                        name,
                        "loss over the last updates",
                        f"{ratio['one']:.4f} and {ratio['two']:.4f}",
                        f"{100 * ratio['relative']:+.2f} %",
                    )
                )
            else:
                pairs.append((name, what, f"{ratio['median']:.3f}", f"{ratio['min']:.3f} to {ratio['max']:.3f}"))
    pairs += list(_one_after_another(values))
    yield from table(("measurement", "one over the other", "median", "from, to"), pairs)
    formula = next((figures["mfu_formula"] for _, _, figures in jobs_of(values) if "mfu_formula" in figures), None)
    if formula:
        yield formula
        yield ""
    if "kills" in values["runs"]:
        kills = values["runs"]["kills"]
        outcome = "the same bits" if kills["bit_for_bit"] else f"differs: {', '.join(kills['differ'])}"
        yield f"{kills['kills']} kills at random times: {outcome}."
        yield ""


def _one_after_another(values: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """What did not fit the GPU beside each other, by the name that they share: every other one over bf16."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for row in values["runs"].values():
        if "compare" in row:
            groups.setdefault(row["compare"], {}).update(row["jobs"])
    for name, jobs in groups.items():
        base = next((job for label, job in jobs.items() if label.startswith("bf16")), None)
        for label, job in jobs.items():
            if base is not None and job is not base:
                yield name, f"{label} / bf16, not in turns", f"{job['tokens_per_second'] / base['tokens_per_second']:.3f}", None
                loss = parity_of(base.get("losses", []), job.get("losses", []))
                if loss:
                    yield (
                        name,
                        f"loss, {label} over bf16",
                        f"{loss['two']:.4f} and {loss['one']:.4f}",
                        f"{100 * loss['relative']:+.2f} %",
                    )


def _layers(figures: dict[str, Any]) -> str:
    plan = figures.get("plan", {})
    names = [row["layer"] for row in plan.values() if isinstance(row, dict) and "layer" in row]
    return ", ".join(name for name in names if name in CATALOG and not CATALOG[name].baseline)


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _goals(kept: dict[str, Any], machine: dict[str, Any], ceiling: dict[str, Any]) -> Iterator[str]:
    rows: Table = []
    for title, what, figure, goal in GOALS:
        reached = best(kept, machine, ceiling, what, figure)
        shown = None if reached is None else f"{reached:,.2f}" if goal < 10 else f"{reached:,.0f}"
        rows.append((title, f"{goal:,}", shown, None if reached is None else "yes" if reached >= goal else "no"))
    yield "## Goals"
    yield ""
    yield from table(("goal", "at least", "measured", "reached"), rows)


def best(kept: dict[str, Any], machine: dict[str, Any], ceiling: dict[str, Any], what: str, figure: str) -> float | None:
    """The best of the measurements that belong to a goal; None where none was made."""
    if figure == "ratio":
        row = kept.get("bf16", {}).get("runs", {}).get("llama-1b-beside-trainer")
        return None if row is None else next(float(ratio["median"]) for name, ratio in row["ratios"].items() if name != "loss")
    stage, wanted = ("fp8", "whole-1.5b-fp8") if what == "fp8" else ("bf16", f"{what}@")
    found = []
    for name, _, figures in jobs_of(kept.get(stage, {"runs": {}})):
        value = share_of_product(figures, machine, ceiling) if figure == "share" else figures["tokens_per_second"]
        found += [value] if name.startswith(wanted) and value is not None else []
    return max(found) if found else None


def _contract(values: dict[str, Any]) -> Iterator[str]:
    yield "## Contract"
    yield ""
    rows: Table = []
    for layer in ("profile", *(name for name, one in CATALOG.items() if not one.baseline)):
        cells = [values["runs"].get(f"{layer}-{family}") for family in FAMILIES]
        if any(cells):
            rows.append(
                (layer, *("" if cell is None else cell["status"] + ("" if cell["passed"] else " (fails)") for cell in cells))
            )
    yield from table(("layer", *FAMILIES), rows)
    proofs: Table = [
        (name, row.get("proof") or "; ".join(row.get("reasons", [])[1:2]).strip(), "; ".join(row.get("wrong", [])))
        for name, row in values["runs"].items()
        if name.endswith(f"-{FAMILIES[0]}") or row.get("wrong")
    ]
    yield from table(("layer", "proof, or why it was refused", "what does not hold"), proofs)


def _failures(kept: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for stage, values in kept.items():
        for name, why in values.get("failures", {}).items():
            yield f"{stage} {name} gave nothing", (why.strip().splitlines() or ["no words"])[0][:300]
        for name, why in values.get("refused", {}).items():
            yield f"{stage} {name} was refused", " ".join(why.split())[:300]


def to_refresh(kept: dict[str, Any], place: Path) -> Iterator[str]:
    """Profiles whose choices were seen here, and layers whose card still says that nothing was measured."""
    profiles = {row["profile"] for row in kept.get("contract", {}).get("runs", {}).values() if "profile" in row}
    profiles |= {figures["profile"] for values in kept.values() for _, _, figures in jobs_of(values) if "profile" in figures}
    for profile in sorted(profiles):
        yield f"refresh: profiles/{profile}.toml and its card, from {place}"
    measured = {
        row["layer"]
        for values in kept.values()
        for _, _, figures in jobs_of(values)
        for row in figures.get("plan", {}).values()
        if isinstance(row, dict) and "layer" in row
    }
    for name in sorted(measured & set(CATALOG)):
        if CATALOG[name].measured == "not measured":
            yield f"refresh: layer {name} says `not measured`; {shlex.quote(str(place))} holds a run of it"

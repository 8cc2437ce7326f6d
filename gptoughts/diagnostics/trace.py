"""Record a trace of training steps and summarize it: time by kind of work, and by operator or kernel.

On a GPU kernels are counted, and the time in which none ran; on a CPU the operators of the training thread, each without its callees.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gptoughts.api import ResolvedRun
from gptoughts.console import print_result, redacted
from gptoughts.console import share as in_per_cent
from gptoughts.diagnostics.bench.training import open_training
from gptoughts.engine.trainer import run_step
from gptoughts.errors import DataError, RunError
from gptoughts.files import replacing
from gptoughts.run.memory_snapshot import history, memory_report

STEP, WAITING, CLIPPING = "step", "data wait", "clipping"
IDLE, PYTHON = "idle (no kernel)", "Python between operators"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
MOST_ROWS = 20
# First match counts, in lower case. Names are torch's, cuBLAS's, CUTLASS's, cuDNN's, FlashAttention's, Transformer Engine's and NCCL's.
KINDS = (
    ("communication", r"^nccl|^gloo|^c10d|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"scaled_dot_product|flash|fmha|attention|sdpa"),
    ("optimizer and clipping", r"adam|::sgd|lion|muon|optimizer|multi_tensor_apply|foreach"),
    (
        "copies and casts",
        r"memcpy|memset|aten::(copy_|clone|contiguous|_?to|_to_copy|fill_|zero_)$|fillfunctor|copy_kernel",
    ),
    (
        "matmul",
        r"gemm|nvjet|cutlass|cublas|xmma|wgrad|triton_tem.*mm|aten::(add)?(b|ba)?mm|_(scaled|grouped)_mm|linear|aten::matmul",
    ),
    ("compiled kernels", r"^triton_|compiledfxgraph|^cpp_fused|torch-compiled region|compiledfunction"),
    ("loss", r"cross_entropy|nll_loss|log_softmax"),
    (
        "norm and elementwise",
        r"^aten::|^void at::|norm|elementwise|softmax|reduce_kernel|backward|autograd::|index|gather|scatter|embedding",
    ),
)
OTHER = "other"
# Everything that runs inside one of these counts as its work.
WHOLE = {
    WAITING: WAITING,
    CLIPPING: "optimizer and clipping",
    "Optimizer.step": "optimizer and clipping",
    "aten::_scaled_dot_product": "attention",
}


@dataclass(frozen=True)
class Part:
    """Work of one kind, or of one operator or kernel."""

    name: str
    kind: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Summary:
    """Time of the traced steps by kind and by operator or kernel."""

    device: str
    """`GPU` if kernels were counted, else `CPU`."""
    steps: int
    seconds: float
    """From the start of the first step to the end of the last."""
    kinds: tuple[Part, ...]
    """By kind, longest first; idle time is a kind. With several streams the sum can exceed the window."""
    rows: tuple[Part, ...]
    """The longest operators or kernels."""
    idle_share: float
    """Share of the window in which no kernel ran, or on a CPU the training thread ran no operator."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def markdown(self, title: str) -> str:
        """Return two tables: kinds of work, and the longest operators or kernels."""
        per_step, what = 1000 / max(1, self.steps), "kernel" if self.device == "GPU" else "operator"
        idle = IDLE if self.device == "GPU" else "outside operators"
        lines = [
            f"# {title}", "",
            f"{self.steps} steps, {1000 * self.seconds / max(1, self.steps):.1f} ms per step, profiler overhead included; "
            f"{idle} {in_per_cent(self.idle_share)}", "",
            "| kind | ms per step | share | calls per step |", "|---|---:|---:|---:|",
        ]  # fmt: skip
        for part in self.kinds:
            lines.append(
                f"| {part.name} | {part.seconds * per_step:.2f} | {self._share(part)} | {part.calls / max(1, self.steps):.0f} |"
            )
        lines += ["", f"| {what} | kind | ms per step | share | calls per step |", "|---|---|---:|---:|---:|"]
        for part in self.rows:
            name = part.name if len(part.name) <= 100 else part.name[:97] + "..."
            lines.append(
                f"| `{name.replace('|', '/')}` | {part.kind} | {part.seconds * per_step:.2f} | {self._share(part)} | "
                f"{part.calls / max(1, self.steps):.0f} |"
            )
        return "\n".join(lines) + "\n"

    def _share(self, part: Part) -> str:
        return in_per_cent(part.seconds / self.seconds if self.seconds else None)


# --- recording


def record(setting: ResolvedRun, first: int, last: int, out: Path, memory_history: bool) -> None:
    """Train to step `last` and write trace.json.gz of steps `first` to `last` into `out`. Raises RunError if GPU memory runs out."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with ExitStack() as stack:
            if memory_history:
                if not setting.machine.gpus:
                    print_result("note: --memory-history: records GPU allocations, and there is no GPU")
                stack.enter_context(history(torch.device("cuda" if setting.machine.gpus else "cpu")))
            training = stack.enter_context(open_training(setting))
            engine, schedule = training.engine, training.session.length.rate
            training.steps(first - 1)
            engine.model.train()
            with phases_named(engine), recorded(engine.device, out / "trace.json.gz"):
                for number in range(first, last + 1):
                    with step_named(number):
                        training.progress, _ = run_step(engine, training.progress, schedule)
                        if number == last:
                            engine.synchronize()
    except torch.OutOfMemoryError as error:
        blocks = memory_report(out / "memory.json")
        raise RunError(
            f"out of memory: {str(error).partition('. ')[0]}\n{blocks}", fix="a smaller --layer.microbatch.sequences"
        ) from None


def describe(out: Path, title: str) -> str:
    """Summarize the trace in `out`, write the summary as Markdown, JSON and a plot beside it, and return its text."""
    summary = summarize(read(out / "trace.json.gz"))
    title = redacted(title)
    text = summary.markdown(title)
    (out / "trace.md").write_text(text, encoding="utf-8")
    (out / "trace.summary.json").write_text(
        json.dumps({"title": title, **summary.to_json()}, indent=1) + "\n", encoding="utf-8"
    )
    draw(summary, out / "trace.png", title)
    return f"{text}\ntrace       {out}  (trace.json.gz for perfetto.dev, trace.md, trace.summary.json, trace.png)"


@contextmanager
def recorded(device: torch.device, file: Path) -> Iterator[None]:
    """Profile the block and write the trace to `file` (.json.gz), which chrome://tracing and perfetto.dev open."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        yield
    with replacing(file) as temporary:  # which keeps the suffix .gz, for which torch compresses
        profiler.export_chrome_trace(str(temporary))


def step_named(number: int) -> Any:
    """Return a context that appears as `step N` in the trace."""
    return torch.profiler.record_function(f"{STEP} {number}")


@contextmanager
def phases_named(engine: Any) -> Iterator[None]:
    """Mark waits for a batch and gradient clipping in the trace during the block."""
    before = engine.next_batch

    def clip(inner: Callable[[], Any]) -> Any:
        with torch.profiler.record_function(CLIPPING):
            return inner()

    def next_batch() -> Any:
        with torch.profiler.record_function(WAITING):
            return before()

    undo = engine.wrap("clip", clip)
    engine.next_batch = next_batch  # on the instance
    try:
        yield
    finally:
        del engine.next_batch
        undo()


# --- reading


def read(file: Path) -> list[dict[str, Any]]:
    """Return the complete events of a trace file, plain or gzipped. Raises DataError if it is not one."""
    opener: Callable[..., Any] = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a trace of torch's profiler", found=f"{type(error).__name__}: {error}") from None
    return [event for event in events if event.get("ph") == "X" and "dur" in event]


def kind_of(name: str) -> str:
    """Return the kind of work of an operator or kernel, from its name."""
    lower = name.lower()
    return next((kind for kind, pattern in KINDS if re.search(pattern, lower)), OTHER)


def summarize(events: Sequence[Mapping[str, Any]]) -> Summary:
    """Where the time went. Raises DataError for a trace without a step."""
    steps = [event for event in events if event.get("cat") == "user_annotation" and _is_step(event["name"])]
    if not steps:
        raise DataError("trace: shows no step")
    kernels = [event for event in events if event.get("cat") in ON_GPU]
    began, ended = min(map(_begin, steps)), max(map(_end, steps))
    if not kernels:
        inside = [event for event in events if event["tid"] == steps[0]["tid"] and began <= _begin(event) < ended]
        return _summary("CPU", len(steps), ended - began, _own_times(inside), PYTHON)
    # The device is behind the host: its last kernels end after the step that asked for them.
    inside = [event for event in kernels if _begin(event) >= began]
    ended = max([ended, *map(_end, inside)])
    times = [(event["name"], kind_of(event["name"]), float(event["dur"])) for event in inside]
    idle = (ended - began) - _union((_begin(event), _end(event)) for event in inside)
    return _summary("GPU", len(steps), ended - began, [*times, (IDLE, IDLE, idle)], IDLE)


def _is_step(name: str) -> bool:
    return bool(re.fullmatch(r"step \d+|ProfilerStep#\d+", name))


def _begin(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _end(event: Mapping[str, Any]) -> float:
    return float(event["ts"]) + float(event["dur"])


def _union(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of the spans."""
    covered, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, until))
        until = max(until, end)
    return covered


def _own_times(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Return (name, kind, own time in µs) of every event of one thread: its duration without its callees.

    Events inside a wait for data, the optimizer or fused attention count as that. A step's own time is Python's.
    """
    rows: list[list[Any]] = []
    around: list[tuple[float, int, str | None]] = []  # end, row, the kind that what is inside belongs to
    for event in sorted(events, key=lambda event: (_begin(event), -float(event["dur"]))):
        while around and around[-1][0] <= _begin(event):
            around.pop()
        name, owner = str(event["name"]), around[-1][2] if around else None
        whole = owner or next((kind for prefix, kind in WHOLE.items() if name.startswith(prefix)), None)
        if around:
            rows[around[-1][1]][2] -= float(event["dur"])
        kind = PYTHON if _is_step(name) else whole or kind_of(name)
        rows.append([PYTHON if _is_step(name) else _shortened(name), kind, float(event["dur"])])
        around.append((_end(event), len(rows) - 1, whole))
    return [(name, kind, max(0.0, own)) for name, kind, own in rows]


def _shortened(name: str) -> str:
    """Return the name without the part that differs between graphs."""
    return re.sub(r"^## Call CompiledFxGraph \S+ ##$", "CompiledFxGraph", name)


def _summary(device: str, steps: int, window: float, times: Iterable[tuple[str, str, float]], idle: str) -> Summary:
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    names: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0])
    for name, kind, microseconds in times:
        for held in (kinds[kind], names[name, kind]):
            held[0] += microseconds / 1e6
            held[1] += 1
    parts = [Part(kind, kind, seconds, int(calls)) for kind, (seconds, calls) in kinds.items()]
    rows = [Part(name, kind, seconds, int(calls)) for (name, kind), (seconds, calls) in names.items() if kind != idle]
    seconds = window / 1e6
    return Summary(
        device,
        steps,
        seconds,
        tuple(sorted(parts, key=lambda part: -part.seconds)),
        tuple(sorted(rows, key=lambda part: -part.seconds)[:MOST_ROWS]),
        kinds[idle][0] / seconds if seconds and idle in kinds else 0.0,
    )


def draw(summary: Summary, picture: Path, title: str) -> None:
    """Draw a bar per kind of work, in ms per step, with its share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = list(reversed(summary.kinds))
    figure = Figure(figsize=(8, 0.45 * len(parts) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lengths = [1000 * part.seconds / summary.steps for part in parts]
    colors = ["#9aa0a6" if part.name in (IDLE, PYTHON, WAITING) else "#1a73e8" for part in parts]
    axes.barh([part.name for part in parts], lengths, color=colors)
    for place, part in enumerate(parts):
        axes.text(lengths[place], place, f" {in_per_cent(part.seconds / summary.seconds)}", va="center", fontsize=9)
    axes.set(xlabel="ms per step", title=title, xlim=(0, 1.15 * max(lengths)))
    axes.grid(axis="x", alpha=0.3)
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120)

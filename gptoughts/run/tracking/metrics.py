"""The keys of metrics.jsonl and of every tracker: unit and definition. `docs/python.md` shows the generated table."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One key."""

    key: str
    unit: str
    definition: str


METRICS = (
    Metric("step", "updates", "updates of the weights so far; the x-axis of every row"),
    Metric("attempt", "count", "1 for the first start of the run, one more for every resume"),
    Metric("train/loss", "nats", "sum of the losses of a global batch over the sum of their weights, over micro-batches and ranks"),
    Metric("train/grad_norm", "1", "norm of the gradient before clipping"),
    Metric("train/learning_rate", "1", "learning rate of this update"),
    Metric("train/num_tokens", "tokens", "tokens consumed so far, over all ranks"),
    Metric("train/epoch", "epochs", "samples consumed so far over the samples of the training split; null for `fit`"),
    Metric("train/seconds", "s", "time spent in steps so far, without evaluation, samples and checkpoints"),
    Metric("train/*", "see objective", "figures of the objective, such as balance loss and expert load of a mixture of experts"),
    Metric("perf/tokens_per_second", "tokens/s", "speed since the previous row, over all ranks"),
    Metric("perf/tokens_per_second_per_gpu", "tokens/s", "the same per rank"),
    Metric("perf/steady_tokens_per_second", "tokens/s", "speed since warm-up, compilation and the watched step of this attempt; null before"),
    Metric("perf/tflops_per_gpu", "TFLOP/s", "model FLOPs per second and rank, without recomputation; null if the model's size is unknown"),
    Metric("perf/mfu", "share", "model FLOPs utilization: share of the GPU's dense bf16 peak; null where no peak is known"),
    Metric("perf/hfu", "share", "hardware FLOPs utilization: MFU with the forwards that layers run again in the backward"),
    Metric("perf/of_gemm", "share", "share of the matrix-product rate that `gptoughts bench gemm` measured on this machine"),
    Metric("perf/data_wait", "share", "share of the time since the previous row spent waiting for data"),
    Metric("time/data_wait", "s", "wait for a batch in this step, by the device's clock; all `time/` keys are null if it was not timed"),
    Metric("time/forward", "s", "forwards, over all micro-batches; on a GPU with the gaps between kernels"),
    Metric("time/backward", "s", "backwards, without exposed communication"),
    Metric("time/optimizer", "s", "clipping and the update"),
    Metric("time/communication", "s", "exposed communication, with waits for other ranks (docs/limits.md); null if weights are sharded"),
    Metric("time/other", "s", "rest of the step; the `time/` keys add up to it"),
    Metric("perf/host_bound", "share", "share of this step in which the GPU waited for the host to launch; null on a CPU"),
    Metric("perf/cpu_seconds", "s", "CPU time of the training thread in this step; null on a GPU"),
    Metric("perf/slowest_rank", "rank", "with several ranks: the rank whose timed step was longest without its waits for others"),
    Metric("perf/rank_spread", "share", "how much longer than the median of the other ranks"),
    Metric("perf/limiter", "text", "what limits the run (docs/limits.md); null during warm-up and in rows whose step was not timed"),
    Metric("perf/advice", "text", "the next flag or command to try against it; null if none is known"),
    Metric("perf/gc_seconds", "s", "time in Python's garbage collector since the previous row"),
    Metric("perf/recompiles", "count", "recompilations since the previous row"),
    Metric("memory/predicted_bytes", "bytes", "predicted peak of a step per rank; in the first row after the watched step"),
    Metric("memory/measured_bytes", "bytes", "peak of the watched step on the first rank; in the first row after it"),
    Metric("eval/loss", "nats", "mean loss per label on the validation split"),
    Metric("eval/labels", "count", "labels in that mean"),
    Metric("eval/*", "see task", "scores of the task, such as `eval/f1` and `eval/exact_match` for SQuAD"),
)  # fmt: skip

RENAMED = {"eval/val_loss": "eval/loss", "train/tokens": "train/num_tokens"}
"""Keys of earlier versions -> present key."""


def metrics_table() -> str:
    """Return the table of keys as Markdown."""
    rows = [f"| `{metric.key}` | {metric.unit} | {metric.definition} |" for metric in METRICS]
    return "\n".join(["| key | unit | definition |", "|---|---|---|", *rows]) + "\n"

"""The keys of metrics.jsonl, system.jsonl and every tracker: unit and definition. `docs/python.md` shows the generated table."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """One key."""

    key: str
    unit: str
    definition: str
    axis: str = "step"
    """The x-axis of its rows: `step`, or `sample` for the system metrics."""


GATHERED = ("min", "max", "min_rank", "max_rank")
"""Endings of the keys that tell how a system metric is spread over devices or processes; the key itself is their mean."""


METRICS = (
    Metric("step", "updates", "updates of the weights so far; the x-axis of every row"),
    Metric("attempt", "count", "1 for the first start of the run, one more for every resume"),
    Metric("train/loss", "nats", "sum of the losses of a global batch over the sum of their weights, over ranks; null for a bad step"),
    Metric("train/grad_norm", "1", "norm of the gradient before clipping"),
    Metric("train/bad_steps", "count", "steps without label, finite loss or finite gradient, left out or passed over (docs/diverging.md)"),
    Metric("train/loss_spikes", "count", "losses of this attempt far above the median of the 50 before, each excursion once"),
    Metric("train/learning_rate", "1", "learning rate of this update"),
    Metric("train/num_tokens", "tokens", "tokens consumed so far, over all ranks"),
    Metric("train/epoch", "epochs", "samples consumed so far over the samples of the training split; null for `fit`"),
    Metric("train/seconds", "s", "time spent in steps so far, without evaluation, samples and checkpoints"),
    Metric("train/hours", "h", "the same in hours; in rows of a validation too, as an x-axis"),
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
    Metric("eval/perplexity", "1", "exponential of `eval/loss`; next-token training on text only"),
    Metric("eval/bits_per_byte", "bits/byte", "loss of the labels over the bytes of their text, counted; null if tokens are not bytes"),
    Metric("eval/hellaswag_acc", "share", "HellaSwag rows whose labeled ending has the highest log-likelihood; with `eval.tasks`"),
    Metric("eval/hellaswag_acc_norm", "share", "the same per character of the ending, as lm-evaluation-harness's `acc_norm`"),
    Metric("eval/hellaswag_acc_bytes", "share", "the same per UTF-8 byte of the ending, as its `acc_bytes`"),
    Metric("eval/hellaswag_acc_token", "share", "the same per token of the ending"),
    Metric("eval/hellaswag_rows", "count", "rows in those shares"),
    Metric("eval/*", "see task", "scores of the task, such as `eval/f1` and `eval/exact_match` for SQuAD"),
    Metric("sample", "count", "samples of the system metrics so far, over all attempts; the x-axis of system.jsonl", "sample"),
    Metric("time", "s", "time of the sample, in seconds since 1970", "sample"),
    Metric("gpu/count", "count", "GPUs of the job that answered", "sample"),
    Metric("gpu/utilization", "%", "share of the last sample period of the driver in which a kernel ran", "sample"),
    Metric("gpu/memory_bytes", "bytes", "memory in use, by all processes of the GPU", "sample"),
    Metric("gpu/power_watts", "W", "power drawn", "sample"),
    Metric("gpu/power_limit_watts", "W", "power limit in effect", "sample"),
    Metric("gpu/temperature_celsius", "°C", "temperature of the GPU", "sample"),
    Metric("gpu/sm_clock_mhz", "MHz", "clock of the streaming multiprocessors", "sample"),
    Metric("gpu/memory_clock_mhz", "MHz", "clock of the memory", "sample"),
    Metric("gpu/pcie_rx_bytes_per_second", "bytes/s", "received over PCIe in a window of 20 ms", "sample"),
    Metric("gpu/pcie_tx_bytes_per_second", "bytes/s", "sent over PCIe in a window of 20 ms", "sample"),
    Metric("gpu/nvlink_rx_bytes_per_second", "bytes/s", "received over NVLink since the previous sample", "sample"),
    Metric("gpu/nvlink_tx_bytes_per_second", "bytes/s", "sent over NVLink since the previous sample", "sample"),
    Metric("gpu/throttle", "list", "reasons for which a GPU lowered its clocks; trackers get their number", "sample"),
    Metric("gpu/energy_joules", "J", "energy of all GPUs of the job since the attempt started", "sample"),
    Metric("cpu/process_percent", "%", "CPU time of a rank's process since the previous sample; 100 is one core", "sample"),
    Metric("cpu/load", "count", "load average of the node over one minute", "sample"),
    Metric("memory/process_bytes", "bytes", "resident memory of a rank's process", "sample"),
    Metric("memory/system_available_bytes", "bytes", "memory of the node that is free or can be freed", "sample"),
)  # fmt: skip

RENAMED = {"eval/val_loss": "eval/loss", "train/tokens": "train/num_tokens"}
"""Keys of earlier versions -> present key."""


def metrics_table() -> str:
    """Return the table of keys as Markdown."""
    rows = [f"| `{metric.key}` | {metric.unit} | {metric.definition} |" for metric in METRICS]
    return "\n".join(["| key | unit | definition |", "|---|---|---|", *rows]) + "\n"

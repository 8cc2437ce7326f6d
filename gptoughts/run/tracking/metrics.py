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
    Metric("perf/tflops_per_gpu", "TFLOP/s", "model FLOPs per second and rank, without recomputation; null if the model's size is unknown"),
    Metric("perf/mfu", "share", "model FLOPs utilization: share of the GPU's dense bf16 peak; null where no peak is known"),
    Metric("perf/of_gemm", "share", "share of the matrix-product rate that `gptoughts bench gemm` measured on this machine"),
    Metric("perf/data_wait", "share", "share of the time since the previous row spent waiting for data"),
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
)  # fmt: skip

RENAMED = {"eval/val_loss": "eval/loss", "train/tokens": "train/num_tokens"}
"""Keys of earlier versions -> present key."""


def metrics_table() -> str:
    """Return the table of keys as Markdown."""
    rows = [f"| `{metric.key}` | {metric.unit} | {metric.definition} |" for metric in METRICS]
    return "\n".join(["| key | unit | definition |", "|---|---|---|", *rows]) + "\n"

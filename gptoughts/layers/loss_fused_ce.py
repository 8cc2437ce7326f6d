"""Cross-entropy over slices of tokens: the full logits, vocabulary x tokens in float32, are never materialized.

It saves memory, not time: with a vocabulary of 128 k it saves most of the logits' bytes and takes about an eighth more time in the loss;
with a small vocabulary it only costs time. Losses are summed in float32 in every implementation. `implementation`: `sliced`, ours,
recomputes the logits of a slice in the backward; `liger`, Liger-Kernel's Triton kernel, computes the gradient in the forward and
synchronizes with the device twice; `torch`, torch 2.13's chunked `linear_cross_entropy`, returns bf16 losses for bf16 states, so per-token
losses are rounded before the float32 sum (its own sum is bf16 as well: 1,576 instead of 1,567.6, seen with 219 labels). Source of the
figures: Liger-Kernel's published benchmark, A100, width 4096, vocabulary 128,256.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gptoughts.config.tasks import task_of
from gptoughts.console import bytes_in_words
from gptoughts.errors import LayerError
from gptoughts.layers.support.compile import counting, in_graphs
from gptoughts.planning.layer import (
    Budget,
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    StepTrace,
    active,
    inactive,
    slower,
    unsupported,
)
from gptoughts.planning.memory_fit import current_budget, memory_of_rank

# Share of a rank's memory. Counts logits, log-probabilities and gradient, at least 12 bytes per logit: a tenth without log-probabilities.
LOGITS_SHARE = 0.15


def unmet(case: Case, options: Options) -> Iterator[Reason]:
    """A family with a replaceable head, and logits that take a relevant share of memory."""
    spec = case.spec
    if spec.family is None:
        yield unsupported("needs a model of a known family; a custom module computes its own loss")
        return
    if not task_of(case.recipe).over_vocabulary:
        yield unsupported("question answering has no logits over the vocabulary")
        return
    if spec.head == "own":
        yield unsupported(f"{spec.family} computes logits with more than one matmul")
        return
    yield from _unavailable(case, options["implementation"])
    budget, have = current_budget(case), memory_of_rank(case)
    if budget is None:
        yield slower("vocabulary size unknown before the data is read", "size of the logits unknown")
    elif have is not None and budget.logits < LOGITS_SHARE * have:
        yield slower(
            f"logits take {bytes_in_words(budget.logits)} of {bytes_in_words(have)}", "Liger-Kernel: time +13 % at 128 k words"
        )


def _unavailable(case: Case, name: str) -> Iterator[Reason]:
    packages = case.machine.packages
    if name == "torch" and case.machine.has_older("torch", (2, 13)):
        yield unsupported(
            f"implementation = torch needs torch 2.13, found {packages['torch']}", "--layer.loss.implementation sliced"
        )
    if name != "liger":
        return
    if "liger-kernel" not in packages:
        yield unsupported("needs the package liger-kernel, not installed", "pip install 'gptoughts[liger]'")
    elif not case.on_gpu and case.environment.get("TRITON_INTERPRET") != "1":
        yield unsupported("Liger's kernel is a Triton kernel and needs a GPU", "--layer.loss.implementation sliced")


def memory(case: Case, options: Options, budget: Budget) -> Budget:
    """Logits of one slice at a time."""
    return replace(budget, logits_tokens=options["tokens"])


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Replace the head's loss function. Raises LayerError if the family has no replaceable head."""
    if engine.family.head is None:
        raise LayerError(
            f"loss=fused-ce: {engine.family.name} computes its own logits and has no replaceable head",
            fix="--layer.loss full-ce",
        )
    head = engine.family.head(engine.bare)
    before = head.loss
    head.loss = LOSSES[options["implementation"]](options["tokens"], engine.counters.call_counts)
    try:
        yield
    finally:
        head.loss = before


class SlicedCrossEntropy:
    """Summed cross-entropy over slices of tokens. Counts its calls, as proof that it ran."""

    def __init__(self, tokens: int, call_counts: Counter[str]) -> None:
        self.tokens, self.mark = tokens, counting(call_counts, LAYER.name)

    def __call__(self, hidden, weight, labels, reduction: str = "sum"):  # type: ignore[no-untyped-def]  # torch is not known here
        """Return the loss sum of hidden (B, T, C) for labels (B, T) and head weight (V, C); labels of -100 are ignored.

        A scalar, or one sum per row (B,) for reduction "rows".
        """
        import torch
        from torch.nn import functional
        from torch.utils.checkpoint import checkpoint

        self.mark()
        rows, wanted = hidden.flatten(0, -2), labels.long().flatten()
        by_row = reduction == "rows"

        def of_slice(part, aim):  # type: ignore[no-untyped-def]
            logits = functional.linear(part, weight).float()
            return functional.cross_entropy(logits, aim, ignore_index=-100, reduction="none" if by_row else "sum")

        slices = zip(rows.split(self.tokens), wanted.split(self.tokens), strict=True)
        losses = (
            checkpoint(of_slice, part, aim, use_reentrant=False) if torch.is_grad_enabled() else of_slice(part, aim)
            for part, aim in slices
        )
        if by_row:
            return torch.cat(list(losses)).view(labels.shape).sum(dim=-1)
        return sum(losses, start=torch.zeros((), device=hidden.device))


class TorchCrossEntropy:
    """Summed cross-entropy by torch's chunked `linear_cross_entropy`."""

    def __init__(self, tokens: int, call_counts: Counter[str]) -> None:
        from torch.nn import functional

        if not hasattr(functional, "linear_cross_entropy"):
            raise LayerError("loss=fused-ce: this torch has no linear_cross_entropy", fix="--layer.loss.implementation sliced")
        self.tokens, self.mark = tokens, counting(call_counts, LAYER.name)

    def __call__(self, hidden, weight, labels, reduction: str = "sum"):  # type: ignore[no-untyped-def]  # torch is not known here
        """Return as `SlicedCrossEntropy`. Both factors are cast to autocast's dtype, which the operator does not do."""
        import torch
        from torch.nn import LinearCrossEntropyOptions, functional

        self.mark()
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        chunks = LinearCrossEntropyOptions(batch_chunk_size=self.tokens, chunking_method=None)
        whole = reduction == "sum" and dtype is torch.float32
        losses = functional.linear_cross_entropy(
            hidden.flatten(0, -2).to(dtype),
            weight.to(dtype),
            labels.long().flatten(),
            reduction="sum" if whole else "none",
            ignore_index=-100,
            options=chunks,
        )
        if whole:
            return losses
        return losses.float().sum() if reduction == "sum" else losses.float().view(labels.shape).sum(dim=-1)


class LigerCrossEntropy:
    """Summed cross-entropy by Liger-Kernel, which chooses its own slice size."""

    def __init__(self, tokens: int, call_counts: Counter[str]) -> None:
        from gptoughts.models.kernels.liger import fused_linear_cross_entropy

        self.compute, self.mark = fused_linear_cross_entropy(), counting(call_counts, LAYER.name)

    def __call__(self, hidden, weight, labels, reduction: str = "sum"):  # type: ignore[no-untyped-def]  # torch is not known here
        """Return as `SlicedCrossEntropy`."""
        self.mark()
        losses = self.compute(hidden.flatten(0, -2), weight, labels.long().flatten(), "sum" if reduction == "sum" else "none")
        return losses if reduction == "sum" else losses.view(labels.shape).sum(dim=-1)


LOSSES = {"sliced": SlicedCrossEntropy, "torch": TorchCrossEntropy, "liger": LigerCrossEntropy}


def verify(engine: Engine, trace: StepTrace, options: Options) -> Evidence:
    """Require a sliced loss for every micro-batch."""
    calls = trace.call_counts.get(LAYER.name, 0)
    if (
        not calls and trace.regions and in_graphs(engine.counters.call_counts, LAYER.name)
    ):  # the head is inside a compiled graph
        return active(
            f"traced into the graph that ran {trace.regions} times in {trace.micro_batches} micro-batches", calls=trace.regions
        )
    if calls < trace.micro_batches:
        return inactive(f"{calls} of {trace.micro_batches} losses over slices, the others over full logits", calls=calls)
    if options["implementation"] == "liger":
        return _liger_evidence(engine, trace, calls)
    whose = "" if options["implementation"] == "sliced" else f" by {options['implementation']}"
    return active(f"{calls} of {trace.micro_batches} losses over slices of {options['tokens']} tokens{whose}", calls=calls)


def _liger_evidence(engine: Engine, trace: StepTrace, calls: int) -> Evidence:
    operator, kernels = trace.operators.get("LigerFusedLinearCrossEntropyFunction"), trace.launches("liger_cross_entropy")
    ran = operator.calls if operator else 0
    if ran < calls or (trace.kernels and kernels < calls):
        text = f"{calls} losses requested from Liger; its operator ran {ran} times, its kernel {kernels}"
        return inactive(text, calls=calls, kernels=kernels)
    return active(f"{calls} of {trace.micro_batches} losses by Liger's operator", calls=calls, kernels=kernels)


LAYER = Layer(
    name="fused-ce",
    slot="loss",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    memory=memory,
    unmet=unmet,
    options={
        "implementation": Option("sliced", "implementation of the loss", str, ("sliced", "torch", "liger")),
        "tokens": Option(2048, "tokens per slice; ignored by liger", int),
    },
    changes_numerics=True,
    memory_rank=10,
)

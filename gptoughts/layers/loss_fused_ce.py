"""Cross-entropy a slice of the tokens at a time: the logits, vocabulary x tokens in float32, never exist as a whole.

It is a tool for memory, not for speed: with 128 k words it saves most of the logits' bytes for about an eighth more time in the loss;
with few words it only costs. Each slice's sum is float32 and its logits are computed again in the backward. Torch 2.13's own chunked
`linear_cross_entropy` is not used: it returns and adds its sums in bf16. Source of the figures: Liger-Kernel's published benchmark, A100,
width 4096, vocabulary 128,256.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gptoughts.errors import LayerError
from gptoughts.layer import (
    Case,
    Engine,
    Evidence,
    Layer,
    Option,
    Options,
    Reason,
    Sight,
    active,
    cannot,
    inactive,
    would_not_pay,
)

LOGITS_SHARE = 0.10
BYTES_PER_LOGIT = 8  # float32 logits and their gradient


def fits(case: Case, options: Options) -> Iterator[Reason]:
    """A family with a head of ours, and logits that weigh something."""
    facts = case.facts
    if facts.family is None:
        yield cannot("needs a model of a known family; a module of your own computes its loss itself")
        return
    if case.recipe.objective == "question-answering":
        yield cannot("question answering has no logits over the vocabulary")
        return
    if facts.head == "own":
        yield cannot(f"{facts.family} does more than one product between hidden states and logits")
        return
    if facts.vocab_size is None or facts.sequence_length is None:
        yield would_not_pay("the vocabulary is not known before the text is read", "logits cannot be weighed")
        return
    sizes = [gpu.memory_bytes for gpu in case.machine.gpus] if case.on_gpu else [case.machine.memory_bytes]
    known = [size for size in sizes if size]
    logits = case.forward_sequences * facts.sequence_length * facts.vocab_size * BYTES_PER_LOGIT
    if known and logits < LOGITS_SHARE * min(known):
        yield would_not_pay(
            f"logits take {logits / 2**30:.1f} GiB of {min(known) / 2**30:.0f} GiB at most",
            "Liger-Kernel: time +13 % at 128 k words",
        )


@contextmanager
def apply(engine: Engine, options: Options) -> Iterator[None]:
    """Give the head the sliced loss. Raises LayerError where the model turned out to have no head to be replaced."""
    if engine.family.head is None:
        raise LayerError(
            f"loss=fused-ce: {engine.family.name} makes its logits itself and offers no head\n  try: --layer.loss full-ce"
        )
    head = engine.family.head(engine.bare)
    before = head.loss
    head.loss = SlicedCrossEntropy(options["tokens"], engine.counters.marks)
    yield
    head.loss = before


class SlicedCrossEntropy:
    """Summed cross-entropy over slices of tokens; marks its calls, so that a step can be asked whether it ran."""

    def __init__(self, tokens: int, marks: Counter[str]) -> None:
        self.tokens, self.marks = tokens, marks

    def __call__(self, hidden, weight, labels, reduction: str = "sum"):  # type: ignore[no-untyped-def]  # torch is not known here
        """Loss sum of hidden B T C against labels B T with the head's weight V C; labels of -100 count for nothing.

        A scalar, or with reduction "rows" one sum per row, B.
        """
        import torch
        from torch.nn import functional
        from torch.utils.checkpoint import checkpoint

        self.marks["fused-ce"] += 1
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


def verify(engine: Engine, sight: Sight, options: Options) -> Evidence:
    """Every micro-batch of the step had its loss from the slices."""
    calls = sight.marks.get("fused-ce", 0)
    if calls < sight.micro_batches:
        return inactive(f"{calls} of {sight.micro_batches} losses over slices, the others over all logits at once", calls=calls)
    return active(f"{calls} of {sight.micro_batches} losses over slices of {options['tokens']} tokens", calls=calls)


LAYER = Layer(
    name="fused-ce",
    slot="loss",
    card=__doc__ or "",
    apply=apply,
    verify=verify,
    fits=fits,
    options={"tokens": Option(2048, "tokens per slice", int)},
    changes_numerics=True,
)

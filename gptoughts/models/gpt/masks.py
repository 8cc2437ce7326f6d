"""Who sees whom where documents share rows, in the three forms that attention functions take: dense, blocks, lengths.

A form is made once per forward, for all blocks, from `positions` (B T, counting inside each document, a 0 begins one). Shapes:
B rows, T tokens, N documents, n blocks of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gptoughts.models.gpt.attention import document_mask

MaskForm = Literal["dense", "blocks", "lengths"]
"""dense: bool B 1 T T, or None where `causal` says everything. blocks: torch's BlockMask. lengths: `Documents`, or None likewise."""

MaskFunction = Callable[[Tensor | None, bool, Tensor], Any]
"""masking(positions B T or None, causal, ids B T) -> what `attend` gets as its mask."""

BLOCK = 128
"""Tokens of one side of a block: what torch's flex_attention takes by default."""


class Documents(NamedTuple):
    """Rows as one line of documents, as flash attention's variable-length functions want it."""

    bounds: Tensor
    """int32, where each document begins in the B*T tokens, and at the end B*T; repeated at the end up to a round length."""
    longest: int
    """No document is longer: T, which costs nothing and is the same in every step."""


def dense_mask(positions: Tensor | None, causal: bool, ids: Tensor) -> Tensor | None:
    """The form for functions that take a bool mask; None where rows are one document each."""
    return None if positions is None else document_mask(positions, causal)


def lengths(positions: Tensor | None, causal: bool, ids: Tensor) -> Documents | None:
    """The form for variable-length functions; None where rows are one document each.

    The number of documents differs from batch to batch and a compiled block wants one shape, so bounds are repeated at the end up to
    the next power of two: empty documents, which no kernel works on. Counting the documents waits for the device once per forward.
    """
    if positions is None:
        return None
    begins = positions == 0
    begins[:, 0] = True  # a row never goes on with a document of the row before it
    where = begins.flatten().nonzero().flatten().to(torch.int32)
    room = 1 << (len(where) - 1).bit_length()
    total = positions.numel()
    return Documents(torch.nn.functional.pad(where, (0, room + 1 - len(where)), value=total), positions.shape[1])


def block_mask(positions: Tensor | None, causal: bool, ids: Tensor) -> Any:
    """The form for torch's flex_attention, worked out block by block: the T x T mask never exists.

    Documents are runs of a row, so a block sees another where their ranges of documents meet, and sees all of it where both lie in one
    and the same document. Equal to torch's `create_block_mask`, which writes the whole mask first.
    """
    if positions is None:
        return _whole_rows(ids.shape[1], causal, ids.device)
    document = (positions == 0).cumsum(dim=1).to(torch.int32)  # B T

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[b, query] == document[b, key]

    def looks_back(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[b, query] == document[b, key]) & (query >= key)

    return _blocks(document, causal, looks_back if causal else same_document)


@lru_cache(maxsize=8)
def _whole_rows(length: int, causal: bool, device: torch.device) -> Any:
    """Every row one document. Kept, because every step asks for the same; usable in training even where validation asked first."""

    def looks_back(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def everything(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return b.new_ones((), dtype=torch.bool)

    with torch.inference_mode(False):
        document = torch.zeros(1, length, dtype=torch.int32, device=device)
        return _blocks(document, causal, looks_back if causal else everything)


def _blocks(document: Tensor, causal: bool, sees: Callable[..., Tensor]) -> Any:
    """The BlockMask of `document` (B T, numbers that rise along a row); `sees` tells single pairs where a block is seen in part."""
    from torch.nn.attention.flex_attention import BlockMask

    B, T = document.shape
    n = -(-T // BLOCK)
    filled = torch.cat((document, document[:, -1:].expand(B, n * BLOCK - T)), dim=1).view(B, n, BLOCK)
    first, last = filled[:, :, 0], filled[:, :, -1]  # B n
    seen = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])  # B n n
    whole = (first[:, :, None] == last[:, None, :]) & (last[:, :, None] == first[:, None, :])
    if causal:
        ones = torch.ones(n, n, dtype=torch.bool, device=document.device)
        seen, whole = seen & ones.tril(), whole & ones.tril(-1)
    if n * BLOCK > T:  # the end of the last block does not exist, so nothing there is seen whole
        real = torch.arange(n, device=document.device) < n - 1
        whole = whole & real & real[:, None]
    return BlockMask.from_kv_blocks(
        *_listed(seen & ~whole), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(T, T)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each block sees, and their numbers with those seen first: int32, B 1 n and B 1 n n."""
    which = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32)[:, None], which.to(torch.int32)[:, None]


MASKS: dict[MaskForm, MaskFunction] = {"dense": dense_mask, "blocks": block_mask, "lengths": lengths}
"""Form -> what makes it, for native models."""

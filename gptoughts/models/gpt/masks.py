"""Attention masks of packed documents in the three forms that attention functions take: dense, blocks, lengths.

A mask is built once per forward, for all blocks, from `positions` (B T, counting inside each document; 0 starts one). Shapes:
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
"""dense: bool B 1 T T, or None if `causal` is enough. blocks: torch's BlockMask. lengths: `Documents`, or None likewise."""

MaskFunction = Callable[[Tensor | None, bool, Tensor], Any]
"""masking(positions B T or None, causal, ids B T) -> the mask passed to `attend`."""

BLOCK = 128
"""Tokens per block side: the default of torch's flex_attention."""


class Documents(NamedTuple):
    """Document offsets in the concatenated rows, for variable-length flash attention."""

    bounds: Tensor
    """int32 start offset of each document in the B*T tokens, then B*T, repeated up to a power of two plus one."""
    longest: int
    """Upper bound of document lengths: T, known without synchronization and constant over steps."""


def dense_mask(positions: Tensor | None, causal: bool, ids: Tensor) -> Tensor | None:
    """Return the bool mask B 1 T T; None if each row is one document."""
    return None if positions is None else document_mask(positions, causal)


def lengths(positions: Tensor | None, causal: bool, ids: Tensor) -> Documents | None:
    """Return document offsets for variable-length attention; None if each row is one document.

    The number of documents varies per batch, but compiled blocks need a fixed shape, so offsets are padded with empty documents to
    the next power of two. Counting the documents synchronizes with the device once per forward.
    """
    if positions is None:
        return None
    is_start = positions == 0
    is_start[:, 0] = True  # documents do not continue across rows
    starts = is_start.flatten().nonzero().flatten().to(torch.int32)
    padded = 1 << (len(starts) - 1).bit_length()
    total = positions.numel()
    return Documents(torch.nn.functional.pad(starts, (0, padded + 1 - len(starts)), value=total), positions.shape[1])


def block_mask(positions: Tensor | None, causal: bool, ids: Tensor) -> Any:
    """Return the BlockMask for torch's flex_attention, computed per block without a T x T mask.

    Documents are contiguous in a row, so two blocks interact if their document ranges overlap, and fully if both lie in one document.
    Equal to torch's `create_block_mask`, which builds the T x T mask first.
    """
    if positions is None:
        return _one_document_mask(ids.shape[1], causal, ids.device)
    document = (positions == 0).cumsum(dim=1).to(torch.int32)  # B T

    def same_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document[b, query] == document[b, key]

    def causal_pair(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[b, query] == document[b, key]) & (query >= key)

    return _blocks(document, causal, causal_pair if causal else same_document)


@lru_cache(maxsize=8)
def _one_document_mask(length: int, causal: bool, device: torch.device) -> Any:
    """Return the mask of one document per row. Cached; built outside inference mode, so that training can reuse it after validation."""

    def causal_pair(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def all_pairs(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return b.new_ones((), dtype=torch.bool)

    with torch.inference_mode(False):
        document = torch.zeros(1, length, dtype=torch.int32, device=device)
        return _blocks(document, causal, causal_pair if causal else all_pairs)


def _blocks(document: Tensor, causal: bool, mask_mod: Callable[..., Tensor]) -> Any:
    """Return the BlockMask of `document` (B T, indices that rise along a row); `mask_mod` decides pairs in partial blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    B, T = document.shape
    n = -(-T // BLOCK)
    padded = torch.cat((document, document[:, -1:].expand(B, n * BLOCK - T)), dim=1).view(B, n, BLOCK)
    first, last = padded[:, :, 0], padded[:, :, -1]  # B n
    visible = (first[:, :, None] <= last[:, None, :]) & (first[:, None, :] <= last[:, :, None])  # B n n
    full = (first[:, :, None] == last[:, None, :]) & (last[:, :, None] == first[:, None, :])
    if causal:
        ones = torch.ones(n, n, dtype=torch.bool, device=document.device)
        visible, full = visible & ones.tril(), full & ones.tril(-1)
    if n * BLOCK > T:  # the last block is partly padding, so it is never full
        complete = torch.arange(n, device=document.device) < n - 1
        full = full & complete & complete[:, None]
    return BlockMask.from_kv_blocks(
        *_block_lists(visible & ~full), *_block_lists(full), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(T, T)
    )


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return per query block the number of key blocks and their indices, selected ones first: int32, B 1 n and B 1 n n."""
    indices = blocks.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    return blocks.sum(dim=2, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]


MASKS: dict[MaskForm, MaskFunction] = {"dense": dense_mask, "blocks": block_mask, "lengths": lengths}
"""Form -> function that builds the mask, for native models."""

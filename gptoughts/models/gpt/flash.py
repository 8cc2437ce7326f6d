"""FlashAttention 2, 3, 4 and torch's varlen_attn as attention functions for masks of the form "lengths".

The only file that imports flash_attn (2.x and, as `flash_attn.cute`, 4) and flash_attn_interface (3). The kernels take half precision
in B T H D, or T H D with document offsets; our layout is B H T D.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gptoughts.errors import LayerError
from gptoughts.models.gpt.attention import AttentionFunction
from gptoughts.models.gpt.flex import in_one_dtype
from gptoughts.models.gpt.masks import Documents

Version = Literal["fa2", "fa3", "fa4"]
Kernel = Callable[..., Any]

HALF = (torch.float16, torch.bfloat16)


def attention(version: Version) -> AttentionFunction:
    """Return an `AttentionFunction` that calls a package's kernels. Raises LayerError with the import error of a broken package."""
    dense_kernel, varlen_kernel = _import_kernels(version)

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
        query, key, value = _require_half(version, query, key, value, mask)
        width = value.shape[3]
        if version == "fa2" and width < query.shape[3]:
            # FlashAttention-2 needs equal head widths; latent attention has narrower values, so pad them with zeros.
            value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
        kwargs = {"softmax_scale": scale, "causal": causal}
        if mask is None:
            output = dense_kernel(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **kwargs)
            return _output_of(output).transpose(1, 2)[..., :width]  # B H T E
        kwargs |= {"cu_seqlens_q": mask.bounds, "cu_seqlens_k": mask.bounds}
        kwargs |= {"max_seqlen_q": mask.longest, "max_seqlen_k": mask.longest}
        return as_rows(_output_of(varlen_kernel(*map(as_line, (query, key, value)), **kwargs)), query)[..., :width]

    return attend


def torch_varlen() -> AttentionFunction:
    """Return an `AttentionFunction` that calls torch's `varlen_attn`, whose parameters differ between versions."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise LayerError("attention=varlen: needs torch 2.10", found=torch.__version__, fix="--layer.attention sdpa") from error
    parameters, kernel = inspect.signature(varlen_attn).parameters, cast("Callable[..., Tensor]", varlen_attn)

    def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Any = None, scale: float | None = None) -> Tensor:
        query, key, value = _require_half("varlen", query, key, value, mask)
        if mask is None:  # one document per row, or new queries after a cache
            return _one_document(query, key, value, causal, scale)
        width, groups = value.shape[3], query.shape[1] // key.shape[1]
        if width < query.shape[3]:
            value = torch.nn.functional.pad(value, (0, query.shape[3] - width))
        kwargs: dict[str, Any] = {"is_causal": causal}
        if "window_size" in parameters:
            kwargs = {"window_size": (-1, 0 if causal else -1)}
        if "scale" in parameters:
            kwargs["scale"] = scale
        elif scale is not None:  # this version always divides by the square root of the width
            query = query * (scale * query.shape[3] ** 0.5)
        if "enable_gqa" in parameters:
            kwargs["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        bounds, longest = mask
        output = kernel(*map(as_line, (query, key, value)), bounds, bounds, longest, longest, **kwargs)
        return as_rows(output, query)[..., :width]

    return attend


def as_line(heads: Tensor) -> Tensor:
    """B H T D -> BT H D: concatenated rows, indexed by document offsets."""
    return heads.transpose(1, 2).flatten(0, 1)


def as_rows(tokens: Tensor, like: Tensor) -> Tensor:
    """BT H E -> B H T E, with B and T of `like`."""
    return tokens.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _require_half(name: str, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = in_one_dtype(query, key, value)
    if mask is not None and not isinstance(mask, Documents):
        raise LayerError(f"attention={name}: takes document offsets, not a mask", fix="--layer.attention sdpa")
    if query.dtype not in HALF:
        raise LayerError(f"attention={name}: needs half precision", found=query.dtype, fix="--layer.precision bf16")
    return query, key, value


def _one_document(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    mask = None
    if causal and rows != columns:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _output_of(result: Any) -> Tensor:
    """Return the output only: FlashAttention-4 and some builds of 3 also return the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def _import_kernels(version: Version) -> tuple[Kernel, Kernel]:
    """Return the package's dense and variable-length functions."""
    try:
        if version == "fa2":
            from flash_attn import flash_attn_func, flash_attn_varlen_func
        elif version == "fa3":
            from flash_attn_interface import flash_attn_func, flash_attn_varlen_func
        else:
            from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    except Exception as error:  # a broken build or dependency may raise any type
        raise LayerError(f"attention={version}: installed, but the import fails: {type(error).__name__}: {error}") from error
    if version == "fa3":
        _refuse_inference_build()
    return flash_attn_func, flash_attn_varlen_func


def _refuse_inference_build() -> None:
    """Raise LayerError for builds without backward, which record that in flash_attn_config."""
    try:
        from flash_attn_config import CONFIG
    except ImportError:  # not in every build; a missing backward then fails when called
        return
    if CONFIG.get("build_flags", {}).get("FLASHATTENTION_DISABLE_BACKWARD"):
        raise LayerError(
            "attention=fa3: inference-only build without backward (FLASHATTENTION_DISABLE_BACKWARD)",
            fix="a build from the hopper folder of Dao-AILab/flash-attention, or --layer.attention sdpa",
        )

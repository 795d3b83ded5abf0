"""attention: causal self-attention on packed q, k, v, as one op, so that every device has a kernel of its own.

    out[b, t, h] = sum_{s <= t} softmax_s( q[b, t, h] . k[b, s, h] / sqrt(W) ) v[b, s, h]    for t < lengths[b], else 0

qkv [B, T, 3, H, W]: q, k, v along the third axis; lengths [B] int64 in [0, T], or None: all T. out [B, T, H, W].
Beyond its length a sequence gives and receives nothing: what qkv holds there, NaN included, is not read, and its
gradient is 0. Saved for the backward pass: qkv, out, and lse [B, T, H], the logarithm of the softmax's denominator
(0 beyond the length). The contract of the kernels is csrc/attention.h.

packed_attention is the same for sequences back to back, qkv [n, 3, H, W] and offset [B + 1]: nothing is padded.

On a GPU the kernels are those of attention_triton.py; nothing there waits for the device, so that lengths and offsets
are taken as they are: what is out of range is cut off.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clmfast.ops.arguments import dtype_name, integer, register_fake, require_tensors
from clmfast.ops.derivatives import is_composed, refuse_second, refuse_tangents

if TYPE_CHECKING:
    from clmfast.ops.attention_triton import Form

MAX_HEAD_WIDTH = 128  # of the kernels for a GPU


def attention(qkv: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Causal attention: qkv [B, T, 3, H, W] -> [B, T, H, W], zeros at t >= lengths[b]; lengths [B] int64 or None.

    float32, float64, bfloat16 and float16; the last two are computed in float32. Differentiable once, see composed().
    """
    require_tensors("attention", qkv, or_none=(lengths,))
    if is_composed():
        _check_padded("attention", qkv, lengths)
        return _composed(qkv, lengths)
    refuse_tangents("attention", qkv)
    out, _ = torch.ops.clmfast.attention(qkv, lengths)
    return out


def packed_attention(qkv: Tensor, offset: Tensor, max_length: int, prefix: Tensor | None = None) -> Tensor:
    """Causal attention within each sequence: qkv [n, 3, H, W] -> [n, H, W].

    offset [B + 1] int64: sequence b is the rows offset[b] <= r < offset[b + 1], from 0 to n without a gap; none, with
    its prefix, is longer than max_length. prefix [B] int64: the sequence that stands before b, -1: none; it has none
    itself; only without gradient. Dtypes and derivatives as for attention.
    """
    require_tensors("packed_attention", qkv, offset, or_none=(prefix,))
    max_length = integer("packed_attention", "max_length", max_length)
    if is_composed():
        _check_packed("packed_attention", qkv, offset, prefix)
        max_length = _longest("packed_attention", qkv, offset, prefix, max_length)
        rows, lengths, is_own = padded_rows(offset, prefix, max_length)
        return _into_rows(len(qkv), rows[is_own], _composed(qkv[rows], lengths)[is_own])
    refuse_tangents("attention", qkv)
    out, _ = torch.ops.clmfast.packed_attention(qkv, offset, prefix, max_length)
    return out


def _composed(qkv: Tensor, lengths: Tensor | None) -> Tensor:
    is_wide = qkv.dtype in (torch.float32, torch.float64)
    return _dense(qkv if is_wide else qkv.float(), lengths)[0].to(qkv.dtype)


# ---- registration

_library = torch.library.Library("clmfast", "FRAGMENT")
_library.define(
    "packed_attention(Tensor qkv, Tensor offset, Tensor? prefix, int max_length) -> (Tensor out, Tensor lse)"
)
_library.define(
    "packed_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor offset, int max_length) "
    "-> Tensor"
)


@register_fake("attention")
def _(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, _, H, W = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((B, T, H, W)), qkv.new_empty((B, T, H), dtype=lse_dtype)


@register_fake("attention_backward")
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output, inputs[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, None]:
    refuse_second("attention")
    qkv, out, lse, lengths = ctx.saved_tensors
    return torch.ops.clmfast.attention_backward(grad_out, qkv, out, lse, lengths), None


torch.library.register_autograd("clmfast::attention", _differentiate, setup_context=_save)


@register_fake("packed_attention")
def _(qkv: Tensor, offset: Tensor, prefix: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    n, _, H, W = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((n, H, W)), qkv.new_empty((n, H), dtype=lse_dtype)


@register_fake("packed_attention_backward")
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offset: Tensor, max_length: int) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save_packed(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, offset, prefix, ctx.max_length = inputs
    if prefix is not None and qkv.requires_grad:
        raise ValueError("packed_attention: prefix is for passes without gradient")
    ctx.save_for_backward(qkv, *output, offset)
    ctx.mark_non_differentiable(output[1])


def _differentiate_packed(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second("attention")
    grad = torch.ops.clmfast.packed_attention_backward(grad_out, *ctx.saved_tensors, ctx.max_length)
    return grad, None, None, None


torch.library.register_autograd("clmfast::packed_attention", _differentiate_packed, setup_context=_save_packed)


# ---- checks, but for what csrc/ops.cpp checks


def _check_integers(op: str, name: str, x: Tensor | None, shape: tuple[int, ...], says: str, qkv: Tensor) -> None:
    if x is None:
        return
    if x.dtype != torch.int64:
        raise ValueError(f"{op}: {name} must be int64, got {dtype_name(x)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must be {says}, got {list(x.shape)}")
    if x.device != qkv.device:
        raise ValueError(f"{op}: {name} must be on {qkv.device}, got {x.device}")


def _check_there(op: str, **tensors: Tensor | None) -> None:
    """Of a storage that was resized there may be less than the shape speaks of."""
    for name, x in tensors.items():
        if x is None or x.numel() == 0:
            continue
        n = x.storage_offset() + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        needed, held = n * x.element_size(), x.untyped_storage().nbytes()
        if needed > held:
            raise ValueError(f"{op}: the storage of {name} must hold its elements, {needed} bytes, got {held}")


def _check_dtype(op: str, qkv: Tensor) -> None:
    if qkv.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ValueError(f"{op}: qkv must be float32, float64, bfloat16 or float16, got {dtype_name(qkv)}")


def _check_padded(op: str, qkv: Tensor, lengths: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be [B, T, 3, H, W], got {list(qkv.shape)}")
    _check_dtype(op, qkv)
    B = qkv.shape[0]
    _check_integers(op, "lengths", lengths, (B,), f"[B] with B={B}", qkv)


def _check_packed(op: str, qkv: Tensor, offset: Tensor, prefix: Tensor | None) -> None:
    require_tensors(op, qkv, offset)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"{op}: qkv must be [n, 3, H, W], got {list(qkv.shape)}")
    _check_dtype(op, qkv)
    if offset.dim() != 1 or len(offset) < 1:
        raise ValueError(f"{op}: offset must be [B + 1], got {list(offset.shape)}")
    B = len(offset) - 1
    _check_integers(op, "offset", offset, (B + 1,), "[B + 1]", qkv)
    _check_integers(op, "prefix", prefix, (B,), f"[B] with B={B}", qkv)


def _check_saved(op: str, grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> None:
    require_tensors(op, grad_out, out, lse)
    *rows, _, H, W = qkv.shape
    wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    for name, x, shape, dtype in (
        ("grad_out", grad_out, [*rows, H, W], qkv.dtype),
        ("out", out, [*rows, H, W], qkv.dtype),
        ("lse", lse, [*rows, H], wide),
    ):
        if list(x.shape) != shape or x.dtype != dtype or x.device != qkv.device:
            raise ValueError(
                f"{op}: {name} must be {shape} {dtype} on {qkv.device}, got {list(x.shape)} {x.dtype} on {x.device}"
            )


def longest_of(offset: Tensor, prefix: Tensor | None) -> int:
    """Tokens of the longest sequence with its prefix. Waits for the device; a caller that knows a bound need not."""
    own = offset.diff()
    # A prefix that is out of range is refused elsewhere.
    before = 0 if prefix is None else torch.where(prefix >= 0, own[prefix.clamp(0, max(len(own) - 1, 0))], 0)
    return int((own + before).max()) if len(own) else 0


def _longest(op: str, qkv: Tensor, offset: Tensor, prefix: Tensor | None, max_length: int) -> int:
    """The longest sequence with its prefix, after a look at what offset and prefix hold; on a GPU, and while compiling,
    max_length, as nothing is looked at there."""
    if torch.compiler.is_compiling():
        return max_length
    n, own, B = len(qkv), offset.diff(), len(offset) - 1
    if qkv.device.type != "cpu":
        return max_length if n else 0
    if offset[0] != 0 or offset[-1] != n or (own < 0).any():
        raise ValueError(f"{op}: offset must ascend from 0 to n={n}")
    if prefix is not None:
        if ((prefix < -1) | (prefix >= B)).any():
            raise ValueError(f"{op}: prefix must be -1 or a sequence below {B}")
        if (prefix[prefix[prefix >= 0]] >= 0).any():
            raise ValueError(f"{op}: a prefix must have no prefix itself")
    longest = longest_of(offset, prefix)
    if longest > max_length:
        raise ValueError(
            f"{op}: no sequence, with its prefix, may be longer than max_length={max_length}, got {longest}"
        )
    return longest


# ---- packed sequences on the CPU: padded ones, there and back


def padded_rows(offset: Tensor, prefix: Tensor | None, max_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(rows [B, T] of qkv, each sequence with its prefix before it, padded with row 0; lengths [B]; is it a sequence's
    own row [B, T])."""
    own = offset.diff()
    before = torch.zeros_like(own) if prefix is None else torch.where(prefix >= 0, own[prefix.clamp(min=0)], 0)
    lengths = before + own
    t = torch.arange(max_length, device=offset.device)
    rows = offset[:-1, None] + t - before[:, None]
    if prefix is not None:
        rows = torch.where(t < before[:, None], offset[prefix.clamp(min=0), None] + t, rows)
    is_real = t < lengths[:, None]
    return torch.where(is_real, rows, 0), lengths, is_real & (t >= before[:, None])


@torch.library.impl("clmfast::packed_attention", "CPU")
def _(qkv: Tensor, offset: Tensor, prefix: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    op = "packed_attention"
    _check_packed(op, qkv, offset, prefix)
    _check_there(op, qkv=qkv, offset=offset, prefix=prefix)
    max_length = _longest(op, qkv, offset, prefix, max_length)
    rows, lengths, is_own = padded_rows(offset, prefix, max_length)
    out, lse = torch.ops.clmfast.attention(qkv[rows], lengths)
    at = rows[is_own]
    return _into_rows(len(qkv), at, out[is_own]), _into_rows(len(qkv), at, lse[is_own])


@torch.library.impl("clmfast::packed_attention_backward", "CPU")
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offset: Tensor, max_length: int) -> Tensor:
    op = "packed_attention_backward"
    _check_packed(op, qkv, offset, None)
    _check_saved(op, grad_out, qkv, out, lse)
    _check_there(op, grad_out=grad_out, qkv=qkv, out=out, lse=lse, offset=offset)
    max_length = _longest(op, qkv, offset, None, max_length)
    rows, lengths, is_own = padded_rows(offset, None, max_length)
    padded = (x[rows] for x in (grad_out, qkv, out, lse))
    return _into_rows(len(qkv), rows[is_own], torch.ops.clmfast.attention_backward(*padded, lengths)[is_own])


def _into_rows(n: int, rows: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros((n, *values.shape[1:])).index_copy(0, rows, values)


# ---- on a GPU


@torch.library.impl("clmfast::attention", "CUDA")
def _attention(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_padded("attention", qkv, lengths)
    _check_there("attention", qkv=qkv, lengths=lengths)
    _check_width("attention", qkv)
    B, T, _, H, W = qkv.shape
    if qkv.dtype == torch.float64:
        return _dense(qkv, lengths)
    from clmfast.ops import attention_triton

    out, lse = attention_triton.forward(qkv.reshape(B * T, 3, H, W), _padded(B, T, lengths))
    return out.view(B, T, H, W), lse.view(B, T, H)


@torch.library.impl("clmfast::attention_backward", "CUDA")
def _attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None) -> Tensor:
    op = "attention_backward"
    _check_padded(op, qkv, lengths)
    _check_width(op, qkv)
    _check_saved(op, grad_out, qkv, out, lse)
    _check_there(op, grad_out=grad_out, qkv=qkv, out=out, lse=lse, lengths=lengths)
    B, T = qkv.shape[:2]
    if qkv.dtype == torch.float64:
        return _dense_backward(grad_out, qkv, lengths)
    from clmfast.ops import attention_triton

    flat_grad, flat_qkv, flat_out, flat_lse = (x.reshape(B * T, *x.shape[2:]) for x in (grad_out, qkv, out, lse))
    form = _padded(B, T, lengths)
    return attention_triton.backward(flat_grad, flat_qkv, flat_out, flat_lse, form).view(qkv.shape)


@torch.library.impl("clmfast::packed_attention", "CUDA")
def _packed_attention(qkv: Tensor, offset: Tensor, prefix: Tensor | None, max_length: int) -> tuple[Tensor, Tensor]:
    op = "packed_attention"
    _check_packed(op, qkv, offset, prefix)
    _check_there(op, qkv=qkv, offset=offset, prefix=prefix)
    _check_width(op, qkv)
    if qkv.dtype == torch.float64:
        rows, lengths, is_own = padded_rows(offset, prefix, max_length if len(qkv) else 0)
        out, lse = _dense(qkv[rows], lengths)
        at = rows[is_own]
        return _into_rows(len(qkv), at, out[is_own]), _into_rows(len(qkv), at, lse[is_own])
    from clmfast.ops import attention_triton

    return attention_triton.forward(qkv, _packed(offset, prefix, max_length))


@torch.library.impl("clmfast::packed_attention_backward", "CUDA")
def _packed_attention_backward(
    grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, offset: Tensor, max_length: int
) -> Tensor:
    op = "packed_attention_backward"
    _check_packed(op, qkv, offset, None)
    _check_width(op, qkv)
    _check_saved(op, grad_out, qkv, out, lse)
    _check_there(op, grad_out=grad_out, qkv=qkv, out=out, lse=lse, offset=offset)
    if qkv.dtype == torch.float64:
        rows, lengths, is_own = padded_rows(offset, None, max_length if len(qkv) else 0)
        return _into_rows(len(qkv), rows[is_own], _dense_backward(grad_out[rows], qkv[rows], lengths)[is_own])
    from clmfast.ops import attention_triton

    return attention_triton.backward(grad_out, qkv, out, lse, _packed(offset, None, max_length))


def _padded(B: int, T: int, lengths: Tensor | None) -> Form:
    from clmfast.ops.attention_triton import ALL_FULL, LENGTHS, Form

    return Form(ALL_FULL, B, T) if lengths is None else Form(LENGTHS, B, T, lengths.contiguous())


def _packed(offset: Tensor, prefix: Tensor | None, max_length: int) -> Form:
    from clmfast.ops.attention_triton import OFFSETS, Form

    prefix = None if prefix is None else prefix.contiguous()
    return Form(OFFSETS, len(offset) - 1, max_length, offset.contiguous(), prefix)


def _check_width(op: str, qkv: Tensor) -> None:
    if qkv.shape[-1] > MAX_HEAD_WIDTH and qkv.dtype != torch.float64:
        raise ValueError(f"{op}: the head width must be at most {MAX_HEAD_WIDTH} on a GPU, got {qkv.shape[-1]}")


def _dense_weights(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(qkv without padding's values, scores and weights [B, H, T, T]), for float64 on a GPU and for composed()."""
    B, T, _, _, W = qkv.shape
    t = torch.arange(T, device=qkv.device)
    is_real = torch.ones(B, T, dtype=torch.bool, device=qkv.device) if lengths is None else t < lengths[:, None]
    qkv = qkv.where(is_real[:, :, None, None, None], 0)
    score = torch.einsum("bthw,bshw->bhts", qkv[:, :, 0], qkv[:, :, 1]) / math.sqrt(W)
    score = score.masked_fill(t[None, :] > t[:, None], -math.inf)
    return qkv, score, score.softmax(3) * is_real[:, None, :, None]


def _dense(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    qkv, score, weights = _dense_weights(qkv, lengths)
    is_real = weights[:, 0].sum(2) > 0
    lse = score.logsumexp(3).transpose(1, 2).where(is_real[..., None], 0)
    return torch.einsum("bhts,bshw->bthw", weights, qkv[:, :, 2]), lse.contiguous()


def _dense_backward(grad_out: Tensor, qkv: Tensor, lengths: Tensor | None) -> Tensor:
    qkv, _, weights = _dense_weights(qkv, lengths)
    q, k, v = qkv.unbind(2)
    is_real = weights[:, 0].sum(2) > 0
    grad_out = grad_out.where(is_real[:, :, None, None], 0)
    grad_weights = torch.einsum("bthw,bshw->bhts", grad_out, v)
    delta = (weights * grad_weights).sum(3, keepdim=True)
    grad_score = weights * (grad_weights - delta) / math.sqrt(qkv.shape[-1])
    grad_q, grad_k = torch.einsum("bhts,bshw->bthw", grad_score, k), torch.einsum("bhts,bthw->bshw", grad_score, q)
    return torch.stack([grad_q, grad_k, torch.einsum("bhts,bthw->bshw", weights, grad_out)], 2)

"""attention: causal self-attention on packed q, k, v, as one op, so that every device has a kernel of its own.

    out[b, t, h] = sum_{s <= t} softmax_s( q[b, t, h] . k[b, s, h] / sqrt(W) ) v[b, s, h]    for t < lengths[b], else 0

qkv [B, T, 3, H, W]: q, k, v along the third axis; lengths [B] int64 in [0, T], or None: all T. out [B, T, H, W].
Beyond its length a sequence gives and receives nothing: what qkv holds there, NaN included, is not read, and its
gradient is 0. Saved for the backward pass: qkv, out, and lse [B, T, H], the logarithm of the softmax's denominator
(0 beyond the length). The contract of the kernels is csrc/attention.h.
"""

from typing import Any

import torch
from torch import Tensor


def attention(qkv: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Causal attention: qkv [B, T, 3, H, W] -> [B, T, H, W], zeros at t >= lengths[b]; lengths [B] int64 or None.

    float32, float64, bfloat16 and float16; the last two are computed in float32. Differentiable once; a second
    derivative is refused.
    """
    out, _ = torch.ops.clmfast.attention(qkv, lengths)
    return out


@torch.library.register_fake("clmfast::attention")
def _(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    B, T, _, H, W = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((B, T, H, W)), qkv.new_empty((B, T, H), dtype=lse_dtype)


@torch.library.register_fake("clmfast::attention_backward")
def _(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output, inputs[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, None]:
    qkv, out, lse, lengths = ctx.saved_tensors
    return torch.ops.clmfast.attention_backward(grad_out, qkv, out, lse, lengths), None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention: a second derivative is not supported")


torch.library.register_autograd("clmfast::attention", _differentiate, setup_context=_save)
torch.library.register_autograd("clmfast::attention_backward", _refuse)

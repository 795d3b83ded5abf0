"""attention: causal self-attention on packed q, k, v, as one op, so that a device can bring a kernel of its own.

    out[b, t, h] = sum_{s <= t} softmax_s( q[b, t, h] . k[b, s, h] / sqrt(W) ) v[b, s, h]    for t < lengths[b], else 0

qkv [B, T, 3, H, W]: q, k, v along the third axis; lengths [B] int64 in [0, T], or None: all T. out [B, T, H, W].
Beyond its length a sequence gives and receives nothing: what qkv holds there, NaN included, reaches neither output nor
gradient, and its gradient is 0. Padding lies to the right, so causality keeps it from valid outputs; only 0 * NaN has
to be prevented, by reading padding as zeros. Saved for the backward pass: qkv, out, and lse [B, T, H], the logarithm
of the softmax's denominator.
"""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def attention(qkv: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Causal attention: qkv [B, T, 3, H, W] -> [B, T, H, W], zeros at t >= lengths[b]; lengths [B] int64 or None.

    Differentiable once; a second derivative is refused. On the CPU: float32, float64, bfloat16, float16.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention: qkv must be [B, T, 3, H, W], got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"attention: qkv must be floating point, got {qkv.dtype}")
    if lengths is not None:
        if lengths.shape != qkv.shape[:1] or lengths.dtype != torch.int64:
            raise ValueError(
                f"attention: lengths must be [B] int64 with B={qkv.shape[0]}, got {list(lengths.shape)} {lengths.dtype}"
            )
        if lengths.device != qkv.device:
            raise ValueError(f"attention: lengths must be on qkv's device {qkv.device}, got {lengths.device}")
    out, _ = _forward(qkv, lengths)
    return out


def _padding(lengths: Tensor | None, T: int) -> Tensor | None:
    """Rows of [B * T] that lie beyond their sequences; None if nothing does."""
    if lengths is None or bool((lengths == T).all()):
        return None
    if bool((lengths < 0).any() | (lengths > T).any()):
        raise ValueError(f"attention: lengths must be in [0, T], got {lengths.min()} to {lengths.max()} with T={T}")
    return (torch.arange(T) >= lengths[:, None]).flatten().nonzero()[:, 0]


def _zero_padding(x: Tensor, padding: Tensor | None) -> Tensor:
    """x [B, T, ...] with zeros in the padding; dense, because torch's kernel takes the last axis for dense unseen."""
    if padding is None:
        return x.contiguous()
    # Filling whole rows of a copy costs a third of a masked fill, whose broadcast mask is read element by element.
    zeroed = x.clone(memory_format=torch.contiguous_format)
    zeroed.flatten(0, 1).index_fill_(0, padding, 0)
    return zeroed


@torch.library.custom_op("clmfast::attention", mutates_args=(), device_types="cpu")
def _forward(qkv: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    padding = _padding(lengths, qkv.shape[1])
    if qkv.numel() == 0:
        out, lse = _empty_outputs(qkv)
        return out, lse.zero_()
    q_BHTW, k_BHTW, v_BHTW = _zero_padding(qkv, padding).permute(2, 0, 3, 1, 4)
    out_BHTW, lse_BHT = aten._scaled_dot_product_flash_attention_for_cpu(q_BHTW, k_BHTW, v_BHTW, is_causal=True)
    # Padding was read as zeros; by attending to its sequence it got values all the same.
    return _zero_padding(out_BHTW.transpose(1, 2), padding), lse_BHT.transpose(1, 2).contiguous()


@torch.library.custom_op("clmfast::attention_backward", mutates_args=(), device_types="cpu")
def _backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, lengths: Tensor | None) -> Tensor:
    if qkv.numel() == 0:
        return torch.zeros_like(qkv, memory_format=torch.contiguous_format)
    padding = _padding(lengths, qkv.shape[1])
    q_BHTW, k_BHTW, v_BHTW = _zero_padding(qkv, padding).permute(2, 0, 3, 1, 4)
    grad_BHTW, out_BHTW, lse_BHT = (x.transpose(1, 2) for x in (_zero_padding(grad_out, padding), out, lse))
    grads_BHTW = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_BHTW, q_BHTW, k_BHTW, v_BHTW, out_BHTW, lse_BHT, dropout_p=0.0, is_causal=True
    )
    # With zero gradients at its outputs, and causality, padding gets exact zeros here without being told.
    return torch.stack([grad.transpose(1, 2) for grad in grads_BHTW], dim=2)


def _empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, W = qkv.shape
    lse_dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return qkv.new_empty((B, T, H, W)), qkv.new_empty((B, T, H), dtype=lse_dtype)


_forward.register_fake(lambda qkv, lengths: _empty_outputs(qkv))
_backward.register_fake(
    lambda grad_out, qkv, out, lse, lengths: torch.empty_like(qkv, memory_format=torch.contiguous_format)
)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output, inputs[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor, None]:
    qkv, out, lse, lengths = ctx.saved_tensors
    return _backward(grad_out, qkv, out, lse, lengths), None


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("attention: a second derivative is not supported")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)

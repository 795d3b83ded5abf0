"""The two halves of a pre-norm Transformer block on packed tokens, each with its normalisation and its residual, and
whole blocks, one after the other.

    mlp_block        x + W_out gelu(W_in norm(x) + b_in) + b_out
    attention_block  x + W_out attention(W_qkv norm(x) + b_qkv) + b_out

x [n, D] holds the tokens of all sequences back to back: no padding is computed. On the CPU in float32 each half is one
fused op (its contract is csrc/block.h); on other devices and in other dtypes it is composed of torch's operations and
`ops.packed_attention`, which the fused op is tested against. gelu is the tanh form; norm's epsilon is 1e-5.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clmfast.ops.arguments import dtype_name, integer, register_fake, require_one_device, require_tensors
from clmfast.ops.attention import longest_of, packed_attention
from clmfast.ops.derivatives import is_composed, refuse_second, refuse_tangents


class BlockWeights(NamedTuple):
    """Of one half: norm's weight and bias [D], then the two linear layers, weights [out, in]; F = 3 D for attention."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    in_weight: Tensor  # [F, D]
    in_bias: Tensor  # [F]
    out_weight: Tensor  # [D, F], attention: [D, D]
    out_bias: Tensor  # [D]


def mlp_block(x: Tensor, weights: BlockWeights) -> Tensor:
    """x [n, D] -> [n, D]. Differentiable once, see composed()."""
    require_tensors("mlp_block", x, *weights)
    if _is_fused(x):
        refuse_tangents("mlp_block", x, *weights)
        return torch.ops.clmfast.mlp_block.default(x, *weights, _wants_grad(x, weights))[0]
    require_one_device("mlp_block", x, *weights)
    w = weights
    hidden = F.gelu(F.linear(_norm(x, w), w.in_weight, w.in_bias), approximate="tanh")
    return x + F.linear(hidden, w.out_weight, w.out_bias)


def attention_block(
    x: Tensor,
    weights: BlockWeights,
    n_heads: int,
    offset: Tensor,
    *,
    kept: Tensor | None = None,
    prefix: Tensor | None = None,
    source: Tensor | None = None,
    max_length: int | None = None,
) -> Tensor:
    """x [n, D] -> [R, D], causal within each sequence. Differentiable once, see composed().

    offset [B + 1] int64: sequence b is the rows offset[b] <= r < offset[b + 1] of x, from 0 to n without a gap.
    kept [R] int64, ascending: the rows that are wanted (None: all, R = n). All tokens are still seen by those after
    them, but only the kept ones ask.
    prefix [B] int64: the sequence whose tokens come before those of b, as if b began with them; -1: none. A prefix has
    no prefix itself. Only without gradient.
    source [n_tokens] int64: the row of x that each token is (None: token i is row i): sequences that begin alike can
    share rows. offset and kept then count tokens. Needs kept, with source[kept] ascending; not together with prefix.
    max_length: no sequence is longer, its prefix included. With it nothing waits for the device; it changes no value.
    """
    require_tensors("attention_block", x, *weights, offset, or_none=(kept, prefix, source))
    n_heads = integer("attention_block", "n_heads", n_heads)
    wants_grad = _wants_grad(x, weights)
    _refuse_gradient("attention_block", prefix, wants_grad)
    if _is_fused(x):
        refuse_tangents("attention_block", x, *weights)
        arguments = (n_heads, offset, kept, prefix, source, wants_grad)
        return torch.ops.clmfast.attention_block.default(x, *weights, *arguments)[0]
    _check_composed(x, weights, n_heads, offset, kept, prefix, source)
    w = weights
    if source is not None:
        x = x[source]
    n, D = x.shape
    qkv = F.linear(_norm(x, w), w.in_weight, w.in_bias).view(n, 3, n_heads, D // n_heads)
    if max_length is None:
        max_length = longest_of(offset, prefix)
    mixed = packed_attention(qkv, offset, max_length, prefix).flatten(1)
    if kept is not None:
        x, mixed = x[kept], mixed[kept]
    return x + F.linear(mixed, w.out_weight, w.out_bias)


def transformer_blocks(
    x: Tensor,
    weights: Sequence[tuple[BlockWeights, BlockWeights]],
    n_heads: int,
    offset: Tensor,
    *,
    asking: Tensor | None = None,
    kept: Tensor | None = None,
    prefix: Tensor | None = None,
    source: Tensor | None = None,
    max_length: int | None = None,
    n_trained: int | None = None,
) -> list[Tensor]:
    """x [n, D] -> the residual stream after each block: [n, D] each, [R, D] after the last. Differentiable once, see
    composed(), and the last alone.

    weights: of each block, attention's and mlp's. kept [R]: the tokens that are wanted of the last block. asking [n],
    with source: the tokens that the rows are, which all other blocks compute. Everything else is as for
    `attention_block`. One call, because what Python and autograd add to each half's would be a tenth of a step.

    n_trained: the sequences that have a gradient (None: all), which come first, as do their rows of x. What the others
    put out counts as a constant, and their rows of x get a gradient of zero. On the CPU the gradients are bit for bit
    those of a call without the others, which may read rows of the first, but not be read by them.
    """
    flat = [w for halves in weights for half in halves for w in half]
    require_tensors("transformer_blocks", x, *flat, offset, or_none=(asking, kept, prefix, source))
    n_heads = integer("transformer_blocks", "n_heads", n_heads)
    if n_trained is not None and not 0 <= integer("transformer_blocks", "n_trained", n_trained) < len(offset):
        raise ValueError(f"transformer_blocks: n_trained must be in [0, {len(offset) - 1}], got {n_trained}")
    if _is_fused(x):
        refuse_tangents("transformer_blocks", x, *flat)
        wants_grad = _wants_grad(x, flat)
        _refuse_gradient("transformer_blocks", prefix, wants_grad)
        if wants_grad:
            y, *states = _Blocks.apply(x, n_heads, offset, asking, kept, source, n_trained, *flat)
        else:
            arguments = (n_heads, offset, asking, kept, prefix, source, False)
            y, states, _ = torch.ops.clmfast.transformer_blocks.default(x, flat, *arguments)
        return [*states, y]
    states = []
    for i, (of_attention, of_mlp) in enumerate(weights, start=1):
        between = attention_block(
            x, of_attention, n_heads, offset,
            kept=kept if i == len(weights) else asking, prefix=prefix, source=source, max_length=max_length,
        )  # fmt: skip
        x = mlp_block(between, of_mlp)
        states.append(x)
    if n_trained is not None:
        token = torch.arange(len(x), device=x.device) if kept is None else kept
        x = torch.where((token < offset[n_trained])[:, None], x, x.detach())
    return [*(state.detach() for state in states[:-1]), x]


class _Blocks(torch.autograd.Function):
    """Not register_autograd: that walks through lists of tensors one by one in Python, in every pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        n_heads: int,
        offset: Tensor,
        asking: Tensor | None,
        kept: Tensor | None,
        source: Tensor | None,
        n_trained: int | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        arguments = (n_heads, offset, asking, kept, None, source, True)
        y, states, saved = torch.ops.clmfast.transformer_blocks.default(x, weights, *arguments)
        ctx.n_heads, ctx.n_trained, ctx.n_weights, ctx.n_states = n_heads, n_trained, len(weights), len(states)
        ctx.save_for_backward(x, offset, asking, kept, source, *weights, *states, *saved)
        output = (y, *states)
        _only_y(ctx, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        refuse_second("transformer_blocks")
        x, offset, asking, kept, source, *rest = ctx.saved_tensors
        weights, rest = rest[: ctx.n_weights], rest[ctx.n_weights :]
        states, saved = rest[: ctx.n_states], rest[ctx.n_states :]
        grad_x, *grads = torch.ops.clmfast.transformer_blocks_backward.default(
            grad_y, x, weights, states, saved, ctx.n_heads, offset, asking, kept, source, ctx.n_trained
        )
        return grad_x, None, None, None, None, None, None, *grads


def _is_fused(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not is_composed()


def _wants_grad(x: Tensor, weights: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights))


def _refuse_gradient(op: str, prefix: Tensor | None, wants_grad: bool) -> None:
    if prefix is not None and wants_grad:
        raise ValueError(f"{op}: prefix is for passes without gradient")


def _norm(x: Tensor, w: BlockWeights) -> Tensor:
    return F.layer_norm(x, (x.shape[1],), w.norm_weight, w.norm_bias)


def _check_composed(
    x: Tensor,
    weights: BlockWeights,
    n_heads: int,
    offset: Tensor,
    kept: Tensor | None,
    prefix: Tensor | None,
    source: Tensor | None,
) -> None:
    """What csrc/ops.cpp checks of a fused attention_block, but for shapes that torch's operations look at themselves.
    What indices hold is looked at on the CPU alone, and not while compiling."""
    op = "attention_block"
    require_one_device(op, x, *weights, offset, kept, prefix, source)
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [n, D], got {list(x.shape)}")
    D = x.shape[1]
    if n_heads < 1 or D % n_heads or tuple(weights.in_weight.shape) != (3 * D, D):
        raise ValueError(
            f"{op}: in_weight must be [3 D, D] and n_heads must divide D, got n_heads={n_heads} with D={D}"
        )
    if source is not None and (kept is None or prefix is not None):
        raise ValueError(f"{op}: source must come with kept and without prefix")
    for name, rows in (("kept", kept), ("source", source), ("prefix", prefix)):
        if rows is None:
            continue
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"{op}: {name} must be one row of int64, got {list(rows.shape)} {dtype_name(rows)}")
        if name == "prefix" or x.device.type != "cpu" or torch.compiler.is_compiling() or len(rows) == 0:
            continue
        n = len(x) if name == "source" or source is None else len(source)
        if rows.min() < 0 or rows.max() >= n:
            raise ValueError(f"{op}: {name} must be in [0, {n}), got {int(rows.min())} to {int(rows.max())}")
        if name == "kept" and (rows.diff() <= 0).any():
            raise ValueError(f"{op}: kept must ascend")


# ---- registration

N_WEIGHTS = len(BlockWeights._fields)
HIDDEN_PANEL = 16  # as in csrc/block.h


@register_fake("mlp_block")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n, n_hidden = len(x) if rest[-1] else 0, len(rest[2])
    shapes = (x.shape, (n,), (n,), (n, -(-n_hidden // HIDDEN_PANEL) * HIDDEN_PANEL), (n, n_hidden))
    return tuple(x.new_empty(shape) for shape in shapes)


@register_fake("attention_block")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    n_heads, _, kept, _, _, save = rest[N_WEIGHTS:]
    (n_tokens, D), n = x.shape, len(x) if save else 0
    R = n_tokens if kept is None else len(kept)
    shapes = ((R, D), (n,), (n,), (R, D), (n_tokens, 2, D), (R, D), (R, n_heads))
    return tuple(x.new_empty(shape) for shape in shapes)


@register_fake("transformer_blocks")
def _(
    x: Tensor,
    weights: list[Tensor],
    n_heads: int,
    offset: Tensor,
    asking: Tensor | None,
    kept: Tensor | None,
    prefix: Tensor | None,
    source: Tensor | None,
    save: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    states, saved = [], []
    for first in range(0, len(weights), 2 * N_WEIGHTS):
        middle, last = first + N_WEIGHTS, first + 2 * N_WEIGHTS
        wanted = kept if last == len(weights) else asking
        arguments = (n_heads, offset, wanted, prefix, source, save)
        between, *of_attention = torch.ops.clmfast.attention_block(x, *weights[first:middle], *arguments)
        x, *of_mlp = torch.ops.clmfast.mlp_block(between, *weights[middle:last], save)
        states.append(x)
        saved += [*of_attention, between, *of_mlp] if save else []
    return x, states[:-1], saved


@register_fake("transformer_blocks_backward")
def _(grad_y: Tensor, x: Tensor, weights: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *weights)]


@register_fake("mlp_block_backward")
@register_fake("attention_block_backward")
def _empty_grads(grad_y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *rest[:N_WEIGHTS]))


def _only_y(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """What is saved has no gradient, so that none need be made of zeros: 34 MB in a step of the default run."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _save_mlp(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: 1 + N_WEIGHTS], *output[1:])
    _only_y(ctx, output)


def _differentiate_mlp(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second("mlp_block")
    return (*torch.ops.clmfast.mlp_block_backward(grad_y, *ctx.saved_tensors), None)


def _save_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.n_heads, offset, kept, _, source, _ = inputs[1 + N_WEIGHTS :]
    ctx.save_for_backward(*inputs[: 1 + N_WEIGHTS], offset, kept, source, *output[1:])
    _only_y(ctx, output)


def _differentiate_attention(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second("attention_block")
    x_and_weights, rest = ctx.saved_tensors[: 1 + N_WEIGHTS], ctx.saved_tensors[1 + N_WEIGHTS :]
    grads = torch.ops.clmfast.attention_block_backward(grad_y, *x_and_weights, ctx.n_heads, *rest)
    return (*grads, None, None, None, None, None, None)


torch.library.register_autograd("clmfast::mlp_block", _differentiate_mlp, setup_context=_save_mlp)
torch.library.register_autograd("clmfast::attention_block", _differentiate_attention, setup_context=_save_attention)

"""Triton kernels of ops.attention and ops.packed_attention; csrc/attention.h is the contract. Imported when they run.

Two paths, chosen by the longest sequence that may come (`choose`), never by measuring at run time:
- short: a tile holds whole sequences, as many as fit, so that K, V and P stay in registers, softmax needs no second
  look, and one kernel finds all gradients without atomics;
- long: online softmax over tiles of keys, and two kernels for the gradients, one for each side of P.

All kernels see rows, qkv [rows, 3, H, W], of which sequence b owns the rows [begin, begin + n) (`extent_of`); what lies
between sequences is never read. The head width is a power of two; `forward` and `backward` pad any other with zeros.
float32 is multiplied as float32, never as tf32; bfloat16 and float16 are accumulated in float32. The order of every
sum is fixed. Beware: a value that is not finite can spread to the sequences of its tile.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from clmfast.ops.attention import MAX_HEAD_WIDTH

ALL_FULL, LENGTHS, OFFSETS = 0, 1, 2  # what `extent` holds: nothing, lengths [B], or offsets [B + 1]
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2))

# ---- what can run: exactly what tests/test_attention_compiled.py compiles

WIDTHS = (32, 64, MAX_HEAD_WIDTH)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Config(NamedTuple):
    """Rows of a program's own tile, and of the tiles that it walks along (on the short path there is but one)."""

    own: int
    walked: int
    num_warps: int
    num_stages: int


# Not tuned yet: chosen so that no kernel spills a register on sm_80 or sm_90a with Triton 3.6.
def short_config(dtype: torch.dtype, width: int) -> Config:
    if dtype == torch.float32:
        return Config(32, 32, 4, 1) if width < 128 else Config(16, 16, 4, 1)
    return Config(64, 64, 4 if width < 128 else 8, 1)


def long_config(dtype: torch.dtype, width: int) -> Config:
    if dtype == torch.float32:
        return Config(32, 32 if width < 128 else 16, 8, 1)
    return Config(64, 32, 8, 2)


def choose(dtype: torch.dtype, width: int, T: int) -> tuple[bool, Config]:
    """(is it the short path, config) for sequences of at most T rows."""
    short = short_config(dtype, width)
    return (True, short) if short.own >= T else (False, long_config(dtype, width))


# ---- steps that the kernels share


@triton.jit
def extent_of(b, exists, extent_ptr, form, T):
    """(first row, number of rows) of sequence b; T: the distance of sequences or, with offsets, a bound of lengths."""
    b = b.to(tl.int64)
    # "!= 0", here and below: where a scalar meets a block, Triton's interpreter makes integers of truth values
    first = tl.load(extent_ptr + b, mask=(exists & (form > 0)) != 0, other=0)
    second = tl.load(extent_ptr + b + 1, mask=(exists & (form == 2)) != 0, other=0)
    begin = tl.where(form == 2, first, b * T)
    n = tl.where(form == 2, second - first, tl.where(form == 1, first, T))
    n = tl.minimum(tl.maximum(n, 0), T)
    return begin, tl.where(exists, n, 0).to(tl.int32)


@triton.jit
def prefix_of(b, exists, prefix_ptr, has_prefix, extent_ptr, form, T):
    """(first row, number of rows) of what stands before sequence b."""
    p = tl.load(prefix_ptr + b.to(tl.int64), mask=(exists & (has_prefix > 0)) != 0, other=-1)
    return extent_of(tl.maximum(p, 0), exists & (p >= 0), extent_ptr, form, T)


@triton.jit
def holds(is_real, form):
    """Is a row written: with offsets a sequence's own, otherwise also the zeros behind it."""
    return (is_real | (form < 2)) != 0


@triton.jit
def load_tile(ptr, row, is_real, row_stride, W: tl.constexpr):
    """[rows, W] of one head; zeros where a row is not real."""
    address = row[:, None] * row_stride + tl.arange(0, W)[None, :]
    return tl.load(ptr + address, mask=is_real[:, None], other=0.0)


@triton.jit
def store_tile(ptr, tile, row, is_written, row_stride, W: tl.constexpr):
    address = row[:, None] * row_stride + tl.arange(0, W)[None, :]
    tl.store(ptr + address, tile.to(ptr.dtype.element_ty), mask=is_written[:, None])


@triton.jit
def product(a, b):
    """a @ b summed in float32, and in float32 altogether where the operands are."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tile_of_sequences(tile, B, T, BLOCK: tl.constexpr):
    """(sequence, place in it, does it exist) of every row of a tile that holds BLOCK // T whole sequences."""
    i = tl.arange(0, BLOCK)
    n_fit = BLOCK // T
    b = tile * n_fit + i // T
    return b, i % T, (i // T < n_fit) & (b < B)


# ---- short path


@triton.jit(
    do_not_specialize=["B", "T", "H", "form", "has_prefix"], do_not_specialize_on_alignment=["extent_ptr", "prefix_ptr"]
)
def short_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, extent_ptr, prefix_ptr, scale, B, T, H, form, has_prefix,
    W: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, t, exists = tile_of_sequences(tl.program_id(0), B, T, OWN)
    begin, n = extent_of(b, exists, extent_ptr, form, T)
    before, n_before = prefix_of(b, exists, prefix_ptr, has_prefix, extent_ptr, form, T)
    row = tl.where(t < n_before, before + t, begin + t - n_before)
    is_real = t < n_before + n
    qkv_ptr += h * W
    q = load_tile(qkv_ptr, row, is_real, 3 * H * W, W)
    k = load_tile(qkv_ptr + H * W, row, is_real, 3 * H * W, W)
    v = load_tile(qkv_ptr + 2 * H * W, row, is_real, 3 * H * W, W)

    is_seen = (b[:, None] == b[None, :]) & (t[None, :] <= t[:, None]) & is_real[:, None]
    score = tl.where(is_seen, product(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
    peak = tl.where(is_real, tl.max(score, 1), 0.0)
    p = tl.exp2(score - peak[:, None])
    total = tl.where(is_real, tl.sum(p, 1), 1.0)
    out = product(p.to(v.dtype), v) / total[:, None]

    is_written = exists & (t >= n_before) & holds(is_real, form)
    store_tile(out_ptr + h * W, out, row, is_written, H * W, W)
    tl.store(lse_ptr + row * H + h, (peak + tl.log2(total)) * LN_2, mask=is_written)


# With P = exp(scale Q K' - lse) and the gradient O' of the output:
#     dV = P' O',  dP = O' V',  delta_i = sum_j P_ij dP_ij,  dS = scale P (dP - delta),  dQ = dS K,  dK = dS' Q
# delta is also sum_w O'_iw O_iw, which is cheaper where a tile does not hold a whole row of P.


@triton.jit
def weights_of(a, b, lse, is_seen, scale):
    """P of a tile: a and b are q and k, or k and q for P on its side; lse lies along the queries."""
    score = product(a, tl.trans(b)) * (scale * LOG2_E) - lse * LOG2_E
    return tl.where(is_seen, tl.exp2(tl.where(is_seen, score, 0.0)), 0.0)


@triton.jit(do_not_specialize=["B", "T", "H", "form"], do_not_specialize_on_alignment=["extent_ptr"])
def short_bwd_kernel(
    grad_out_ptr, qkv_ptr, lse_ptr, grad_ptr, extent_ptr, scale, B, T, H, form,
    W: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    b, t, exists = tile_of_sequences(tl.program_id(0), B, T, OWN)
    begin, n = extent_of(b, exists, extent_ptr, form, T)
    row, is_real = begin + t, t < n
    is_written = exists & holds(is_real, form)
    qkv_ptr += h * W
    grad_ptr += h * W
    q = load_tile(qkv_ptr, row, is_real, 3 * H * W, W)
    k = load_tile(qkv_ptr + H * W, row, is_real, 3 * H * W, W)
    v = load_tile(qkv_ptr + 2 * H * W, row, is_real, 3 * H * W, W)
    grad_out = load_tile(grad_out_ptr + h * W, row, is_real, H * W, W)
    lse = tl.load(lse_ptr + row * H + h, mask=is_real, other=0.0)

    is_seen = (b[:, None] == b[None, :]) & (t[None, :] <= t[:, None]) & is_real[:, None]
    p = weights_of(q, k, lse[:, None], is_seen, scale)
    grad_v = product(tl.trans(p).to(q.dtype), grad_out)
    store_tile(grad_ptr + 2 * H * W, grad_v, row, is_written, 3 * H * W, W)
    grad_p = product(grad_out, tl.trans(v))
    grad_score = (p * (grad_p - tl.sum(p * grad_p, 1)[:, None]) * scale).to(q.dtype)
    store_tile(grad_ptr, product(grad_score, k), row, is_written, 3 * H * W, W)
    store_tile(grad_ptr + H * W, product(tl.trans(grad_score), q), row, is_written, 3 * H * W, W)


# ---- long path: a program has one tile of one sequence and head, and walks along the other side of P


@triton.jit(
    do_not_specialize=["B", "T", "H", "form", "has_prefix"], do_not_specialize_on_alignment=["extent_ptr", "prefix_ptr"]
)
def long_fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, extent_ptr, prefix_ptr, scale, B, T, H, form, has_prefix,
    W: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    begin, n = extent_of(b, b < B, extent_ptr, form, T)
    before, n_before = prefix_of(b, b < B, prefix_ptr, has_prefix, extent_ptr, form, T)
    i_first = (tl.num_programs(1) - 1 - tl.program_id(1)) * OWN  # the longest walks start first
    i = i_first + tl.arange(0, OWN)
    row, is_real = begin + i, i < n
    qkv_ptr += h * W
    q = load_tile(qkv_ptr, row, is_real, 3 * H * W, W)
    peak = tl.full([OWN], float("-inf"), tl.float32)
    total = tl.zeros([OWN], tl.float32)
    out = tl.zeros([OWN, W], tl.float32)
    n_seen = tl.where(i_first < n, n_before + tl.minimum(n, i_first + OWN), 0)
    for first in range(0, n_seen, WALKED):
        t = first + tl.arange(0, WALKED)
        key_row = tl.where(t < n_before, before + t, begin + t - n_before)
        k = load_tile(qkv_ptr + H * W, key_row, t < n_seen, 3 * H * W, W)
        v = load_tile(qkv_ptr + 2 * H * W, key_row, t < n_seen, 3 * H * W, W)
        is_seen = t[None, :] <= n_before + i[:, None]
        score = tl.where(is_seen, product(q, tl.trans(k)) * (scale * LOG2_E), float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))  # finite: every query sees key 0, which is in the first tile
        p = tl.exp2(score - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None] + product(p.to(v.dtype), v)
        peak = new_peak
    peak, total = tl.where(is_real, peak, 0.0), tl.where(is_real, total, 1.0)
    is_written = (i < T) & holds(is_real, form)
    out = tl.where(is_real[:, None], out / total[:, None], 0.0)
    store_tile(out_ptr + h * W, out, row, is_written, H * W, W)
    tl.store(lse_ptr + row * H + h, (peak + tl.log2(total)) * LN_2, mask=is_written)


@triton.jit(do_not_specialize=["B", "T", "H", "form"], do_not_specialize_on_alignment=["extent_ptr"])
def long_bwd_q_kernel(
    grad_out_ptr, qkv_ptr, out_ptr, lse_ptr, grad_ptr, delta_ptr, extent_ptr, scale, B, T, H, form,
    W: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """grad of q, and delta for the kernel after this one."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    begin, n = extent_of(b, b < B, extent_ptr, form, T)
    i_first = (tl.num_programs(1) - 1 - tl.program_id(1)) * OWN
    i = i_first + tl.arange(0, OWN)
    row, is_real = begin + i, i < n
    qkv_ptr += h * W
    q = load_tile(qkv_ptr, row, is_real, 3 * H * W, W)
    grad_out = load_tile(grad_out_ptr + h * W, row, is_real, H * W, W)
    out = load_tile(out_ptr + h * W, row, is_real, H * W, W)
    lse = tl.load(lse_ptr + row * H + h, mask=is_real, other=0.0)
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row * H + h, delta, mask=is_real)
    grad_q = tl.zeros([OWN, W], tl.float32)
    for first in range(0, tl.minimum(n, i_first + OWN), WALKED):
        t = first + tl.arange(0, WALKED)
        k = load_tile(qkv_ptr + H * W, begin + t, t < n, 3 * H * W, W)
        v = load_tile(qkv_ptr + 2 * H * W, begin + t, t < n, 3 * H * W, W)
        if q.dtype == tl.float32:  # P on its side: the other way round, operands that stay fill all registers
            p = weights_of(k, q, lse[None, :], (t[:, None] <= i[None, :]) & is_real[None, :], scale)
            grad_score = tl.trans(p * (product(v, tl.trans(grad_out)) - delta[None, :]))
        else:
            p = weights_of(q, k, lse[:, None], (t[None, :] <= i[:, None]) & is_real[:, None], scale)
            grad_score = p * (product(grad_out, tl.trans(v)) - delta[:, None])
        grad_q += product((grad_score * scale).to(k.dtype), k)
    store_tile(grad_ptr + h * W, grad_q, row, (i < T) & holds(is_real, form), 3 * H * W, W)


@triton.jit(do_not_specialize=["B", "T", "H", "form"], do_not_specialize_on_alignment=["extent_ptr"])
def long_bwd_kv_kernel(
    grad_out_ptr, qkv_ptr, lse_ptr, grad_ptr, delta_ptr, extent_ptr, scale, B, T, H, form,
    W: tl.constexpr, OWN: tl.constexpr, WALKED: tl.constexpr,
):  # fmt: skip
    """grads of k and v; P and dP lie on their sides here, [keys, queries], as both products want them."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    begin, n = extent_of(b, b < B, extent_ptr, form, T)
    t_first = tl.program_id(1) * OWN
    t = t_first + tl.arange(0, OWN)
    row, is_real = begin + t, t < n
    qkv_ptr += h * W
    k = load_tile(qkv_ptr + H * W, row, is_real, 3 * H * W, W)
    v = load_tile(qkv_ptr + 2 * H * W, row, is_real, 3 * H * W, W)
    grad_k = tl.zeros([OWN, W], tl.float32)
    grad_v = tl.zeros([OWN, W], tl.float32)
    for first in range(t_first // WALKED * WALKED, n, WALKED):
        i = first + tl.arange(0, WALKED)
        asks = i < n
        q = load_tile(qkv_ptr, begin + i, asks, 3 * H * W, W)
        grad_out = load_tile(grad_out_ptr + h * W, begin + i, asks, H * W, W)
        lse = tl.load(lse_ptr + (begin + i) * H + h, mask=asks, other=0.0)
        delta = tl.load(delta_ptr + (begin + i) * H + h, mask=asks, other=0.0)
        p = weights_of(k, q, lse[None, :], (t[:, None] <= i[None, :]) & asks[None, :], scale)
        grad_v += product(p.to(q.dtype), grad_out)
        grad_p = product(v, tl.trans(grad_out))
        grad_k += product((p * (grad_p - delta[None, :]) * scale).to(q.dtype), q)
    is_written = (t < T) & holds(is_real, form)
    grad_ptr += h * W
    store_tile(grad_ptr + H * W, grad_k, row, is_written, 3 * H * W, W)
    store_tile(grad_ptr + 2 * H * W, grad_v, row, is_written, 3 * H * W, W)


# ---- launchers


class Form(NamedTuple):
    """How B sequences of at most T rows lie in qkv [rows, 3, H, W]; extent and prefix are int64 on its device."""

    form: int
    B: int
    T: int
    extent: Tensor | None = None
    prefix: Tensor | None = None


def forward(qkv: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """(out [rows, H, W], lse [rows, H] float32) of qkv [rows, 3, H, W]. Rows of no sequence are not written."""
    rows, _, H, W = qkv.shape
    wide = _widened(qkv)
    out, lse = wide.new_empty((rows, H, wide.shape[-1])), qkv.new_empty((rows, H), dtype=torch.float32)
    if out.numel() and form.B and form.T:
        is_short, config, grid, extent, prefix = _plan(wide, form)
        kernel = short_fwd_kernel if is_short else long_fwd_kernel
        kernel[grid](
            wide, out, lse, extent, prefix, 1 / math.sqrt(W), form.B, form.T, H, form.form,
            int(form.prefix is not None), wide.shape[-1], config.own, config.walked,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out[..., :W].contiguous(), lse


def backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, form: Form) -> Tensor:
    """The gradient [rows, 3, H, W] of qkv. Rows of no sequence are not written."""
    assert form.prefix is None
    _, _, H, W = qkv.shape
    grad_out, qkv, out = _widened(grad_out), _widened(qkv), _widened(out)
    grad = torch.empty_like(qkv)
    if grad.numel() and form.B and form.T:
        is_short, config, grid, extent, _ = _plan(qkv, form)
        rest = (1 / math.sqrt(W), form.B, form.T, H, form.form, qkv.shape[-1], config.own, config.walked)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if is_short:
            short_bwd_kernel[grid](grad_out, qkv, lse, grad, extent, *rest, **options)
        else:
            delta = torch.empty_like(lse)
            long_bwd_q_kernel[grid](grad_out, qkv, out, lse, grad, delta, extent, *rest, **options)
            long_bwd_kv_kernel[grid](grad_out, qkv, lse, grad, delta, extent, *rest, **options)
    return grad[..., :W].contiguous()


def _widened(x: Tensor) -> Tensor:
    """Contiguous, 16-byte aligned, its last axis padded with zeros to a width that the kernels have."""
    W = x.shape[-1]
    width = next(width for width in WIDTHS if width >= W)
    x = torch.nn.functional.pad(x, (0, width - W)) if width > W else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _plan(qkv: Tensor, form: Form) -> tuple[bool, Config, tuple[int, int], Tensor, Tensor]:
    is_short, config = choose(qkv.dtype, qkv.shape[-1], form.T)
    H = qkv.shape[2]
    if is_short:
        grid = (triton.cdiv(form.B, config.own // form.T), H)
    else:
        grid = (form.B * H, triton.cdiv(form.T, config.own))
    # Where there is no extent or prefix, nothing is read, but the kernel wants a pointer of the right type.
    nothing = qkv.view(torch.int64) if form.extent is None else form.extent
    return is_short, config, grid, nothing, nothing if form.prefix is None else form.prefix

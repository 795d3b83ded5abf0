"""Attention forward and backward on a GPU against every backend of torch's scaled_dot_product_attention, FlexAttention,
and flash-attn and xformers where they are installed: sections of benchmarks.gpu_check.

All read the same packed qkv [B, T, 3, H, W] and give its gradient. Ragged: rivals compute the padding, as they know no
lengths; they are judged by the real tokens alone. FlexAttention is compiled for every shape, which takes seconds: it
comes last, and for three shapes only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contest import Claim
from benchmarks.gpu_contest import N_INPUTS, Call, Report, claim_ratio, compete, copy_gbs, replayed_us
from benchmarks.machine import is_installed
from clmfast import ops
from clmfast.ops import reference

Attention = Callable[[Tensor, Tensor | None], Tensor]
"""(qkv [B, T, 3, H, W], lengths [B] or None) -> [B, T, H, W]"""

ERROR_OVER_EAGER = 4.0  # error of a contender over that of torch's own products in the same dtype
COPY_FROM_BYTES = 256 << 20  # of q, k, v and out: from there on, the share of the copying rate is told
OPTIONAL = "flash_attn", "xformers"  # rivals that are not a part of torch


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    W: int
    is_ragged: bool
    must: float | None
    aim: float | None
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        kind = "ragged" if self.is_ragged else "full"
        return f"attention B{self.B} T{self.T} H{self.H} W{self.W} {str(self.dtype)[6:]} {kind}"

    @property
    def n_bytes(self) -> int:
        """Of q, k, v and the result."""
        return 4 * self.B * self.T * self.H * self.W * self.dtype.itemsize


SHORT = [
    Shape(64, 16, 4, 32, True, 1.3, 2.0),
    Shape(128, 32, 4, 64, True, 1.3, 2.0),
    Shape(512, 64, 8, 64, False, 1.3, 2.0),
    Shape(2048, 64, 8, 64, False, None, None),
]
LONG = [
    Shape(64, 128, 8, 64, False, 1.0, 1.2),
    Shape(16, 512, 8, 64, False, None, 0.8),
    Shape(4, 2048, 8, 64, False, None, 0.8),
]
WITH_FLEX = [SHORT[2], *LONG[:2]]


def inputs(shape: Shape, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """(qkv, gradient of the result, lengths)"""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(shape.dtype)

    lengths = None
    if shape.is_ragged:
        lengths = torch.randint(shape.T // 2, shape.T + 1, (shape.B,), device=device, generator=generator)
    qkv = normal(shape.B, shape.T, 3, shape.H, shape.W)
    grad = normal(shape.B, shape.T, shape.H, shape.W)
    if lengths is not None:
        grad = grad * is_real(lengths, shape.T)[..., None, None]
    return qkv.requires_grad_(), grad, lengths


def is_real(lengths: Tensor, T: int) -> Tensor:
    return torch.arange(T, device=lengths.device) < lengths[:, None]


def sdpa(qkv: Tensor, lengths: Tensor | None) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


FLASH, EFFICIENT = SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION
CUDNN, MATH = SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH
BACKENDS = {  # in the order of their priority
    "math": [MATH],
    "flash": [FLASH],
    "memory-efficient": [EFFICIENT],
    "cuDNN": [CUDNN],
    "cuDNN before flash": [CUDNN, FLASH, EFFICIENT, MATH],
    "flash before cuDNN": [FLASH, CUDNN, EFFICIENT, MATH],
}


def rivals() -> dict[str, Attention]:
    """By name. Those that cannot do a shape or dtype raise when they are called."""

    def by(backends: list[SDPBackend]) -> Attention:
        def call(qkv: Tensor, lengths: Tensor | None) -> Tensor:
            with sdpa_kernel(backends, set_priority=True):
                return sdpa(qkv, lengths)

        return call

    found = {f"SDPA {name}": by(backends) for name, backends in BACKENDS.items()}
    if is_installed("flash_attn"):
        from flash_attn import flash_attn_qkvpacked_func

        found["flash-attn"] = lambda qkv, lengths: flash_attn_qkvpacked_func(qkv, causal=True)
    if is_installed("xformers"):
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        found["xformers"] = lambda qkv, lengths: memory_efficient_attention(
            *qkv.unbind(2), attn_bias=LowerTriangularMask()
        )
    return found


def flex(shape: Shape, device: str) -> Attention:
    """FlexAttention, compiled when it is called first."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.T, shape.T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(qkv: Tensor, lengths: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    return call


def forward_backward(attention: Attention, qkv: Tensor, grad: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(result, gradient of qkv)"""
    out = attention(qkv, lengths)
    return out, torch.autograd.grad(out, qkv, grad)[0]


class Gate:
    """Lets pass who is as right as torch's own products in this dtype, measured from float64.

    Everyone computes the whole batch; its first and last sequences are compared, of long ones the last but one.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.qkv, self.grad, self.lengths = inputs(shape, 0, device)
        ends = range(4) if shape.T < 512 else range(1)  # float64 on a CPU takes seconds for a long sequence
        self.of = torch.tensor([(i - 2) % shape.B for i in ends], device=device)
        qkv, grad = (x.detach()[self.of].cpu().double() for x in (self.qkv, self.grad))
        lengths = None if self.lengths is None else self.lengths[self.of].cpu()
        self.exact = [x.detach() for x in forward_backward(reference.attention, qkv.requires_grad_(), grad, lengths)]
        real = is_real(torch.full((len(self.of),), shape.T) if lengths is None else lengths, shape.T)
        self.real = real[..., None, None], real[..., None, None, None]
        self.bar = [ERROR_OVER_EAGER * max(e, 1e-6) for e in self.errors(self._by_products)]

    @staticmethod
    def _by_products(qkv: Tensor, lengths: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        T, W = q.shape[-2:]
        score = (q @ k.mT) * W**-0.5
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        return (score.masked_fill(later, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    def errors(self, attention: Attention) -> list[float]:
        """Largest deviations of (result, gradient), at real tokens."""
        whole = forward_backward(attention, self.qkv, self.grad, self.lengths)
        pairs = zip((x.detach()[self.of].cpu().double() for x in whole), self.exact, self.real, strict=True)
        return [float(((found - exact) * mask).abs().max()) for found, exact, mask in pairs]

    def wrong(self, attention: Attention) -> str:
        """What is wrong with its answer; empty: nothing."""
        errors = self.errors(attention)
        if all(e <= bar for e, bar in zip(errors, self.bar, strict=True)):
            return ""
        return f"result and gradient are wrong by {errors}, allowed are {self.bar}"


def short(report: Report, shapes: list[Shape] = SHORT) -> None:
    """Ours and torch's backends."""
    for module in OPTIONAL:
        if not is_installed(module):
            report.note(f"{module} is not installed")
    rate_gbs = copy_gbs(report.device) if any(shape.n_bytes >= COPY_FROM_BYTES for shape in shapes) else 0.0
    for shape in shapes:
        with report.shape(str(shape)):
            measure(report, shape, rate_gbs)


def long(report: Report, shapes: list[Shape] = LONG, with_flex: list[Shape] = WITH_FLEX) -> None:
    """The same for longer sequences; then FlexAttention."""
    short(report, shapes)
    for shape in with_flex:
        what = f"{shape}, FlexAttention"
        with report.shape(what):
            gate = Gate(shape, report.device)
            report.check(what, gate.wrong(ops.attention))
            sets = sets_of(shape, report.device)
            ours = replayed_us(call_of(ops.attention, sets), report.device)
            times = {"clmfast": report.time(what, "clmfast", ours, how="graph")}
            rival = checked(report, what, {"FlexAttention": flex(shape, report.device)}, gate)
            for name, attention in rival.items():
                us = replayed_us(call_of(attention, sets), report.device)
                times[name] = report.time(what, name, us, how="graph")
            claim_ratio(report, what, times, "FlexAttention", None, shape.aim)


def sets_of(shape: Shape, device: str) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return [inputs(shape, i, device) for i in range(N_INPUTS)]


def call_of(attention: Attention, sets: list[tuple[Tensor, Tensor, Tensor | None]]) -> Call:
    return lambda i: forward_backward(attention, *sets[i])


def checked(report: Report, what: str, contenders: dict[str, Attention], gate: Gate) -> dict[str, Attention]:
    """Those that are right; the others are named."""
    found = {}
    for name, attention in contenders.items():
        try:
            why = gate.wrong(attention)
        except Exception as error:  # no kernel for this shape
            why = f"{type(error).__name__}: {str(error)[:160]}"
        if why:
            report.note(f"{what}: {name} left out: {why}")
        else:
            found[name] = attention
    return found


def measure(report: Report, shape: Shape, rate_gbs: float) -> None:
    what = str(shape)
    gate = Gate(shape, report.device)
    report.check(what, gate.wrong(ops.attention))
    sets = sets_of(shape, report.device)
    right = checked(report, what, rivals(), gate)
    calls = {name: ("graph", call_of(attention, sets)) for name, attention in right.items()}
    times = compete(report, what, call_of(ops.attention, sets), calls)
    others = {name: us for name, us in times.items() if name != "clmfast"}
    if others and (shape.must is not None or shape.aim is not None):
        claim_ratio(report, what, times, min(others, key=others.__getitem__), shape.must, shape.aim)
    if shape.n_bytes >= COPY_FROM_BYTES:
        # q, k, v, out forward; those, the gradient of out and that of q, k, v backward
        moved = shape.n_bytes * (4 + 4 + 1 + 3) / 4
        share = moved / times["clmfast"] / 1e3 / rate_gbs
        report.claim(Claim(f"{what}: share of the rate of copying", 100 * share, None, 85, " %"))

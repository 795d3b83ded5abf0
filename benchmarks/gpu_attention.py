"""Attention forward and backward on a GPU against every backend of torch's scaled_dot_product_attention, FlexAttention,
and flash-attn and xformers where they are installed. A part of benchmarks.gpu_check.

All read the same packed qkv [B, T, 3, H, W] and give its gradient. Ragged: rivals compute the padding, as they know no
lengths; they are judged by the real tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import is_installed
from clmfast import ops
from clmfast.ops import reference

if TYPE_CHECKING:
    from benchmarks.gpu_check import Report

Attention = Callable[[Tensor, Tensor | None], Tensor]
"""(qkv [B, T, 3, H, W], lengths [B] or None) -> [B, T, H, W]"""

ERROR_OVER_EAGER = 4.0  # error of a contender over that of torch's own products in the same dtype
LEAST_S = 150.0  # left before a shape begins: itself, mostly compiling, and what follows this section
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


SHAPES = [
    Shape(64, 16, 4, 32, True, 1.3, 2.0),
    Shape(128, 32, 4, 64, True, 1.3, 2.0),
    Shape(512, 64, 8, 64, False, 1.3, 2.0),
    Shape(2048, 64, 8, 64, False, None, None),
    Shape(64, 128, 8, 64, False, 1.0, 1.2),
    Shape(16, 512, 8, 64, False, None, 0.8),
    Shape(4, 2048, 8, 64, False, None, 0.8),
]


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


def rivals(shape: Shape, device: str) -> dict[str, Attention]:
    """By name. Those that cannot do this shape or dtype raise when they are called."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def by(backend: Any) -> Attention:
        def call(qkv: Tensor, lengths: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(qkv, lengths)

        return call

    found: dict[str, Attention] = {
        f"SDPA {name}": by(backend)
        for name, backend in (
            ("math", SDPBackend.MATH),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("cuDNN", SDPBackend.CUDNN_ATTENTION),
        )
    }
    if device == "cpu":
        return found
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, shape.T, shape.T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex(qkv: Tensor, lengths: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return compiled(q, k, v, block_mask=mask).transpose(1, 2)

    found["FlexAttention"] = flex
    if is_installed("flash_attn"):
        from flash_attn import flash_attn_qkvpacked_func

        found["flash-attn"] = lambda qkv, lengths: flash_attn_qkvpacked_func(qkv, causal=True)
    if is_installed("xformers"):
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        found["xformers"] = lambda qkv, lengths: memory_efficient_attention(
            *qkv.unbind(2), attn_bias=LowerTriangularMask()
        )
    return found


def forward_backward(attention: Attention, qkv: Tensor, grad: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """(result, gradient of qkv)"""
    out = attention(qkv, lengths)
    return out, torch.autograd.grad(out, qkv, grad)[0]


class Gate:
    """Lets pass who is as right as torch's own products in this dtype, measured from float64."""

    def __init__(self, shape: Shape, device: str) -> None:
        B = min(shape.B, 4)  # sequences do not know each other
        self.qkv, self.grad, self.lengths = inputs(shape._replace(B=B), 0, device)
        exact = self.qkv.detach().double().requires_grad_()
        self.exact = forward_backward(reference.attention, exact, self.grad.double(), self.lengths)
        real = torch.full((B,), shape.T, device=device) if self.lengths is None else self.lengths
        self.real = is_real(real, shape.T)[..., None, None]
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
        out, grad = (x.detach() for x in forward_backward(attention, self.qkv, self.grad, self.lengths))
        real = self.real, self.real[..., None]
        pairs = zip((out, grad), self.exact, real, strict=True)
        return [float(((found.double() - exact.detach()) * mask).abs().max()) for found, exact, mask in pairs]

    def check(self, name: str, attention: Attention) -> None:
        """Raises ValueError for a wrong answer."""
        errors = self.errors(attention)
        if not all(e <= bar for e, bar in zip(errors, self.bar, strict=True)):
            raise ValueError(f"{name} is wrong by {errors}, allowed are {self.bar}")


def measure(report: Report) -> None:
    from benchmarks.contest import Claim
    from benchmarks.gpu_check import N_INPUTS, claim_ratio, compete

    def call(attention: Attention, sets: list[tuple[Tensor, Tensor, Tensor | None]]) -> Callable[[int], object]:
        return lambda i: forward_backward(attention, *sets[i])

    for module in OPTIONAL:
        if not is_installed(module):
            report.note(f"{module} is not installed")
    for shape in SHAPES:
        what = str(shape)
        if not report.has_time(what, LEAST_S):
            continue
        gate = Gate(shape, "cuda")
        sets = [inputs(shape, i, "cuda") for i in range(N_INPUTS)]
        gate.check("clmfast", ops.attention)
        calls = {}
        for name, attention in rivals(shape, "cuda").items():
            try:
                gate.check(name, attention)
            except Exception as error:  # no kernel for this shape, or a wrong answer: no time
                report.note(f"{what}: {name} left out: {type(error).__name__}: {str(error)[:160]}")
                continue
            calls[name] = ("graph", call(attention, sets))
        times = compete(report, what, call(ops.attention, sets), calls)
        others = {name: us for name, us in times.items() if name != "clmfast"}
        if others and (shape.must is not None or shape.aim is not None):
            claim_ratio(report, what, times, min(others, key=others.__getitem__), shape.must, shape.aim)
        if shape.n_bytes >= COPY_FROM_BYTES and "copy_gbs" in report.limits:
            # q, k, v, out forward; those, the gradient of out and that of q, k, v backward
            moved = shape.n_bytes * (4 + 4 + 1 + 3) / 4
            share = moved / times["clmfast"] / 1e3 / report.limits["copy_gbs"]
            report.claims.append(Claim(f"{what}: share of the rate of copying", 100 * share, None, 85, " %"))

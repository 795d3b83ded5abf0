"""attention: forward and backward of short ragged sequences, against torch's scaled_dot_product_attention.

A contender returns the output [B, T, H, W] and the gradients of q, k, v, each [B, T, H, W] (or None where it has no
padding: then all are [tokens, H, W]). Only real tokens are compared. Rivals hold q, k, v as they like them best, so no
copying is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.contest import N_INPUTS, TORCH, Contender
from benchmarks.worker import Call

TOLERANCE = 1e-4  # absolute, of values around 1


def shape(B: int = 64, H: int = 4, T: int = 32, W: int = 64, shortest: int = 8) -> dict[str, Any]:
    """A case; lengths are uniform in [shortest, T]."""
    return {"B": B, "H": H, "T": T, "W": W, "shortest": shortest}


def lengths(case: dict[str, Any], i: int) -> NDArray[np.int64]:
    found = np.random.default_rng(i).integers(case["shortest"], case["T"] + 1, size=case["B"])
    found[0] = case["T"]  # a batch is padded to its longest sequence
    return found


def inputs(case: dict[str, Any]) -> list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]:
    """The rotated inputs: qkv [B, T, 3, H, W], gradient of the output [B, T, H, W] (zero in the padding), lengths."""
    found = []
    for i in range(N_INPUTS):
        rng, length = np.random.default_rng(i), lengths(case, i)
        B, T, H, W = (case[axis] for axis in "BTHW")
        is_real = np.arange(T) < length[:, None]
        qkv = rng.normal(size=(B, T, 3, H, W)).astype(np.float32)
        grad = rng.normal(size=(B, T, H, W)) * is_real[..., None, None]
        found.append((qkv, grad.astype(np.float32), length))
    return found


def clmfast(case: dict[str, Any]) -> Call:
    import torch

    from clmfast import ops

    tensors = [tuple(torch.from_numpy(x) for x in arrays) for arrays in inputs(case)]

    def call(i: int) -> Any:
        qkv, grad, length = tensors[i % N_INPUTS]
        qkv.requires_grad_()
        out = ops.attention(qkv, length)
        (grad_qkv,) = torch.autograd.grad(out, qkv, grad)
        return out, *grad_qkv.unbind(2)

    return call


def torch_padded(case: dict[str, Any]) -> Call:
    """Padded batches; case["dense"]: q, k, v each dense as [B, H, T, W], else views of one qkv; case["compiled"]."""
    import torch
    from torch.nn import functional as F

    def attend(q: Any, k: Any, v: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if case["compiled"]:
        attend = torch.compile(attend, dynamic=False)
    tensors = []
    for qkv, grad, _ in inputs(case):
        parts = torch.from_numpy(qkv).permute(2, 0, 3, 1, 4).unbind(0)
        if case["dense"]:
            parts = tuple(part.contiguous() for part in parts)
        dense_grad = torch.from_numpy(grad).transpose(1, 2)
        tensors.append(
            ([p.detach().requires_grad_() for p in parts], dense_grad.contiguous() if case["dense"] else dense_grad)
        )

    def call(i: int) -> Any:
        parts, grad = tensors[i % N_INPUTS]
        out = attend(*parts)
        grads = torch.autograd.grad(out, parts, grad)
        return [x.transpose(1, 2) for x in (out, *grads)]

    return call


def torch_nested(case: dict[str, Any]) -> Call:
    """Jagged nested tensors: no padding."""
    import torch
    from torch.nn import functional as F

    tensors = []
    for qkv, grad, length in inputs(case):
        is_real = torch.from_numpy(np.arange(case["T"]) < length[:, None])
        offset = torch.from_numpy(np.concatenate([[0], np.cumsum(length)]))
        leaves = [x.contiguous().requires_grad_() for x in torch.from_numpy(qkv)[is_real].unbind(1)]
        tensors.append((leaves, offset, torch.from_numpy(grad)[is_real], int(length.min()), int(length.max())))

    def call(i: int) -> Any:
        leaves, offset, grad, shortest, longest = tensors[i % N_INPUTS]
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(x, offset, min_seqlen=shortest, max_seqlen=longest).transpose(1, 2)
            for x in leaves
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).values()
        return out, *torch.autograd.grad(out, leaves, grad)

    return call


CONTENDERS = (
    Contender("clmfast", clmfast),
    Contender("torch SDPA", torch_padded, TORCH, options={"dense": True, "compiled": False}),
    Contender("torch SDPA, views of qkv", torch_padded, TORCH, options={"dense": False, "compiled": False}),
    Contender("torch SDPA, compiled", torch_padded, TORCH, options={"dense": True, "compiled": True}),
    Contender("torch SDPA, nested", torch_nested, TORCH),
)


def gate(case: dict[str, Any]) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, str]]:
    def check(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        wrong: dict[str, str] = {}
        for i, (qkv, grad, length) in enumerate(inputs(case)):
            right = [_right(qkv[b, :n].astype(np.float64), grad[b, :n]) for b, n in enumerate(length)]
            is_real = np.arange(case["T"]) < length[:, None]
            for what, values in zip(("output", "dq", "dk", "dv"), zip(*right, strict=True), strict=True):
                expected = np.concatenate(values)
                for name, result in results.items():
                    got = result[i][("output", "dq", "dk", "dv").index(what)]
                    off = np.abs((got[is_real] if got.ndim == 4 else got) - expected).max()
                    if not off <= TOLERANCE:
                        wrong[name] = f"{what} is off by {off:.2g}"
        return wrong

    return check


def _right(qkv: NDArray[np.float64], grad: NDArray[np.float32]) -> tuple[NDArray[np.float64], ...]:
    """(out, dq, dk, dv), each [n, H, W], of one sequence: qkv [n, 3, H, W], grad [n, H, W]."""
    q, k, v = qkv.transpose(1, 2, 0, 3)  # [H, n, W]
    grad_out = grad.transpose(1, 0, 2).astype(np.float64)
    scale = q.shape[-1] ** -0.5
    score = np.where(np.tri(q.shape[1], dtype=bool), q @ k.transpose(0, 2, 1) * scale, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    grad_p = grad_out @ v.transpose(0, 2, 1)
    grad_score = p * (grad_p - (grad_p * p).sum(-1, keepdims=True)) * scale
    found = (p @ v, grad_score @ k, grad_score.transpose(0, 2, 1) @ q, p.transpose(0, 2, 1) @ grad_out)
    return tuple(x.transpose(1, 0, 2) for x in found)


def flops(case: dict[str, Any]) -> float:
    """Two products forward and five backward over the pairs s <= t of real tokens."""
    n_pairs = np.mean([(n * (n + 1) / 2).sum() for n in (lengths(case, i) for i in range(N_INPUTS))])
    return float(7 * 2 * case["H"] * case["W"] * n_pairs)


@pytest.mark.parametrize(
    ("what", "case", "must", "aim"),
    [
        ("attention forward+backward, B64 H4 T<=32 W64 ragged", shape(), 2.0, 4.0),
        ("attention at the shape of the default run, B128 H4 T<=14 W32", shape(128, 4, 14, 32, 7), None, None),
        pytest.param("attention, B32 H8 T<=64 W64", shape(32, 8, 64, 64, 16), None, None, marks=pytest.mark.full),
        pytest.param("attention, B64 H4 T=32 W64, no padding", shape(shortest=32), None, None, marks=pytest.mark.full),
    ],
    ids=["ragged", "default_run", "longer", "even"],
)
def test_attention(compete: Any, claim: Any, what: str, case: dict[str, Any], must: float, aim: float) -> None:
    outcome = compete(what, case, CONTENDERS, gate(case), flops=flops(case))
    n_real, n_padded = (sum(lengths(case, i).sum() for i in range(N_INPUTS)), N_INPUTS * case["B"] * case["T"])
    detail = f"{outcome.best_text()}; {n_real / n_padded:.0%} of the padded batch are tokens"
    claim(what, outcome.ratio(), must, aim, detail=detail)

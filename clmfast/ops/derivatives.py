"""Which derivatives attention and Transformer blocks have: the first one, by backward(). Others are refused.

The fused ops compute a gradient, but neither its derivative nor tangents, and torch would pass these over in silence: a
Hessian-vector product would miss what goes through the model, a tangent would be 0. `with composed():` runs the same
functions as torch's own operations, which have every derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

_n_composed = 0  # blocks of `composed` that are open


@contextmanager
def composed() -> Iterator[None]:
    """Within this block attention and Transformer blocks are torch's own operations: slower, with every derivative.

    Holds for all threads. Values differ from the fused ops' by rounding.
    """
    global _n_composed
    _n_composed += 1
    try:
        yield
    finally:
        _n_composed -= 1


def is_composed() -> bool:
    return _n_composed > 0


def refuse_tangents(op: str, *tensors: Tensor) -> None:
    """Raises RuntimeError where forward mode, or a gradient or tangent of torch.func, is asked of a fused op."""
    if torch.compiler.is_compiling():
        return
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(_only_first(op, "forward mode"))
    if torch._C._are_functorch_transforms_active():
        kinds = torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp
        if any(transform.key() in kinds for transform in torch._C._functorch.get_interpreter_stack() or []):
            raise RuntimeError(_only_first(op, "torch.func"))


def refuse_second(op: str) -> None:
    """Raises RuntimeError in a backward pass that is itself to be differentiated (create_graph=True)."""
    if torch.is_grad_enabled():
        raise RuntimeError(_only_first(op, "a second derivative"))


def _only_first(op: str, asked: str) -> str:
    return f"{op} has the first derivative alone, by backward(), got {asked}: `with clmfast.ops.composed():` has all"

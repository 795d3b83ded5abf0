"""capture_rows: copies chosen rows of a batch into preallocated banks. The contract is csrc/capture.h."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array


def capture_rows(
    x: Array,
    start: Array,
    stop: Array,
    slot: Array | int,
    bank: Tensor | NDArray[Any],
    norm2: Tensor | NDArray[Any],
) -> None:
    """Write R readouts of every sequence of a batch into R rings of N rows, in place, with their squared norms.

        bank [r, (slot + b) % N] = mean of x[b, t] over start[r, b] <= t < stop[r, b]
        norm2[r, (slot + b) % N] = |that row as stored|^2

    x [B, T, D] float32, bfloat16 or float16; start, stop [R, B] integers; bank [R, N, D] of x's dtype; norm2 [R, N]
    float32; B <= N. slot: one integer; an int64 on x's device is a counter that needs no trip to the host. Any strides
    that keep the elements of bank and of norm2 apart; these two share no memory with each other or with what is read.
    Arrays and lists serve as well as tensors; bank and norm2 are written where they are, so that a list cannot be one.
    A span of one token is copied bit for bit; a longer one is averaged in float64. No gradient flows: x may require it.
    """
    op = "capture_rows"
    beside = (x, start, stop, slot, bank, norm2)
    torch.ops.clmfast.capture_rows(
        arguments.points(op, "x", x, beside),
        arguments.labels(op, "start", start, beside),
        arguments.labels(op, "stop", stop, beside),
        arguments.labels(op, "slot", slot, beside),
        arguments.written(op, "bank", bank),
        arguments.written(op, "norm2", norm2),
    )


@arguments.register_fake("capture_rows")
def _(x: Tensor, start: Tensor, stop: Tensor, slot: Tensor, bank: Tensor, norm2: Tensor) -> None:
    return None

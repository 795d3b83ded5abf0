"""capture_rows: copies chosen rows of a batch into preallocated banks. The contract is csrc/capture.h."""

import torch
from torch import Tensor


def capture_rows(x: Tensor, start: Tensor, stop: Tensor, slot: Tensor, bank: Tensor, norm2: Tensor) -> None:
    """Write R readouts of every sequence of a batch into R rings of N rows, in place, with their squared norms.

        bank [r, (slot + b) % N] = mean of x[b, t] over start[r, b] <= t < stop[r, b]
        norm2[r, (slot + b) % N] = |that row as stored|^2

    x [B, T, D] float32, bfloat16 or float16; start, stop [R, B] int64; bank [R, N, D] of x's dtype; norm2 [R, N]
    float32; B <= N. slot: one int64 on x's device, so that a counter there needs no trip to the host. Any strides;
    nothing is allocated.
    A span of one token is copied bit for bit; a longer one is averaged in float64. No gradient flows: x may require it.
    """
    torch.ops.clmfast.capture_rows(x.detach(), start, stop, slot, bank, norm2)


@torch.library.register_fake("clmfast::capture_rows")
def _(x: Tensor, start: Tensor, stop: Tensor, slot: Tensor, bank: Tensor, norm2: Tensor) -> None:
    return None

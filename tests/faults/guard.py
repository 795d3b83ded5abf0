"""Tensors in guarded memory: a read or write that runs off their end, or off their start, ends the process at once.

A slot is 1 MiB of memory between two pages that nobody may touch. A tensor is placed at the very end or the very start
of a slot. Slots are made once and used again for every case: a system call per tensor would cost more than the op.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
SLOT_BYTES = 1 << 20
PROT_NONE = 0
MARGIN = 64  # bytes on the side that no page guards, compared before and after a call
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def span_of(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last that a tensor can reach."""
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class Placed(NamedTuple):
    """A tensor, and the memory that it and its margin lie in."""

    tensor: Tensor
    memory: Tensor  # 1-D, of the tensor's dtype: what its strides can reach
    bytes: Tensor  # uint8, with the margin
    margin: slice  # of `bytes`: what not even an op that writes the tensor may change


class Slot:
    def __init__(self) -> None:
        # Private: a forked child that writes into a slot must not write into its parent's.
        self._map = mmap.mmap(-1, SLOT_BYTES + 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        for page in (start, start + PAGE + SLOT_BYTES):
            if _mprotect(page, PAGE, PROT_NONE) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self._of: dict[torch.dtype, Tensor] = {}

    def whole(self, dtype: torch.dtype) -> Tensor:
        """All of the slot as one 1-D tensor."""
        if dtype not in self._of:
            self._of[dtype] = torch.frombuffer(self._map, dtype=dtype, offset=PAGE, count=SLOT_BYTES // dtype.itemsize)
        return self._of[dtype]

    def place(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, at_end: bool) -> Placed:
        whole, n = self.whole(dtype), span_of(shape, strides)
        first = len(whole) - n if at_end else 0
        byte, n_bytes = first * dtype.itemsize, n * dtype.itemsize
        begin, end = (max(0, byte - MARGIN), SLOT_BYTES) if at_end else (0, min(SLOT_BYTES, n_bytes + MARGIN))
        return Placed(
            whole.as_strided(shape, strides, first),
            whole[first : first + n],
            self.whole(torch.uint8)[begin:end],
            slice(0, byte - begin) if at_end else slice(n_bytes, end),
        )


class Guard:
    """Slots for the tensors of one call."""

    def __init__(self) -> None:
        self._slots: list[Slot] = []
        self._n_used = 0

    def clear(self) -> None:
        """The next call's tensors take the place of the last one's."""
        self._n_used = 0

    def place(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, at_end: bool) -> Placed | None:
        """A tensor of unspecified content; None if no slot has room for it."""
        if span_of(shape, strides) * dtype.itemsize > SLOT_BYTES:
            return None
        if self._n_used == len(self._slots):
            self._slots.append(Slot())
        self._n_used += 1
        return self._slots[self._n_used - 1].place(shape, strides, dtype, at_end)

"""Recorder: the tap that copies hidden states at the readouts into banks that were allocated once, on the device.

A bank is a ring: batch after batch is written behind the last one, and the oldest rows are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clmfast import ops
from clmfast.data.tasks import Batch


def from_host(array: NDArray[Any], device: torch.device | str) -> Tensor:
    """The array as a tensor on the device: the same memory on the CPU, a copy that nobody waits for on a GPU."""
    tensor = torch.from_numpy(array)
    return tensor if torch.device(device).type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def spans(batch: Batch, readouts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(start, stop), each [R, B] int64: readout r of sequence b is the mean state over the rows start <= row < stop.

    instruction_end and prompt_end are spans of one token; `mean` is the whole sequence.
    """
    span = {
        "mean": (batch.offset[:-1], batch.offset[1:]),
        "instruction_end": (batch.instruction_end, batch.instruction_end + 1),
        "prompt_end": (batch.prompt_end, batch.prompt_end + 1),
    }
    start, stop = (from_host(np.stack([span[r][i] for r in readouts]), device) for i in range(2))
    return start, stop


class Recorder:
    """A ring of N states for every layer and readout: `bank` [L, R, N, D], `norm2` [L, R, N] float32.

    `aim` at the readouts of a batch, run the model with the recorder as its tap, then `advance`: the rows that it
    returns now hold the batch, and `example` [N] says which example each row is (-1: still empty).
    """

    def __init__(
        self,
        n_layers: int,
        readouts: Sequence[str],
        n_points: int,
        width: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.readouts = tuple(readouts)
        self.bank = torch.zeros(n_layers, len(readouts), n_points, width, device=device, dtype=dtype)
        self.norm2 = torch.zeros(n_layers, len(readouts), n_points, device=device, dtype=torch.float32)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.example = torch.full((n_points,), -1, dtype=torch.int64, device="cpu")
        self.n_written = 0
        self._span = self._span_of_last = (torch.empty(0, device="cpu"), torch.empty(0, device="cpu"))

    @property
    def n_points(self) -> int:
        return len(self.example)

    @property
    def n_filled(self) -> int:
        """Rows that hold a state."""
        return min(self.n_written, self.n_points)

    @property
    def points(self) -> Tensor:
        """The bank as point sets [S, N, D], S = layers x readouts, readout fastest; a view."""
        return self.bank.flatten(0, 1)

    def aim(self, start: Tensor, stop: Tensor, kept: Tensor | None = None) -> None:
        """Say where in the coming batch the readouts are, start and stop [R, B] as of `spans`; kept [R] are the rows
        that the last layer holds, ascending, if not all: every readout has to be among them."""
        self._span = self._span_of_last = (start, stop)
        if kept is not None:
            first = torch.searchsorted(kept, start)
            self._span_of_last = (first, first + (stop - start))

    def __call__(self, layer: int, x: Tensor) -> None:
        """The tap: copy the readouts of x [n, D] behind the rows written last."""
        start, stop = self._span_of_last if layer == len(self.bank) - 1 else self._span
        ops.capture_rows(x, start, stop, self.slot, self.bank[layer], self.norm2[layer])

    def advance(self, example: Tensor) -> Tensor:
        """After the model ran: note the batch's examples [B]; returns its rows in the bank [B] int64."""
        self.slot += len(example)
        return self.note(example)

    def note(self, example: Tensor) -> Tensor:
        """The part of `advance` that is the host's: a graph that is replayed moves the slot itself."""
        rows = self.next_rows(len(example))
        self.example[rows] = example
        self.n_written += len(example)
        return rows

    def next_rows(self, n: int) -> Tensor:
        """The rows [n] that the next n states will be written to."""
        return (self.n_written + torch.arange(n, device="cpu")) % self.n_points

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs to go on with the same ring."""
        return {"bank": self.bank, "norm2": self.norm2, "example": self.example, "slot": self.slot}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.n_written = int(self.slot)

"""Recorder: the tap that copies hidden states at the readouts into banks that were allocated once, on the device.

A bank is a ring: batch after batch is written behind the last one, and the oldest rows are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clmfast import ops
from clmfast.data.tasks import Batch


def spans(batch: Batch, readouts: Sequence[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(start, stop), each [R, B] int64: readout r of sequence b is the mean state over tokens start <= t < stop.

    instruction_end and prompt_end are spans of one token; `mean` is all real tokens.
    """
    first = {"mean": batch.length * 0, "instruction_end": batch.instruction_end, "prompt_end": batch.prompt_end}
    last = {"mean": batch.length - 1, "instruction_end": batch.instruction_end, "prompt_end": batch.prompt_end}
    start = torch.stack([torch.from_numpy(first[r]) for r in readouts])
    stop = torch.stack([torch.from_numpy(last[r]) for r in readouts]) + 1
    return start.to(device), stop.to(device)


class Recorder:
    """A ring of N states for every layer and readout: `bank` [L, R, N, D], `norm2` [L, R, N] float32.

    `aim` at a batch, run the model with the recorder as its tap, then `advance`: rows `rows` now hold the batch, and
    `example` [N] says which example each row is (-1: still empty).
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
        self.norm2 = torch.zeros(n_layers, len(readouts), n_points, device=device)
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.example = torch.full((n_points,), -1, dtype=torch.int64)
        self.n_written = 0
        self._start = self._stop = torch.empty(0)

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

    def aim(self, batch: Batch) -> None:
        """Say where in the coming batch the readouts are."""
        self._start, self._stop = spans(batch, self.readouts, self.bank.device)

    def __call__(self, layer: int, x: Tensor) -> None:
        """The tap: copy the readouts of x [B, T, D] behind the rows written last."""
        ops.capture_rows(x, self._start, self._stop, self.slot, self.bank[layer], self.norm2[layer])

    def advance(self, example: Tensor) -> Tensor:
        """After the model ran: note the batch's examples [B]; returns its rows in the bank [B] int64."""
        rows = (self.n_written + torch.arange(len(example))) % self.n_points
        self.example[rows] = example
        self.n_written += len(example)
        self.slot += len(example)
        return rows

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs to go on with the same ring."""
        return {"bank": self.bank, "norm2": self.norm2, "example": self.example, "slot": self.slot}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.n_written = int(self.slot)

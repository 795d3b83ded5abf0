"""capture_rows: the states at two readouts of every sequence, with their squared norms, from all layers of a forward
pass into rings, at the shape of the default run. One call is all layers of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contest import N_INPUTS, TORCH, Contender
from benchmarks.worker import Call

NORM2_TOLERANCE = 1e-5  # relative; rows themselves are copies


def shape(L: int = 7, B: int = 128, T: int = 14, D: int = 128, N: int = 2048) -> dict[str, Any]:
    """A case: L layers, a ring of N rows for each of two readouts."""
    return {"L": L, "B": B, "T": T, "D": D, "N": N}


def inputs(case: dict[str, Any]) -> list[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """The rotated inputs: states [L, B, T, D] and positions [2, B] of the readouts."""
    found = []
    for i in range(N_INPUTS):
        rng = np.random.default_rng(i)
        states = rng.normal(size=[case[axis] for axis in "LBTD"]).astype(np.float32)
        found.append((states, rng.integers(case["T"], size=(2, case["B"]))))
    return found


def first_row(case: dict[str, Any], i: int) -> int:
    """Where call i starts to write."""
    return i * case["B"] % case["N"]


def rings(case: dict[str, Any]) -> tuple[Any, Any]:
    """(bank [L, 2, N, D], norm2 [L, 2, N])."""
    import torch

    return torch.zeros(case["L"], 2, case["N"], case["D"]), torch.zeros(case["L"], 2, case["N"])


def as_tensors(case: dict[str, Any]) -> list[tuple[Any, Any]]:
    import torch

    return [(torch.from_numpy(states), torch.from_numpy(position)) for states, position in inputs(case)]


def written(case: dict[str, Any], i: int, bank: Any, norm2: Any) -> tuple[Any, Any]:
    """What call i wrote: views of the rings."""
    rows = slice(first_row(case, i), first_row(case, i) + case["B"])
    return bank[:, :, rows], norm2[:, :, rows]


def clmfast(case: dict[str, Any]) -> Call:
    import torch

    from clmfast import ops

    bank, norm2 = rings(case)
    tensors, slot = as_tensors(case), torch.zeros(1, dtype=torch.int64)
    stops = [position + 1 for _, position in tensors]

    def call(i: int) -> Any:
        states, position = tensors[i % N_INPUTS]
        slot.fill_(first_row(case, i))
        for layer, x in enumerate(states):
            ops.capture_rows(x, position, stops[i % N_INPUTS], slot, bank[layer], norm2[layer])
        return written(case, i, bank, norm2)

    return call


def torch_hooks(case: dict[str, Any]) -> Call:
    """Forward hooks that pick the rows by indexing, on modules that do nothing else; case["compiled"]: the picking
    through torch.compile."""
    import torch
    from torch import nn

    bank, norm2 = rings(case)
    tensors, sequence = as_tensors(case), torch.arange(case["B"])
    now: dict[str, Any] = {}

    def pick(x: Any, position: Any, bank: Any, norm2: Any) -> None:
        rows = x[sequence, position]
        bank.copy_(rows)
        norm2.copy_(rows.square().sum(-1))

    if case["compiled"]:
        pick = torch.compile(pick, dynamic=False)

    def hook_of(layer: int) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            rows = now["rows"]
            pick(output.detach(), now["position"], bank[layer, :, rows], norm2[layer, :, rows])

        return hook

    layers = [nn.Identity() for _ in range(case["L"])]
    for layer, module in enumerate(layers):
        module.register_forward_hook(hook_of(layer))

    def call(i: int) -> Any:
        states, now["position"] = tensors[i % N_INPUTS]
        now["rows"] = slice(first_row(case, i), first_row(case, i) + case["B"])
        for module, x in zip(layers, states, strict=True):
            module(x)
        return written(case, i, bank, norm2)

    return call


CONTENDERS = (
    Contender("clmfast", clmfast),
    Contender("torch hooks", torch_hooks, TORCH, options={"compiled": False}),
    Contender("torch hooks, compiled", torch_hooks, TORCH, options={"compiled": True}),
)


def gate(case: dict[str, Any]) -> Callable[[Mapping[str, Sequence[Any]]], dict[str, str]]:
    def check(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
        wrong: dict[str, str] = {}
        for i, (states, position) in enumerate(inputs(case)):
            right = states[:, np.arange(case["B"]), position]  # [L, 2, B, D]
            right_norm2 = (right.astype(np.float64) ** 2).sum(-1)
            for name, result in results.items():
                rows, norm2 = result[i]
                if not np.array_equal(rows, right):
                    wrong[name] = "rows are not the states at the readouts"
                elif not np.abs(norm2 / right_norm2 - 1).max() <= NORM2_TOLERANCE:
                    wrong[name] = "squared norms are off"
        return wrong

    return check


def test_capture(compete: Any, claim: Any) -> None:
    case, what = shape(), "capture of 7 layers, 2 readouts, batch 128, D = 128"
    bytes_moved = 2 * 4.0 * case["L"] * 2 * case["B"] * case["D"]  # every row read and written once
    outcome = compete(what, case, CONTENDERS, gate(case), bytes_moved=bytes_moved)
    claim(what, outcome.ratio(), detail=outcome.best_text())

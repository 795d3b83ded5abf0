"""Leaks: the same calls of every op again and again, good and refused ones, while memory in use must stay as it is.

Measured is what the allocators have given out and not got back, of C (mallinfo2) and of Python: exact to the byte,
so that a few thousand calls tell what by resident memory would take millions. The long run watches resident memory too.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.faults import table
from tests.faults.arguments import Maker, spoil
from tests.faults.worker import Cases, Limits, Progress, run_cases

N_GOOD, N_REFUSED = 3, 4  # calls of an op that are repeated, of either kind
ROUNDS = 3  # a leak grows in each
SURE_CALLS = 2000  # in a round
LIMITS = (  # per call: less than the smallest thing that can be lost, more than noise
    (16, "bytes of C's memory"),
    (0.5, "of Python's objects"),
    (mmap.PAGESIZE / 2, "bytes of resident memory"),  # what no allocator knows of, such as a mapping
)


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


_mallinfo = ctypes.CDLL(None).mallinfo2
_mallinfo.restype = _Mallinfo


def in_use() -> tuple[int, int, int]:
    """(bytes of C's allocator, blocks of Python's, bytes resident)."""
    gc.collect()
    info = _mallinfo()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    return info.uordblks + info.hblkhd, sys.getallocatedblocks(), resident


class LeakCases:
    """Case i repeats each of some calls of op i, `n_calls` times in all."""

    name = "leaks"

    def __init__(self, ops: list[table.Op], n_calls: int, seed: int) -> None:
        self.ops, self.n_calls, self.seed = ops, n_calls, seed
        self.command = f"python -m tests.faults leaks --seed {seed}  # op {{i}}"

    def start(self) -> None:
        torch.set_num_threads(1)
        self.maker = Maker()
        gc.freeze()  # all of torch: a collection then takes no time

    def describe(self, i: int) -> str:
        return self.ops[i].name

    def run(self, i: int) -> str | None:
        op = self.ops[i]
        calls = self._calls(op)
        n = max(10, self.n_calls // (ROUNDS * len(calls)))
        for given in calls:
            # Caches fill up over a few thousand calls; who is suspected after a few is watched for longer.
            if self._leak(op, given, n) and (leak := self._leak(op, given, max(n, SURE_CALLS))):
                return f"leaks {leak} per call: {op.name}\n    {_words(given)}"
        return None

    def _leak(self, op: table.Op, given: dict[str, Any], n: int) -> str | None:
        marks = [in_use()]
        for _ in range(ROUNDS):
            for _ in range(n):
                _call(op, given)
            marks.append(in_use())
        for kind, (limit, unit) in enumerate(LIMITS):
            amount = min(b[kind] - a[kind] for a, b in pairwise(marks)) / n
            if amount > limit:
                return f"{amount:.3g} {unit}"
        return None

    def _calls(self, op: table.Op) -> list[dict[str, Any]]:
        """Small good calls, and calls that are refused; tensors of their own, which outlive the maker's."""
        rng = Random(f"{self.seed}/leaks/{op.name}")
        good, refused = [], []
        for _ in range(300):
            arguments = op.draw(rng)
            is_good = len(good) < N_GOOD
            if not is_good:
                spoil(arguments, rng, True, op.counts)
            try:
                given = _copied(self.maker.make(arguments, rng).arguments)
            except RuntimeError:
                continue
            is_small = sum(x.numel() for x in table._tensors(given)) < 500
            if is_small and _call(op, given) == is_good:
                (good if is_good else refused).append(given)
            if len(refused) == N_REFUSED:
                break
        return good + refused


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list):
        return [_copied(x) for x in value]
    return {key: _copied(x) for key, x in value.items()} if isinstance(value, dict) else value


def _words(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_word(value)}" for name, value in given.items())


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_word(x) for x in value)}]"
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)


def _call(op: table.Op, given: dict[str, Any]) -> bool:
    try:
        op.call(**given)
    except Exception:
        return False
    return True


def main(is_long: bool, seed: int) -> int:
    ops = table.PUBLIC + table.RAW
    n_calls = (1_000_000 if is_long else 60_000) // len(ops)
    cases: Cases = LeakCases(ops, n_calls, seed)
    progress = Progress(f"leaks, {n_calls:,} calls each", len(ops))
    faults = run_cases(cases, len(ops), Limits(case_s=600), progress)
    progress.end(faults)
    for fault in faults:
        print(f"FAULT {fault.text}")
    return len(faults)

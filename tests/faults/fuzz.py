"""Fuzzing: random calls of all ops and random damage to all files that are read, most of them almost right.

A call may succeed, or be refused by an exception of one line. Faults are crashes, hangs, exceptions of other kinds or
with texts of the machinery below, good calls that are refused, inputs that change, and results that differ from one
call to the next, from 1 to 2 threads, from uninitialised memory to memory full of NaN, or from reference.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from copy import deepcopy
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.faults import readers, table
from tests.faults.arguments import BENIGN, Maker, Spec, leaves, spoil
from tests.faults.worker import Cases, Fault, Limits, Progress, run_cases

ALLOWED = (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError, MemoryError)
INTERNAL = ("INTERNAL ASSERT", "API call failed", "std::", "bad_alloc", "vector::", "stoi", "unknown", "Unknown")
TORCHS_OWN = (
    "Declaration: ",
    "Could not run '",
    "There were no tensor arguments",
)  # texts of torch's dispatcher take several lines
MAX_ALIKE = 4  # examples that are printed
GOOD_SHARE = 0.25  # of the calls, that are left as they were drawn
CHECK_SHARE = 0.15  # of those that could be, are compared with the reference
CHECK_SIZE = 2000  # elements in all that a call compared with the reference may have


def ran_out(error: BaseException) -> bool:
    """Was there no memory? oneDNN, which torch's own products go to, has words of its own for that."""
    return isinstance(error, MemoryError) or "could not create a primitive" in str(error)


class OpCases:
    """Calls of the ops of a list."""

    def __init__(self, name: str, ops: list[table.Op], seed: int) -> None:
        self.name, self.ops, self.seed = name, ops, seed
        self.command = f"python -m tests.faults fuzz --seed {seed} --case {name}:{{i}}"

    def start(self) -> None:
        torch.set_num_threads(1)
        self.maker = Maker()

    def draw(self, i: int) -> tuple[table.Op, dict[str, Any], list[str], Random]:
        rng = Random(f"{self.seed}/{self.name}/{i}")
        op = self.ops[rng.randrange(len(self.ops))]
        arguments = op.draw(rng)
        is_good = rng.random() < GOOD_SHARE
        marks = [] if is_good else spoil(arguments, rng, self.name == "public", op.counts)
        for name in op.writes:  # torch itself negates what is to be written, and leaves it so when the op refuses
            if isinstance(spec := arguments[name], Spec) and spec.form == "negated":
                spec.form = "tensor"
        return op, arguments, marks, rng

    def describe(self, i: int) -> str:
        op, arguments, marks, _ = self.draw(i)
        return f"{op.name} ({', '.join(marks) or 'good'})\n{_words(op, arguments, marks)}"

    def run(self, i: int) -> str | None:
        op, arguments, marks, rng = self.draw(i)
        try:
            made = self.maker.make(arguments, rng)
        except (RuntimeError, TypeError, MemoryError, OverflowError):  # there is no such tensor, or no room for it
            return None
        wrong = self._wrong(op, arguments, marks, made, rng)
        return f"{wrong} {op.name}\n{_words(op, arguments, marks)}" if wrong else None

    def _wrong(self, op: table.Op, arguments: dict[str, Any], marks: list[str], made: Any, rng: Random) -> str | None:
        written = {id(spec) for name in op.writes for spec in _specs(arguments.get(name))}
        before = [place.bytes.clone() for _, place in made.placed]
        found, error = _attempt(op, made.arguments)
        for (spec, place), old in zip(made.placed, before, strict=True):
            region = place.margin if id(spec) in written and error is None else slice(None)
            if not torch.equal(place.bytes[region], old[region]):
                return (
                    "a call that was refused wrote to its arguments:"
                    if error
                    else "an input, or memory beside it, changed:"
                )
        is_good = not {mark.split(" of ")[0] for mark in marks} - BENIGN
        if error is not None:
            return _wrong_error(error, is_good)
        wrong = self._wrong_again(op, made, before, written, found, rng)
        if wrong or not is_good:
            return wrong
        if op.check and rng.random() < CHECK_SHARE and _size(arguments) < CHECK_SIZE:
            try:
                op.check(made.arguments, self._result)
            except AssertionError as mismatch:
                return f"differs from the reference: {' '.join(str(mismatch).split())[:200]}:"
        if self.name == "raw" and rng.random() < 0.1:
            return self._wrong_meta(op, arguments, found, rng)
        return None

    def _wrong_again(
        self, op: table.Op, made: Any, before: list[Tensor], written: set[int], found: list[Tensor], rng: Random
    ) -> str | None:
        """Once more, perhaps with two threads, and with all new memory full of NaN."""
        for (spec, place), old in zip(made.placed, before, strict=True):
            if id(spec) in written:
                found = [x.clone() for x in found]
                place.bytes.copy_(old)
        n_threads = 2 if not op.threads_show and rng.random() < 0.1 else 1
        if n_threads == 2:
            torch.set_num_threads(2)
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            again, error = _attempt(op, made.arguments, keep := [])
            self._result = keep[0] if keep else None  # with its fields, for the check
        finally:
            torch._C._set_deterministic_algorithms(False)
            if n_threads == 2:
                torch.set_num_threads(1)
        if error is not None and ran_out(error):
            return None
        if error is not None:
            return f"succeeds once, and then not: {type(error).__name__}: {_line(error)}:"
        for a, b in zip(found, again, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype or not _same_bits(a, b):
                return f"another result the second time ({n_threads} threads, new memory full of NaN):"
        return None

    def _wrong_meta(self, op: table.Op, arguments: dict[str, Any], found: list[Tensor], rng: Random) -> str | None:
        """Shapes and dtypes of the fake implementation, which torch.compile goes by."""
        on_meta = deepcopy(arguments)
        for _, _, value in leaves(on_meta):
            if isinstance(value, Spec):
                value.device = "meta"
        fake, error = _attempt(op, self.maker.make(on_meta, rng).arguments)
        if error is not None:
            return f"refused on meta: {type(error).__name__}: {_line(error)}:"
        if [(x.shape, x.dtype, x.stride()) for x in fake] != [(x.shape, x.dtype, x.stride()) for x in found]:
            return "another shape, dtype or stride on meta:"
        return None


def _attempt(
    op: table.Op, given: dict[str, Any], keep: list[Any] | None = None
) -> tuple[list[Tensor], BaseException | None]:
    try:
        result = op.call(**given)
    except Exception as error:
        return [], error
    if keep is not None:
        keep.append(result)
    return table._tensors(result if not isinstance(result, Tensor) else [result]), None


def _wrong_error(error: BaseException, is_good: bool) -> str | None:
    text = str(error)
    told = f"{type(error).__name__}: {_line(error)}:"
    if is_good and "could not create a primitive" in text:
        return None  # the kernels that oneDNN has made for other shapes fill the memory that a worker may have
    if is_good:
        return f"a good call is refused: {told}"
    if not isinstance(error, ALLOWED):
        return f"an exception of another kind: {told}"
    if any(mark in text for mark in INTERNAL):
        return f"a text of the machinery: {told}"
    if not text.strip() or ("\n" in text.strip() and not any(mark in text for mark in TORCHS_OWN)):
        return f"not one line: {told}"
    return None


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 160 else text[:160] + "..."


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or torch.equal(a, b):
        return True
    if a.numel() == 0 or not a.dtype.is_floating_point:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _specs(value: Any) -> list[Spec]:
    return [value] if isinstance(value, Spec) else []


def _size(arguments: dict[str, Any]) -> int:
    return sum(torch.Size(value.shape).numel() for _, _, value in leaves(arguments) if isinstance(value, Spec))


def _words(op: table.Op, arguments: dict[str, Any], marks: list[str]) -> str:
    """The call, and what was done to a good one."""
    given = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"    {op.name}({given})" + "".join(f"\n    spoilt: {mark}" for mark in marks)


# ---- the harness


def sources(seed: int) -> dict[str, tuple[Cases, int, int]]:
    """By name: the cases, how many of them, and how many in the long run."""
    return {
        "public": (OpCases("public", table.PUBLIC, seed), 11_000, 1_000_000),
        "raw": (OpCases("raw", table.RAW, seed), 5_000, 100_000),
        "readers": (readers.ReaderCases(seed), 4_000, 100_000),
    }


def warm() -> None:
    """What torch imports when a meta tensor first meets an operation takes seconds: once here, not in every child.
    With one thread no pool of threads is started, which a child would lack."""
    torch.set_num_threads(1)
    torch.nn.functional.layer_norm(torch.empty(1, 1, device="meta"), (1,))


def main(
    is_long: bool, seed: int, n_cases: int | None = None, only: tuple[str, ...] = (), sanitized: bool = False
) -> int:
    """Returns the number of faults."""
    if names := table.missing():
        print(f"fuzz: these ops have no generator in tests/faults/table.py: {', '.join(sorted(names))}")
        return len(names)
    warm()
    limits = Limits(memory_bytes=None if sanitized else Limits().memory_bytes)
    n_faults = 0
    for name, (cases, n, n_long) in sources(seed).items():
        if only and name not in only:
            continue
        n = n_cases or (n_long if is_long else n)
        progress = Progress(f"fuzz {name}", n)
        faults = run_cases(cases, n, limits, progress)
        progress.end(faults)
        report(cases, faults)
        n_faults += len(faults)
    return n_faults


def report(cases: Cases, faults: list[Fault]) -> None:
    """One example of every kind of fault, with the command that shows it again."""
    kinds = Counter(fault.kind for fault in faults)
    shown: Counter[str] = Counter()
    for fault in sorted(faults, key=lambda fault: (-kinds[fault.kind], fault.kind, len(fault.text))):
        shown[fault.kind] += 1
        alike = fault.kind.split(" (")[0]  # deaths of one op, whatever was done to its arguments
        shown[alike] += alike != fault.kind
        if shown[fault.kind] == 1 and shown[alike] <= MAX_ALIKE:
            print(f"FAULT {fault.text}\n    {cases.command.format(i=fault.i)}", flush=True)


def one(seed: int, case: str) -> int:
    """Run one case, in a child as ever, and say all about it."""
    name, i = case.split(":")
    cases = sources(seed)[name][0]
    print(cases.describe(int(i)), flush=True)
    warm()
    faults = run_cases(_Only(cases, int(i)), 1, Limits())
    for fault in faults:
        print(f"FAULT {fault.text}")
    if not faults:
        print("no fault")
    sys.stdout.flush()
    return len(faults)


class _Only:
    """One of the cases, as the only one."""

    def __init__(self, cases: Cases, i: int) -> None:
        self.cases, self.i = cases, i
        self.name, self.command = cases.name, cases.command
        self.start = cases.start

    def run(self, _: int) -> str | None:
        return self.cases.run(self.i)

    def describe(self, _: int) -> str:
        return self.cases.describe(self.i)

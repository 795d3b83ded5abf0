"""Runs numbered cases in child processes that may crash or hang: either is recorded, and the rest goes on.

A child writes the number of its case into shared memory before it runs it. When it dies, or takes too long, its parent
knows which case it was, and starts another child behind that case. Children are forked: torch is imported once, and the
parent must not run any of its parallel loops itself, whose threads would be missing in a child.
"""

from __future__ import annotations

import ast
import contextlib
import faulthandler
import mmap
import os
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

MAX_DEATHS = 300  # more of them than that are one fault that swamps all others
KEPT_PER_KIND = 3
# A sanitizer ends the process where `new` would throw and the call be refused; a run without sanitizers sees that.
OUT_OF_MEMORY = "allocator is out of memory"


class Cases(Protocol):
    """Cases 0, 1, 2, ... of which every one is a function of its number alone."""

    name: str
    command: str  # reproduces case {i}

    def start(self) -> None:
        """Called once in every child."""

    def run(self, i: int) -> str | None:
        """What is wrong with case i."""

    def describe(self, i: int) -> str:
        """Case i in words, without running it."""


class Fault(NamedTuple):
    cases: str
    i: int
    text: str

    @property
    def kind(self) -> str:
        """Faults that differ in numbers alone are of one kind."""
        return re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[+-]?\d+)?", "#", self.text.split("\n")[0])


class Limits(NamedTuple):
    case_s: float = 20  # wall time: two children and whoever else share the cores
    memory_bytes: int | None = 2 << 30  # of address space, beyond what a child starts with
    n_workers: int = 2


def run_cases(
    cases: Cases, n_cases: int, limits: Limits, tell: Callable[[int, int], None] | None = None
) -> list[Fault]:
    """Run cases 0 to n_cases - 1; `tell(n_done, n_faults)` is called a few times a second."""
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(_Worker(cases, range(w, n_cases, limits.n_workers), limits))
            for w in range(min(limits.n_workers, n_cases))
        ]
        faults: list[Fault] = []
        while not all(worker.is_finished for worker in workers):
            time.sleep(0.02)
            faults += [fault for worker in workers for fault in worker.watch()]
            if sum(worker.n_deaths for worker in workers) > MAX_DEATHS:
                faults.append(
                    Fault(cases.name, -1, f"more than {MAX_DEATHS} cases crashed or hung: the rest was left out")
                )
                break
            if tell:
                tell(sum(worker.n_done for worker in workers), len(faults))
    return faults


class _Worker:
    """One child after the other, for the cases of a range."""

    def __init__(self, cases: Cases, numbers: range, limits: Limits) -> None:
        self.cases, self.numbers, self.limits = cases, numbers, limits
        self.n_deaths = 0
        self.is_finished = False
        shared = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the children
        self._at = memoryview(shared).cast("q")  # [0]: position in `numbers`
        self._since = memoryview(shared)[8:].cast("d")  # [0]: when that case started
        self._folder = tempfile.TemporaryDirectory(prefix="faults-")
        self._said = Path(self._folder.name, "said")  # what the child and its libraries print
        self._found = Path(self._folder.name, "found")
        self._found.touch()
        self._n_read = 0
        self._pid = 0

    def __enter__(self) -> _Worker:
        self._start(0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._folder.cleanup()

    @property
    def n_done(self) -> int:
        return len(self.numbers) if self.is_finished else self._at[0]

    def watch(self) -> list[Fault]:
        """What came to light since the last call; starts a new child where one is needed."""
        if self.is_finished:
            return []
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        died = None
        if pid:
            self._pid = 0
            if os.waitstatus_to_exitcode(status) == 0:
                self.is_finished = True
                return self._read()
            died = _death(status)
        elif time.monotonic() - self._since[0] > self.limits.case_s:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
            died = f"hangs: more than {self.limits.case_s:g} s"
        if self._said.exists() and self._said.stat().st_size > 1 << 20:
            os.truncate(self._said, 0)
        faults = self._read()
        if died:
            i, words = self.numbers[self._at[0]], self._last_words()
            if OUT_OF_MEMORY not in words:
                faults.append(Fault(self.cases.name, i, f"{died}: {self.cases.describe(i)}{words}"))
                self.n_deaths += 1
            self._start(self._at[0] + 1)
        return faults

    def _start(self, at: int) -> None:
        if at >= len(self.numbers):
            self.is_finished = True
            return
        self._at[0], self._since[0] = at, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid:
            return
        code = 1
        try:
            self._be_child(at)
            code = 0
        except BaseException as error:
            os.write(2, f"the harness itself failed: {type(error).__name__}: {error}\n".encode())
            raise
        finally:
            os._exit(code)

    def _be_child(self, first: int) -> None:
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
        faulthandler.enable(said)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.limits.memory_bytes is not None:
            own = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (own + self.limits.memory_bytes,) * 2)
        self.cases.start()
        seen: Counter[str] = Counter()
        with self._found.open("a") as found:
            for at in range(first, len(self.numbers)):
                self._at[0], self._since[0] = at, time.monotonic()
                if text := self.cases.run(self.numbers[at]):
                    fault = Fault(self.cases.name, self.numbers[at], text)
                    seen[fault.kind] += 1
                    if seen[fault.kind] <= KEPT_PER_KIND:
                        found.write(f"{fault.i}\t{fault.text!r}\n")
                        found.flush()
        self._at[0] = len(self.numbers)

    def _read(self) -> list[Fault]:
        with self._found.open() as file:
            file.seek(self._n_read)
            lines = file.read()
            whole = lines[: lines.rfind("\n") + 1]
            self._n_read += len(whole.encode())
        split = (line.split("\t", 1) for line in whole.splitlines())
        return [Fault(self.cases.name, int(i), ast.literal_eval(text)) for i, text in split]

    def _last_words(self) -> str:
        """What a sanitizer or the harness said before the child died."""
        text = self._said.read_text(errors="replace") if self._said.exists() else ""
        marks = ("ERROR: AddressSanitizer", "CHECK failed", "runtime error:", "harness itself")
        lines = text.splitlines()
        first = next((i for i, line in enumerate(lines) if any(mark in line for mark in marks)), None)
        if first is None:
            return ""
        near = [line for line in lines[first + 1 : first + 60] if re.match(r"\s+#\d+ .*csrc", line)]
        return "\n    " + "\n    ".join([lines[first], *near[:6]])


def _death(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"dies of {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ends with exit code {os.waitstatus_to_exitcode(status)}"


class Progress:
    """One line with the time left; on a terminal it is written over."""

    def __init__(self, name: str, n_cases: int) -> None:
        self.name, self.n_cases, self.began, self.told = name, n_cases, time.monotonic(), 0.0

    def __call__(self, n_done: int, n_faults: int) -> None:
        now = time.monotonic()
        if now - self.told < (0.5 if sys.stdout.isatty() else 15):
            return
        self.told = now
        took = now - self.began
        left = took / n_done * (self.n_cases - n_done) if n_done else float("nan")
        line = f"{self.name}: {n_done:,} of {self.n_cases:,}, {n_faults} faults, {left:.0f} s left"
        print(f"\r{line}\x1b[K" if sys.stdout.isatty() else line, end="" if sys.stdout.isatty() else "\n", flush=True)

    def end(self, faults: list[Fault]) -> None:
        took = time.monotonic() - self.began
        clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        rate = self.n_cases / took
        print(
            f"{clear}{self.name}: {self.n_cases:,} cases in {took:.0f} s ({rate:,.0f}/s), {len(faults)} faults",
            flush=True,
        )

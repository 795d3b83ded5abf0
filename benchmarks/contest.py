"""A contest: the same work done by several contenders in turn, in one run.

    prepare    every contender in its process; what is not installed is skipped, what fails is dropped, both by name
    gate       every contender's results are checked; who is wrong is dropped and gets no time
    rounds     contenders take turns on rotated inputs, only one process computing at a time
    outcome    medians and quartiles, ratios, share of the machine's limit

A contender gets about `budget_s` seconds of rounds. A turn is one call, or as many as last TURN_S, behind one that is
not timed and wakes the threads. Before a turn everybody waits SETTLE_S, so that waiting threads stop spinning (OpenMP's
and OpenBLAS's do for some 15 to 30 ms) before the next contender starts: no library's way of waiting has to be changed.
How much processor time the others took during a turn is recorded all the same.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, Limits, is_installed, openblas_core
from benchmarks.worker import Call

N_INPUTS = 3  # rotated, so that no contender finds its input in the nearest cache
MIN_ROUNDS, MAX_ROUNDS = 3, 40
TURN_S = 0.02
SETTLE_S = 0.04
PATIENCE_S = 300.0  # for one answer of a worker

Gate = Callable[[Mapping[str, Sequence[Any]]], Mapping[str, str]]
"""gate(results by contender, one for each checked input) returns what is wrong, by contender."""


def anchor(results: Mapping[str, Sequence[Any]], name: str) -> Sequence[Any]:
    """The results that a gate compares all others with. Without them there is no contest."""
    if name not in results:
        raise ContenderFailed(f"nothing can be checked without {name}")
    return results[name]


class Clock:
    """Time as the workers report it. pytest-benchmark is given this clock, so that its statistics are those of the work
    and not of the way to the worker and back."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


CLOCK = Clock()


class ContenderFailed(RuntimeError):
    """What a worker answered instead of a result."""


@dataclass(frozen=True)
class Process:
    """Contenders of equal Process share a worker. `environment` holds settings beyond those that every worker has;
    threads 0: as many as the run has. n_cores: on how many cores it may run, 0: one for each thread."""

    name: str
    environment: tuple[tuple[str, str], ...] = ()
    threads: int = 0
    n_cores: int = 0


CLMFAST, TORCH = Process("clmfast"), Process("torch")


@dataclass(frozen=True)
class Contender:
    """`make(case)`, a function of a benchmarks module, prepares inputs and returns the Call that is timed.

    `options` are added to the case; `needs` names modules without which the contender is skipped.
    """

    name: str
    make: Callable[[dict[str, Any]], Call]
    process: Process = CLMFAST
    needs: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A contender's process, seen from outside. Requests are the methods of worker.Server."""

    def __init__(self, process: Process, threads: int) -> None:
        threads = process.threads or threads
        ours, theirs = socket.socketpair()
        pools = ("OMP", "OPENBLAS", "MKL", "NUMBA")
        environment = {
            **os.environ,
            **{f"{pool}_NUM_THREADS": str(threads) for pool in pools},
            "OPENBLAS_CORETYPE": openblas_core(),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **dict(process.environment),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", str(theirs.fileno()), str(process.n_cores or threads)],
            cwd=ROOT,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())

    def ask(self, request: str, *arguments: Any) -> Any:
        try:
            self._connection.send((request, *arguments))
            if not self._connection.poll(PATIENCE_S):
                self.close()
                raise ContenderFailed(f"no answer within {PATIENCE_S:.0f} s")
            is_fine, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ContenderFailed("its process died") from error
        if not is_fine:
            raise ContenderFailed(answer)
        return answer

    def processor_s(self) -> float:
        """Processor time of all its threads so far."""
        tasks = Path(f"/proc/{self._process.pid}/task").glob("*/schedstat")
        try:
            return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
        except OSError:  # a thread ended between the listing and the reading
            return 0.0

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Times:
    """One contender's seconds per call, one number a turn."""

    seconds: tuple[float, ...]
    calls_per_turn: int

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds))

    def describe(self) -> dict[str, Any]:
        low, median, high = (1e3 * np.quantile(self.seconds, (0.25, 0.5, 0.75))).tolist()
        return {
            "median_ms": median,
            "q1_ms": low,
            "q3_ms": high,
            "min_ms": 1e3 * min(self.seconds),
            "n_rounds": len(self.seconds),
            "calls_per_round": self.calls_per_turn,
        }


@dataclass
class Outcome:
    """What a contest brought. The first contender in `times` is ours.

    `flops` and `bytes_moved` count the useful work of one call, for the share of the limit; 0: not counted.
    """

    suite: str
    title: str
    case: dict[str, Any]
    times: dict[str, Times] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    checked: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # results that the gate saw
    flops: float = 0.0
    bytes_moved: float = 0.0
    curve: tuple[str, float] | None = None
    disturbance: float = 0.0

    @property
    def ours(self) -> str:
        return next(iter(self.times))

    def best_rival(self, among: Sequence[str] = ()) -> str | None:
        """The fastest other contender, of those named or of all."""
        rivals = [name for name in self.times if name != self.ours and (not among or name in among)]
        return min(rivals, key=lambda name: self.times[name].median_s) if rivals else None

    def ratio(self, among: Sequence[str] = ()) -> float | None:
        """Median of the best rival over ours: how many times faster ours is. None without a rival."""
        rival = self.best_rival(among)
        return None if rival is None else self.times[rival].median_s / self.times[self.ours].median_s

    def best_text(self) -> str:
        """The best rival and the ratio to it, in words."""
        rival, ratio = self.best_rival(), self.ratio()
        return "no rival" if ratio is None else f"best rival: {rival}, {ratio:.2f}x"

    def share_of_limit(self, name: str, limits: Limits) -> float | None:
        """The useful work of a call over what the machine could have done in that time, of its scarcer resource."""
        least_s = max(self.flops / (1e9 * limits.fma_gflops), self.bytes_moved / (1e9 * limits.read_gbs))
        return least_s / self.times[name].median_s if least_s else None

    def describe(self, limits: Limits) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "title": self.title,
            "case": self.case,
            "curve": self.curve,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "disturbance": self.disturbance,
            "contenders": {
                name: {**times.describe(), "share_of_limit": self.share_of_limit(name, limits)}
                for name, times in self.times.items()
            },
            "best_rival": self.best_rival(),
            "ratio_to_best": self.ratio(),
            "skipped": self.skipped,
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class Claim:
    """A measured number beside what was promised. None: nothing was promised, or nothing could be measured."""

    what: str
    value: float | None
    must: float | None = None
    aim: float | None = None
    unit: str = "x"  # "x" a ratio, "%" a share
    at_most: bool = False
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.must is None:
            return ""
        for bar, verdict in ((self.aim, "aim met"), (self.must, "met")):
            if bar is not None and (self.value <= bar if self.at_most else self.value >= bar):
                return verdict
        return "NOT MET"

    def describe(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


class Arena:
    """Runs contests and keeps the workers between them, as starting one costs seconds."""

    def __init__(self, threads: int, budget_s: float) -> None:
        self.threads, self.budget_s = threads, budget_s
        self.libraries: dict[str, Any] = {}
        self._workers: dict[Process, Worker] = {}

    def worker(self, process: Process) -> Worker:
        """The running worker of a process, or a new one."""
        if process not in self._workers or not self._workers[process].is_alive:
            self._workers[process] = Worker(process, self.threads)
        return self._workers[process]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def run(
        self,
        benchmark: Any,
        outcome: Outcome,
        contenders: Sequence[Contender],
        gate: Gate,
        *,
        n_checks: int = N_INPUTS,
        rounds: Mapping[str, int] | None = None,
    ) -> Outcome:
        """Fill `outcome`; `benchmark` is pytest-benchmark's fixture, which times the first contender: ours.

        `rounds` fixes the number of one-call turns of the contenders that it names. ContenderFailed if ours fails or is
        wrong.
        """
        contest = _Contest(self, outcome, contenders)
        try:
            contest.prepare()
            contest.check(gate, n_checks)
            plan = contest.plan(rounds or {})
            contest.play(benchmark, plan)
        finally:
            contest.leave()
        return outcome


@dataclass(frozen=True)
class _Plan:
    n_turns: int
    n_warm: int
    n_calls: int


class _Contest:
    def __init__(self, arena: Arena, outcome: Outcome, contenders: Sequence[Contender]) -> None:
        self.arena, self.outcome = arena, outcome
        self.ours = contenders[0]
        self.present = list(contenders)
        self.n_called = dict.fromkeys((c.name for c in contenders), 0)
        self.checked_s: dict[str, float] = {}  # of the last checked call

    def ask(self, contender: Contender, request: str, *arguments: Any) -> Any:
        return self.arena.worker(contender.process).ask(request, contender.name, *arguments)

    def drop(self, contender: Contender, why: str) -> None:
        if contender is self.ours:
            raise ContenderFailed(f"{contender.name}: {why}")
        self.outcome.dropped[contender.name] = why
        self.present.remove(contender)
        self.forget(contender)

    def forget(self, contender: Contender) -> None:
        with contextlib.suppress(ContenderFailed):  # its process is gone, and all it held with it
            self.ask(contender, "drop")

    def prepare(self) -> None:
        for contender in list(self.present):
            missing = [module for module in contender.needs if not is_installed(module)]
            if missing:
                self.outcome.skipped[contender.name] = f"{', '.join(missing)} not installed"
                self.present.remove(contender)
                continue
            case = {**self.outcome.case, **contender.options}
            try:
                self.ask(contender, "make", contender.make.__module__, contender.make.__name__, case)
            except ContenderFailed as error:
                self.drop(contender, f"failed: {error}")

    def check(self, gate: Gate, n_checks: int) -> None:
        results: dict[str, tuple[Any, ...]] = {}
        for contender in list(self.present):
            try:
                answers = [self.ask(contender, "check", i) for i in range(n_checks)]
                results[contender.name] = tuple(result for _, result in answers)
                self.checked_s[contender.name] = answers[-1][0]
                self.n_called[contender.name] = n_checks
            except ContenderFailed as error:
                self.drop(contender, f"failed: {error}")
        wrong = gate(results)
        for contender in list(self.present):
            if why := wrong.get(contender.name):
                self.drop(contender, f"wrong: {why}")
        self.outcome.checked = results

    def plan(self, rounds: Mapping[str, int]) -> dict[str, _Plan]:
        """Turns and calls for each contender, from the last checked call and, unless that was slow, two more."""
        plans = {}
        for contender in self.present:
            if contender.name in rounds:
                plans[contender.name] = _Plan(rounds[contender.name], 0, 1)
                continue
            call_s = self.checked_s[contender.name]
            if call_s < self.arena.budget_s / MIN_ROUNDS:
                call_s = min(self.take_turn(contender, _Plan(1, 0, 1)) for _ in range(2))
            n_calls = max(1, math.ceil(TURN_S / call_s))
            n_warm = 1 if call_s < TURN_S else 0
            turn_s = (n_warm + n_calls) * call_s
            n_turns = min(MAX_ROUNDS, max(MIN_ROUNDS, round(self.arena.budget_s / turn_s)))
            plans[contender.name] = _Plan(n_turns, n_warm, n_calls)
        return plans

    def play(self, benchmark: Any, plans: Mapping[str, _Plan]) -> None:
        """Rounds in which rivals, then ours, take their turns. Whoever has fewer turns than ours sits out some rounds,
        evenly; whoever has more gets as many as ours."""
        n_rounds = max(plans[self.ours.name].n_turns, MIN_ROUNDS)
        seconds: dict[str, list[float]] = {contender.name: [] for contender in self.present}
        disturbances: list[float] = []
        n_played = 0

        def turn(contender: Contender) -> None:
            before = self.idle_processor_s(contender)
            start = time.perf_counter()
            seconds[contender.name].append(self.take_turn(contender, plans[contender.name]))
            wall_s = time.perf_counter() - start
            disturbances.append((self.idle_processor_s(contender) - before) / wall_s)

        def rivals() -> None:
            nonlocal n_played
            for contender in [c for c in self.present if c is not self.ours]:
                n_turns = min(plans[contender.name].n_turns, n_rounds)
                if (n_played + 1) * n_turns // n_rounds > n_played * n_turns // n_rounds:
                    turn(contender)
            n_played += 1

        def ours() -> None:
            turn(self.ours)
            CLOCK.now_s += seconds[self.ours.name][-1]

        benchmark.pedantic(ours, setup=rivals, rounds=n_rounds, iterations=1, warmup_rounds=0)
        self.outcome.times = {
            contender.name: Times(tuple(seconds[contender.name]), plans[contender.name].n_calls)
            for contender in self.present
        }
        self.outcome.disturbance = max(0.0, float(np.median(disturbances)))
        for process in {contender.process for contender in self.present}:
            self.arena.libraries[process.name] = self.arena.worker(process).ask("libraries")

    def take_turn(self, contender: Contender, plan: _Plan) -> float:
        time.sleep(SETTLE_S)
        first = self.n_called[contender.name]
        self.n_called[contender.name] += plan.n_calls
        return self.ask(contender, "time", first, plan.n_warm, plan.n_calls)

    def idle_processor_s(self, but: Contender) -> float:
        """Processor time that all workers but this contender's have taken so far."""
        return sum(w.processor_s() for process, w in self.arena._workers.items() if process != but.process)

    def leave(self) -> None:
        for contender in self.present:
            self.forget(contender)

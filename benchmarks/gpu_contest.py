"""What the sections of benchmarks.gpu_check share: findings that are kept as they come, timing, the table of kernels.

A section is a function of a Report. Everything here runs on a CPU as well, with perf_counter and without graphs, so
that a section can be tested where no GPU is.
"""

from __future__ import annotations

import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from benchmarks.contest import Claim
from benchmarks.machine import ROOT

N_INPUTS, REPEATS, ROUNDS = 3, 12, 25
CPU_ROUNDS = 3  # no number of a CPU is reported
KINDS = "device", "checked", "failures", "times", "claims", "findings", "limits", "counters", "profiles", "notes"
LONGEST_TEXT = 2000
KERNELS_KEPT = 60  # rows of a table of kernels

Call = Callable[[int], Any]
"""call(i) does the work once, on the i-th of the inputs."""


class Skipped(Exception):
    """Why a section was not run."""


class WrongResult(Exception):
    """What is wrong with a result of ours."""


def anonymous(text: str) -> str:
    """The text without the folders of this machine, and not too long."""
    return re.sub(r"(?<![\w.<])/(?:[\w.+-]+/)+", "", text.strip().replace(f"{ROOT}/", ""))[:LONGEST_TEXT]


@dataclass
class Report:
    """What a section found, by kind. Every entry goes to `stream` as a JSON line at once, and is printed."""

    device: str = "cuda"
    out: Path = Path()
    limit_s: float = 600.0
    stream: TextIO | None = None
    found: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def add(self, kind: str, line: str, /, **entry: Any) -> None:
        self.found[kind].append(entry)
        if self.stream is not None:
            print(json.dumps({kind: entry}), file=self.stream, flush=True)
        print(f"  {line}", flush=True)

    def note(self, text: str) -> None:
        self.add("notes", text, text=anonymous(text))

    def time(self, what: str, contender: str, us: float, **more: Any) -> float:
        self.add("times", f"{what:44} {contender:26} {us:10.1f} us {more or ''}", what=what, contender=contender, us=us,
                 **more)  # fmt: skip
        return us

    def claim(self, claim: Claim) -> None:
        value = "not measured" if claim.value is None else f"{claim.value:.3g}{claim.unit} {claim.verdict}"
        self.add("claims", f"{claim.what}: {value}", **claim.describe())

    def limit(self, what: str, value: float) -> float:
        self.add("limits", f"{what}: {value:.0f}", what=what, value=value)
        return value

    def count(self, what: str, **counters: float) -> None:
        self.add("counters", f"{what}: {counters}", what=what, **counters)

    def profile(self, what: str, kernels: list[dict[str, Any]]) -> None:
        total = sum(row["us"] for row in kernels)
        lines = [f"    {row['us']:9.1f} us {row['calls']:5} x {row['kernel'][:90]}" for row in kernels[:8]]
        text = "\n".join([f"{what}: {total:.1f} us in {sum(row['calls'] for row in kernels)} launches", *lines])
        self.add("profiles", text, what=what, us=total, kernels=kernels[:KERNELS_KEPT])

    def check(self, what: str, wrong: str) -> None:
        """Record that a result of ours was compared. `wrong` says how it differs; raises WrongResult if it does."""
        if wrong:
            raise WrongResult(wrong)
        self.add("checked", f"{what}: right", what=what)

    @contextmanager
    def shape(self, what: str) -> Iterator[None]:
        """One shape of a section: whatever fails in it is recorded, and the next shape has its turn."""
        try:
            yield
        except Skipped:
            raise
        except Exception as error:
            traceback.print_exc()
            self.fail(what, f"{type(error).__name__}: {error}")

    def fail(self, what: str, why: str) -> None:
        self.add("failures", f"{what}: FAILED: {why[:300]}", what=what, why=anonymous(why))

    def outcome(self, must_compare: bool) -> str:
        """ "ok", or "failed: why"; a section that compares results is not ok if it has compared none."""
        if failures := self.found["failures"]:
            return "failed: " + "; ".join(f"{entry['what']}: {entry['why'][:200]}" for entry in failures[:5])
        if must_compare and not self.found["checked"]:
            return "failed: nothing of ours was compared"
        return "ok"


def differences(found: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 0.0, atol: float = 0.0) -> str:
    """How results differ from what they must be, in words; empty: they do not."""
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        x, y = x.detach().cpu(), y.detach().cpu()
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"output {i} is {list(x.shape)} {x.dtype}, must be {list(y.shape)} {y.dtype}"
        differs = ~torch.isclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
        if n := int(differs.sum()):
            at = tuple(differs.nonzero()[0].tolist())
            return f"output {i} differs in {n} of {x.numel()} values, first at {at}: {x[at]}, must be {y[at]}"
    return ""


# ---- time


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def replayed_us(call: Call, device: str) -> float:
    """Median microseconds of one call inside a replayed CUDA graph of REPEATS calls on inputs in turn."""
    if device == "cpu":
        return eager_us(call, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(N_INPUTS):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(REPEATS):
            call(i % N_INPUTS)
    return median_us(graph.replay, device) / REPEATS


def eager_us(call: Call, device: str) -> float:
    """Median microseconds of a call alone, launches included."""
    turn = iter(range(10**9))
    return median_us(lambda: call(next(turn) % N_INPUTS), device)


def median_us(work: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        found = []
        for _ in range(CPU_ROUNDS):
            begin_s = time.perf_counter()
            work()
            found.append(1e6 * (time.perf_counter() - begin_s))
        return statistics.median(found)
    for _ in range(3):
        work()
    found = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end))
    return statistics.median(found)


def compete(
    report: Report, what: str, ours: Call, rivals: dict[str, tuple[str, Call]], how: str = "graph", **more: Any
) -> dict[str, float]:
    """Microseconds of all, and the kernels of ours; `rivals`: name -> ("graph" or "eager", call).

    A rival that fails is named and left out.
    """
    timers = {"graph": replayed_us, "eager": eager_us}
    found = {"clmfast": report.time(what, "clmfast", timers[how](ours, report.device), how=how, **more)}
    report.profile(what, kernel_table(lambda: ours(0), report.device))
    for name, (how_rival, call) in rivals.items():
        try:
            us = timers[how_rival](call, report.device)
        except Exception as error:
            report.note(f"{what}: {name} left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = report.time(what, name, us, how=how_rival, **more)
    return found


def claim_ratio(
    report: Report, what: str, times: dict[str, float], rival: str, must: float | None, aim: float | None
) -> None:
    value = times[rival] / times["clmfast"] if rival in times else None
    report.claim(Claim(f"{what}: times as fast as {rival}", value, must, aim))


def copy_gbs(device: str) -> float:
    """Rate at which this device copies memory: bytes read and written, in GB/s."""
    x = torch.zeros(1 << 30 if device != "cpu" else 1 << 22, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / eager_us(lambda i: y.copy_(x), device) / 1e3


def in_turns(contenders: Mapping[str, Callable[[], object]], n_warm: int, n_timed: int) -> dict[str, float]:
    """Median seconds of a call of each, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(n_warm + n_timed):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if i >= n_warm:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(of_name) for name, of_name in times.items()}


# ---- kernels


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces and argument list."""
    name = kernel.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    depth = 0
    for i, letter in enumerate(name):
        if letter == "<":
            depth += 1
        elif letter == ">" and name[i - 1] != "-":
            depth -= 1
        elif letter == "(" and depth == 0 and i > 0:
            name = name[:i]
            break
    return re.sub(r"(?:[A-Za-z_]\w*::)+", "", name).strip()[:160]


def kernel_table(work: Callable[[], Any], device: str, n: int = 1) -> list[dict[str, Any]]:
    """[{kernel, us, calls}] of one run of `work`, the most expensive first, by torch.profiler over n runs.

    On a GPU: kernels and copies, whoever launched them, a graph included. On a CPU: torch's ops.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    is_cpu = device == "cpu"
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU if is_cpu else ProfilerActivity.CUDA]) as profiler:
        for _ in range(n):
            work()
        synchronize(device)
    rows: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CPU) != is_cpu or getattr(event, "is_user_annotation", False):
            continue
        row = rows.setdefault(short_name(event.key), [0.0, 0.0])
        row[0] += event.self_cpu_time_total if is_cpu else event.self_device_time_total
        row[1] += event.count
    table = [{"kernel": name, "us": us / n, "calls": calls / n} for name, (us, calls) in rows.items()]
    return sorted(table, key=lambda row: -row["us"])


def copies_and_launches(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """What a table of kernels counts: copies in both directions, and everything that is no copy."""
    copies = {"copies_to_device": "Memcpy HtoD", "copies_to_host": "Memcpy DtoH"}
    found = {
        name: sum(row["calls"] for row in kernels if row["kernel"].startswith(start)) for name, start in copies.items()
    }
    others = [row for row in kernels if not row["kernel"].startswith(("Memcpy", "Memset"))]
    return {**found, "kernel_launches": sum(row["calls"] for row in others)}

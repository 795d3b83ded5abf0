"""A process that reads hostile files: tasks come as lines of JSON, how each ended goes out as such lines.

Each is read in a fork of its own, with an address space for data that is bounded and a time after which it is killed,
so that what an attack does to one reading is no other's. Time and the largest memory are measured there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch  # noqa: F401  what the memory of reading is counted from


def page_bytes(field: int) -> int:
    """Of this process now: 1 is all that it has in memory, 5 its data."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[field]) * os.sysconf("SC_PAGE_SIZE")


BARE_BYTES = page_bytes(1)  # what `import torch` alone takes

import records  # noqa: E402

import clmfast  # noqa: E402
from clmfast import export, report  # noqa: E402
from clmfast.config import RunConfig, check, from_file  # noqa: E402
from clmfast.files import read_checkpoint  # noqa: E402
from clmfast.study import __main__ as study  # noqa: E402
from clmfast.study.revisit import checkpoint_steps, model_at, tasks_of  # noqa: E402
from clmfast.study.summary import Summary, revisited, run_of  # noqa: E402
from clmfast.study.unseen import MISTAKES  # noqa: E402

TASKS = tasks_of(records.config())
OWN_IMPORTS_BYTES = page_bytes(1) - BARE_BYTES
KILLED_S = 20
LIMIT_BYTES = 1 << 30  # of data: twice what is allowed, so that a fault is a MemoryError and no dead machine


def read_run(path: Path) -> str:
    """Everything that a run can be asked for; says which lines of its events are damaged."""
    run = clmfast.load(path.parent if path.parent.name != "projections" else path.parent.parent)
    assert run.config and run.long() and run.controls is not None and run.per_task is not None
    for readout in run.readouts:
        assert list(run.snapshots(readout)) == [60]
    assert len(run.events) >= 2
    return "; ".join(run.damaged_events)


def read_summary(path: Path) -> str:
    summary = Summary(run_of(path))
    assert summary.per_task is not None and summary.long()
    return ""


def read_kept(path: Path) -> str:
    run = Summary(path.with_name(path.name.removesuffix(f".{MISTAKES.name}.npz")))
    return str(revisited(run, MISTAKES)["counts"].shape)


def read_weights(path: Path) -> str:
    run = clmfast.load(path.parent.parent.parent)
    assert checkpoint_steps(run) == [1]
    return str(model_at(run, TASKS, 1))


def ended(main: Callable[[list[str]], int], arguments: list[str]) -> str:
    """A command: its line of error as an error of the name 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    if code:
        raise type(str(code), (ValueError,), {})(errors.getvalue().removesuffix("\n"))
    return ""


READERS: dict[str, Callable[[Path], str]] = {
    "run": read_run,
    "summary": read_summary,
    "kept": read_kept,
    "checkpoint": lambda path: str(read_checkpoint(path.parent)[1]),
    "weights": read_weights,
    "config": lambda path: str(from_file(path, RunConfig()).seed),
    "checked": lambda path: str(check(from_file(path, RunConfig()))),
    "report": lambda path: ended(report.main, [str(path.parent)]),
    "export": lambda path: ended(export.main, [str(path.parent), "--csv"]),
    "draw": lambda path: ended(
        study.main,
        [records.STUDY, "--quick", "--seeds", "0..0", "--draw", "--out", str(folder_of(path, "study"))],
    ),
}


def folder_of(path: Path, name: str) -> Path:
    return next(parent for parent in path.resolve().parents if parent.name == name)


def measured(reader: str, path: Path) -> dict[str, object]:
    """How one reading ended, in this process."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        ends, text = "reads", READERS[reader](path)
    except Exception as error:
        ends, text = type(error).__name__, str(error)
        if ends in ("AssertionError", "MemoryError"):
            text = traceback.format_exc()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    mib = grown_kib / 1024 + OWN_IMPORTS_BYTES / (1 << 20)
    return {"ends": ends, "text": text, "seconds": seconds, "cpu_seconds": cpu_seconds, "mib": mib}


def in_a_fork(reader: str, path: Path) -> dict[str, object]:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(KILLED_S)
        resource.setrlimit(resource.RLIMIT_DATA, (page_bytes(5) + LIMIT_BYTES,) * 2)
        with open(write_end, "w") as file:
            json.dump(measured(reader, path), file)
        os._exit(0)
    os.close(write_end)
    with open(read_end) as file:
        told = file.read()
    _, status = os.waitpid(child, 0)
    killed = {"ends": f"killed: {status}", "text": "", "seconds": KILLED_S, "cpu_seconds": KILLED_S, "mib": 0}
    return json.loads(told) if told else killed


def main() -> None:
    for line in sys.stdin:
        reader, path = json.loads(line)
        print(json.dumps(in_a_fork(reader, Path(path))), flush=True)


if __name__ == "__main__":
    main()

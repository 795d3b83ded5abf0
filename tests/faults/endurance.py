"""A toy model for very many measured steps: memory, open files and threads stay as they are, a step takes as long at
the end as at the beginning, and the record can be read at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from clmfast import run
from clmfast.config import to_dict
from clmfast.measure.catalogue import Column
from clmfast.progress import Progress
from clmfast.record import Run
from tests.faults import sweep
from tests.faults.worker import Progress as ProgressLine

N_STEPS, N_STEPS_LONG = 600, 200_000
N_SAMPLES = 40
MAX_GROWTH_MIB = 16.0  # from a quarter of the steps on: the pages of the rows that are written belong to the file
MAX_SLOWER = 1.5  # last quarter over second one, in steps that neither probe nor save
N_READS = 20
LIMIT_S = 7200.0


def main(is_long: bool, seed: int) -> int:
    """Returns the number of faults."""
    n_steps = N_STEPS_LONG if is_long else N_STEPS
    config = dataclasses.replace(
        sweep.CONFIG,
        seed=seed,
        steps=n_steps,
        resume_every=n_steps // 50,
        measure=dataclasses.replace(sweep.CONFIG.measure, probe_every=n_steps // 100),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out, samples_at = folder / "run", folder / "samples.json"
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        arguments = ["--config", str(folder / "config.json"), "--out", str(out)]
        child = sweep.started(lambda: _train(arguments, n_steps, samples_at), folder / "log", LIMIT_S)
        faults, n_reads = _read_throughout(child, out, n_steps)
        if faults:
            return _told(faults)
        samples = np.array(json.loads(samples_at.read_text()))
        faults += _judge(samples)
        run_read = Run(out)
        loss = run_read.column(Column("train", "loss").name)
        if len(run_read.step) != n_steps + 1 or not np.isfinite(loss[:-1]).all():
            faults.append(f"the record must have {n_steps + 1} rows with a loss, got {np.isfinite(loss).sum()}")
    (_, mib, n_files, n_threads, ms), (_, mib_late, n_files_late, n_threads_late, ms_late) = _early_and_late(samples)
    print(
        f"endurance: {n_steps:,} steps, memory {mib:.0f} -> {mib_late:.0f} MiB, open files {n_files:.0f} -> "
        f"{n_files_late:.0f}, threads {n_threads:.0f} -> {n_threads_late:.0f}, a step {ms:.2f} -> {ms_late:.2f} ms, "
        f"read {n_reads} times while it grew; {len(faults)} faults"
    )
    return _told(faults)


def _told(faults: list[str]) -> int:
    for fault in faults:
        print(f"endurance: {fault}")
    return len(faults)


def _train(arguments: list[str], n_steps: int, samples_at: Path) -> int:
    """The run, in a process of its own, which looks at itself N_SAMPLES times."""
    samples, ms = [], list[float]()
    update, every = Progress.update, n_steps // N_SAMPLES

    def update_and_look(progress: Progress, step) -> None:  # type: ignore[no-untyped-def]
        update(progress, step)
        ms.append(step.timing["step_ms"] + step.timing["window_ms"])
        if step.step and step.step % every == 0:
            n_pages = int(Path("/proc/self/statm").read_text().split()[1])
            n_threads = len(os.listdir("/proc/self/task"))
            mib = n_pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            samples.append([step.step, mib, len(os.listdir("/proc/self/fd")), n_threads, float(np.median(ms))])
            ms.clear()

    Progress.update = update_and_look  # type: ignore[method-assign]
    Progress.summary = lambda *_: None  # type: ignore[method-assign]
    run.finish = lambda *_: None
    code = run.main(arguments)
    samples_at.write_text(json.dumps(samples))
    return code


def _read_throughout(child: int, out: Path, n_steps: int) -> tuple[list[str], int]:
    """Load the record again and again while the child writes it."""
    line, n_reads, before = ProgressLine("endurance", n_steps), 0, -1
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return ([f"the run ended with {code}"] if code else []), n_reads
        time.sleep(0.2)
        if not (out / "checkpoints" / "00000000").exists():
            continue
        done = int(np.count_nonzero(np.load(out / "steps.npy", mmap_mode="r")[:, 0]))
        line(done, 0)
        if done // (n_steps // N_READS) > before:
            before = done // (n_steps // N_READS)
            read = Run(out)
            n_reads += 1
            if not np.array_equal(read.step, np.arange(len(read.step))) or len(read.step) < done:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return [f"{done} rows are written, and {len(read.step)} were read"], n_reads


def _judge(samples: np.ndarray) -> list[str]:
    (_, mib, n_files, n_threads, ms), (_, mib_late, n_files_late, n_threads_late, ms_late) = _early_and_late(samples)
    faults = []
    if mib_late - mib > MAX_GROWTH_MIB:
        faults.append(f"memory must grow by at most {MAX_GROWTH_MIB:.0f} MiB, {mib:.0f} became {mib_late:.0f}")
    for before, after, what in ((n_files, n_files_late, "open files"), (n_threads, n_threads_late, "threads")):
        if after > before:
            faults.append(f"{what} must not grow, {before:.0f} became {after:.0f}")
    if ms_late > MAX_SLOWER * ms:
        faults.append(f"a step must not get slower, {ms:.2f} ms became {ms_late:.2f}")
    return faults


def _early_and_late(samples: np.ndarray) -> np.ndarray:
    """samples [N, 5]: step, resident MiB, open files, threads, median ms of a step. [2, 5]: medians of the second
    quarter, when all that is made once has been made, and of the last one."""
    quarter = len(samples) // 4
    return np.stack([np.median(samples[quarter : 2 * quarter], 0), np.median(samples[-quarter:], 0)])

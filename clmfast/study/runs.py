"""The pool of runs behind the studies: what is missing is trained in processes of `clmfast.run`, what is there is read.

A run directory belongs to one configuration, whatever study asked for it. The number of threads is no part of that: it
is chosen by a measurement and may be another one after a restart. When a run ends, its summary is written beside it
(summary.py), and so is what studies read from its checkpoints; with these files there, the directory may be moved away.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from clmfast import files
from clmfast.config import ConfigError, MeasureConfig, RunConfig, from_file, to_dict
from clmfast.directory import is_empty
from clmfast.files import write_json
from clmfast.measure.catalogue import MEASUREMENT_VERSION
from clmfast.record import NotARun, Run
from clmfast.study.base import Revisit, StudyError, changed
from clmfast.study.summary import Summary, beside, kept_at, revisited, run_of, write_summary

DIVERGED = 3  # exit code of clmfast.run
ENDED = ("finished", "diverged")
MEASURED_STEPS = 30
RUN_NAME = re.compile(r".*-seed\d+-[0-9a-f]{10}")  # of a directory and of all files beside it


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A run that studies ask for: where it lies, what it is, and what they read from its checkpoints."""

    path: Path
    config: RunConfig
    revisits: tuple[Revisit, ...] = ()
    version: int = MEASUREMENT_VERSION

    def is_there(self) -> bool:
        """Has it ended, with all that is asked for still to be had?"""
        state = state_of(self.path, self.config, self.version)
        has_all = all(kept_at(self.path, what).exists() for what in self.revisits)
        return state == "diverged" or (state == "finished" and (has_all or (self.path / "checkpoints").exists()))

    def keep(self) -> None:
        """Write beside the directory of a run that has ended what is to outlive it."""
        run = load_run(self.path, self.config, self.version)
        if run is not None:
            for what in self.revisits:
                revisited(run, what)


def identity(config: RunConfig) -> RunConfig:
    """The config without what makes no other study of it."""
    return changed(dataclasses.replace(config, out="", threads=0), "measure", threads=MeasureConfig().threads)


@functools.lru_cache(maxsize=4096)
def _config_in(file: Path, modified_ns: int) -> RunConfig | None:
    """The identity of the run that a config.json or a summary is of; None for anything else."""
    try:
        if file.suffix == ".json":
            return identity(from_file(file, RunConfig()))
        return identity(Summary(run_of(file)).config)
    except (ConfigError, NotARun):
        return None


def run_path(pool: Path, label: str, config: RunConfig) -> Path:
    """Where in the pool the run of a configuration lies. The first study to ask for it gives its name.

    It is known by its config, not by the hash in its name: a setting that a later version adds would change that.
    """
    names = {match[0] for file in pool.glob(f"*-seed{config.seed}-*") if (match := RUN_NAME.match(file.name))}
    for path in sorted(pool / name for name in names):
        for file in (beside(path, ".npz"), path / "config.json"):
            if file.exists() and _config_in(file, file.stat().st_mtime_ns) == identity(config):
                return path
    digest = hashlib.sha256(json.dumps(to_dict(identity(config)), sort_keys=True).encode()).hexdigest()[:10]
    return pool / f"{label.replace(' ', '_')}-seed{config.seed}-{digest}"


def state_of(path: Path, config: RunConfig, version: int = MEASUREMENT_VERSION) -> str:
    """finished, diverged, started (can be resumed) or missing (nothing, or an empty directory, is there); StudyError
    for something else."""
    if beside(path, ".npz").exists():
        try:
            summary = Summary(path)
        except NotARun as error:
            raise StudyError(str(error)) from None
        _need_same(beside(path, ".npz"), summary.config, config)
        _need_version(beside(path, ".npz"), summary, version)
        return "diverged" if _has(summary, "anomaly") else "finished"
    if not path.exists() or (path.is_dir() and is_empty(path)):
        return "missing"
    try:
        found = from_file(path / "config.json", RunConfig())
    except ConfigError as error:
        raise StudyError(f"{path} must be the run of this study: {error}") from None
    _need_same(path / "config.json", found, config)
    try:
        run = Run(path)
        _need_version(path, run, version)
        if _has(run, "anomaly"):
            return "diverged"
        if _has(run, "extended"):
            raise StudyError(f"{path} must be a run as it began, its number of steps was changed: move it away")
        is_whole = found.train.stop_early or (len(run.step) > 0 and run.step[-1] == found.steps)
        if _has(run, "end") and is_whole and (path / "report.html").exists():
            return "finished"
    except NotARun as error:
        if (path / "meta.json").exists():
            raise StudyError(f"records must be those of a run: {error}") from None
    return "started"


def version_in(pool: Path) -> int:
    """The measurement version of the summaries of a pool; the current one where there are none. StudyError where
    there are several: numbers of two versions are never compared."""
    paths = [run_of(file) for file in pool.glob("*.npz")]
    try:
        versions = {Summary(path).measurement_version for path in paths if RUN_NAME.fullmatch(path.name)}
    except NotARun as error:
        raise StudyError(str(error)) from None
    if len(versions) > 1:
        raise StudyError(
            f"{pool} must hold runs of one measurement version, got {' and '.join(map(str, sorted(versions)))}"
        )
    return versions.pop() if versions else MEASUREMENT_VERSION


def _need_version(file: Path, run: Run, version: int) -> None:
    if run.measurement_version != version:
        raise StudyError(
            f"{file} must be of measurement version {version}, as numbers of two versions are never "
            f"compared, got {run.measurement_version}: move it away"
        )


def _need_same(file: Path, found: RunConfig, config: RunConfig) -> None:
    if identity(found) != identity(config):
        raise StudyError(f"{file} must be of the run of this study, it is of another one")


def _has(run: Run, event: str) -> bool:
    return any(one["event"] == event for one in run.events)


def load_run(path: Path, config: RunConfig, version: int = MEASUREMENT_VERSION) -> Run | None:
    """The summary of a finished run, None for one that diverged, written if it is not there yet; StudyError if the run
    has not ended."""
    state = state_of(path, config, version)
    if state not in ENDED:
        raise StudyError(f"{path} must be a finished run, it is {state}: run the study without --draw")
    if not beside(path, ".npz").exists():
        write_summary(Run(path))
    return Summary(path) if state == "finished" else None


def hold(folder: Path) -> int:
    """Lock the studies' folder for this process and all it starts; a second study there would train the same runs.

    The lock ends with the last process that holds it, so that a run which outlived a killed study is not resumed twice.
    """
    files.make_folder(folder)
    try:
        lock = files.hold(folder)
    except BlockingIOError:
        raise StudyError(
            f"{folder} must be free: another study, or a run that it started, is still at work there"
        ) from None
    os.set_inheritable(lock, True)
    return lock


class Job:
    """One run of clmfast in a process of its own; its output goes to NAME.log beside its directory."""

    def __init__(self, wanted: Wanted, threads: int, lock: int) -> None:
        self.wanted = wanted
        # None beside them: the cores are the other runs'.
        config = changed(dataclasses.replace(wanted.config, threads=threads), "measure", threads=0)
        self.path, self.config = wanted.path, config
        path = self.path
        command = [sys.executable, "-m", "clmfast.run"]
        if state_of(path, config) == "started":
            command += ["--resume", str(path)]
        else:
            for file in path.parent.glob(f"{glob.escape(path.name)}.*"):
                files.remove(file)
            files.make_folder(path.parent)
            write_json(beside(path, ".json"), to_dict(config))
            command += ["--config", str(beside(path, ".json")), "--out", str(path)]
        with open(beside(path, ".log"), "wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C reaches the study alone, which then ends its runs politely
            )  # fmt: skip

    def steps_done(self) -> int:
        """Rows on disk: the first column of what is written counts them."""
        try:
            return min(self.config.steps, int(np.count_nonzero(np.load(self.path / "steps.npy", mmap_mode="r")[:, 0])))
        except (OSError, ValueError):
            return 0  # not made yet

    def finished(self) -> bool:
        """Has it ended? StudyError with its last line if it failed."""
        code = self.process.poll()
        if code is None:
            return False
        if code < 0:
            raise StudyError(f"run {self.path.name} was ended by {signal.Signals(-code).name}; start again to go on")
        if code not in (0, DIVERGED):
            lines = beside(self.path, ".log").read_text(encoding="utf-8", errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), f"exit code {code}")
            raise StudyError(f"run {self.path.name} failed: {last.removeprefix('clmfast: ')}")
        self.wanted.keep()
        if (self.path / "resume").exists():
            files.remove(self.path / "resume")
        return True


def train_missing(
    jobs: list[Wanted], n_processes: int, threads: int, lock: int, show: Callable[[int, int], None]
) -> None:
    """Train the runs, n_processes at a time; `show(finished runs, steps done)` is told now and then."""
    waiting, at_work = list(jobs), list[Job]()
    n_finished, n_steps = 0, 0
    try:
        while waiting or at_work:
            while waiting and len(at_work) < n_processes:
                at_work.append(Job(waiting.pop(0), threads, lock))
            time.sleep(0.2)
            for job in [job for job in at_work if job.finished()]:
                at_work.remove(job)
                n_finished, n_steps = n_finished + 1, n_steps + job.config.steps
            show(n_finished, n_steps + sum(job.steps_done() for job in at_work))
    finally:  # Ctrl-C or a failed run: the others end after their step and keep what they have
        for job in at_work:
            job.process.send_signal(signal.SIGTERM)
        for job in at_work:
            job.process.wait()


def choose_processes(config: RunConfig, lock: int) -> dict[str, Any]:
    """How many processes of how many threads do the most steps per second: measured with a few steps of the config.

    {'processes', 'threads', 'reason'}. Candidates use all cores: one process per core, or fewer with more threads.
    """
    n_cores = len(os.sched_getaffinity(0))
    candidates = [(n_cores // threads, threads) for threads in (1, 2, 4, 8) if n_cores % threads == 0]
    if len(candidates) == 1:
        return {"processes": 1, "threads": 1, "reason": "the only core"}
    speed = {}
    for n_processes, threads in candidates:
        with tempfile.TemporaryDirectory() as folder:
            short = dataclasses.replace(changed(config, "measure", probe_every=0), steps=MEASURED_STEPS, resume_every=0)
            jobs = [Wanted(Path(folder) / str(i), short) for i in range(n_processes)]
            train_missing(jobs, n_processes, threads, lock, lambda *_: None)
            ms = [sum(float(np.median(t)) for t in Run(job.path).timing.values()) for job in jobs]
        speed[n_processes, threads] = 1000 * sum(1 / one for one in ms)
    best = max(speed, key=lambda candidate: speed[candidate])
    told = ", ".join(f"{p} x {t} threads {s:.1f} steps/s" for (p, t), s in speed.items())
    return {"processes": best[0], "threads": best[1], "reason": f"measured over {MEASURED_STEPS} steps: {told}"}


def each_once(wanted: Iterable[Wanted]) -> list[Wanted]:
    """Every configuration once, at the first of its paths: studies share their runs under different labels."""
    found: dict[RunConfig, Wanted] = {}
    for one in wanted:
        first = found.setdefault(identity(one.config), one)
        revisits = tuple(dict.fromkeys((*first.revisits, *one.revisits)))
        found[identity(one.config)] = dataclasses.replace(first, revisits=revisits)
    return list(found.values())

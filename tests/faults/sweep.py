"""Kills and disk faults at every change that a run makes to its directory; afterwards the run must go on as if nothing
had been.

A stand-in for `os` counts what changes the disk, and strikes at the n-th change: the process dies before it, inside it
or after it; the disk is full from there on, fails once, or takes half of a write; or the power goes, and what was not
synced is lost or not, as chance has it. Then the run is resumed, or started again where it had not begun, and its
tables, weights and states must be those of a run that nothing happened to, bit for bit.

Runs are forked from this process, which has everything loaded, and are tiny; the report is not drawn.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clmfast import files, record, report, run, train
from clmfast.config import MeasureConfig, ModelConfig, RunConfig, TaskConfig, TrainConfig, to_dict
from clmfast.data import tasks
from clmfast.progress import Progress
from tests.faults.worker import Progress as ProgressLine

CONFIG = RunConfig(
    steps=4,
    resume_every=2,
    threads=1,
    task=TaskConfig(n_tasks=2, n_grammars=2, n_instructions=4, n_unseen_instructions=2, n_inputs=2, n_outputs=4),
    model=ModelConfig(n_layers=1, width=8, n_heads=1),
    train=TrainConfig(batch=4, warmup_steps=1, validate_every=2, n_validation=8, patience=1),
    measure=MeasureConfig(
        window=8, unseen_per_step=2, unseen_window=4, probe_every=2, probe_train=8, probe_unseen=4, k=2, n_init=1,
        max_iter=3, n_shuffles=1, n_snapshots=2,
    ),
)  # fmt: skip
MORE_STEPS = 6
N_RESUMES = 200  # of the long sweep: a run that is killed after every step
LIMIT_S = 60.0  # a run takes a tenth of a second

WRITES = ("write", "pwrite")
CHANGES = ("open", *WRITES, "fsync", "replace", "rename", "mkdir", "unlink", "ftruncate", "posix_fallocate", "rmtree")
MODES = ("kill before", "kill inside", "kill after", "full disk", "error", "short write", "power cut")
ALLOCATING = ("open", *WRITES, "mkdir", "posix_fallocate")


def applies(mode: str, kind: str) -> bool:
    """Can this happen to a change of this kind?"""
    if mode == "short write":
        return kind in WRITES
    if mode == "kill inside":
        return kind in (*WRITES, "rmtree")
    return kind in ALLOCATING if mode == "full disk" else True


class Disk:
    """Stands in for the module `os`, and for shutil.rmtree, in clmfast.files."""

    def __init__(self, n: int = -1, mode: str = "", seed: int = 0, struck: Callable[[], None] = lambda: None) -> None:
        self.n, self.mode, self.struck, self.random = n, mode, struck, random.Random(seed)
        self.kinds: list[str] = []
        self._is_full = False
        self._unsynced: list[tuple[int, Callable[[], None]]] = []  # (inode, what undoes a change)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _change(self, kind: str, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if self._is_full and kind in ALLOCATING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.kinds.append(kind)
        if len(self.kinds) - 1 != self.n:
            return do()
        self.struck()
        if self.mode == "full disk":
            self._is_full = True
            if half is not None and kind in WRITES:
                half()  # as much as there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.mode == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.mode == "short write":
            assert half is not None
            return half()
        if self.mode == "power cut":
            do()
            share = self.random.choice((0.0, 0.5, 1.0))
            for _, undo in reversed(self._unsynced):
                if self.random.random() < share:
                    with suppress(OSError):
                        undo()
        elif self.mode == "kill inside":
            assert half is not None
            half()
        elif self.mode == "kill after":
            do()
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody lives here")

    def _undoable(self, file: int | str | Path, undo: Callable[[], None]) -> None:
        if self.mode == "power cut":
            self._unsynced.append((os.stat(file).st_ino, undo))

    def _undoable_in(self, file: int, undo: Callable[[int], Any]) -> None:
        """A change of what an open file holds, under whatever name it is by then."""
        if self.mode == "power cut":
            again = os.dup(file)
            self._unsynced.append((os.fstat(file).st_ino, lambda: undo(again)))

    def _folder_of(self, path: Any, folder: int | None) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{folder}")) if folder is not None else Path(path).absolute().parent

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        def make() -> int:
            return os.open(path, flags, mode, dir_fd=dir_fd)

        if not flags & os.O_CREAT:
            return make()
        where = self._folder_of(path, dir_fd)
        if (where / Path(path).name).exists():
            return make()

        def make_new() -> int:
            file = make()
            self._undoable(where, lambda: os.unlink(where / Path(path).name))
            return file

        return self._change("open", make_new)

    def write(self, file: int, data: Any) -> int:
        def some(n: int) -> int:
            size = os.fstat(file).st_size
            done = os.write(file, data[:n])
            self._undoable_in(file, lambda again: os.ftruncate(again, size))
            return done

        return self._change("write", lambda: some(len(data)), lambda: some((len(data) + 1) // 2))

    def pwrite(self, file: int, data: Any, offset: int) -> int:
        def some(n: int) -> int:
            before = os.pread(file, n, offset)
            done = os.pwrite(file, data[:n], offset)
            self._undoable_in(file, lambda again: os.pwrite(again, before, offset))
            return done

        return self._change("pwrite", lambda: some(len(data)), lambda: some((len(data) + 1) // 2))

    def fsync(self, file: int) -> None:
        def sync() -> None:
            os.fsync(file)
            inode = os.fstat(file).st_ino
            self._unsynced = [(of, undo) for of, undo in self._unsynced if of != inode]

        self._change("fsync", sync)

    def _rename(self, kind: str, a: Any, b: Any, folder: int | None) -> None:
        where = self._folder_of(b, folder)
        source, target = where / Path(a).name, where / Path(b).name

        def rename() -> None:
            spare = Path(tempfile.mkdtemp(dir=where.parent.parent)) / "spare"
            if target.is_file():
                os.link(target, spare)
            getattr(os, kind)(source, target)

            def undo() -> None:
                os.rename(target, source)
                if spare.exists():
                    os.rename(spare, target)

            self._undoable(where, undo)

        def rename_plainly() -> None:
            getattr(os, kind)(source, target)

        self._change(kind, rename if self.mode == "power cut" else rename_plainly)

    def replace(self, a: Any, b: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._rename("replace", a, b, dst_dir_fd)

    def rename(self, a: Any, b: Any) -> None:
        self._rename("rename", a, b, None)

    def mkdir(self, path: Any, *mode: int) -> None:
        def make() -> None:
            os.mkdir(path, *mode)
            self._undoable(Path(path).absolute().parent, lambda: shutil.rmtree(path))

        if not Path(path).exists():
            self._change("mkdir", make)
        else:
            make()

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._change("unlink", lambda: os.unlink(path, dir_fd=dir_fd))

    def ftruncate(self, file: int, n: int) -> None:
        self._change("ftruncate", lambda: os.ftruncate(file, n))

    def posix_fallocate(self, file: int, offset: int, n: int) -> None:
        self._change("posix_fallocate", lambda: os.posix_fallocate(file, offset, n))

    def rmtree(self, path: Any) -> None:
        def half() -> None:
            os.unlink(next(iter(sorted(Path(path).iterdir()))))

        self._change("rmtree", lambda: shutil.rmtree(path), half)


@contextmanager
def on(disk: Disk) -> Iterator[None]:
    """What is written in this block goes to `disk`."""
    before = files.os, files.shutil
    files.os, files.shutil = disk, disk  # type: ignore[assignment]
    try:
        yield
    finally:
        files.os, files.shutil = before


def prepare(folder: Path) -> None:
    """Load and compile all that a run needs, so that a fork has it; leave out what is no part of the record."""
    torch.set_num_threads(1)  # this process must have no other thread when it forks
    made = tasks.make_tasks(CONFIG.task, CONFIG.seed)
    tasks.make_tasks = lambda *_: made  # type: ignore[assignment]
    report.page = lambda _: "<html>"  # type: ignore[assignment]
    train.Training.controls = lambda _: []  # type: ignore[method-assign]
    Progress.summary = lambda *_: None  # type: ignore[method-assign]
    for n_steps in (CONFIG.steps, N_RESUMES):
        config = dataclasses.replace(CONFIG, steps=n_steps)
        if n_steps == N_RESUMES:
            config = dataclasses.replace(config, resume_every=1)
        (folder / f"{n_steps}.json").write_text(json.dumps(to_dict(config)))


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command, the directory it finds, and what is to be there in the end."""

    name: str
    before: Path | None  # directory that it finds; None: none
    arguments: tuple[str, ...]
    n_steps: int
    config: Path

    def command(self, out: Path) -> list[str]:
        """What to type in the first place."""
        if self.before is None:
            return ["--config", str(self.config), "--out", str(out)]
        return ["--resume", str(out), *self.arguments]

    def again(self, out: Path) -> list[str]:
        """What to type once it was struck down."""
        return ["--resume", str(out), *self.arguments] if (out / "config.json").exists() else self.command(out)


Known = dict[str, tuple[Scenario, dict[str, bytes], list[str]]]
Job = tuple[str, Callable[[Path], list[str]]]


def started(work: Callable[[], int], log: Path, limit_s: float = LIMIT_S) -> int:
    """The pid of a fork that runs `work`, ends with its exit code and prints to `log`."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(to, 1)
            os.dup2(to, 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(i, "wb", 0), write_through=True) for i in (1, 2))
            signal.alarm(int(limit_s))
            code = work()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a fork; its exit code, -signal where it died of one."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work: Callable[[], int], log: Path) -> int:
    """Run `work` in a fork; returns its exit code, -signal where it died of one."""
    return ended(started(work, log))


def fingerprint(out: Path) -> dict[str, bytes]:
    """All of a run's directory that the same run must have again."""
    found = {
        name: (out / name).read_bytes() for name in ("config.json", "steps.npy", "neighbours.npy", "controls.json")
    }
    for path in sorted(out.glob("*/**/*")):
        if path.is_file() and path.suffix != ".npz":
            found[str(path.relative_to(out))] = path.read_bytes()
    for path in sorted(out.glob("projections/*.npz")):
        with np.load(path) as arrays:
            found[path.name] = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    return found


def differences(out: Path, wanted: dict[str, bytes], may_lose_rows: bool = False) -> list[str]:
    """What is wrong with a run that went on. A power cut may take a part of a row that no state stands on: computing it
    again then tells of a difference, and rightly so."""
    try:
        found, read = fingerprint(out), record.Run(out)
        happened = [event["event"] for event in read.events]
    except (OSError, ValueError) as error:
        return [f"it cannot be read: {error}"]
    told = [f"{name} differs" for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    told += [f"{path.relative_to(out)} is left over" for path in out.glob("**/.*.part")]
    if "resume_mismatch" in happened and not may_lose_rows:
        told.append("a row was computed again, and was another one")
    return told


def strike(scenario: Scenario, n: int, mode: str, seed: int, wanted: dict[str, bytes], place: Path) -> list[str]:
    """Let one thing happen to a run, let it go on, and say what is wrong then; runs in a process of its own."""
    out, log, hit = place / "run", place / "log", place / "hit"
    if scenario.before is not None:
        shutil.copytree(scenario.before, out)
    with on(Disk(n, mode, seed, struck=lambda: hit.touch())):
        code = forked(lambda: run.main(scenario.command(out)), log)
    told = log.read_text()
    if not hit.exists():
        return [f"change {n} never came"]
    if mode == "short write":
        allowed = (0,)
    elif mode in ("full disk", "error"):
        allowed = (run.CANNOT_WRITE, run.BAD_INPUT, 0)  # 0: what was only tidying up may fail
    else:
        allowed = (-signal.SIGKILL,)
    wrong = []
    if code not in allowed:
        wrong.append(f"exit code {code}")
    if "Traceback" in told:
        wrong.append(f"a traceback: {told.splitlines()[-1]}")
    code = forked(lambda: run.main(scenario.again(out)), log)
    if code:
        return [*wrong, f"going on ended with {code}: {log.read_text()[-300:]}"]
    return wrong + differences(out, wanted, may_lose_rows=mode == "power cut")


def random_kill(scenario: Scenario, seed: int, wanted: dict[str, bytes], place: Path) -> list[str]:
    """SIGKILL at any moment, three times over."""
    out, chance = place / "run", random.Random(seed)
    command = scenario.command(out)
    if scenario.before is not None:
        shutil.copytree(scenario.before, out)
    for _ in range(3):
        child = started(lambda: run.main(command), Path(os.devnull))  # noqa: B023  the fork has this round's
        time.sleep(chance.random() * 0.25)
        os.kill(child, signal.SIGKILL)
        code = ended(child)
        if code not in (-signal.SIGKILL, 0):
            return [f"exit code {code} before it was killed"]
        command = scenario.again(out)
    code = forked(lambda: run.main(command), place / "log")
    return [f"going on ended with {code}: {(place / 'log').read_text()[-300:]}"] if code else differences(out, wanted)


def real_kill(scenario: Scenario, seed: int, wanted: dict[str, bytes], place: Path) -> list[str]:
    """SIGKILL to a process as a user starts it; it draws its report, too."""
    out = place / "run"
    start = [sys.executable, "-m", "clmfast.run"]
    process = subprocess.Popen([*start, *scenario.command(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(2 + 4 * random.Random(seed).random())
    process.kill()
    process.wait()
    again = subprocess.run([*start, *scenario.again(out)], capture_output=True, text=True)
    wanted = {name: content for name, content in wanted.items() if name != "controls.json"}
    told = [one for one in differences(out, wanted) if one != "controls.json differs"]
    return [again.stderr[-300:]] if again.returncode else told


def many_resumes(scenario: Scenario, wanted: dict[str, bytes], place: Path) -> list[str]:
    """A run that dies after every single step, as soon as that step's state is saved."""
    out = place / "run"
    save = record.RunWriter.save

    def save_and_die(writer: record.RunWriter) -> None:
        save(writer)
        os.kill(os.getpid(), signal.SIGKILL)

    record.RunWriter.save = save_and_die  # type: ignore[method-assign]
    for n in range(scenario.n_steps):
        code = forked(lambda: run.main(scenario.again(out)), place / "log")
        if code != -signal.SIGKILL:
            return [f"resume {n} ended with {code}: {(place / 'log').read_text()[-300:]}"]
    record.RunWriter.save = save  # type: ignore[method-assign]
    code = forked(lambda: run.main(scenario.again(out)), place / "log")
    return [f"the last resume ended with {code}"] if code else differences(out, wanted)


class Pool:
    """As many jobs at a time as there are cores, each in a fork and in a folder of its own."""

    def __init__(self, folder: Path, n_jobs: int) -> None:
        self.folder, self.n_processes = folder, len(os.sched_getaffinity(0))
        self.n_done = self.n_faults = 0
        self._at_work: dict[int, tuple[str, Path]] = {}
        self._line = ProgressLine("sweep", n_jobs)

    def add(self, name: str, job: Callable[[Path], list[str]]) -> None:
        """Start a job as soon as there is a free core; a job returns what is wrong."""
        while len(self._at_work) >= self.n_processes:
            self._collect()
        place = Path(tempfile.mkdtemp(dir=self.folder))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                told = job(place)
                (place / "told").write_text("\n".join(told))
                code = 0
            except BaseException as error:
                (place / "told").write_text(f"the sweep itself failed: {error!r}")
            finally:
                os._exit(code)
        self._at_work[child] = name, place

    def _collect(self) -> None:
        child, _ = os.wait()
        name, place = self._at_work.pop(child)
        told = (place / "told").read_text() if (place / "told").exists() else "the sweep itself died"
        if told:
            self.n_faults += 1
            print(f"\n{name}: {told}", flush=True)
        self.n_done += 1
        self._line(self.n_done, self.n_faults)
        shutil.rmtree(place)

    def finish(self) -> int:
        while self._at_work:
            self._collect()
        return self.n_faults


def scenarios(folder: Path) -> Known:
    """By name: the scenario, what is to be there in the end, and the changes that it makes to the disk, in order."""
    config = folder / f"{CONFIG.steps}.json"
    found = {}

    def add(name: str, before: Path | None, arguments: tuple[str, ...] = (), n_steps: int = CONFIG.steps) -> Path:
        scenario, out = Scenario(name, before, arguments, n_steps, config), folder / f"whole-{name}"
        if before is not None:
            shutil.copytree(before, out)
        disk = Disk()
        with on(disk), open(os.devnull, "w") as nothing:
            stdout, sys.stdout = sys.stdout, nothing
            code = run.main(scenario.command(out))
            sys.stdout = stdout
        assert code == 0, name
        found[name] = scenario, fingerprint(out), disk.kinds
        return out

    whole = add("new", None)
    # As after a kill behind step 3: the newest state is that of step 2, and a row is there that is computed again.
    stopped = folder / "stopped"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "resume" / f"{CONFIG.steps:08d}")
    shutil.rmtree(stopped / "checkpoints" / f"{CONFIG.steps:08d}")
    table = np.load(stopped / "steps.npy", mmap_mode="r+")
    table[-1] = 0
    del table
    for name in ("report.html", "controls.json"):
        (stopped / name).unlink()
    (stopped / ".config.json.0123456789abcdef.part").write_text("a stray")
    with open(stopped / "events.jsonl", "ab") as file:
        file.write(b'{"event": "torn')
    add("resumed", stopped)
    add("extended", whole, ("--steps", str(MORE_STEPS)), MORE_STEPS)
    return found


ROUNDS = 9  # of power cuts in the long sweep: what is lost is another thing each time


def strikes(known: Known, is_long: bool, chance: random.Random) -> list[Job]:
    """A job for everything that is to happen at the changes of every scenario."""
    jobs: list[Job] = []
    for name, (scenario, wanted, kinds) in known.items():
        for i in range(ROUNDS if is_long else 1):
            for n, mode in points(kinds, is_long, chance):
                if i and mode != "power cut":
                    continue
                r = chance.randrange(2**32)

                def job(place: Path, s=scenario, n=n, m=mode, r=r, w=wanted) -> list[str]:  # type: ignore[no-untyped-def]
                    return strike(s, n, m, r, w, place)

                jobs.append((f"{name}: {mode} at change {n} ({kinds[n]}, seed {r})", job))
    return jobs


def points(kinds: list[str], is_long: bool, chance: random.Random) -> list[tuple[int, str]]:
    """(change, what happens there): every change is struck; in the long sweep, by everything that can happen to it."""
    found = []
    for n, kind in enumerate(kinds):
        modes = [mode for mode in MODES if applies(mode, kind)]
        found += [(n, mode) for mode in (modes if is_long else chance.sample(modes, 1))]
    return found


def main(is_long: bool, seed: int) -> int:
    """The sweep, and kills at random times; returns the number of faults."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        prepare(folder)
        known = scenarios(folder)
        jobs = strikes(known, is_long, chance)
        n_struck = len(jobs)
        scenario, wanted, _ = known["new"]
        for _ in range(400 if is_long else 20):
            r = chance.randrange(2**32)
            jobs.append((f"random kill, seed {r}", lambda place, r=r: random_kill(scenario, r, wanted, place)))
        for _ in range(20 if is_long else 2):
            r = chance.randrange(2**32)
            jobs.append((f"kill of a process, seed {r}", lambda place, r=r: real_kill(scenario, r, wanted, place)))
        if is_long:
            long = Scenario("long", None, (), N_RESUMES, folder / f"{N_RESUMES}.json")
            out = folder / "whole-long"
            assert forked(lambda: run.main(long.command(out)), folder / "log") == 0
            jobs.append(("a resume at every step", lambda place: many_resumes(long, fingerprint(out), place)))
        pool = Pool(folder, len(jobs))
        for name, job in jobs:
            pool.add(name, job)
        n_faults = pool.finish()
    changes = sum(len(kinds) for _, _, kinds in known.values())
    hit = Counter(kind for _, _, kinds in known.values() for kind in kinds)
    print(
        f"sweep: {len(jobs)} points, {n_struck} of them at the {changes} changes of {len(known)} kinds of run, each "
        f"struck at least once ({', '.join(f'{kind} {n}' for kind, n in hit.most_common())}); {n_faults} faults"
    )
    return n_faults

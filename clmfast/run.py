"""The command line: train, measure every layer at every step, record, draw. The only place that knows everything.

    python -m clmfast.run                    # a new directory under runs/, the report's path at the end
    python -m clmfast.run --preset paper --seed 3 --out runs/three
    python -m clmfast.run --resume runs/three              # go on with a run that was stopped, or died
    python -m clmfast.run --resume runs/three --steps 6000 # go on with a run that has finished

Exit codes: 0 the run finished, whatever the claims; 2 bad input, nothing was begun; 3 the loss diverged; 4 the run
directory could not be written to; 5 the memory ran out; 129, 130, 143 stopped by SIGHUP, Ctrl-C or SIGTERM, with a
state saved: as a process it dies of that signal, so that a loop of a shell stops as well.

torch is imported only once the arguments are known to be good, so that help and errors come at once.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clmfast import __version__, directory
from clmfast.config import PRESETS, ConfigError, RunConfig, check, from_file
from clmfast.needs import check_needs, is_out_of_memory
from clmfast.paths import expanded
from clmfast.record import NotARun, RunWriter, state_bytes
from clmfast.screen import complain, forgiving
from clmfast.surroundings import Surroundings, on_signal
from clmfast.untrusted import Damaged

if TYPE_CHECKING:
    from clmfast.progress import Progress
    from clmfast.train import Training

BAD_INPUT, DIVERGED, CANNOT_WRITE, NO_MEMORY = 2, 3, 4, 5
NEW_RUNS = "runs"  # folder of runs that were given no name
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
STOPPED_BY = 128  # plus the signal's number, as shells count


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """Train a small Transformer to follow instructions and measure, in every layer and at every step, how its hidden
    states cluster by task. Everything is recorded in a run directory, with a page of pictures: report.html."""

    preset: Literal["tiny", "paper"] = "tiny"
    """Where the settings start from: tiny runs in minutes on two cores, paper is a reconstruction of the paper's."""
    config: str = ""
    """A TOML or JSON file with settings on top of the preset, such as the config.json of an earlier run."""
    resume: str = ""
    """Go on with the run in this directory, from its last saved state or the start; only --steps may be changed."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)


def parse(arguments: list[str]) -> CommandLine:
    """The command line as a checked config; ConfigError or SystemExit (help, unknown flag) otherwise."""
    base = RunConfig()
    preset, file, resume = (_value_of(arguments, flag) for flag in ("--preset", "--config", "--resume"))
    for flag, value in (("--config", file), ("--resume", resume)):
        if value == "":
            raise ConfigError(f"{flag} must be followed by a path, got nothing (is a variable empty?)")
    if preset in PRESETS:
        base = PRESETS[preset]
    if file:
        base = from_file(expanded(file), base)
    if resume:
        base = directory.config_of(expanded(resume))
    asked = tyro.cli(
        CommandLine,
        args=arguments,
        prog="python -m clmfast.run",
        default=CommandLine(run=base),
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes[CommandLine]),
    )
    if resume and (preset or file or dataclasses.replace(asked.run, steps=base.steps) != base):
        raise ConfigError(f"--resume goes on with the run's own settings, only --steps may be changed, got {arguments}")
    run = asked.run
    if run.out and not resume:
        run = dataclasses.replace(run, out=str(expanded(run.out)))
    check(run)
    check_device(run)
    n_cores = len(os.sched_getaffinity(0))
    if run.threads > n_cores and not resume:
        raise ConfigError(f"threads must be at most the {n_cores} cores of this process, got {run.threads}")
    n_beside = n_cores - (run.threads or 1)
    if run.measure.threads > n_beside and not resume:
        raise ConfigError(
            f"measure.threads must leave training its threads, at least one, and so be at most {n_beside} of the "
            f"{n_cores} cores of this process, got {run.measure.threads}"
        )
    check_needs(run, None if resume else directory.existing_parent(Path(run.out or NEW_RUNS)))
    return dataclasses.replace(asked, run=run)


def _value_of(arguments: list[str], flag: str) -> str | None:
    """The value of one flag, looked up before the others can be parsed, because their defaults depend on it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


@forgiving()
def main(arguments: list[str]) -> int:
    """Train, measure, record, draw as the arguments say; returns the exit code, see the head of this file."""
    path: Path | None = None
    try:
        asked = parse(arguments)
        path = Path(asked.run.out) if asked.run.out else None
        with Surroundings() as surroundings:
            return run(asked, surroundings)
    except ConfigError as error:
        complain("clmfast", error)
        return BAD_INPUT
    except (NotARun, Damaged) as error:
        complain("clmfast", f"the records of the run must be as they were written: {error}")
        return BAD_INPUT
    except OSError as error:
        complain("clmfast", f"{error.filename or 'the run directory'} must be writable: {error.strerror}")
        if path is not None and os.path.exists(path / "config.json"):
            complain("clmfast", f"what was recorded stays; go on with {resume_command(path)}")
            return CANNOT_WRITE
        return CANNOT_WRITE if error.errno in DISK_ERRORS else BAD_INPUT
    except KeyboardInterrupt:
        complain("clmfast", "stopped at once; what was recorded before stays")
        return STOPPED_BY + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain("clmfast", f"the memory must hold the run, it ran out: {' '.join(str(error).split())}")
        return NO_MEMORY


def resume_command(path: Path) -> str:
    """What to type to go on with the run in `path`."""
    return f"python -m clmfast.run --resume {shlex.quote(str(path))}"


def die_of(code: int) -> int:
    """Die of the signal that an exit code stands for, so that a loop of a shell stops; for others, the code itself."""
    if code > STOPPED_BY:
        signal.signal(code - STOPPED_BY, signal.SIG_DFL)
        os.kill(os.getpid(), code - STOPPED_BY)
    return code


def run(asked: CommandLine, surroundings: Surroundings) -> int:
    """Train, measure and draw; returns the exit code."""
    config, is_resumed = asked.run, bool(asked.resume)
    lock = -1
    try:
        path, meta, n_steps = Path(config.out or NEW_RUNS), {}, config.steps
        if is_resumed:
            lock = directory.reopen(path)
            meta = directory.header_of(path)
            n_steps = directory.check_same(path, config, meta)
        elif config.out:
            directory.check_new(path)
        else:
            directory.check_writable(path if path.exists() else directory.existing_parent(path))
        import torch

        from clmfast.data.tasks import make_tasks
        from clmfast.progress import Progress
        from clmfast.train import Training

        # Another number of threads would be another rounding of what torch computes.
        choices = surroundings.set_up_torch(dataclasses.replace(config, threads=meta.get("threads", config.threads)))
        training = Training(config, make_tasks(config.task, config.seed))
        if not is_resumed:
            if config.out:
                lock = directory.claim(path)
            else:
                path, lock = directory.claim_free_name(path, config.seed)
        with RunWriter(path, training) as writer:
            here = header(choices, torch.__version__)
            notes = go_on(training, writer, meta, n_steps, here) if is_resumed else begin(training, writer, here)
            with Progress(training, path) as progress:
                for note in notes:
                    progress.note(note)
                exit_code = follow(training, writer, progress)
                if exit_code in (0, DIVERGED, STOPPED_BY + signal.SIGINT):
                    progress.note("measuring the controls and drawing the report")
                    finish(training, writer)
            writer.end()
        if exit_code in (0, DIVERGED):
            progress.summary(path)
    finally:
        if lock >= 0:
            os.close(lock)
    return exit_code


def begin(training: Training, writer: RunWriter, here: dict[str, Any]) -> list[str]:
    """The first entries of a run's records."""
    writer.write_header(here)
    writer.event("start", step=0)
    writer.checkpoint()
    return []


def go_on(training: Training, writer: RunWriter, meta: dict[str, Any], n_steps: int, here: dict[str, Any]) -> list[str]:
    """Take over the newest state of a run that was stopped, and that had n_steps; returns what its user should know."""
    if not meta:  # it died before it had a header, and so before any row
        return begin(training, writer, here)
    notes = []
    state, skipped = directory.newest_state(
        writer.path, writer.steps.is_written(), 2 * state_bytes(training), training.check_state
    )
    for reason in skipped:
        writer.event("state_skipped", step=0, reason=reason)
        notes.append(f"a saved state could not be used: {reason}")
    if state is not None:
        training.load_state(*state)
    step = training.next_step
    changed = {
        name: [before, now]
        for name, before, now in (
            *((name, meta.get("versions", {}).get(name), version) for name, version in here["versions"].items()),
            ("cpu", meta.get("machine", {}).get("cpu"), here["machine"]["cpu"]),
        )
        if before != now
    }
    writer.event("resume", step=step, **({"changed": changed} if changed else {}))
    notes.append(f"going on from step {step}" if state else "going on from the start: there is no saved state")
    if changed:
        told = ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changed.items())
        notes.append(f"other than when the run began: {told}; rows may differ in their last bits from here on")
    n_cores = len(os.sched_getaffinity(0))
    if here["threads"] > n_cores:
        notes.append(f"the run began with {here['threads']} threads and keeps them, on {n_cores} cores")
    if n_steps != training.config.steps:
        notes.append(extend(training, writer, n_steps))
        writer.write_header({name: meta.get(name, here[name]) for name in here})
    if state is None:
        writer.checkpoint()
    return notes


def extend(training: Training, writer: RunWriter, n_steps: int) -> str:
    """Make rows that another number of steps changes unwritten; returns what that means for the run."""
    from clmfast.train import learning_rate

    step = training.next_step
    before = dataclasses.replace(training.config, steps=n_steps)
    lr = learning_rate(before, min(step, n_steps)), learning_rate(training.config, step)
    n_rows = writer.clear_rows(step)
    writer.event("extended", step=step, steps=[n_steps, training.config.steps], lr=list(lr), rows_again=n_rows)
    return (
        f"steps changed from {n_steps:,} to {training.config.steps:,}: up to step {step:,} the learning rate followed "
        f"the schedule of {n_steps:,} steps and was {lr[0]:.2g}, from here on it follows that of "
        f"{training.config.steps:,} and is {lr[1]:.2g}. "
        f"This is not the run that would have had {training.config.steps:,} steps from the start"
        if step
        else f"steps changed from {n_steps:,} to {training.config.steps:,}, and the run starts from step 0 with that"
    )


def follow(training: Training, writer: RunWriter, progress: Progress) -> int:
    """Record every step. A signal that asks the run to stop is obeyed between two steps, with all of it recorded and a
    state saved to go on from; a second one ends it at once."""
    from clmfast.train import TrainingDiverged

    with stop_asked_for(progress.note) as came:
        try:
            for step in training:
                writer.write(step)
                progress.update(step)
                if any(event["event"] == "anomaly" for event in step.events):
                    continue  # to the error that ends it: nobody should go on from such a state
                writer.checkpoint()
                if came and training.next_step <= training.config.steps:
                    writer.save()
                    writer.event("interrupted", step=step.step, signal=signal.Signals(came[0]).name)
                    progress.note(f"stopped after step {step.step}; go on with {resume_command(writer.path)}")
                    return STOPPED_BY + came[0]
        except TrainingDiverged as error:
            progress.note(str(error))
            return DIVERGED
        writer.event("end", step=training.next_step - 1)
        return 0


@contextmanager
def stop_asked_for(note: Callable[[str], None]) -> Iterator[list[int]]:
    """The signals that asked the run to stop: the first one is put into the list that comes back, and waits for the
    step to end; a second one acts as usual."""
    came: list[int] = []
    polite = ExitStack()

    def take_note(number: int, _: object) -> None:
        came.append(number)
        polite.close()
        note("stopping after this step, with a state to go on from (once more: at once)")

    with on_signal(signal.SIGINT, signal.default_int_handler), polite:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            polite.enter_context(on_signal(number, take_note))
        yield came


def finish(training: Training, writer: RunWriter) -> None:
    """Controls and report of what was recorded."""
    from clmfast.report import write_report

    writer.write_controls(training.controls())
    write_report(writer.path)


def check_device(config: RunConfig) -> None:
    """Is the device there, with all that the run needs on it? ConfigError otherwise: nothing asked for is replaced."""
    device = config.device
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ConfigError(f"device must be cpu, cuda or cuda:N, got {device}")
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= n_gpus:
        raise ConfigError(f"device must be one of the {n_gpus} GPUs that torch {torch.__version__} sees, got {device}")
    from clmfast.ops.attention import MAX_HEAD_WIDTH  # registers the kernels, too

    if not torch._C._dispatch_has_kernel_for_dispatch_key("clmfast::knn", "CUDA"):
        raise ConfigError(f"device {device} needs clmfast built where nvcc is found: see the README, On a GPU")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"device {device} needs triton for attention: pip install triton")
    width, n_heads = config.model.width, config.model.n_heads
    if width > MAX_HEAD_WIDTH * n_heads:
        raise ConfigError(
            f"on a GPU a head must be at most {MAX_HEAD_WIDTH} wide, got model.width = {width} / {n_heads} heads"
        )


def header(choices: dict[str, dict[str, Any]], torch_version: str) -> dict[str, Any]:
    """Machine, versions and choices for meta.json: no path and no host name."""
    import platform
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not every system says; the architecture has to do
    return {
        "versions": {
            "clmfast": __version__,
            "torch": torch_version,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", "safetensors")},
        },
        "machine": {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "system": platform.system()},
        "threads": choices["threads"]["value"],
        "choices": choices,
    }


if __name__ == "__main__":
    sys.exit(die_of(main(sys.argv[1:])))

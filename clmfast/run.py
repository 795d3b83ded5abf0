"""The command line: train, measure every layer at every step, record, draw. The only place that knows everything.

    python -m clmfast.run                    # a new directory under runs/, the report's path at the end
    python -m clmfast.run --preset paper --seed 3 --out runs/three
    python -m clmfast.run --resume runs/three

torch is imported only once the arguments are known to be good, so that help and errors come at once.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from clmfast import __version__
from clmfast.config import PRESETS, ConfigError, RunConfig, check, from_file, replays_graph

if TYPE_CHECKING:
    from clmfast.progress import Progress
    from clmfast.record import RunWriter
    from clmfast.train import Training

DIVERGED, BAD_INPUT = 3, 2


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """Train a small Transformer to follow instructions and measure, in every layer and at every step, how its hidden
    states cluster by task. Everything is recorded in a run directory, with a page of pictures: report.html."""

    preset: Literal["tiny", "paper"] = "tiny"
    """Where the settings start from: tiny runs in minutes on two cores, paper is a reconstruction of the paper's."""
    config: str = ""
    """A TOML or JSON file with settings on top of the preset, such as the config.json of an earlier run."""
    resume: str = ""
    """Go on with the run in this directory from its last saved state; takes no other flag."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=RunConfig)


def parse(arguments: list[str]) -> CommandLine:
    """The command line as a checked config; ConfigError or SystemExit (help, unknown flag) otherwise."""
    base = RunConfig()
    preset, file = _value_of(arguments, "--preset"), _value_of(arguments, "--config")
    if preset in PRESETS:
        base = PRESETS[preset]
    if file:
        base = from_file(file, base)
    resume = _value_of(arguments, "--resume")
    if resume:
        if len(arguments) > (1 if "=" in arguments[0] else 2):
            raise ConfigError(
                f"--resume takes no other flag (the run's own config.json holds), got {' '.join(arguments)}"
            )
        path = Path(resume) / "config.json"
        if not path.exists():
            raise ConfigError(f"--resume must name a run directory, {resume} has no config.json")
        run = dataclasses.replace(from_file(path, RunConfig()), out=resume)
        check_device(run)
        return CommandLine(resume=resume, run=run)
    asked = tyro.cli(
        CommandLine,
        args=arguments,
        prog="python -m clmfast.run",
        default=CommandLine(run=base),
        config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes[CommandLine]),
    )
    check(asked.run)
    check_device(asked.run)
    n_cores = len(os.sched_getaffinity(0))
    if asked.run.threads > n_cores:
        raise ConfigError(f"threads must be at most the {n_cores} cores of this process, got {asked.run.threads}")
    return asked


def _value_of(arguments: list[str], flag: str) -> str:
    """The value of one flag, looked up before the others can be parsed, because their defaults depend on it."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return ""


def new_directory(config: RunConfig) -> Path:
    """The run directory, checked but not yet made: it must not exist, and its parent must be writable."""
    path = (
        Path(config.out)
        if config.out
        else _free_name(Path("runs"), f"{time.strftime('%Y%m%d-%H%M%S')}-seed{config.seed}")
    )
    if path.exists():
        raise ConfigError(f"--out must name a new directory, {path} exists (--resume goes on with a run)")
    parent = _existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--out must be in a directory that can be written to, {parent} cannot")
    return path


def _existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _free_name(folder: Path, name: str) -> Path:
    taken = {path.name for path in folder.glob(f"{name}*")}
    return folder / next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def share_the_cores() -> str:
    """Make OpenMP's threads go to sleep after about half a millisecond of waiting; returns the reason.

    By default they burn some 15 ms waiting, and where another process wants a core the scheduler makes up for that at
    the next barrier: with one busy process beside it, a step of the default run took 4.6 s instead of 0.5 s. Where the
    cores are free, this costs nothing. Must come before torch is imported; an environment that says otherwise wins.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return "as the environment says"
    os.environ["GOMP_SPINCOUNT"] = "10000"
    return "short: a process beside this one must not stall every step"


def main(arguments: list[str]) -> int:
    """Exit codes: 0 the run finished (whatever the claims) or was ended by Ctrl-C, 2 bad input, 3 the loss diverged."""
    try:
        asked = parse(arguments)
        path = Path(asked.resume) if asked.resume else new_directory(asked.run)
        return run(asked.run, path, is_resumed=bool(asked.resume))
    except ConfigError as error:
        print(f"clmfast: {error}", file=sys.stderr)
    except BrokenPipeError:
        pass  # whoever read our output has seen enough
    except OSError as error:
        print(f"clmfast: {error.filename or 'the run directory'} must be writable: {error.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        print("clmfast: stopped at once; what was recorded before stays", file=sys.stderr)
    return BAD_INPUT


def run(config: RunConfig, path: Path, is_resumed: bool = False) -> int:
    """Train, measure and draw into `path`; returns the exit code."""
    waiting = share_the_cores()
    import torch

    from clmfast.data.tasks import make_tasks
    from clmfast.files import DamagedCheckpoint, newest_checkpoint
    from clmfast.progress import Progress
    from clmfast.record import RunWriter, disk_bytes
    from clmfast.train import TIMING_COLUMNS, Training

    choices = set_up_torch(config)
    choices["openmp_waiting"] = {"value": os.environ.get("GOMP_SPINCOUNT", ""), "reason": waiting}
    training = Training(config, make_tasks(config.task, config.seed))
    if is_resumed:
        try:
            training.load_state(*newest_checkpoint(path / "resume"))
        except DamagedCheckpoint as error:
            raise ConfigError(f"--resume: {error}") from None
    else:
        check_disk(path, disk_bytes(training))
    writer = RunWriter(path, training, TIMING_COLUMNS)
    if is_resumed:
        writer.event("resume", step=training.next_step)
    else:
        writer.write_header(header(choices, torch.__version__))
        writer.event("start", step=0)
        writer.checkpoint()
    with Progress(training, path) as progress:
        exit_code = follow(training, writer, progress)
        progress.note("measuring the controls and drawing the report")
        finish(training, writer)
    writer.close()
    progress.summary(path)
    return exit_code


def follow(training: Training, writer: RunWriter, progress: Progress) -> int:
    """Record every step. Ctrl-C ends the run between two steps with everything recorded; a second one at once."""
    from clmfast.train import TrainingDiverged

    with _PoliteInterrupt(progress.note) as interrupt:
        try:
            for step in training:
                writer.write(step)
                writer.checkpoint()
                progress.update(step)
                if interrupt.came:
                    writer.event("interrupted", step=step.step)
                    progress.note(f"stopped by Ctrl-C after step {step.step}; --resume {writer.path} goes on")
                    return 0
        except TrainingDiverged as error:
            progress.note(str(error))
            return DIVERGED
    writer.event("end", step=training.next_step - 1)
    return 0


class _PoliteInterrupt:
    """The first Ctrl-C is noted and waits for the step to end; the second one interrupts as usual."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.came, self.note = False, note

    def __enter__(self) -> _PoliteInterrupt:
        import signal

        def first(*_: object) -> None:
            self.came = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self.note("stopping after this step (Ctrl-C again: at once)")

        self.before = signal.signal(signal.SIGINT, first)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        signal.signal(signal.SIGINT, self.before)


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


def step_choice(config: RunConfig) -> tuple[str, str]:
    """(how a training step runs, why), for the header."""
    is_graph, reason = replays_graph(config)
    return "one CUDA graph" if is_graph else "op by op", reason


def set_up_torch(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Threads and determinism; returns the automatic choices with their reasons for the header."""
    import torch

    n_cores = len(os.sched_getaffinity(0))
    threads = config.threads or n_cores
    torch.set_num_threads(threads)
    is_cpu = config.device == "cpu"
    if not is_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
    torch.use_deterministic_algorithms(True)
    # That would also write NaN to all new memory, a seventh of a step; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    reason = "asked for" if config.threads else f"all {n_cores} cores that this process may use"
    return {
        "threads": {"value": threads, "reason": reason},
        "device": {"value": config.device, "reason": "the default" if is_cpu else "asked for"},
        "step": dict(zip(("value", "reason"), step_choice(config), strict=True)),
        "attention": {"value": "clmfast, fused C++", "reason": "float32 on a CPU: packed sequences, no padding"}
        if is_cpu
        else {"value": "clmfast, Triton", "reason": "a GPU: packed sequences, no padding"},
        "dtype": {"value": "float32", "reason": "the only one that training offers in this version"},
    }


def header(choices: dict[str, dict[str, Any]], torch_version: str) -> dict[str, Any]:
    """Machine, versions and choices for meta.json: no path and no host name."""
    import platform
    from importlib.metadata import version

    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
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


def check_disk(path: Path, n_bytes: int) -> None:
    """ConfigError if the disk has no room for the run."""
    import shutil

    parent = _existing_parent(path)
    free = shutil.disk_usage(parent).free
    if free < n_bytes:
        raise ConfigError(
            f"the disk of {parent} must have {n_bytes / 1e6:.0f} MB free for this run, got {free / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a run will need, told from its config alone before anything is spent: memory, disk and time.

The figures are what it cannot do without, so that a run which is refused could not have worked; a run that is let in
may still take a half more. Letters: see the formulas of clmfast/model.py; R readouts, S = (layers + 1) R point sets.
"""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clmfast.config import ConfigError, RunConfig

LIBRARIES_BYTES = 350e6  # resident, once torch and numba are loaded
LIBRARIES_ADDRESSES = 2.5e9  # the same as addresses, which is what ulimit -v counts
REPORT_BYTES = 6_000_000
KEPT_STATES = 2  # in resume/
NO_MEMORY = "can't allocate memory|not enough memory"  # torch's words on Linux and elsewhere
RECLAIMED = ("inactive_file", "active_file", "slab_reclaimable")  # of memory.stat: pages of files, mostly
YEAR_S = 365 * 86400.0
# Faster than any core or device of today at float32: a run that takes a year at this speed takes more.
CORE_FLOPS, GPU_FLOPS = 1e12, 1e15
# Columns per layer and readout; a test compares what follows from them with the directory of a run.
WINDOW_COLUMNS, PROBE_COLUMNS, SPLIT_COLUMNS = 22, 20, 6
ANSWERS = 6  # numbers of what neighbours say of each task


@dataclass(frozen=True)
class Needs:
    """Bytes of memory by what they are for, bytes on disk, and the seconds that it takes at the very least."""

    memory: dict[str, float]
    disk: float
    seconds: float

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


def n_checkpoints(steps: int) -> int:
    """How many steps of a run are checkpoint steps (record.is_checkpoint_step): no loop over them."""
    powers = 1 + min(steps, 512).bit_length()  # 0, 1, 2, 4, ...
    later = max(0, steps // 500 - 1)  # 1000, 1500, ...
    is_one_of_them = steps % 500 == 0 if steps > 512 else steps & (steps - 1) == 0
    return powers + later + (not is_one_of_them)


def needs(config: RunConfig) -> Needs:
    """Of a config that `check` accepts."""
    task, model, train, measure = config.task, config.model, config.train, config.measure
    is_measured, has_probe = config.measure_every > 0, config.measure_every > 0 and measure.probe_every > 0
    D, F, L = model.width, model.mlp_ratio * model.width, model.n_layers
    V = 5 + len(task.alphabet) + task.n_outputs
    length = task.max_instruction_length + task.input_length + 5
    n_sets = (L + 1) * len(measure.readouts)
    n_known = task.n_tasks * task.n_grammars * task.n_instructions
    n_texts = n_known + task.n_tasks * (task.n_grammars + task.n_unseen_grammars) * task.n_unseen_instructions
    n_parameters = (2 - model.tie_head) * V * D + length * D + L * (4 * D * D + 2 * D * F + 9 * D + F) + 2 * D

    # Tokens that the same tokens precede are computed once, and the last block computes only what is read of it. About
    # half of an instruction's letters are its own.
    letters = 1 if task.grammars else (task.min_instruction_length + task.max_instruction_length) // 2
    n_texts_drawn = _different(train.batch, n_known)
    n_rows = n_texts_drawn * (letters / 2 + 2) + _different(train.batch, n_known * task.n_inputs) * task.input_length
    n_predicted = train.batch * (letters + task.input_length + 4 if train.loss_on == "all" else 1)
    n_probe = min(measure.probe_train, n_known * task.n_inputs)
    activations = 4.0 * n_rows * max(1, L - 1) * (6 * D + 2 * F)
    memory = {
        "the libraries": LIBRARIES_BYTES,
        "weights, gradients and AdamW's moments": 16.0 * n_parameters,
        "activations of a batch": activations + 12.0 * n_predicted * V + 40.0 * train.batch * length,
        "the task set": 200.0 * n_texts + 24.0 * n_texts * task.n_inputs,
    }
    if config.resume_every:
        memory["a state to save"] = 12.0 * n_parameters
    ring = measure.window + measure.unseen_per_step
    answers = n_sets * task.n_tasks * ANSWERS * is_measured
    n_steps_of_ring = max(measure.window // train.batch, measure.unseen_window // measure.unseen_per_step)
    # Of a state, for the search of partitions: its labels and its projection.
    of_search = 8 * measure.population + 4.0 * min(2 * task.n_tasks + 8, D / 2)
    if is_measured:
        # Of a state: itself and its cells, too.
        memory["the rings"] = n_sets * ring * (6.0 * D + of_search) + 8.0 * answers * n_steps_of_ring
    if has_probe:
        memory["the probe"] = n_sets * n_probe * (8.0 * D + 24 * measure.k)

    columns = 4 + 2 * (1 + len(measure.probe_splits) * has_probe)
    columns += n_sets * WINDOW_COLUMNS * is_measured
    columns += n_sets * (PROBE_COLUMNS + SPLIT_COLUMNS * len(measure.probe_splits)) * has_probe
    disk = (config.steps + 1) * 8.0 * (columns + 8 + answers) + n_checkpoints(config.steps) * 4.0 * n_parameters
    state = 2**18 + 12.0 * n_parameters
    state += is_measured * n_sets * ring * (4.0 * D + of_search) + 8.0 * answers * n_steps_of_ring
    disk += (KEPT_STATES + 1) * state * (config.resume_every > 0) + REPORT_BYTES

    flops = config.steps * 6.0 * n_rows * max(1, L - 1) * (4 * D * D + 2 * D * F)
    if has_probe:
        n_probes = 2 + config.steps // measure.probe_every
        # Each start of k-means draws its centres and assigns every point at least once; probes ask for neighbours.
        at_instruction_end = min(n_probe, n_known)
        flops += n_probes * 2.0 * n_sets * at_instruction_end * D * (2 * measure.n_init * task.n_tasks)
        flops += measure.n_shuffles * 2.0 * n_sets * at_instruction_end * measure.k
    n_cores = config.threads or len(os.sched_getaffinity(0))
    speed = CORE_FLOPS * n_cores if config.device == "cpu" else GPU_FLOPS
    return Needs(memory, disk, flops / speed)


def _different(n_draws: int, n: int) -> float:
    """How many different ones n_draws out of n bring on average."""
    return -n * math.expm1(-n_draws / n)


def check_needs(config: RunConfig, folder: Path | None = None) -> None:
    """ConfigError where this machine has not what the run needs. `folder` is one that exists, on the disk where the run
    will lie; None: it has its place already."""
    found = needs(config)
    # What a GPU has to hold is torch's to tell: the machine itself needs little then.
    free, what = available_memory()
    if config.device == "cpu" and found.memory_bytes > free:
        largest = sorted(found.memory.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {amount(n)}" for name, n in largest)
        raise ConfigError(
            f"this run needs about {amount(found.memory_bytes)} of memory ({parts}), got {amount(free)} ({what})"
        )
    free = shutil.disk_usage(folder).free if folder else float("inf")
    if found.disk > free:
        raise ConfigError(
            f"this run needs about {amount(found.disk)} on the disk of {folder}, got {amount(free)} that are free"
        )
    if found.seconds > YEAR_S:
        raise ConfigError(
            "a run must be able to end within a year (fewer steps, a smaller train.batch, model, measure.n_init or "
            f"measure.n_shuffles), got one that takes at least {found.seconds / YEAR_S:,.1f} years"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail? torch says so by a RuntimeError on a CPU, and by one of its own on a GPU."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or bool(re.search(NO_MEMORY, str(error))))
    )


def amount(n_bytes: float) -> str:
    """Bytes for a person: 310 GB."""
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{0 if n_bytes >= 10 * size else 1}f} {unit}"
    return f"{max(0.0, n_bytes) / 1e6:.0f} MB"


def available_memory() -> tuple[float, str]:
    """(bytes that this process can still get, what sets that limit): the least of what the machine has free, what its
    cgroups leave, and what ulimit allows. Infinity where nothing says."""
    found = [(float("inf"), "no limit known"), *_of_machine(), *_of_cgroups(), *_of_limits()]
    return min(found, key=lambda one: one[0])


def _of_machine() -> Iterator[tuple[float, str]]:
    lines = _text("/proc/meminfo").splitlines()
    kib = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if value.split()}
    if "MemAvailable" in kib:
        yield 1024.0 * (kib["MemAvailable"] + kib.get("SwapFree", 0)), "free on this machine"


def _of_cgroups(root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[float, str]]:
    """A group may use what it and every group above it may; what the system takes back at need is no use of it."""
    for line in _text("/proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, limit, usage, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder != top and top not in folder.parents:
                break
            allowed, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if not (allowed.isdigit() and used.isdigit()):
                continue  # "max", or this group is not shown to us
            stat = dict(line.split() for line in _text(folder / "memory.stat").splitlines() if len(line.split()) == 2)
            idle = sum(int(stat.get(prefix + name, 0)) for name in RECLAIMED)
            yield float(int(allowed) - int(used) + idle), "left by the limit of the control group"


def _of_limits() -> Iterator[tuple[float, str]]:
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft != resource.RLIM_INFINITY:
        pages = _text("/proc/self/statm").split()
        used = float(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else 0.0
        yield soft - max(used, LIBRARIES_ADDRESSES) + LIBRARIES_BYTES, "left by ulimit -v"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

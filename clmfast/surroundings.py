"""The settings of the whole process that a run changes, and their return: threads, determinism, variables, signals.

`Surroundings` are entered before torch is imported and left when the run has ended, whatever ended it. A process has
one of each setting, so it does one run at a time.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from clmfast.config import ConfigError, RunConfig, replays_graph, rides_inside

VARIABLES = ("GOMP_SPINCOUNT", "CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR")  # the last one torch sets itself
_at_work = threading.Lock()


def share_the_cores() -> str:
    """Make OpenMP's threads go to sleep after about half a millisecond of waiting; returns the reason.

    By default they burn some 15 ms waiting, and where another process wants a core the scheduler makes up for that at
    the next barrier: with one busy process beside it, a step of the default run took 4.6 s instead of 0.5 s. Where the
    cores are free, this costs nothing. OpenMP reads it when torch is imported; an environment that says otherwise wins.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return "as the environment says"
    if "torch" in sys.modules:
        return "OpenMP's own: torch was loaded before the run, and with it this choice was made"
    os.environ["GOMP_SPINCOUNT"] = "10000"
    return "short: a process beside this one must not stall every step"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST_FROM_HEAP = 32 * 2**20  # bytes; glibc takes no larger limit


def keep_memory(n_bytes: int = 2**30) -> tuple[bool, str]:
    """Let the process keep up to n_bytes of freed memory at the end of its heap; returns (is it kept?, the reason).

    Every step frees what its forward pass saved, 40 MB in the default run. Where glibc gives that back to the system,
    which depends on how the heap lies, 1000 to 6000 pages of the next step are new: 2.6 us each on a virtual machine,
    2 to 14 % of a step.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False, "the environment has limits of its own"
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not (mallopt and mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP) and mallopt(M_TRIM_THRESHOLD, n_bytes)):
        return False, "the C library has no such limits"
    return True, "the next step needs as much"


def set_up_torch(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Threads and determinism; returns the automatic choices with their reasons for the header."""
    import torch

    from clmfast.measuring_thread import threads_beside

    n_cores = len(os.sched_getaffinity(0))
    threads = config.threads or max(1, n_cores - max(0, config.measure.threads))
    torch.set_num_threads(threads)
    is_cpu = config.device == "cpu"
    if not is_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products ask for
    torch.use_deterministic_algorithms(True)
    # That would also write NaN to all new memory, a seventh of a step; nothing here reads what it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    is_graph, why = replays_graph(config)
    is_inside, why_there = rides_inside(config)
    is_kept, why_kept = keep_memory()
    n_beside, why_beside = threads_beside(config)
    reason = f"all {n_cores} cores that this process may use"
    if config.threads:
        reason = "asked for"
    elif threads < n_cores:
        reason = f"{n_cores} cores without those of measure.threads"
    return {
        "threads": {"value": threads, "reason": reason},
        "measuring_threads": {"value": n_beside, "reason": why_beside},
        "device": {"value": config.device, "reason": "the default" if is_cpu else "asked for"},
        "step": {"value": "one CUDA graph" if is_graph else "op by op", "reason": why},
        "riders": {"value": "in the training pass" if is_inside else "in their own pass", "reason": why_there},
        "attention": {"value": "clmfast, fused C++", "reason": "float32 on a CPU: packed sequences, no padding"}
        if is_cpu
        else {"value": "clmfast, Triton", "reason": "a GPU: packed sequences, no padding"},
        "freed_memory": {"value": "kept" if is_kept else "as the C library does", "reason": why_kept},
        "dtype": {"value": "float32", "reason": "the only one that training offers in this version"},
    }


class Surroundings:
    """The process as a run needs it, from `with` on, and afterwards as it was.

    ConfigError where another run is at work in this process.
    """

    def __enter__(self) -> Surroundings:
        if not _at_work.acquire(blocking=False):
            raise ConfigError("a process does one run at a time, this one is at work on another: start a second one")
        self._variables = {name: os.environ.get(name) for name in VARIABLES}
        self._put_back: list[Callable[[], object]] = []
        self._waiting = share_the_cores()
        return self

    def set_up_torch(self, config: RunConfig) -> dict[str, dict[str, Any]]:
        """As the function of that name, with the choice of how OpenMP's threads wait."""
        import torch

        def put_back(
            threads: int = torch.get_num_threads(),
            is_deterministic: bool = torch.are_deterministic_algorithms_enabled(),
            only_warns: bool = torch.is_deterministic_algorithms_warn_only_enabled(),
            fills: bool = torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ) -> None:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)
            torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]

        from clmfast.ops import forks

        if forks.is_late_fork and config.threads != 1:
            raise ConfigError(
                "threads must be 1 in a process that was forked after torch's threads had begun (multiprocessing's "
                f"spawn and forkserver know no such limit), got {config.threads or 'all'}"
            )
        # glibc's limits would have adapted up to about this.
        self._put_back += [put_back, lambda: keep_memory(2 * LARGEST_FROM_HEAP)]
        value = os.environ.get("GOMP_SPINCOUNT", "")
        return set_up_torch(config) | {"openmp_waiting": {"value": value, "reason": self._waiting}}

    def __exit__(self, *_: object) -> None:
        for put_back in reversed(self._put_back):
            put_back()
        for name, before in self._variables.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
        _at_work.release()


@contextmanager
def on_signal(number: int, handler: Callable[..., Any]) -> Iterator[None]:
    """The handler in place for a while. Only the main thread may set one, and only it gets signals: in another thread
    nothing is done, and whoever runs the main thread decides what Ctrl-C means."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        # None: not set from Python, so it cannot be put back from there
        signal.signal(number, signal.SIG_DFL if before is None else before)

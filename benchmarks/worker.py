"""The process that contenders run in: `python -m benchmarks.worker SOCKET CORES`, started by contest.py.

Libraries read their settings when they are loaded and bring thread pools of their own, so those of one contender must
not share a process with those of another. A worker imports nothing but what its contenders import, makes its own inputs
(a pure function of the case), times its own calls, and sleeps while others compute.
"""

from __future__ import annotations

import gc
import importlib
import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Call = Callable[[int], Any]
"""call(i) does the work once, on the i-th of the rotated inputs."""


class Server:
    """Answers the requests of contest.Worker; each method is one of them."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}

    def make(self, name: str, module: str, function: str, case: dict[str, Any]) -> None:
        """Prepare a contender: module.function(case) returns its Call."""
        self.calls[name] = getattr(importlib.import_module(module), function)(case)
        gc.collect()
        gc.freeze()  # what stands now need not be searched before every timed call

    def check(self, name: str, i: int) -> tuple[float, Any]:
        """(seconds, the result as numpy arrays) of one call."""
        start = time.perf_counter()
        result = self.calls[name](i)
        return time.perf_counter() - start, as_numpy(result)

    def time(self, name: str, i: int, n_warm: int, n_calls: int) -> float:
        """Seconds per call over calls i, ..., i + n_calls - 1, after n_warm that are not timed."""
        call = self.calls[name]
        gc.collect()
        for j in range(i, i + n_warm):
            call(j)
        start = time.perf_counter()
        for j in range(i, i + n_calls):
            call(j)
        return (time.perf_counter() - start) / n_calls

    def drop(self, name: str) -> None:
        """Forget a contender and its inputs."""
        self.calls.pop(name, None)
        gc.unfreeze()
        gc.collect()

    def peak_mib(self) -> float:
        """The most memory that this process has held."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def libraries(self) -> list[dict[str, Any]]:
        """What threadpoolctl says about the thread pools and BLAS libraries that are loaded, without their paths."""
        from threadpoolctl import threadpool_info

        keys = ("user_api", "prefix", "version", "num_threads", "architecture", "threading_layer")
        return [{key: pool[key] for key in keys if pool.get(key) is not None} for pool in threadpool_info()]


def as_numpy(result: Any) -> Any:
    """Tensors, also those inside tuples, lists and dicts, as numpy arrays."""
    if hasattr(result, "detach"):
        return result.detach().numpy()
    if isinstance(result, dict):
        return {key: as_numpy(value) for key, value in result.items()}
    if isinstance(result, (tuple, list)):
        return tuple(as_numpy(value) for value in result)
    return result


def main(socket: int, n_cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n_cores])
    gc.disable()  # collected before every timed call instead of within it
    connection, server = Connection(socket), Server()
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, getattr(server, request)(*arguments)))
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            connection.send((False, f"{type(error).__name__}: {text[0]}"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

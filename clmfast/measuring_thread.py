"""A thread of its own that measures the window while the training step goes on with its backward pass.

The window is complete when the forward pass is over, and nothing writes to it before the next one. So measuring needs
no copy of it and no later row: the step waits for what was measured when it has updated the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from clmfast.config import RunConfig
from clmfast.ops import forks

Result = TypeVar("Result")


def threads_beside(config: RunConfig) -> tuple[int, str]:
    """(CPU threads that measure beside the backward pass, the reason), where torch uses those of training."""
    n_cores = len(os.sched_getaffinity(0))
    asked, n_free = config.measure.threads, n_cores - torch.get_num_threads()
    if config.device != "cpu":
        return 0, "a GPU measures on a stream of its own"
    if not config.measure_every:
        return 0, "nothing is measured"
    if asked >= 0:
        return asked, "asked for"
    if n_free <= 0 or forks.is_late_fork:
        return 0, "no core is free: the step measures when it has been trained"
    return n_free, f"training leaves so many of {n_cores} cores free"


class MeasuringThread:
    """Calls functions one after the other, in a thread whose torch operations use n_threads CPU threads."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        n_here = torch.get_num_threads()
        self._executor = ThreadPoolExecutor(1, "measuring", torch.set_num_threads, (n_threads,))
        self._executor.submit(torch.get_num_threads).result()
        torch.set_num_threads(n_here)  # the other thread's choice would hold for all that begin later

    def start(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """The call's result is that of `result()`, which waits, and raises what the call raised."""
        return self._executor.submit(function, *arguments)

    @contextmanager
    def lends(self) -> Iterator[None]:
        """While nothing is measured here, whoever calls has these threads too."""
        n_here = torch.get_num_threads()
        torch.set_num_threads(n_here + self.n_threads)
        try:
            yield
        finally:
            torch.set_num_threads(n_here)

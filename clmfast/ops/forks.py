"""A process forked from one whose OpenMP threads are at work: its ops use one thread.

The threads are not copied by a fork, but OpenMP's list of them is, and the child would wait for them for ever. With one
thread nothing is waited for; results are the same, as they do not depend on the number of threads. torch's own worker
processes do the same.
"""

import os

import torch

_has_threads = False
is_late_fork = False
"""Was this process forked from one that had threads?"""


def _before() -> None:
    global _has_threads
    try:
        _has_threads = len(os.listdir("/proc/self/task")) > 1
    except OSError:
        _has_threads = True  # no such list on this system


def _in_child() -> None:
    global is_late_fork
    if _has_threads:
        is_late_fork = True
        torch.set_num_threads(1)


os.register_at_fork(before=_before, after_in_child=_in_child)

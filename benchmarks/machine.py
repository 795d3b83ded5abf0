"""What the machine can do at most, measured in the run whose times it judges, and what it is: no host name, no path."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from clmfast.provenance import commit

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (
    "clmfast", "torch", "numpy", "scipy", "numba", "faiss-cpu", "scikit-learn", "scikit-learn-intelex", "torchmetrics",
    "pykeops", "exrex", "rstr", "pytest-benchmark",
)  # fmt: skip
READ_FLOATS = 1 << 26  # 256 MB: more than any cache
SECONDS = 0.2  # of multiply-adds per try
N_TRIES = 5


@dataclass(frozen=True)
class Limits:
    """`fma_gflops`: fp32 multiply-adds out of registers. `read_gbs`: reading memory once. Both with all threads."""

    fma_gflops: float
    read_gbs: float


def cpu_fields() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def cpu_name() -> str:
    """Model with family and number, as some machines tell the model by its brand only."""
    fields = cpu_fields()
    family, model = fields.get("cpu family", "?"), fields.get("model", "?")
    return f"{fields.get('model name', 'unknown')} (family {family}, model {model})"


def cpu_slug() -> str:
    """The CPU as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", cpu_name().lower()).strip("-")


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def openblas_core() -> str:
    """OPENBLAS_CORETYPE for every process: where the CPU has AVX-512, kernels that use it. An OpenBLAS that does not
    know a new CPU falls back to kernels that take several times as long, and the rival would look slow for nothing."""
    return "SkylakeX" if "avx512f" in cpu_fields().get("flags", "") else ""


def is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def versions(names: Sequence[str] = DISTRIBUTIONS) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def describe(threads: int) -> dict[str, Any]:
    """Machine, versions and commit for the saved results."""
    flags = cpu_fields().get("flags", "").split()
    return {
        "cpu": cpu_name(),
        "cores": n_cores(),
        "threads": threads,
        "instruction_sets": [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "openblas_coretype": openblas_core(),
        "openmp_waiting": {k: os.environ[k] for k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if k in os.environ},
        "versions": versions(),
        "commit": commit(),
    }


class Yardstick:
    """Measures Limits with `threads` threads; compiles limits.cpp once."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "limits.so"
            source = Path(__file__).with_name("limits.cpp")
            flags = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.multiply_add.restype = ctypes.c_double
        self._sinks = [ctypes.c_float() for _ in range(threads)]

    def measure(self) -> Limits:
        """The best of a few tries, as everything that goes wrong only makes it slower."""
        n_rounds = 1_000_000
        n_rounds = int(n_rounds * SECONDS / self._seconds_of(lambda i: self._multiply_add(n_rounds, i)))
        operations = self.threads * self._multiply_add(1, 0) * n_rounds
        fma_s = min(self._seconds_of(lambda i: self._multiply_add(n_rounds, i)) for _ in range(N_TRIES))

        part = READ_FLOATS // self.threads // 64 * 64
        memory = np.ones(self.threads * part + 16, np.float32)  # ones: pages of untouched zeros are all the same one
        first = memory.ctypes.data + (-memory.ctypes.data) % 64

        def read(i: int) -> None:
            self._library.read_all(ctypes.c_void_p(first + 4 * i * part), ctypes.c_int64(part), self._sink(i))

        read_s = min(self._seconds_of(read) for _ in range(N_TRIES))
        return Limits(operations / fma_s / 1e9, 4 * self.threads * part / read_s / 1e9)

    def _multiply_add(self, n_rounds: int, i: int) -> float:
        return self._library.multiply_add(ctypes.c_int64(n_rounds), self._sink(i))

    def _sink(self, i: int) -> Any:
        return ctypes.byref(self._sinks[i])

    def _seconds_of(self, work: Callable[[int], object]) -> float:
        """Wall time of `work(i)` on every thread i at once; ctypes lets go of the interpreter while it runs."""
        barrier = threading.Barrier(self.threads + 1)

        def one(i: int) -> None:
            barrier.wait()
            work(i)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(self.threads)]
        for thread in threads:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

"""Runs the CUDA kernels of csrc/cuda on the CPU: what each does is described in machine.h and ptx.cuh.

    library = build('''
        #include "votes.cu"
        using namespace clmfast;
        extern "C" void vote(const int64_t* index, int64_t n, ...) { majority_vote_cuda(..., nullptr); }
    ''')
    for seed in library.seeds(4):
        library.vote(index, n, ...)

Arguments are tensors or arrays (their pointers), numbers and None; in C++ pointers, int64_t and double. A kernel that
does something wrong raises EmulatorError.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
SHADOWED = ("launch.cuh", "ptx.cuh")
COMPILE = [
    "g++", "-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-fno-gnu-unique",
    "-ffp-contract=off",      # as setup.py tells nvcc
    "-fno-strict-aliasing",   # device code reads four numbers through one pointer
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-ignored-attributes", "-Wno-psabi",
    "-fsanitize=alignment,null,bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow,float-cast-overflow",
]  # fmt: skip


class EmulatorError(Exception):
    """What a kernel did wrong, and which thread did it."""


def is_available() -> bool:
    return platform.machine() == "x86_64"


class Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_failure.restype = ctypes.c_char_p
        self.reset()

    def reset(
        self, seed: int = 0, capability: int = 90, n_multiprocessors: int = 3, n_resident_clusters: int = 2
    ) -> None:
        """Chooses the device (80 or 90) and the order in which threads run."""
        arguments = (seed, capability, n_multiprocessors, n_resident_clusters)
        self._library.emulator_reset(*map(ctypes.c_int64, arguments))

    def seeds(self, n: int, **device: int) -> Iterator[int]:
        for seed in range(n):
            self.reset(seed, **device)
            yield seed

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)
        function.restype = None

        def call(*arguments: Any) -> None:
            function(*map(_as_c, arguments))
            failure = self._library.emulator_failure().decode()
            if failure:
                self.reset()
                raise EmulatorError(failure)

        return call


def _as_c(x: Any) -> Any:
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, (bool, int)):
        return ctypes.c_int64(x)
    if isinstance(x, float):
        return ctypes.c_double(x)
    return ctypes.c_void_p(x.data_ptr() if hasattr(x, "data_ptr") else x.ctypes.data)


def build(source: str) -> Library:
    """Compiles `source`, which may include any file of csrc/cuda; kept until one of those files changes."""
    files = {f"cuda/{name}": HERE / name for name in SHADOWED}
    files |= {f"emulator/{path.name}": path for pattern in ("*.h", "*.cuh") for path in HERE.glob(pattern)}
    for pattern in ("*.h", "cpu/*.h", "cuda/*.cu", "cuda/*.cuh"):
        files = {str(path.relative_to(CSRC)): path for path in CSRC.glob(pattern)} | files
    content = hashlib.sha256(source.encode() + "\0".join(COMPILE).encode())
    for name in sorted(files):
        content.update(name.encode() + b"\0" + files[name].read_bytes() + b"\0")
    kept = Path(tempfile.gettempdir(), f"clmfast-emulator-{os.getuid()}")
    library = kept / f"{content.hexdigest()[:24]}.so"
    if not library.exists():
        kept.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept) as folder:
            _compile(source, files, Path(folder))
            os.replace(Path(folder, "built.so"), library)
    return Library(library)


def _compile(source: str, files: dict[str, Path], folder: Path) -> None:
    # A file finds its neighbours before anything else: so the stand-ins lie where the real ones would.
    for name, path in files.items():
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).symlink_to(path)
    main = folder / "cuda" / "main.cpp"
    main.write_text('#include "ptx.cuh"\n#include "launch.cuh"\n' + source)
    for command in (
        [*COMPILE, "-I", str(folder / "emulator"), "-c", str(main), "-o", str(folder / "main.o")],
        ["g++", "-shared", "-Wl,-Bsymbolic", str(folder / "main.o"), "-o", str(folder / "built.so")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or "warning" in done.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

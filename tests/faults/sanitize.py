"""AddressSanitizer and UndefinedBehaviorSanitizer: the op tests and some of the fuzz with an instrumented library.

The library is built beside a copy of the package and the tests, build/sanitize/, so that the usual one stays as it is.
A finding ends the process that makes it: a test run stops there, the fuzz records the case and goes on.
Leaks are not looked for here, for Python and torch keep a lot until the end; leaks.py does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitize"
TESTS = (
    "test_knn", "test_kmeans", "test_partition_scores", "test_separation", "test_capture_rows", "test_attention",
    "test_block",
)  # fmt: skip
# Not under sanitizers: what compiles a model, what starts other processes, and the slowest of many alike.
LEFT_OUT = "not compile and not opcheck and not subprocess and not million and not (few_directions and not duplicates)"
SECTION_S = {False: 480, True: 3600}
N_CASES = {False: 1500, True: 20_000}  # of the fuzz, public and raw each


def build() -> None:
    """Make the instrumented library, or bring it up to date, and a copy of all Python beside it."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        FOLDER,
        "--build-temp",
        f"{FOLDER}-objects",
    ]
    environment = os.environ | {"CLMFAST_SANITIZE": "1", "CLMFAST_CUDA": "0"}
    library, sources = FOLDER / "clmfast" / "ops" / "_C.so", [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    for name in ("clmfast", "tests"):
        for path in (ROOT / name).rglob("*"):
            if path.suffix in (".py", ".toml", ".txt", ".json"):
                target = FOLDER / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    shutil.copyfile(ROOT / "pyproject.toml", FOLDER / "pyproject.toml")


def environment() -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    # Both come first: the sanitizer looks for what throws exceptions when it starts, and Python brings no libstdc++.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    options = "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=512:hard_rss_limit_mb=6000"
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": f"{options}:handle_segv=0:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(FOLDER),
    }


def main(is_long: bool, seed: int) -> int:
    began = time.monotonic()
    build()
    print(f"sanitize: built in {time.monotonic() - began:.0f} s", flush=True)
    cases = ["--cases", str(N_CASES[is_long]), "--only", "public", "raw"]
    n_faults = _run("fuzz", [["tests.faults", "fuzz", "--sanitized", "--seed", str(seed), *cases]], SECTION_S[is_long])
    files = [f"tests/{name}.py" for name in TESTS if (FOLDER / "tests" / f"{name}.py").exists()]
    # Output is not captured: a process that a sanitizer ends would take its report along.
    pytest = ["pytest", "-q", "-x", "--capture=no", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    return n_faults + _run("tests", [[*pytest, *files[half::2]] for half in range(2)], SECTION_S[is_long])


def _run(name: str, modules: list[list[str]], limit_s: float) -> int:
    """Run Python modules side by side under the sanitizers; returns how many fail."""
    began = time.monotonic()
    processes = [subprocess.Popen([sys.executable, "-m", *m], cwd=FOLDER, env=environment()) for m in modules]
    n_failed = 0
    for process in processes:
        try:
            code: int | str = process.wait(max(1.0, began + limit_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"none after {limit_s:g} s"
        n_failed += code != 0
        print(f"sanitize: {name} in {time.monotonic() - began:.0f} s, exit code {code}", flush=True)
    return n_failed

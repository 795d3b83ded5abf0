"""Sections of benchmarks.gpu_check that are commands: the build, the tests that need a GPU, compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.gpu_contest import Report, Skipped
from benchmarks.machine import ROOT, is_installed, n_cores

JUNIT = "tests.xml"
WORKERS = 8
TEST_LIMIT_S = 60
TIME_TO_REPORT_S = 8.0  # what pytest needs to write its file once it is interrupted
PATIENCE_S = 20.0  # before it is killed


def run(command: Sequence[str], **environment: str) -> None:
    """Run a command whose output is ours; raises if it fails."""
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    if status:
        raise RuntimeError(f"{' '.join(command[1:5])}: exit status {status}")


def build(report: Report) -> None:
    """The extension for this device alone: a library for all takes three times as long."""
    major, minor = torch.cuda.get_device_capability()
    run([sys.executable, "setup.py", "build_ext", "--inplace"], CLMFAST_CUDA="1",
        CLMFAST_CUDA_DEVICE=f"{major}.{minor}")  # fmt: skip


def gpu_test_files() -> list[str]:
    """Those whose tests need a GPU: only they are imported, as others may need what is not installed here."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())


def gpu_tests(report: Report, files: Sequence[str] = (), options: Sequence[str] = ("-m", "gpu")) -> None:
    """All tests that are marked `gpu`. Those that fail are named; where none passed, the section has failed."""
    junit = report.out.resolve() / JUNIT
    junit.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={junit}"]
    if is_installed("xdist"):
        command += ["-n", str(min(WORKERS, n_cores()))]
    if is_installed("pytest_timeout"):
        command += ["--timeout", str(TEST_LIMIT_S)]
    process = subprocess.Popen(
        [*command, *options, *(files or gpu_test_files())], cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's job in the background ignores it
    )  # fmt: skip
    try:
        process.wait(max(report.limit_s - TIME_TO_REPORT_S, 1))
    except subprocess.TimeoutExpired:
        report.fail("tests", "not done in time: some were not run, and those that ran then count as passed")
        process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    read_junit(report, junit)


def read_junit(report: Report, path: Path) -> None:
    """Take the tests that failed, and how many passed, from pytest's file."""
    if not path.exists():
        raise RuntimeError("pytest wrote no results")
    path.write_text(re.sub(r' hostname="[^"]*"', "", path.read_text()))
    n_passed = n_skipped = 0
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        wrong = [x for x in case if x.tag in ("failure", "error")]
        if wrong:
            report.fail(f"{case.get('classname')}.{case.get('name')}", str(wrong[0].get("message")))
        elif case.find("skipped") is not None:
            n_skipped += 1
        else:
            n_passed += 1
    report.count("tests", passed=n_passed, skipped=n_skipped, failed=len(report.found["failures"]))
    if not n_passed:
        raise RuntimeError("no test passed")
    report.check("tests", "")


def sanitizer(report: Report) -> None:
    """Every op on small shapes under compute-sanitizer."""
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not found:
        raise Skipped("compute-sanitizer is not installed")
    script = "from benchmarks.gpu_smoke import call_everything; call_everything()"
    for tool in ("memcheck", "racecheck"):
        with report.shape(tool):
            command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
            run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            report.check(tool, "")

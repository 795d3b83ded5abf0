"""The default run of one seed on a GPU, from the command line to its findings: a section of benchmarks.gpu_check."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import Claim
from benchmarks.gpu_contest import Report, Skipped
from benchmarks.machine import ROOT, is_installed
from clmfast.findings import findings
from clmfast.record import load

NEEDED = "tyro", "dacite", "rich", "plotly", "safetensors", "numba", "scipy"
UNMEASURED = "--measure-every", "0"


def default_run(report: Report, seed: int = 0) -> None:
    """Train, measure and report as `python -m clmfast.run` does; then once more without measuring, for the tax."""
    missing = [module for module in NEEDED if not is_installed(module)]
    if missing:
        raise Skipped(f"{', '.join(missing)} not installed; docs/gpu.md says how to carry what is missing")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        wall_s = run(arguments(report.device, seed, path))
        report_run(report, path, seed, wall_s)
        unmeasured_s = run([*arguments(report.device, seed, Path(folder) / "unmeasured"), *UNMEASURED])
        report.count("default run, unmeasured", wall_s=unmeasured_s)
        tax = 100 * (wall_s / unmeasured_s - 1)
        report.claim(Claim("default run: tax in wall time, probe included", tax, None, None, " %", at_most=True))


def arguments(device: str, seed: int, path: Path) -> list[str]:
    """Of the command line: everything else is the default."""
    return ["--device", device, "--seed", str(seed), "--out", str(path)]


def run(arguments: Sequence[str]) -> float:
    """Wall seconds of a run."""
    begin_s = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "clmfast.run", *arguments], cwd=ROOT).returncode
    if status:
        raise RuntimeError(f"clmfast.run: exit status {status}")
    return time.perf_counter() - begin_s


def report_run(report: Report, path: Path, seed: int, wall_s: float) -> None:
    """What the run directory says: its findings, and where its time went."""
    recorded = load(path)
    what = f"default run, seed {seed}"
    n_steps = recorded.config.steps
    complete = len(recorded.step) == n_steps + 1 and (path / "report.html").exists()
    report.check(what, "" if complete else f"{len(recorded.step)} of {n_steps + 1} rows, or no report.html")
    timing = {name: float(ms.sum()) / 1e3 for name, ms in recorded.timing.items()}
    report.count(what, seed=seed, steps=n_steps, wall_s=wall_s, **{name[:-2] + "s": s for name, s in timing.items()})
    for finding in findings(recorded):
        line = f"{finding.claim}: {finding.number}, bar {finding.bar}: {finding.verdict}"
        report.add("findings", line, claim=finding.claim, number=finding.number, bar=finding.bar, holds=finding.holds,
                   verdict=finding.verdict, seed=seed)  # fmt: skip

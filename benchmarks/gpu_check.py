"""Is it right on this GPU, how fast is it, what costs most: one command, a few minutes.

    python -m benchmarks.gpu_check --plan first --skip-build --out FOLDER   what matters most, under five minutes
    python -m benchmarks.gpu_check --plan rest --skip-build --out FOLDER    long attention, large searches, a whole run
    python -m benchmarks.gpu_check --only sanitizer --skip-build --out FOLDER
    python -m benchmarks.gpu_report FOLDER/<commit>.json                    as Markdown

Every section is a process of its own with a time limit of its own: one that faults, hangs or dies is reported, what it
had found until then is kept, and the next one begins. FOLDER then holds <commit>.json (written again after every
section; a second call adds to it), <commit>.log (what all sections printed) and tests.xml. Without --skip-build the
extension is built first, for this device alone. Exit status: 0 when nothing failed, 1 when something did or no GPU is
there. --rehearse starts every section, which imports what it needs, says that it finds no GPU, and ends.

Needs torch, triton, numpy, numba, scipy, scikit-learn and pytest; the whole run also tyro, dacite, rich, plotly and
safetensors. Rivals that are not installed are named.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from benchmarks.gpu_report import markdown
from benchmarks.machine import DISTRIBUTIONS, ROOT, cpu_name, versions
from clmfast.files import write_json
from clmfast.provenance import commit

GPU_DISTRIBUTIONS = (
    "triton", "pytest", "pytest-xdist", "pytest-timeout", "flashlib", "flash-kmeans", "flash-attn", "xformers", "tyro",
)  # fmt: skip
REHEARSAL_LIMIT_S = 120.0  # of a section, which only imports what it needs
GRACE_S = 3.0  # from SIGTERM to SIGKILL
LOG_BYTES = 12 << 20  # of the log, at most
NO_GPU = "no GPU"
REHEARSED = "rehearsed"


class Section(NamedTuple):
    """`work` is module:function, a function of a Report; `needs` are the large modules it imports by itself."""

    name: str
    limit_s: float
    work: str
    rank: int  # by worth: 0 the build, 1 to 6 the plans, 7 what is asked for alone
    is_first: bool = True  # in --plan first
    must_compare: bool = True  # has failed if it compared nothing of ours
    needs: tuple[str, ...] = ()


INDUCTOR = ("torch._inductor.compile_fx",)
FLEX = ("torch.nn.attention.flex_attention", *INDUCTOR)
SECTIONS = [
    Section("build", 240, "benchmarks.gpu_commands:build", 0, must_compare=False),
    Section("smoke", 27, "benchmarks.gpu_smoke:smoke", 1),
    Section("tests", 70, "benchmarks.gpu_commands:gpu_tests", 2, needs=("pytest",)),
    Section("training step, tiny", 45, "benchmarks.gpu_step:tiny", 3, needs=INDUCTOR),
    Section("training step, paper", 45, "benchmarks.gpu_step:paper", 3),
    Section("knn", 17, "benchmarks.gpu_ops:knn", 4),
    Section("k-means, scores, capture", 23, "benchmarks.gpu_ops:kmeans_and_others", 4),
    Section("short attention", 35, "benchmarks.gpu_attention:short", 5),
    Section("knn of many points", 13, "benchmarks.gpu_ops:knn_of_many", 4, is_first=False),
    Section("long attention", 65, "benchmarks.gpu_attention:long", 5, is_first=False, needs=FLEX),
    Section("default run", 110, "benchmarks.gpu_run:default_run", 6, is_first=False),
    Section("sanitizer", 300, "benchmarks.gpu_commands:sanitizer", 7, is_first=False),
]
CHILD = [sys.executable, "-m", "benchmarks.gpu_check"]


def chosen(options: argparse.Namespace) -> list[Section]:
    """The sections of a plan, or those that are named; the build before them unless it is skipped."""
    build = [] if options.skip_build else [s for s in SECTIONS if s.rank == 0]
    sections = [s for s in SECTIONS if s.rank > 0]
    if options.only:
        return build + [s for s in sections if s.name in options.only]
    if options.plan:
        return build + [s for s in sections if s.rank < 7 and s.is_first == (options.plan == "first")]
    return build + [s for s in sections if s.rank < 7 or options.rehearse]


# ---- a section, in its own process


def run_section(section: Section, options: argparse.Namespace) -> str:
    """Do a section's work; returns its outcome. Findings go to options.found as they come."""
    for module in section.needs:
        importlib.import_module(module)
    module, function = section.work.split(":")
    work: Callable[[Any], None] = getattr(importlib.import_module(module), function)
    from benchmarks.gpu_contest import Report, Skipped, anonymous

    device = describe_device(options.device)
    if device is None:
        return f"skipped: {NO_GPU}"
    if options.rehearse:
        return f"skipped: {REHEARSED}"
    with open(options.found, "a") as stream:
        report = Report(options.device, options.out, section.limit_s, stream)
        report.add("device", str(device), **device)
        try:
            work(report)
        except Skipped as why:
            return f"skipped: {why}"
        except Exception as error:
            traceback.print_exc()
            return f"failed: {type(error).__name__}: {anonymous(str(error))}"
        return report.outcome(section.must_compare)


def describe_device(device: str) -> dict[str, Any] | None:
    """What it is; None if it is not there."""
    if device == "cpu":
        return {"name": "CPU", "cpu": cpu_name()}
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
    }


def section_main(options: argparse.Namespace) -> NoReturn:
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)  # the log then says where it hung
    (section,) = [s for s in SECTIONS if s.name == options.section]
    outcome = run_section(section, options)
    print(f"  {outcome}", flush=True)
    with open(options.found, "a") as stream:
        print(json.dumps({"outcome": outcome}), file=stream, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is written; to take down what torch.compile has made takes ten seconds of the section's time


# ---- all sections, each in a child


class Log:
    """Text that goes to the console and to a file at once."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "a", encoding="utf-8", errors="replace")  # noqa: SIM115  closed with the process

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        if self._file.tell() < LOG_BYTES:
            print(text, file=self._file, flush=True)

    def follow(self, stream: IO[str]) -> None:
        for line in stream:
            self(line.rstrip("\n"))


def run_child(command: Sequence[str], limit_s: float, log: Log) -> str:
    """Why the command failed, in words; empty if it ended by itself with status 0. Nothing it started is left."""
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    reader = threading.Thread(target=log.follow, args=(child.stdout,), daemon=True)
    reader.start()
    try:
        status = child.wait(limit_s)
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        signal_group(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it is killed below
            child.wait(GRACE_S)
        return f"not done after {limit_s:.0f} s"
    finally:
        signal_group(child, signal.SIGKILL)
        child.wait()
        reader.join(GRACE_S)


def signal_group(child: subprocess.Popen[str], number: int) -> None:
    """To the child and all that it started."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(child.pid, number)


def read_found(path: Path) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """(findings as (kind, entry), outcome, empty if there is none) of a section's file, which may end in mid-line."""
    entries, outcome = [], ""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            ((kind, entry),) = json.loads(line).items()
        except ValueError:
            continue  # it died while it wrote
        if kind == "outcome":
            outcome = entry
        else:
            entries.append((kind, entry))
    return entries, outcome


class Results:
    """<commit>.json: what all sections found, each entry with the section that it is from."""

    KINDS = "checked", "failures", "claims", "findings", "counters", "limits", "times", "profiles", "notes"

    def __init__(self, path: Path, commit: str) -> None:
        self.path, self.begun_s = path, time.monotonic()
        self.found: dict[str, Any] = {
            "commit": commit, "device": {}, "versions": {}, "seconds": 0.0, "sections": {},
            **{kind: [] for kind in self.KINDS},
        }  # fmt: skip
        if path.exists():
            self.found.update(json.loads(path.read_text()))
        self.found["versions"] = versions((*DISTRIBUTIONS, *GPU_DISTRIBUTIONS))
        self.seconds_before = self.found["seconds"]

    def take(self, section: Section, entries: Sequence[tuple[str, dict[str, Any]]], outcome: str, s: float) -> None:
        """Put a section's findings in the place of those it had before, and save."""
        for kind in self.KINDS:
            self.found[kind] = [entry for entry in self.found[kind] if entry["section"] != section.name]
        for kind, entry in entries:
            if kind == "device":
                self.found["device"] = entry
            else:
                self.found[kind].append({"section": section.name, **entry})
        entry = {"outcome": outcome, "seconds": round(s, 1), "limit_s": section.limit_s}
        self.found["sections"][section.name] = entry
        self.found["seconds"] = round(self.seconds_before + time.monotonic() - self.begun_s, 1)
        write_json(self.path, self.found)


def run_sections(sections: Sequence[Section], options: argparse.Namespace, results: Results, log: Log) -> list[str]:
    """Outcomes of all, one after the other; whatever one of them does, the next has its turn."""
    outcomes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, section in enumerate(sections):
            log(f"== {section.name} ({time.monotonic() - results.begun_s:.0f} s)")
            found, begin_s = Path(folder) / f"{i}.jsonl", time.monotonic()
            entries: list[tuple[str, dict[str, Any]]] = []
            stop = why_not(outcomes, sections, options)
            if stop:
                outcome = stop
            else:
                command = [*CHILD, "--section", section.name, "--found", str(found), "--device", options.device]
                command += ["--out", str(options.out), *(["--rehearse"] if options.rehearse else [])]
                why = run_child(command, REHEARSAL_LIMIT_S if options.rehearse else section.limit_s, log)
                entries, outcome = read_found(found)
                if why or not outcome:
                    outcome = f"failed: {why or 'it ended without an outcome'}"
            outcomes.append(outcome)
            if outcome != "ok":
                log(f"  {section.name}: {outcome}")
            results.take(section, entries, outcome, time.monotonic() - begin_s)
    return outcomes


def why_not(outcomes: Sequence[str], sections: Sequence[Section], options: argparse.Namespace) -> str:
    """Why the next section is not started; empty: it is."""
    if outcomes and sections[0].rank == 0 and outcomes[0].startswith("failed"):
        return "skipped: the build failed"
    if not options.rehearse and any(NO_GPU in outcome for outcome in outcomes):
        return f"skipped: {NO_GPU}"
    return ""


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--plan", choices=["first", "rest"], help="one of the two halves; both by default")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[s.name for s in SECTIONS if s.rank])
    parser.add_argument("--skip-build", action="store_true", help="use the compiled ops that are there")
    parser.add_argument("--commit", help="what is measured, where there is no .git")
    parser.add_argument("--rehearse", action="store_true", help="start every section, and measure nothing")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to test sections")
    parser.add_argument("--section", help="run this section in this process, as a child does")
    parser.add_argument("--found", type=Path, help="with --section: the file of its findings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of(arguments)
    if options.section:
        section_main(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no child is left behind
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", options.commit or commit())
    results, log = Results(options.out / f"{name}.json", name), Log(options.out / f"{name}.log")
    sections = chosen(options)
    outcomes = run_sections(sections, options, results, log)
    if not options.rehearse:
        log("\n" + markdown(results.found))
    else:
        n = sum(outcome.startswith("skipped") for outcome in outcomes)
        log(f"gpu_check: {n} of {len(sections)} sections were started and ended as they should")
    has_failed = any(outcome.startswith("failed") for outcome in outcomes)
    has_no_gpu = not options.rehearse and any(NO_GPU in outcome for outcome in outcomes)
    return 1 if has_failed or has_no_gpu else 0


if __name__ == "__main__":
    sys.exit(main())

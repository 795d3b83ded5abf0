"""Everything that needs a GPU, in one command and under nine minutes: python -m benchmarks.gpu_check [--out FOLDER]

    build       the extension with its CUDA ops, without a network
    tests       all that are marked `gpu`
    limits      what this device does at most: copying, multiplying bfloat16 matrices
    knn, k-means, scores, capture, ...   against torch in a CUDA graph, and flashlib and flash-kmeans where installed
    attention   against every backend of torch's, FlexAttention, flash-attn and xformers where installed
    training step   against a compiled nanoGPT-style model; the tax of measuring, and the probe
    sanitizer   every op on small shapes under compute-sanitizer

A section that fails says why and does not stop the others; what was skipped is named. Results are written to
FOLDER/<commit>.json after every section, by default under benchmarks/results/<device>/. Needs torch, triton, numpy,
numba, scipy, scikit-learn, pytest and pytest-benchmark, and nothing else.

Times are medians of replays of a CUDA graph that holds REPEATS calls on inputs in turn, or of calls alone ("eager")
where a rival cannot be captured. What gives a wrong result gets no time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contest import Claim
from benchmarks.machine import ROOT, commit, cpu_name, is_installed, versions

BUDGET_S = 520.0  # of all sections together
N_INPUTS, REPEATS, ROUNDS = 3, 12, 25


class Skipped(Exception):
    """Why a section, or a rival, was not run."""


@dataclass
class Report:
    """What was found; every section adds to it."""

    device: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)  # name -> "ok", "skipped: why", "failed: why"
    limits: dict[str, float] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    begun_s: float = field(default_factory=time.monotonic)

    def left_s(self) -> float:
        return BUDGET_S - (time.monotonic() - self.begun_s)

    def has_time(self, what: str, least_s: float) -> bool:
        """Is so much left? Otherwise what is skipped is noted."""
        if self.left_s() >= least_s:
            return True
        self.note(f"{what}: skipped: less than {least_s:.0f} s left")
        return False

    def time(self, what: str, contender: str, us: float, **more: Any) -> float:
        self.times.append({"what": what, "contender": contender, "us": us, **more})
        print(f"  {what:34} {contender:28} {us:10.1f} us  {more or ''}", flush=True)
        return us

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "commit": commit(),
            "versions": versions(),
            "sections": self.sections,
            "limits": self.limits,
            "times": self.times,
            "claims": [claim.describe() for claim in self.claims],
            "notes": self.notes,
            "seconds": round(time.monotonic() - self.begun_s, 1),
        }


def run_sections(
    report: Report, sections: Sequence[tuple[str, Callable[[Report], None]]], save: Callable[[], None]
) -> None:
    """One after the other; whatever one of them does, the next has its turn and all is saved."""
    for name, section in sections:
        print(f"== {name} ({time.monotonic() - report.begun_s:.0f} s)", flush=True)
        if report.left_s() <= 0:
            report.sections[name] = "skipped: no time left"
        else:
            try:
                section(report)
                report.sections[name] = "ok"
            except Skipped as why:
                report.sections[name] = f"skipped: {why}"
            except Exception as error:
                traceback.print_exc()
                report.sections[name] = f"failed: {type(error).__name__}: {str(error).strip()[:2000]}"
        if report.sections[name] != "ok":
            print(f"  {report.sections[name]}", flush=True)
        save()


def run(command: Sequence[str], timeout_s: float, **environment: str) -> str:
    """The command's output. Raises with its end if it fails or takes too long."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, timeout=max(timeout_s, 1),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command[:6])}: not done after {timeout_s:.0f} s") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: exit status {done.returncode}\n{done.stdout[-1500:]}")
    return done.stdout


# ---- build, tests, sanitizer


def build(report: Report) -> None:
    run([sys.executable, "setup.py", "build_ext", "--inplace"], report.left_s(), CLMFAST_CUDA="1")


def gpu_test_files() -> list[str]:
    """Those whose tests need a GPU: only they are imported, as others may need what is not installed here."""
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text())


def tests(report: Report) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *gpu_test_files()]
    told = run(command, min(report.left_s(), 300), PYTHONPATH=str(ROOT))
    last = told.strip().splitlines()[-1]
    report.note(last)
    if "passed" not in last:
        raise RuntimeError(f"no test passed: {last}")


SMALL_CALLS = """
import sys
sys.path.insert(0, "tests")
import torch
from test_cuda_device import by_seed, moved
for name, (op, inputs) in by_seed(0).items():
    op(*moved(inputs, "cuda"))
torch.cuda.synchronize()
"""


def sanitizer(report: Report) -> None:
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not found:
        raise Skipped("compute-sanitizer is not installed")
    wrong = []
    for tool in ("memcheck", "racecheck"):
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_CALLS]
        try:
            run(command, min(report.left_s(), 120), PYTHONPATH=str(ROOT), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            report.note(f"{tool}: nothing found")
        except RuntimeError as error:
            wrong.append(f"{tool}: {error}")
    if wrong:
        raise RuntimeError("; ".join(wrong))


# ---- time

Call = Callable[[int], Any]
"""call(i) does the work once, on the i-th of the inputs."""


def replayed_us(call: Call) -> float:
    """Microseconds of one call inside a replayed graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(N_INPUTS):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(REPEATS):
            call(i % N_INPUTS)
    return _median_us(graph.replay) / REPEATS


def eager_us(call: Call) -> float:
    turn = iter(range(10**9))
    return _median_us(lambda: call(next(turn) % N_INPUTS))


def _median_us(work: Callable[[], Any]) -> float:
    import torch

    for _ in range(3):
        work()
    found = []
    for _ in range(ROUNDS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(1e3 * begin.elapsed_time(end))
    return statistics.median(found)


def compete(
    report: Report, what: str, ours: Call, rivals: dict[str, tuple[str, Call]], **more: Any
) -> dict[str, float]:
    """Times of all; `rivals`: name -> ("graph" or "eager", call). A rival that fails is named and left out."""
    found = {"clmfast": report.time(what, "clmfast", replayed_us(ours), how="graph", **more)}
    for name, (how, call) in rivals.items():
        try:
            us = replayed_us(call) if how == "graph" else eager_us(call)
        except Exception as error:
            report.note(f"{what}: {name} left out: {type(error).__name__}: {str(error)[:200]}")
            continue
        found[name] = report.time(what, name, us, how=how, **more)
    return found


def claim_ratio(
    report: Report, what: str, times: dict[str, float], rival: str, must: float | None, aim: float | None
) -> None:
    value = times[rival] / times["clmfast"] if rival in times else None
    report.claims.append(Claim(f"{what}: times as fast as {rival}", value, must, aim))


# ---- what is measured


def limits(report: Report) -> None:
    import torch

    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    report.limits["copy_gbs"] = 2 * x.numel() / eager_us(lambda i: y.copy_(x)) / 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report.limits["bf16_tflops"] = 2 * 8192**3 / eager_us(lambda i: a @ b) / 1e6
    report.note(f"copy {report.limits['copy_gbs']:.0f} GB/s, bf16 {report.limits['bf16_tflops']:.0f} TFLOP/s")


def clustered(S: int, N: int, D: int, i: int, dtype: Any = None) -> Any:
    """Points [S, N, D] around 20 centres, off the origin, as hidden states are."""
    import torch

    generator = torch.Generator("cuda").manual_seed(i)
    centre = 3 * torch.randn(S, 20, D, device="cuda", generator=generator)
    of = torch.randint(20, (N,), device="cuda", generator=generator)
    noise = torch.randn(S, N, D, device="cuda", generator=generator)
    return (centre[:, of] + noise + 5).to(dtype or torch.float32)


def knn(report: Report) -> None:
    import torch

    from clmfast import ops

    what, k = "knn 7 x 2048 x 256, k = 10", 10
    sets = [clustered(7, 2048, 256, i) for i in range(N_INPUTS)]
    found, expected = ops.knn(sets[0], k), ops.knn(sets[0][:1].cpu(), k)
    if not torch.equal(found.index[:1].cpu(), expected.index):
        raise RuntimeError(f"{what}: wrong neighbours")
    itself = torch.eye(2048, device="cuda", dtype=torch.bool)

    def by_torch(i: int) -> Any:
        norm2 = sets[i].square().sum(dim=2)
        dist2 = norm2[:, :, None] + norm2[:, None] - 2 * torch.bmm(sets[i], sets[i].mT)
        return dist2.masked_fill(itself, torch.inf).topk(k, largest=False)

    rivals: dict[str, tuple[str, Call]] = {"torch bmm + topk": ("graph", by_torch)}
    if is_installed("flashlib"):
        from flashlib import flash_knn

        rivals["flashlib"] = ("graph", lambda i: flash_knn(sets[i], sets[i], k + 1))  # the point itself is among them
        rivals["flashlib, eager"] = ("eager", lambda i: flash_knn(sets[i], sets[i], k + 1))
    times = compete(report, what, lambda i: ops.knn(sets[i], k), rivals)
    claim_ratio(report, what, times, "torch bmm + topk", 3, 8)
    claim_ratio(report, what, times, "flashlib", 1.5, 4)
    report.claims.append(Claim(f"{what}: microseconds", times["clmfast"], None, 35, "", at_most=True))
    bound = [ops.knn(x, k).dist2[..., -1] for x in sets]
    report.time(what, "clmfast, known bound", replayed_us(lambda i: ops.knn(sets[i], k, within=bound[i])), how="graph")


def knn_of_many(report: Report) -> None:
    import torch

    from clmfast import ops

    Q, N, D = 16384, 100_000, 128
    points = clustered(1, N, D, 0, torch.bfloat16)
    queries = [clustered(1, Q, D, i, torch.bfloat16) for i in range(N_INPUTS)]
    flops = 2 * Q * N * D
    for k in (1, 8, 16, 32):
        what = f"knn 16384 x 100k x 128 bf16, k = {k}"
        found = ops.knn(points, k, queries[0])
        expected = ops.knn(points.cpu(), k, queries[0][:, :64].cpu())
        if not torch.equal(found.index[:, :64].cpu(), expected.index):
            raise RuntimeError(f"{what}: wrong neighbours")
        ours = report.time(what, "clmfast", eager_us(lambda i, k=k: ops.knn(points, k, queries[i])), how="eager")
        report.times[-1]["tflops"] = flops / ours / 1e6
        if not is_installed("flashlib"):
            continue
        from flashlib import flash_knn

        try:
            rival = report.time(
                what, "flashlib", eager_us(lambda i, k=k: flash_knn(queries[i], points, k)), how="eager"
            )
        except Exception as error:
            report.note(f"{what}: flashlib left out: {error}")
            continue
        if k == 16:
            claim_ratio(report, what, {"clmfast": ours, "flashlib": rival}, "flashlib", 1, 4)
    if not is_installed("flashlib"):
        report.note("flashlib is not installed")


def kmeans(report: Report) -> None:
    import torch

    from clmfast import ops

    what, K, n_iter = "k-means 7 x 2048 x 256, K = 20, 25 it.", 20, 25
    sets = [torch.randn(7, 2048, 256, device="cuda") for _ in range(N_INPUTS)]  # no clusters: all iterations are needed
    init = [x[:, :K].contiguous() for x in sets]
    found, expected = (
        ops.kmeans(sets[0].to(d), K, init=init[0].to(d), max_iter=n_iter, tol=0) for d in ("cuda", "cpu")
    )
    if not torch.equal(found.label.cpu(), expected.label):
        raise RuntimeError(f"{what}: labels differ from the CPU's")

    def ours(i: int) -> Any:
        return ops.kmeans(sets[i], K, max_iter=n_iter, tol=0)

    report.note(f"iterations until nothing changes, by set: {ours(0).n_iter.tolist()}")

    def by_torch(i: int) -> Any:  # without seeding
        centroid = init[i]
        for _ in range(n_iter):
            label = (centroid.square().sum(2)[:, None] - 2 * torch.bmm(sets[i], centroid.mT)).argmin(dim=2)
            member = torch.nn.functional.one_hot(label, K).float()
            centroid = torch.bmm(member.mT, sets[i]) / member.sum(dim=1).clamp(min=1)[..., None]
        return centroid

    rivals: dict[str, tuple[str, Call]] = {"torch, without seeding": ("graph", by_torch)}
    if is_installed("flash_kmeans"):
        from flash_kmeans import batch_kmeans_Euclid

        rivals["flash-kmeans"] = ("eager", lambda i: batch_kmeans_Euclid(sets[i], K, max_iters=n_iter, tol=0.0))
    else:
        report.note("flash-kmeans is not installed")
    times = compete(report, what, ours, rivals)
    claim_ratio(report, what, times, "flash-kmeans", 10, 30)
    report.claims.append(Claim(f"{what}: microseconds", times["clmfast"], None, 80, "", at_most=True))
    report.time(
        what,
        "clmfast, known start",
        replayed_us(lambda i: ops.kmeans(sets[i], K, init=init[i], max_iter=n_iter, tol=0)),
    )


def scores(report: Report) -> None:
    import torch

    from clmfast import ops

    what = "six scores, 7 layers x 2048, K = 20"
    truth = [torch.randint(20, (2048,), device="cuda") for _ in range(N_INPUTS)]
    label = [
        torch.where(torch.rand(7, 2048, device="cuda") < 0.8, t, torch.randint(20, (7, 2048), device="cuda"))
        for t in truth
    ]
    found = torch.stack(ops.partition_scores(truth[0], label[0], n_truth=20, n_label=20))
    expected = torch.stack(ops.partition_scores(truth[0].cpu(), label[0].cpu()))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)
    rivals: dict[str, tuple[str, Call]] = {}
    if is_installed("torchmetrics"):
        from torchmetrics.functional import clustering

        def by_torchmetrics(i: int) -> Any:
            return [
                score(labels, truth[i])
                for labels in label[i]
                for score in (
                    clustering.adjusted_rand_score,
                    clustering.normalized_mutual_info_score,
                    clustering.v_measure_score,
                )
            ]

        rivals["torchmetrics, three scores"] = ("eager", by_torchmetrics)
    else:
        report.note("torchmetrics is not installed")
    times = compete(report, what, lambda i: ops.partition_scores(truth[i], label[i], n_truth=20, n_label=20), rivals)
    claim_ratio(report, what, times, "torchmetrics, three scores", 20, None)
    report.claims.append(Claim(f"{what}: microseconds", times["clmfast"], None, 4, "", at_most=True))


def capture(report: Report) -> None:
    import torch

    from clmfast import ops

    what = "capture of 7 layers, 128 x 32 x 256, 2 readouts"
    states = [torch.randn(7, 128, 32, 256, device="cuda") for _ in range(N_INPUTS)]
    bank, norm2 = torch.zeros(7, 2, 2048, 256, device="cuda"), torch.zeros(7, 2, 2048, device="cuda")
    start = torch.randint(32, (2, 128), device="cuda")
    slot, row = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.arange(128, device="cuda")

    def ours(i: int) -> None:
        for layer in range(7):
            ops.capture_rows(states[i][layer], start, start + 1, slot, bank[layer], norm2[layer])

    def by_torch(i: int) -> None:
        for layer in range(7):
            rows = states[i][layer][row, start]
            at = (slot + row) % 2048
            bank[layer].index_copy_(1, at, rows)
            norm2[layer].index_copy_(1, at, rows.double().square().sum(dim=2).float())

    ours(0)
    if not torch.equal(bank[:, :, :128], states[0].transpose(0, 1)[row, :, start].permute(2, 0, 1, 3)):
        raise RuntimeError(f"{what}: wrong rows")
    compete(report, what, ours, {"torch, index_copy": ("graph", by_torch)})


def other_ops(report: Report) -> None:
    import torch

    from clmfast import ops

    points = [clustered(7, 2048, 256, i) for i in range(N_INPUTS)]
    label = torch.randint(20, (2048,), device="cuda")
    many = torch.randint(4000, (6, 2048), device="cuda")
    index = ops.knn(points[0], 10).index
    for what, call in (
        ("separation 7 x 2048 x 256, 20 groups", lambda i: ops.separation(points[i], label, 20)),
        ("majority vote 7 x 2048 x 10", lambda i: ops.majority_vote(index, label)),
        ("label shares 7 x 2048 x 10", lambda i: ops.label_shares(index, label, label, 20)),
        (
            "adjusted Rand, 5 truths x 7 x 2048",
            lambda i: ops.adjusted_rand(label.expand(5, -1), label.expand(7, -1), 20, 20),
        ),
        (
            "adjusted Rand, 6 truths of 4000 x 7 x 2048",
            lambda i: ops.adjusted_rand(many, label.expand(7, -1), 4000, 20),
        ),
    ):
        report.time(what, "clmfast", replayed_us(call), how="graph")


def attention(report: Report) -> None:
    from benchmarks.gpu_attention import measure

    measure(report)


def training_step(report: Report) -> None:
    from benchmarks.gpu_step import measure

    measure(report)


SECTIONS: list[tuple[str, Callable[[Report], None]]] = [
    ("build", build),
    ("tests", tests),
    ("limits", limits),
    ("knn", knn),
    ("knn of many points", knn_of_many),
    ("k-means", kmeans),
    ("scores", scores),
    ("capture", capture),
    ("other ops", other_ops),
    ("attention", attention),
    ("training step", training_step),
    ("sanitizer", sanitizer),
]


def describe_device() -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gib": round(found.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cpu": cpu_name(),
    }


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def print_summary(report: Report) -> None:
    print("\n== summary")
    for name, outcome in report.sections.items():
        print(f"  {name:20} {outcome.splitlines()[0][:160]}")
    for claim in report.claims:
        value = "-" if claim.value is None else f"{claim.value:.3g}{claim.unit}"
        bars = f"must {claim.must}" if claim.must is not None else ""
        aims = f"aim {claim.aim}" if claim.aim is not None else ""
        print(f"  {claim.what:72} {value:>9}  {bars:9} {aims:9} {claim.verdict}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder of the JSON file")
    parser.add_argument("--only", nargs="+", choices=[name for name, _ in SECTIONS], help="these sections alone")
    options = parser.parse_args(arguments)
    report = Report()
    try:
        import torch

        has_device = torch.cuda.is_available()
    except ImportError:
        has_device = False
    report.device = describe_device() if has_device else {"name": "none", "cpu": cpu_name()}
    folder = options.out or ROOT / "benchmarks" / "results" / slug(report.device["name"])
    path = folder / f"{commit()}.json"

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report.as_dict(), indent=1) + "\n")

    if not has_device:
        print("gpu_check: torch finds no CUDA device here, so nothing was measured")
        report.sections = {name: "skipped: no CUDA device" for name, _ in SECTIONS}
        if options.out:
            save()
        return 1
    print(f"{report.device['name']}, {report.device['multiprocessors']} multiprocessors, commit {commit()}")
    chosen = [(name, section) for name, section in SECTIONS if not options.only or name in options.only]
    run_sections(report, chosen, save)
    print_summary(report)
    print(f"written: {path.name}, {report.as_dict()['seconds']} s")
    return 1 if any(outcome.startswith("failed") for outcome in report.sections.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

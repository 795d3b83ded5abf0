"""kNN, k-means, scores, capture and the other ops on a GPU: sections of benchmarks.gpu_check.

What the op gave is compared before it is timed: with the CPU's op in full, and with ops.reference or the formula in
torch on as much as that can do in a second. Rivals are torch in a CUDA graph, and flashlib, flash-kmeans and
torchmetrics where they are installed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contest import Claim
from benchmarks.gpu_contest import N_INPUTS, Call, Report, claim_ratio, compete, differences, replayed_us
from benchmarks.machine import is_installed
from clmfast import ops
from clmfast.ops import reference

RIGHT_RIVAL = 0.99  # share of true neighbours that a rival must find


class Search(NamedTuple):
    """A search: S sets of N points of width D, k neighbours; of Q queries, or of the points themselves (Q = 0)."""

    kind: str  # of points, see `points`
    S: int
    N: int
    D: int
    k: int
    Q: int = 0
    n_groups: int = 0  # a query and a point of equal group are no neighbours; 0: no groups
    dtype: torch.dtype = torch.float32
    n_reference: int = 4  # queries of a set that are compared with the reference, which takes 10 ms and more for each
    aim_us: float | None = None

    def __str__(self) -> str:
        asked = f" of {self.Q}" if self.Q else ""
        kind = f"{self.kind}, barred groups" if self.n_groups else self.kind
        return f"knn{asked} {self.S}x{self.N}x{self.D} k{self.k} {str(self.dtype)[6:]}, {kind}"


SEARCHES = [
    Search("clustered", 7, 2048, 256, 10, aim_us=35),
    Search("gaussian", 7, 2048, 256, 10, aim_us=35),
    Search("112 rows", 7, 2048, 256, 10, aim_us=35),
    Search("clustered", 14, 1024, 128, 10, Q=144, n_groups=40),
]
SEARCHES_OF_MANY = [
    Search("clustered", 1, 100_000, 128, k, Q=16384, dtype=torch.bfloat16, n_reference=4)
    for k in (16, 1, 8, 32)  # the claimed one first
]


def points(kind: str, S: int, N: int, D: int, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Points [S, N, D]: "clustered" around 20 centres, off the origin, as hidden states are; "gaussian"; or "112 rows",
    of which all points are copies, as the states of the first layer are."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    def drawn(n: int) -> Tensor:
        return torch.randint(n, (N,), device=device, generator=generator)

    if kind == "gaussian":
        found = normal(S, N, D)
    elif kind == "clustered":
        found = (3 * normal(S, 20, D))[:, drawn(20)] + normal(S, N, D) + 5
    else:
        found = normal(S, int(kind.split()[0]), D)[:, drawn(int(kind.split()[0]))]
    return found.to(dtype)


class Inputs(NamedTuple):
    points: Tensor
    k: int
    queries: Tensor | None
    barred: tuple[Tensor, Tensor] | None

    def on_cpu(self) -> Inputs:
        queries = None if self.queries is None else self.queries.cpu()
        barred = None if self.barred is None else (self.barred[0].cpu(), self.barred[1].cpu())
        return Inputs(self.points.cpu(), self.k, queries, barred)

    def of(self, rows: Tensor) -> Inputs:
        """The search of these queries alone: a point that asks bars itself."""
        everyone = torch.arange(self.points.shape[1])
        queries = self.points if self.queries is None else self.queries
        barred = (everyone, everyone) if self.queries is None else self.barred
        return Inputs(self.points, self.k, queries[:, rows], None if barred is None else (barred[0][rows], barred[1]))


def search_inputs(search: Search, seed: int, device: str) -> Inputs:
    S, N, D, Q = search.S, search.N, search.D, search.Q
    x = points(search.kind, S, N + Q, D, seed, device, search.dtype)  # queries are of the points' clusters
    groups = torch.arange(N + Q, device=device) % max(search.n_groups, 1)
    barred = (groups[N:], groups[:N]) if search.n_groups else None
    return Inputs(x[:, :N].contiguous(), search.k, x[:, N:].contiguous() if Q else None, barred)


def check_search(report: Report, search: Search, inputs: Inputs) -> Tensor:
    """Compare our op with the CPU's and with the reference; returns the indices that the reference gave."""
    found = ops.knn(*inputs)
    host = inputs.on_cpu()
    n_asked = search.Q or search.N
    rows = torch.linspace(0, n_asked - 1, min(search.n_reference, n_asked)).long()
    expected = reference.knn(*host.of(rows))
    wrong = differences([x[:, rows.to(x.device)] for x in found], expected)
    if search.Q > 1024:  # the CPU would take seconds
        report.check(str(search), wrong or differences([x[:, :64] for x in found], ops.knn(*host.of(torch.arange(64)))))
    else:
        report.check(str(search), wrong or differences(found, ops.knn(*host)))
    return found.index


def is_right(found: Any, expected: Tensor) -> bool:
    """Has a rival found our neighbours? `found`: what it returned, of which one tensor holds indices."""
    index = next(x for x in found if not x.is_floating_point()).view(*expected.shape[:2], -1)
    rows = slice(0, 64)
    hit = (index[:, rows, :, None] == expected[:, rows, None, :]).any(2).float().mean()
    return float(hit) >= RIGHT_RIVAL


def search_rivals(search: Search, sets: list[Inputs]) -> dict[str, tuple[str, Call]]:
    is_self = not search.Q

    def by_torch(i: int) -> Any:
        x, k, queries, barred = sets[i]
        asking = x if queries is None else queries
        norm2 = x.square().sum(dim=2)[:, None] + asking.square().sum(dim=2)[:, :, None]
        dist2 = norm2 - 2 * torch.bmm(asking, x.mT)
        if queries is None:
            dist2.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        if barred is not None:
            dist2.masked_fill_(barred[0][:, None] == barred[1], torch.inf)
        return dist2.topk(k, largest=False)

    rivals: dict[str, tuple[str, Call]] = {}
    if search.Q * search.N < 1 << 28:  # what it makes would not fit
        rivals["torch bmm + topk"] = ("graph", by_torch)
    if is_installed("flashlib") and not search.n_groups:
        from flashlib import flash_knn

        def by_flashlib(i: int) -> Any:  # a point that asks is among its own neighbours
            x, k, queries, _ = sets[i]
            return flash_knn(x if queries is None else queries, x, k + is_self)

        rivals["flashlib"] = ("graph" if is_self else "eager", by_flashlib)
    return rivals


def knn(report: Report, searches: list[Search] = SEARCHES, how: str = "graph") -> None:
    if not is_installed("flashlib"):
        report.note("flashlib is not installed")
    for search in searches:
        what = str(search)
        with report.shape(what):
            sets = [search_inputs(search, i, report.device) for i in range(N_INPUTS)]
            expected = check_search(report, search, sets[0])
            rivals = search_rivals(search, sets)
            for name, (_, call) in list(rivals.items()):
                try:
                    why = "" if "rows" in search.kind or is_right(call(0), expected) else "other neighbours"
                except Exception as error:
                    why = f"{type(error).__name__}: {str(error)[:200]}"
                if why:
                    report.note(f"{what}: {name} left out: {why}")
                    del rivals[name]
            times = compete(report, what, lambda i, sets=sets: ops.knn(*sets[i]), rivals, how)
            if "torch bmm + topk" in rivals and not search.Q:
                claim_ratio(report, what, times, "torch bmm + topk", 3, 8)
            if "flashlib" in rivals:
                claim_ratio(report, what, times, "flashlib", *((1, 4) if search.Q else (1.5, 4)))
            if search.aim_us is not None:
                report.claim(Claim(f"{what}: microseconds", times["clmfast"], None, search.aim_us, "", at_most=True))
                bound = [ops.knn(*x).dist2[..., -1].contiguous() for x in sets]
                known = replayed_us(lambda i, sets=sets, bound=bound: ops.knn(*sets[i], within=bound[i]), report.device)
                report.time(what, "clmfast, known bound", known, how="graph")
            if search.Q > 1024:
                tflops = 2 * search.S * search.Q * search.N * search.D / times["clmfast"] / 1e6
                report.count(what, tflops=tflops)


def knn_of_many(report: Report, searches: list[Search] = SEARCHES_OF_MANY) -> None:
    knn(report, searches, "eager")


def kmeans(report: Report, S: int = 7, N: int = 2048, D: int = 256, K: int = 20, n_iter: int = 25) -> None:
    what = f"k-means {S}x{N}x{D} K{K}, {n_iter} iterations"
    with report.shape(what):
        # No clusters, so that all iterations are needed.
        sets = [points("gaussian", S, N, D, i, report.device) for i in range(N_INPUTS)]
        init = [x[:, :K].contiguous() for x in sets]
        few = ops.kmeans(sets[0], K, init=init[0], max_iter=2, tol=0)
        by_reference = reference.kmeans(sets[0][:1].cpu(), init[0][:1].cpu(), max_iter=2, tol=0)
        wrong = differences([x[:1] for x in few], by_reference, rtol=1e-5, atol=1e-5)
        found, on_cpu = (
            ops.kmeans(sets[0].to(d), K, init=init[0].to(d), max_iter=n_iter, tol=0) for d in (report.device, "cpu")
        )
        seeded, seeded_on_cpu = (ops.kmeans(sets[0].to(d), K, max_iter=n_iter, tol=0) for d in (report.device, "cpu"))
        wrong = wrong or differences([found.label, found.inertia], [on_cpu.label, on_cpu.inertia], rtol=1e-6)
        report.check(what, wrong or differences([seeded.label], [seeded_on_cpu.label]))
        report.note(f"{what}: iterations until nothing changes, by set: {seeded.n_iter.tolist()}")

        def by_torch(i: int) -> Any:
            centroid = init[i]
            for _ in range(n_iter):
                label = (centroid.square().sum(2)[:, None] - 2 * torch.bmm(sets[i], centroid.mT)).argmin(dim=2)
                member = F.one_hot(label, K).float()
                centroid = torch.bmm(member.mT, sets[i]) / member.sum(dim=1).clamp(min=1)[..., None]
            return centroid

        rivals: dict[str, tuple[str, Call]] = {"torch, without seeding": ("graph", by_torch)}
        if is_installed("flash_kmeans"):
            from flash_kmeans import batch_kmeans_Euclid

            rivals["flash-kmeans"] = ("eager", lambda i: batch_kmeans_Euclid(sets[i], K, max_iters=n_iter, tol=0.0))
        else:
            report.note("flash-kmeans is not installed")
        times = compete(report, what, lambda i: ops.kmeans(sets[i], K, max_iter=n_iter, tol=0), rivals)
        if "flash-kmeans" in times:
            claim_ratio(report, what, times, "flash-kmeans", 10, 30)
        report.claim(Claim(f"{what}: microseconds", times["clmfast"], None, 80, "", at_most=True))
        known = replayed_us(lambda i: ops.kmeans(sets[i], K, init=init[i], max_iter=n_iter, tol=0), report.device)
        report.time(what, "clmfast, known start", known, how="graph")


def kmeans_and_others(report: Report) -> None:
    kmeans(report)
    scores(report)
    scores_of_many_values(report)
    capture(report)
    votes(report)
    separation(report)


def labelings(S: int, N: int, K: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """(truth [N], label [S, N] that is right for four in five), for every input."""
    truth = [torch.randint(K, (N,), device=device) for _ in range(N_INPUTS)]
    label = [
        torch.where(torch.rand(S, N, device=device) < 0.8, t, torch.randint(K, (S, N), device=device)) for t in truth
    ]
    return truth, label


def scores(report: Report, S: int = 7, N: int = 2048, K: int = 20) -> None:
    what = f"six scores, {S}x{N} K{K}"
    with report.shape(what):
        truth, label = labelings(S, N, K, report.device)
        found = ops.partition_scores(truth[0], label[0], n_truth=K, n_label=K)
        ari = ops.adjusted_rand(truth[0][None], label[0], K, K)
        on_cpu = ops.partition_scores(truth[0].cpu(), label[0].cpu())
        expected = reference.partition_scores(truth[0].cpu(), label[0][:1].cpu())  # a second for seven sets
        wrong = differences([x[:1] for x in found], expected, atol=1e-12)
        report.check(what, wrong or differences([*found, ari[0]], [*on_cpu, on_cpu.ari], atol=1e-12))
        rivals: dict[str, tuple[str, Call]] = {}
        if is_installed("torchmetrics"):
            from torchmetrics.functional import clustering as of

            three = of.adjusted_rand_score, of.normalized_mutual_info_score, of.v_measure_score

            def by_torchmetrics(i: int) -> Any:
                return [score(labels, truth[i]) for labels in label[i] for score in three]

            rivals["torchmetrics, three scores"] = ("eager", by_torchmetrics)
        times = compete(report, what, lambda i: ops.partition_scores(truth[i], label[i], n_truth=K, n_label=K), rivals)
        report.claim(Claim(f"{what}: microseconds", times["clmfast"], None, 4, "", at_most=True))
        many = [x.expand(5, -1) for x in truth]
        compete(report, f"adjusted Rand 5x{S}x{N}", lambda i: ops.adjusted_rand(many[i], label[i], K, K), {})


def scores_of_many_values(report: Report, S: int = 7, N: int = 2048, K: int = 20, n_values: int = 4000) -> None:
    """As of instructions: a label of which most points have one of their own."""
    what = f"adjusted Rand 6x{S}x{N}, {n_values} values"
    with report.shape(what):
        _, label = labelings(S, N, K, report.device)
        values = torch.randint(n_values, (6, N), device=report.device)
        found = ops.adjusted_rand(values, label[0], n_values, K)
        on_cpu = ops.adjusted_rand(values.cpu(), label[0].cpu(), n_values, K)
        expected = reference.partition_scores(values[0].cpu(), label[0][:1].cpu()).ari
        wrong = differences([found[0, :1]], [expected], atol=1e-12)
        report.check(what, wrong or differences([found], [on_cpu], atol=1e-12))
        compete(report, what, lambda i: ops.adjusted_rand(values, label[i], n_values, K), {})


def capture(report: Report, n_layers: int = 7, B: int = 128, T: int = 32, D: int = 256, N: int = 2048) -> None:
    what = f"capture {n_layers} layers, {B}x{T}x{D}, 2 readouts"
    with report.shape(what):
        device = report.device
        states = [torch.randn(n_layers, B, T, D, device=device) for _ in range(N_INPUTS)]
        bank, norm2 = torch.zeros(n_layers, 2, N, D, device=device), torch.zeros(n_layers, 2, N, device=device)
        start = torch.randint(T, (2, B), device=device)
        slot, row = torch.full((1,), N - 3, device=device), torch.arange(B, device=device)

        def ours(i: int) -> None:
            for layer in range(n_layers):
                ops.capture_rows(states[i][layer], start, start + 1, slot, bank[layer], norm2[layer])

        def by_torch(i: int) -> None:
            for layer in range(n_layers):
                rows = states[i][layer][row, start]
                at = (slot + row) % N
                bank[layer].index_copy_(1, at, rows)
                norm2[layer].index_copy_(1, at, rows.double().square().sum(dim=2).float())

        ours(0)
        wrong, begin = "", start.cpu()
        for layer in range(n_layers):
            rows, norms = torch.zeros(2, N, D), torch.zeros(2, N)
            reference.capture_rows(states[0][layer].cpu(), begin, begin + 1, slot.cpu(), rows, norms)
            wrong = wrong or differences([bank[layer], norm2[layer]], [rows, norms], rtol=1e-6)
        report.check(what, wrong)
        compete(report, what, ours, {"torch, index_copy": ("graph", by_torch)})


def votes(report: Report, S: int = 7, N: int = 2048, k: int = 10, K: int = 20) -> None:
    what = f"majority vote and label shares {S}x{N}x{k}"
    with report.shape(what):
        index = torch.randint(-1, N, (S, N, k), device=report.device)
        label = torch.randint(K, (N,), device=report.device)
        near, is_there = label.cpu()[index.cpu()], index.cpu() >= 0  # index -1 reads a label that counts nowhere
        count = (F.one_hot(near, K) * is_there[..., None]).sum(2)
        most = count.gather(2, near) == count.amax(2, keepdim=True)
        first = (most & is_there).int().argmax(2, keepdim=True)
        vote = near.gather(2, first)[..., 0].where(is_there.any(2), -1)
        share = ((near == label.cpu()[:, None]) & is_there).sum(2) / is_there.sum(2).clamp(min=1).double()
        own = F.one_hot(label.cpu(), K).double()
        shares = torch.stack([share @ own, is_there.any(2).double() @ own])
        found = ops.majority_vote(index, label), ops.label_shares(index, label, label, K)
        report.check(what, differences(found, [vote, shares], rtol=1e-12))
        compete(report, f"majority vote {S}x{N}x{k}", lambda i: ops.majority_vote(index, label), {})
        compete(report, f"label shares {S}x{N}x{k}", lambda i: ops.label_shares(index, label, label, K), {})


def separation(report: Report, S: int = 7, N: int = 2048, D: int = 256, K: int = 20) -> None:
    what = f"separation {S}x{N}x{D}, {K} groups"
    with report.shape(what):
        sets = [points("clustered", S, N, D, i, report.device) for i in range(N_INPUTS)]
        label = torch.arange(N, device=report.device) % K
        found = ops.separation(sets[0], label, K)
        x, of = sets[0].cpu().double(), F.one_hot(label.cpu(), K).double()
        centre = of.mT @ x / of.sum(0)[:, None]
        dist = torch.cdist(x, centre, compute_mode="donot_use_mm_for_euclid_dist")
        own = dist.gather(2, label.cpu().expand(S, -1)[..., None])[..., 0]
        other = dist.masked_fill(of.bool(), torch.inf).amin(2)
        silhouette = ((other - own) / torch.maximum(own, other)).mean(1)
        total = (x - x.mean(1, keepdim=True)).square().sum((1, 2))
        within = own.square().sum(1)
        expected = torch.stack([silhouette, (total - within) / within, total])
        report.check(what, differences([found], [expected], rtol=1e-6))
        compete(report, what, lambda i: ops.separation(sets[i], label, K), {})

"""The slow, obviously right twin of every op, in float64: what the ops are tested against."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from clmfast.ops.kmeans import KMeans
from clmfast.ops.knn import KNN
from clmfast.ops.partition import PartitionScores

MOVE_ITERATIONS, SPLIT_ITERATIONS, ROUNDING = 4, 3, 1e-6  # of csrc/cpu/kmeans_search.cpp


Barred = tuple[Tensor, Tensor]


@overload
def knn(points: Tensor, k: int, queries: Tensor | None = None, barred: Barred | None = None) -> KNN: ...
@overload
def knn(points: Tensor, k: int, queries: Tensor, barred: list[Barred]) -> list[KNN]: ...
def knn(
    points: Tensor, k: int, queries: Tensor | None = None, barred: Barred | list[Barred] | None = None
) -> KNN | list[KNN]:
    """All pairs, masked, then a stable sort by dist2, which leaves equal ones in the order of their index."""
    if isinstance(barred, list):
        assert queries is not None
        return [knn(points, k, queries[:, queries.shape[1] - len(pair[0]) :], pair) for pair in barred]
    asked = points if queries is None else queries
    S, Q, _ = asked.shape
    N = points.shape[1]
    dist2_SQk = torch.full((S, Q, k), math.inf, dtype=torch.float32, device="cpu")
    index_SQk = torch.full((S, Q, k), -1, device="cpu")
    for s in range(S):
        for i in range(Q):
            dist2_N = (asked[s, i].double() - points[s].double()).square().sum(dim=1).float()
            is_candidate_N = points[s].isfinite().all(dim=1) & asked[s, i].isfinite().all()
            if queries is None:
                is_candidate_N &= torch.arange(N, device="cpu") != i
            if barred is not None:
                is_candidate_N &= barred[0][i] != barred[1]
            candidate = is_candidate_N.nonzero().flatten()
            nearest = candidate[dist2_N[candidate].argsort(stable=True)][:k]
            dist2_SQk[s, i, : len(nearest)] = dist2_N[nearest]
            index_SQk[s, i, : len(nearest)] = nearest
    return KNN(dist2_SQk, index_SQk)


def kmeans(points: Tensor, init: Tensor, max_iter: int = 100, tol: float = 1e-4) -> KMeans:
    """Lloyd's iterations from given centroids, which are rounded to float32 after every move, as the op stores them."""
    S, N, D = points.shape
    K = init.shape[1]
    label_SN = torch.full((S, N), -1, device="cpu")
    centroid_SKD = torch.empty(S, K, D, dtype=torch.float32, device="cpu")
    inertia_S = torch.zeros(S, dtype=torch.float64, device="cpu")
    n_iter_S = torch.zeros(S, dtype=torch.int64, device="cpu")
    for s in range(S):
        is_finite_N = points[s].isfinite().all(dim=1)
        x_ND = points[s][is_finite_N].double()
        bound = tol * float(x_ND.var(dim=0, correction=0).mean()) if len(x_ND) else 0.0
        found = _lloyd(x_ND, init[s].double(), max_iter, bound)
        label_SN[s, is_finite_N], centroid_SKD[s], n_iter_S[s] = found
        inertia_S[s] = _inertia(x_ND, found)
    return KMeans(label_SN, centroid_SKD, inertia_S, n_iter_S)


Fit = tuple[Tensor, Tensor, int]  # label [N], centroid [K, D], iterations


def _inertia(x_ND: Tensor, fit: Fit) -> float:
    return float((x_ND - fit[1][fit[0]]).square().sum())


def _lloyd(x_ND: Tensor, centroid_KD: Tensor, max_iter: int, bound: float) -> Fit:
    label_N = torch.full((len(x_ND),), -1, device="cpu")
    n_iter, is_active = 0, True
    while is_active and n_iter < max_iter:
        n_iter += 1
        before_N, before_KD = label_N, centroid_KD
        label_N = _nearest_centroid(x_ND, centroid_KD)
        centroid_KD = _move(x_ND, label_N, centroid_KD)
        is_active = not torch.equal(label_N, before_N) and float((centroid_KD - before_KD).square().sum()) > bound
    return _nearest_centroid(x_ND, centroid_KD), centroid_KD, n_iter


def kmeans_search(points: Tensor, K: int, known: Tensor, moves: int, max_iter: int = 100, seed: int = 0) -> KMeans:
    """The best partition of the search from known ones, [P, S, N] labels, without a projection."""
    P, S = known.shape[:2]
    init_SKD = torch.full((S, K, points.shape[2]), math.nan, dtype=torch.float32, device="cpu")
    for s in range(S):
        is_finite_N = points[s].isfinite().all(dim=1)
        x_ND = points[s][is_finite_N].double()
        if len(x_ND) == 0:
            continue
        x_ND = x_ND - x_ND.mean(dim=0)
        found = [_Lloyd(x_ND, known[p, s, is_finite_N], K) for p in range(P)]
        for partition in found:
            partition.assign(set(range(K)), partition.label_N < 0)
            partition.go_on(1, set(range(K)))
        best = min(range(P), key=lambda p: found[p].scatter())
        for p in {best, (best + 1 + seed % (P - 1)) % P} if P > 1 else {best}:
            found[p] = _moved(found[p], moves)
        label_N = min(found, key=_Lloyd.scatter).label_N
        init_SKD[s] = _means(points[s][is_finite_N].double(), label_N, K).float()
    return kmeans(points, init_SKD, max_iter)


def _means(x_ND: Tensor, label_N: Tensor, K: int) -> Tensor:
    return torch.stack([x_ND[label_N == k].mean(dim=0) for k in range(K)])  # NaN where there are none


def _scatter(x_ND: Tensor, label_N: Tensor, K: int) -> float:
    return float((x_ND - _means(x_ND, label_N, K)[label_N]).square().sum())


class _Lloyd:
    """Labels of points that go on, and |c|^2 - 2 c . x of the point's own centroid c when it was looked at last."""

    def __init__(self, x_ND: Tensor, label_N: Tensor, K: int) -> None:
        has_any = ((label_N >= 0) & (label_N < K)).any()
        self.x_ND, self.K = x_ND, K
        self.label_N = (
            torch.where((label_N >= 0) & (label_N < K), label_N, -1) if has_any else torch.zeros_like(label_N)
        )
        self.own_N = torch.full((len(x_ND),), math.inf, dtype=torch.float64, device="cpu")

    def copy(self) -> _Lloyd:
        other = _Lloyd(self.x_ND, self.label_N.clone(), self.K)
        other.own_N = self.own_N.clone()
        return other

    def scatter(self) -> float:
        return _scatter(self.x_ND, self.label_N, self.K)

    def assign(self, clusters: set[int], of_N: Tensor | None = None) -> set[int]:
        """Points, or some of them, take the nearest of some centroids and their own; the clusters that changed."""
        names = torch.tensor(sorted(clusters), device="cpu")
        mean_KD = _means(self.x_ND, self.label_N, self.K)[names]
        value_NK = (mean_KD.square().sum(dim=1) - 2 * self.x_ND @ mean_KD.T).nan_to_num(nan=math.inf)
        value_NK = torch.cat(
            [torch.where(torch.isin(self.label_N, names), math.inf, self.own_N)[:, None], value_NK], dim=1
        )
        own_N, place_N = value_NK.min(dim=1)
        label_N = torch.where(place_N == 0, self.label_N, names[(place_N - 1).clamp(min=0)])
        if of_N is not None:
            own_N, label_N = torch.where(of_N, own_N, self.own_N), torch.where(of_N, label_N, self.label_N)
        moved_N = label_N != self.label_N
        changed = {*self.label_N[moved_N].tolist(), *label_N[moved_N].tolist()} - {-1}
        self.own_N, self.label_N = own_N, label_N
        return changed

    def fill_empty(self) -> None:
        own2_N = self.own_N + self.x_ND.square().sum(dim=1)
        for k in range(self.K):
            if not (self.label_N == k).any() and own2_N.max() > 0:
                self.label_N[own2_N.argmax()] = k
                own2_N[own2_N.argmax()] = 0

    def go_on(self, n_iter: int, clusters: set[int]) -> _Lloyd:
        for _ in range(n_iter):
            if not clusters:
                break
            clusters = self.assign(clusters)
            self.fill_empty()
        return self


def _moved(found: _Lloyd, moves: int) -> _Lloyd:
    x_ND, K = found.x_ND, found.K
    for _ in range(moves):
        label_N = found.label_N
        mean_KD, count_K = _means(x_ND, label_N, K), torch.bincount(label_N, minlength=K).double()
        splits = [_split(x_ND[label_N == k], mean_KD[k]) for k in range(K)]
        k = max(range(K), key=lambda k: splits[k][0])
        merges = [
            (
                float(count_K[i] * count_K[j] / (count_K[i] + count_K[j]) * (mean_KD[i] - mean_KD[j]).square().sum()),
                i,
                j,
            )
            for i in range(K)
            for j in range(i + 1, K)
            if k not in (i, j)
        ]
        if K < 3 or splits[k][0] == 0 or found.scatter() <= ROUNDING * x_ND.square().sum():
            break
        _, into, freed = min(merges)
        three = {k, into, freed}
        of_three_N = torch.isin(label_N, torch.tensor(sorted(three), device="cpu"))
        trial = found.copy()
        trial.label_N[label_N == freed] = into
        trial.label_N[(label_N == k).nonzero()[~splits[k][1], 0]] = freed
        changed = trial.assign(three)
        changed |= trial.assign(set(range(K)), of_three_N)
        trial.fill_empty()
        trial.go_on(MOVE_ITERATIONS - 1, changed)
        if not trial.scatter() < found.scatter():
            break
        found = trial
    return found


def _split(x_ND: Tensor, mean_D: Tensor) -> tuple[float, Tensor]:
    """(inertia that it saves, which points are in the first half): 2-means of a cluster's points."""
    nothing = 0.0, torch.ones(len(x_ND), dtype=torch.bool, device="cpu")
    if len(x_ND) < 2:
        return nothing
    a_D = x_ND[(x_ND - mean_D).square().sum(dim=1).argmax()]
    b_D = x_ND[(x_ND - a_D).square().sum(dim=1).argmax()]
    for _ in range(SPLIT_ITERATIONS):
        is_a_N = (x_ND - a_D).square().sum(dim=1) <= (x_ND - b_D).square().sum(dim=1)
        if is_a_N.all() or not is_a_N.any():
            return nothing
        a_D, b_D = x_ND[is_a_N].mean(dim=0), x_ND[~is_a_N].mean(dim=0)
    n_a, n_b = int(is_a_N.sum()), int((~is_a_N).sum())
    return n_a * n_b / (n_a + n_b) * float((a_D - b_D).square().sum()), is_a_N


def _nearest_centroid(x_ND: Tensor, centroid_KD: Tensor) -> Tensor:
    """[N]: the first centroid of smallest squared distance."""
    return (x_ND[:, None] - centroid_KD).square().sum(dim=2).argmin(dim=1)


def _move(x_ND: Tensor, label_N: Tensor, centroid_KD: Tensor) -> Tensor:
    """The mean of every cluster, after empty clusters took the points farthest from their centroids."""
    K = len(centroid_KD)
    dist2_N = (x_ND - centroid_KD[label_N]).square().sum(dim=1)
    owner_N = label_N.clone()
    empty = [k for k in range(K) if not (label_N == k).any()]
    far = [int(i) for i in dist2_N.argsort(descending=True, stable=True) if dist2_N[i] > 0]
    for k, i in zip(empty, far, strict=False):
        owner_N[i] = k
    moved_KD = centroid_KD.clone()
    for k in range(K):
        if (owner_N == k).any():
            moved_KD[k] = x_ND[owner_N == k].mean(dim=0).float().double()
    return moved_KD


def partition_scores(truth: Tensor, label: Tensor) -> PartitionScores:
    """truth, label [N] or [S, N], any values: the formulas of ops.partition, pairs counted in exact integers."""
    S = max(len(x) if x.dim() == 2 else 1 for x in (truth, label))
    rows = [_partition_scores_of_one(t, l) for t, l in zip(_per_set(truth, S), _per_set(label, S), strict=True)]
    return PartitionScores(*torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(S, 6).unbind(1))


def _per_set(labels: Tensor, S: int) -> list[list[int]]:
    return labels.expand(S, labels.shape[-1]).tolist()


def _partition_scores_of_one(truth: list[int], label: list[int]) -> tuple[float, ...]:
    N = len(truth)
    if N == 0:
        return (1.0,) * 6
    cells = dict.fromkeys(zip(truth, label, strict=True), 0)
    for pair in zip(truth, label, strict=True):
        cells[pair] += 1
    a = {i: sum(n for (row, _), n in cells.items() if row == i) for i in set(truth)}
    b = {j: sum(n for (_, column), n in cells.items() if column == j) for j in set(label)}

    together, all_pairs = sum(math.comb(n, 2) for n in cells.values()), math.comb(N, 2)
    in_truth, in_label = (sum(math.comb(n, 2) for n in counts.values()) for counts in (a, b))
    # (together - expected) / (mean - expected) with expected = in_truth in_label / all_pairs, times 2 all_pairs
    above = 2 * (together * all_pairs - in_truth * in_label)
    below = (in_truth + in_label) * all_pairs - 2 * in_truth * in_label
    ari = 1.0 if in_truth == in_label == together else above / below

    h_truth, h_label = (-math.fsum(n / N * math.log(n / N) for n in counts.values()) for counts in (a, b))
    mi = math.fsum(n / N * math.log(N * n / (a[i] * b[j])) for (i, j), n in cells.items())
    mi = min(max(mi, 0.0), h_truth, h_label) if len(a) > 1 and len(b) > 1 else 0.0
    nmi = mi / ((h_truth + h_label) / 2) if len(a) > 1 or len(b) > 1 else 1.0
    homogeneity = mi / h_truth if len(a) > 1 else 1.0
    completeness = mi / h_label if len(b) > 1 else 1.0
    total = homogeneity + completeness
    v_measure = 2 * homogeneity * completeness / total if total > 0 else 0.0
    purity = sum(max(n for (_, column), n in cells.items() if column == j) for j in b) / N
    return ari, nmi, homogeneity, completeness, v_measure, purity


def capture_rows(x: Tensor, start: Tensor, stop: Tensor, slot: Tensor, bank: Tensor, norm2: Tensor) -> None:
    """One row at a time; a mean of one token is that token, so the two cases need no distinction here."""
    R, B = start.shape
    N = bank.shape[1]
    for r in range(R):
        for b in range(B):
            row = x[b, start[r, b] : stop[r, b]].detach().double().mean(dim=0).float().to(bank.dtype)
            i = (int(slot) + b) % N
            bank[r, i] = row
            norm2[r, i] = row.double().square().sum()


def attention(qkv: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Dense scores per sequence; positions beyond its length never enter. Any dtype in, float64 out."""
    B, T, _, H, W = qkv.shape
    out_BTHW = torch.zeros(B, T, H, W, dtype=torch.float64, device="cpu")
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        q_nHW, k_nHW, v_nHW = qkv[b, :n].double().unbind(1)
        scores_Hnn = torch.einsum("thw,shw->hts", q_nHW, k_nHW) / math.sqrt(W)
        is_later_nn = torch.ones(n, n, dtype=torch.bool, device="cpu").triu(1)
        weights_Hnn = scores_Hnn.masked_fill(is_later_nn, -math.inf).softmax(dim=2)
        out_BTHW[b, :n] = torch.einsum("hts,shw->thw", weights_Hnn, v_nHW)
    return out_BTHW

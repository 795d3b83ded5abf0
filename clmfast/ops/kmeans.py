"""kmeans: Lloyd's algorithm on many point sets at once. The contract with its ties and limits is csrc/kmeans.h."""

from typing import NamedTuple

import torch
from torch import Tensor

from clmfast.ops import arguments
from clmfast.ops.arguments import Array
from clmfast.ops.kmeans_search import kmeans_search


class KMeans(NamedTuple):
    label: Tensor  # [S, N] int64; -1 for points that are not finite
    centroid: Tensor  # [S, K, D] float32
    inertia: Tensor  # [S] float64
    n_iter: Tensor  # [S] int64


def kmeans(
    points: Array,
    n_clusters: int,
    *,
    init: str | Array = "k-means++",
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 1e-4,
    seed: int = 0,
    moves: int = 0,
) -> KMeans:
    """Partition each set into K = n_clusters clusters of small inertia, like scikit-learn's KMeans(algorithm="lloyd").

        label[s, i] = argmin_k |points[s, i] - centroid[s, k]|^2        ties to the smaller k
        inertia[s]  = sum_i |points[s, i] - centroid[s, label[s, i]]|^2

    points [S, N, D] float32, bfloat16 or float16; 1 <= K <= N. init: "k-means++" (greedy), "random" (points of
    different index), or the centroids to begin with, [S, K, D] (then n_init must be 1). Of n_init restarts the one of
    lowest inertia is returned. tol is relative to the mean variance of the set's coordinates. Draws depend on seed,
    set and restart only. moves: of each start, up to so many rounds of splitting one cluster and merging two others, by
    ops.kmeans_search (k-means++ alone, on a CPU): one start with ten of them finds what takes tens of restarts.
    Arrays and lists serve as well as tensors; a list of numbers becomes float32, and no other dtype is rounded.
    Beware: of identical points all go to one cluster, and other clusters then stay empty. No gradient flows.
    """
    if isinstance(init, str) and init not in ("k-means++", "random"):
        raise ValueError(f'kmeans: init must be "k-means++", "random" or a tensor, got "{init}"')
    op = "kmeans"
    if arguments.integer(op, "moves", moves) != 0:
        if not isinstance(init, str) or init == "random":
            raise ValueError('kmeans: moves must be 0 unless init is "k-means++"')
        found = kmeans_search(points, n_clusters, n_cold=n_init, moves=moves, max_iter=0, seed=seed)
        init, n_init = found.centroid, 1
    beside = (points, init)
    fit = torch.ops.clmfast.kmeans(
        arguments.points(op, "points", points, beside),
        arguments.integer(op, "n_clusters", n_clusters),
        None if isinstance(init, str) else arguments.points(op, "init", init, beside),
        isinstance(init, str) and init == "random",
        arguments.integer(op, "n_init", n_init),
        arguments.integer(op, "max_iter", max_iter),
        arguments.number(op, "tol", tol),
        arguments.integer(op, "seed", seed),
    )
    return KMeans(*fit)


@arguments.register_fake("kmeans")
def _(
    points: Tensor,
    n_clusters: int,
    init: Tensor | None,
    is_random: bool,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S, N, D = points.shape
    return (
        points.new_empty((S, N), dtype=torch.int64),
        points.new_empty((S, n_clusters, D), dtype=torch.float32),
        points.new_empty((S,), dtype=torch.float64),
        points.new_empty((S,), dtype=torch.int64),
    )

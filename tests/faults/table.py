"""Every op with a generator of good arguments, and for most a check of the result: what fuzz.py and leaks.py call.

A generator draws a call that the op's contract allows; such a call must succeed. What is wrong with calls is up to
arguments.spoil. `missing()` names ops that nobody gave a generator to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import torch
from torch import Tensor

from clmfast import ops
from clmfast.ops import reference
from tests.faults.arguments import Spec

Arguments = dict[str, Any]

EXCLUDED = {
    "KNN", "KMeans", "Partitions", "PartitionScores", "BlockWeights", "SearchMemory",  # what ops return or take
    "search_memory",  # makes what kmeans_search writes to
    "composed",  # a context, within which the blocks are compared
}  # fmt: skip


@dataclass(frozen=True)
class Op:
    name: str
    draw: Callable[[Random], Arguments]  # good arguments
    call: Callable[..., Any]  # with those by name
    writes: tuple[str, ...] = ()  # arguments that the op changes
    check: Callable[[Arguments, Any], None] | None = None  # raises AssertionError for a wrong result
    counts: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # that the work grows with: bad ones, and small
    threads_show: bool = False  # in the last bits: composed of torch's own ops


# ---- sizes and values


def few(rng: Random, least: int = 0) -> int:
    """A size: small, often odd, now and then 0."""
    return max(least, rng.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 7)))


def many(rng: Random, least: int = 0) -> int:
    """A size that sometimes is longer than a block of the kernels."""
    return max(
        least, few(rng, 1) if rng.random() < 0.85 else rng.choice((0, 15, 16, 17, 31, 33, 64, 65, 130, 257, 513))
    )


def points(rng: Random, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    spec = Spec(shape, dtype, at_end=rng.random() < 0.7)
    kind = rng.random()
    if kind < 0.2:
        spec.fill = ("rounded",)  # many equal distances
    elif kind < 0.3:
        spec.fill = ("normal", rng.choice((0.0, 1e-41, 1e-20, 1e18, 1e38)))
    elif kind < 0.4:
        spec.spots = [(rng.random(), rng.choice((math.nan, math.inf, -math.inf)))]
    return spec


def labels(rng: Random, shape: tuple[int, ...], low: int, high: int) -> Spec:
    return Spec(shape, torch.int64, ("labels", low, max(low + 1, high)), at_end=rng.random() < 0.7)


def whole_numbers(values: list[int]) -> Spec:
    return Spec((len(values),), torch.int64, ("values", values))


def point_type(rng: Random) -> torch.dtype:
    return rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))


def chance(rng: Random, p: float, make: Callable[[], Any]) -> Any:
    return make() if rng.random() < p else None


# ---- what measures


def draw_knn(rng: Random) -> Arguments:
    S, D, dtype = few(rng), few(rng), point_type(rng)
    D = rng.choice((60, 61, 128)) if rng.random() < 0.1 else D
    N = many(rng, 2)
    Q = many(rng) if N < 100 else few(rng)
    has_queries = rng.random() < 0.5
    if has_queries:
        N = rng.choice((0, 1, N))
    k = (
        rng.randrange(1, min(N, 20) if not has_queries and N < 20 else 20 if has_queries else min(N, 20))
        if N > 2
        else 1
    )
    n_asked = Q if has_queries else N
    return {
        "points": points(rng, (S, N, D), dtype),
        "k": k,
        "queries": points(rng, (S, Q, D), dtype) if has_queries else None,
        "barred": chance(
            rng, 0.4, lambda: [draw_view(rng, n_asked, N, v) for v in range(rng.randrange(1, 4) if has_queries else 1)]
        ),
        "within": chance(rng, 0.2, lambda: points(rng, (S, n_asked), torch.float32)),
    }


def draw_view(rng: Random, n_asked: int, N: int, v: int) -> list[Spec]:
    return [labels(rng, (rng.randrange(n_asked + 1) if v else n_asked,), 0, 3), labels(rng, (N,), 0, 3)]


def views_of(barred: Any, has_queries: bool) -> Any:
    """What the public op takes: points that ask give one pair."""
    views = [tuple(x) if isinstance(x, list) else x for x in barred] if isinstance(barred, list) else barred
    return views[0] if isinstance(views, list) and views and not has_queries else views


def call_knn(points: Any, k: Any, queries: Any, barred: Any, within: Any) -> Any:
    return ops.knn(points, k, queries, views_of(barred, queries is not None), within=within)


def check_knn(given: Arguments, found: Any) -> None:
    if given["within"] is not None:
        return
    queries = given["queries"]
    of_views = reference.knn(given["points"], given["k"], queries, views_of(given["barred"], queries is not None))
    if not isinstance(of_views, list):
        found, of_views = [found], [of_views]
    for of_view, expected in zip(found, of_views, strict=True):
        check_neighbours(of_view, expected)


def check_neighbours(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found.dist2, expected.dist2, rtol=1e-6, atol=3e-45)
    assert torch.equal(found.index < 0, expected.index < 0), "neighbours are missing"
    differs = (found.index != expected.index) & (found.dist2 == expected.dist2)
    # Of equal distances the smaller index comes first; the reference adds up in another order, so that two distances
    # may be equal for one of the two alone.
    twice = torch.zeros_like(differs)
    twice[..., 1:] |= found.dist2[..., 1:] <= found.dist2[..., :-1] * (1 + 1e-6)
    twice[..., :-1] |= twice[..., 1:].clone()
    twice[..., -1] = True
    assert not (differs & ~twice).any(), "wrong neighbours"


def draw_kmeans(rng: Random) -> Arguments:
    S, D, dtype = few(rng), few(rng), point_type(rng)
    N = many(rng, 1)
    K = rng.randrange(1, min(N, rng.choice((4, 30, 300))) + 1)
    init = rng.choice(("k-means++", "random", None))
    return {
        "points": points(rng, (S, N, D), dtype),
        "n_clusters": K,
        "init": init or points(rng, (S, K, D), point_type(rng)),
        "n_init": rng.choice((1, 1, 3)) if init else 1,
        "max_iter": rng.choice((1, 2, 5, 100)),
        "tol": rng.choice((0.0, 1e-4, 0.1)),
        "seed": rng.choice((0, 1, -1, 2**63 - 1)),
        "moves": rng.choice((0, 0, 1, 7)) if init == "k-means++" else 0,
    }


def check_kmeans(given: Arguments, found: Any) -> None:
    centroid = found.centroid
    x = given["points"].double()
    is_finite = x.isfinite().all(2)
    assert torch.equal(found.label >= 0, is_finite), "label -1 must mean not finite"
    assert (found.label < centroid.shape[1]).all(), "label out of range"
    if x.numel() and x.abs().nan_to_num(0, 0, 0).max() < 1e15 and is_finite.all():
        dist2 = (x[:, :, None] - centroid.double()[:, None]).square().sum(3)
        own = dist2.gather(2, found.label[..., None])[..., 0]
        assert (own <= dist2.amin(2) * (1 + 1e-9) + 1e-300).all(), "not the nearest centroid"
        torch.testing.assert_close(found.inertia, own.sum(1), rtol=1e-9, atol=1e-60)


def draw_separation(rng: Random) -> Arguments:
    S, N, D, n_labels = few(rng), many(rng), few(rng), few(rng, 1)
    return {
        "points": points(rng, (S, N, D), point_type(rng)),
        "label": labels(rng, (N,), 0, n_labels),
        "n_labels": n_labels,
    }


def draw_majority_vote(rng: Random) -> Arguments:
    S, Q, k, N = few(rng), many(rng), few(rng), many(rng)
    return {"index": labels(rng, (S, Q, k), -1, N), "label": labels(rng, (N,), 0, rng.choice((1, 3, 1 << 40)))}


def check_majority_vote(given: Arguments, voted: Tensor) -> None:
    label = given["label"].tolist()
    for near, vote in zip(given["index"].flatten(0, 1).tolist(), voted.flatten().tolist(), strict=True):
        near = [label[i] for i in near if i >= 0]
        assert vote == (max(near, key=near.count) if near else -1), "wrong vote"


def draw_label_shares(rng: Random) -> Arguments:
    n_labels = few(rng, 1)
    given = draw_majority_vote(rng)
    Q = given["index"].shape[1]
    return {**given, "truth": labels(rng, (Q,), 0, n_labels), "n_labels": n_labels}


def check_label_shares(given: Arguments, found: Tensor) -> None:
    label, truth = given["label"].tolist(), given["truth"].tolist()
    expected = torch.zeros(found.shape, dtype=torch.float64)
    for s, rows in enumerate(given["index"].tolist()):
        for near, c in zip(rows, truth, strict=True):
            near = [label[i] for i in near if i >= 0]
            if near:
                expected[0, s, c] += near.count(c) / len(near)
                expected[1, s, c] += 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def draw_partition_scores(rng: Random) -> Arguments:
    S, N, n_truth, n_label = few(rng), many(rng), few(rng, 1), few(rng, 1)
    promised = rng.random() < 0.5
    shapes = rng.choice((((N,), (S, N)), ((S, N), (N,)), ((S, N), (S, N)), ((N,), (N,))))
    low = 0 if promised else rng.choice((0, -3, -(2**63), 2**62))
    return {
        "truth": labels(rng, shapes[0], low, low + n_truth),
        "label": labels(rng, shapes[1], 0, n_label),
        "n_truth": n_truth if promised else None,
        "n_label": n_label if promised else None,
    }


def check_partition_scores(given: Arguments, found: Any) -> None:
    if 0 in (*given["truth"].shape, *given["label"].shape):
        return
    expected = reference.partition_scores(given["truth"], given["label"])
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-9, atol=1e-12)


def draw_adjusted_rand(rng: Random) -> Arguments:
    V, S, N, n_truth, n_label = few(rng), few(rng), many(rng), few(rng, 1), few(rng, 1)
    return {
        "truth": labels(rng, (V, N), 0, n_truth),
        "label": labels(rng, (S, N), -1, n_label),
        "n_truth": n_truth,
        "n_label": n_label,
    }


def check_adjusted_rand(given: Arguments, found: Tensor) -> None:
    for v, truth in enumerate(given["truth"] if len(given["label"]) else ()):
        expected = reference.partition_scores(truth, given["label"]).ari
        torch.testing.assert_close(found[v], expected, rtol=1e-9, atol=1e-12)


def draw_capture_rows(rng: Random) -> Arguments:
    B, T, D, R, dtype = few(rng, 1), few(rng, 1), few(rng), few(rng), point_type(rng)
    N = B + few(rng)
    start = [rng.randrange(T) for _ in range(R * B)]
    stop = [rng.randrange(first + 1, T + 1) for first in start]
    shape = (T, D) if rng.random() < 0.3 else (B, T, D)
    return {
        "x": Spec(shape, dtype, at_end=rng.random() < 0.7),
        "start": Spec((R, B), torch.int64, ("values", start)),
        "stop": Spec((R, B), torch.int64, ("values", stop)),
        "slot": Spec(rng.choice(((), (1,))), torch.int64, ("values", [rng.choice((0, 1, N - 1, N, 1000, 2**40))])),
        "bank": Spec((R, N, D), dtype, at_end=rng.random() < 0.7),
        "norm2": Spec((R, N), at_end=rng.random() < 0.7),
    }


def call_capture_rows(x: Any, start: Any, stop: Any, slot: Any, bank: Any, norm2: Any) -> Any:
    ops.capture_rows(x, start, stop, slot, bank, norm2)
    return bank, norm2


def check_capture_rows(given: Arguments, found: Any) -> None:
    x, bank, norm2 = given["x"], found[0].clone(), found[1].clone()
    if x.dim() == 2:
        x = x.expand(given["start"].shape[1], *x.shape)
    reference.capture_rows(x, given["start"], given["stop"], given["slot"], bank, norm2)
    # both start from what the op left: rows that it did not write agree by themselves
    torch.testing.assert_close(found[0], bank, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], norm2, rtol=1e-5, atol=1e-5)


# ---- attention and blocks


def offsets(rng: Random, n: int) -> list[int]:
    """Of some sequences of n tokens in all; some may be empty."""
    return [0, *sorted(rng.randrange(n + 1) for _ in range(rng.randrange(4))), n]


def prefixes(rng: Random, offset: list[int]) -> list[int]:
    """A sequence that has none is a prefix of some others."""
    B = len(offset) - 1
    first = rng.randrange(B)
    return [-1 if b == first or rng.random() < 0.5 else first for b in range(B)]


def longest(offset: list[int], prefix: list[int] | None) -> int:
    own = [b - a for a, b in pairwise(offset)]
    before = [own[of] if of >= 0 else 0 for of in prefix] if prefix is not None else [0] * len(own)
    return max(a + b for a, b in zip(own, before, strict=True))


def draw_attention(rng: Random) -> Arguments:
    B, H, W = few(rng), few(rng, 1), rng.choice((1, 2, 3, 8, 16, 17, 32))
    T = many(rng) if rng.random() < 0.5 else few(rng)
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    return {
        "qkv": Spec((B, T, 3, H, W), dtype, grad=rng.random() < 0.3, at_end=rng.random() < 0.7),
        "lengths": chance(rng, 0.5, lambda: labels(rng, (B,), 0, T + 1)),
    }


def check_attention(given: Arguments, found: Any) -> None:
    expected = reference.attention(given["qkv"].detach(), given["lengths"])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(given["qkv"].dtype, 2e-2)
    torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance)


def draw_packed_attention(rng: Random) -> Arguments:
    n, H, W = many(rng), few(rng, 1), rng.choice((1, 2, 3, 8, 16, 17))
    offset = offsets(rng, n)
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16))
    prefix = prefixes(rng, offset) if rng.random() < 0.3 else None
    return {
        "qkv": Spec((n, 3, H, W), dtype, grad=prefix is None and rng.random() < 0.3),
        "offset": whole_numbers(offset),
        "max_length": longest(offset, prefix) + rng.choice((0, 0, 3)),
        "prefix": None if prefix is None else whole_numbers(prefix),
    }


def with_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    """The outputs of a call, followed by the gradients of what asks for some, of a sum of the last output."""

    def run(**given: Any) -> Any:
        wanted = [x for x in _tensors(given) if x.requires_grad and x.is_leaf]
        out = call(**given)
        outs = out if isinstance(out, list) else [out]
        grads = torch.autograd.grad(outs[-1].sum(), wanted, allow_unused=True) if wanted and outs[-1].grad_fn else ()
        return [*(x.detach() for x in outs), *grads]

    return run


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in _tensors(part)] if isinstance(value, list | tuple) else []


def half_weights(rng: Random, D: int, F: int, out_in: int, dtype: torch.dtype, grad: bool) -> list[Spec]:
    shapes = ((D,), (D,), (F, D), (F,), (D, out_in), (D,))
    return [Spec(shape, dtype, grad=grad, at_end=rng.random() < 0.7) for shape in shapes]


def block_type(rng: Random) -> torch.dtype:
    return rng.choice((torch.float32,) * 6 + (torch.float64, torch.bfloat16))


def draw_mlp_block(rng: Random) -> Arguments:
    n, D, F = many(rng), many(rng, 1), many(rng, 1)
    if n * D * F > 1 << 20:
        D, F = few(rng, 1), few(rng, 1)
    dtype, grad = block_type(rng), rng.random() < 0.3
    return {"x": Spec((n, D), dtype, grad=grad), "weights": half_weights(rng, D, F, F, dtype, grad)}


def call_mlp_block(x: Any, weights: Any) -> Any:
    return ops.mlp_block(x, ops.BlockWeights(*weights))


def attention_arguments(rng: Random, n: int, can_prefix: bool) -> tuple[Arguments, list[int]]:
    """offset, kept, prefix, source for x of n rows; and the tokens that the rows are, where there is a source."""
    given: Arguments = {"kept": None, "prefix": None, "source": None}
    rows = []
    if n and rng.random() < 0.25:  # several sequences begin with the same rows
        shared = rng.randrange(n + 1)
        source = [*range(n), *range(shared)]
        given["offset"] = whole_numbers([0, n, n + shared])
        given["source"] = whole_numbers(source)
        kept = sorted(rng.sample(range(n), rng.randrange(n + 1)))
        given["kept"] = whole_numbers(kept)
        return given, list(range(n))
    offset = offsets(rng, n)
    given["offset"] = whole_numbers(offset)
    if rng.random() < 0.4:
        given["kept"] = whole_numbers(sorted(rng.sample(range(n), rng.randrange(n + 1))))
    if can_prefix and rng.random() < 0.3:
        given["prefix"] = whole_numbers(prefixes(rng, offset))
    return given, rows


def draw_attention_block(rng: Random) -> Arguments:
    n, n_heads = many(rng), few(rng, 1)
    D = n_heads * (few(rng, 1) if n > 20 else rng.choice((1, 2, 3, 8, 17)))
    dtype, grad = block_type(rng), rng.random() < 0.3
    given, _ = attention_arguments(rng, n, can_prefix=not grad)
    return {
        "x": Spec((n, D), dtype, grad=grad),
        "weights": half_weights(rng, D, 3 * D, D, dtype, grad),
        "n_heads": n_heads,
        **given,
        "max_length": None,
    }


def call_attention_block(x: Any, weights: Any, n_heads: Any, offset: Any, **rest: Any) -> Any:
    return ops.attention_block(x, ops.BlockWeights(*weights), n_heads, offset, **rest)


def draw_transformer_blocks(rng: Random) -> Arguments:
    n, n_heads = few(rng) if rng.random() < 0.7 else many(rng), few(rng, 1)
    D, F = n_heads * few(rng, 1), few(rng, 1)
    dtype, grad = block_type(rng), rng.random() < 0.3
    given, rows = attention_arguments(rng, n, can_prefix=not grad)
    weights = [
        [half_weights(rng, D, 3 * D, D, dtype, grad), half_weights(rng, D, F, F, dtype, grad)]
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    return {
        "x": Spec((n, D), dtype, grad=grad),
        "weights": weights,
        "n_heads": n_heads,
        **given,
        "asking": whole_numbers(rows) if given["source"] else None,
        "max_length": None,
        "n_trained": None if given["prefix"] else n_trained(rng, given),
    }


def n_trained(rng: Random, given: Arguments) -> int | None:
    """How many of the sequences have a gradient; None: all."""
    return rng.randrange(given["offset"].shape[0]) if rng.random() < 0.5 else None


def call_transformer_blocks(x: Any, weights: Any, n_heads: Any, offset: Any, **rest: Any) -> Any:
    halves = [(ops.BlockWeights(*attention), ops.BlockWeights(*mlp)) for attention, mlp in weights]
    return ops.transformer_blocks(x, halves, n_heads, offset, **rest)


def check_composed(call: Callable[..., Any]) -> Callable[[Arguments, Any], None]:
    """The same call within composed(), in float64 where that is finer."""

    def check(given: Arguments, found: Any) -> None:
        with ops.composed():
            expected = with_gradients(call)(**given)
        for a, b in zip(found, expected, strict=True):
            if b is None:
                assert a is None or not a.any()
                continue
            tolerance = {torch.float64: 1e-9, torch.float32: 2e-3}.get(b.dtype, 0.2)
            scale = float(b.abs().max()) if b.numel() else 1.0
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(scale, 0.5))

    return check


def call_kmeans_search(*, directions: Tensor | None, projected: Tensor | None, **given: Any) -> Any:
    memory = None if directions is None or projected is None else ops.SearchMemory(directions, projected)
    return ops.kmeans_search(memory=memory, **given)


def draw_kmeans_search(rng: Random) -> Arguments:
    S, D, P = few(rng), few(rng), rng.choice((0, 1, 3))
    N = many(rng, 1)
    K = rng.randrange(1, min(N, rng.choice((4, 30, 300))) + 1)
    directions = projected = None
    if rng.random() < 0.3:  # wide points, whose projection can be kept
        N, D, K = rng.choice((48, 65, 257)), rng.choice((48, 50, 129)), rng.randrange(1, 9)
        # A new one, or one of other points: no good result then, but no fault either.
        directions, projected = (
            Spec(tuple(x.shape), fill=("normal", rng.choice((0.0, 1.0)))) for x in ops.search_memory(S, N, D, K)
        )
    return {
        "points": points(rng, (S, N, D), point_type(rng)),
        "n_clusters": K,
        "known": labels(rng, (P, S, N), -1, K + 1) if P else None,
        "n_cold": whole_numbers([rng.choice((1, 2)) for _ in range(S)]),
        "keep": P + rng.choice((0, 2)) or 1,
        "moves": rng.choice((0, 1, 7)),
        "renewals": rng.choice((0, 1, 5)),
        "max_iter": rng.choice((0, 1, 2, 100)),
        "seed": rng.choice((0, 1, -1, 2**63 - 1)),
        "directions": directions,
        "projected": projected,
    }


def check_kmeans_search(given: Arguments, found: Any) -> None:
    if given["directions"] is not None and given["known"] is not None:
        return
    is_finite = given["points"].isfinite().all(2)
    assert torch.equal(found.label[0] >= 0, is_finite), "label -1 must mean not finite"
    assert (found.label < given["n_clusters"]).all(), "label out of range"
    x = given["points"]
    if x.numel() and x.abs().nan_to_num(0, 0, 0).max() < 1e15:
        assert not found.inertia.isnan().any(), "inertia must be a number"


def public(name: str, draw: Any, call: Any = None, **more: Any) -> Op:
    return Op(name, draw, call or getattr(ops, name), **more)


PUBLIC = [
    public("knn", draw_knn, call_knn, check=check_knn),
    public(
        "kmeans", draw_kmeans, check=check_kmeans,
        counts={"n_init": (0, -1, 2, 5, INT := -(2**63)), "max_iter": (0, -1, 1, 50, INT), "moves": (0, -1, 3, INT)},
    ),
    public(
        "kmeans_search", draw_kmeans_search, call_kmeans_search, writes=("directions", "projected"),
        check=check_kmeans_search,
        counts={"keep": (0, -1, 5, INT), "moves": (-1, 3, INT), "max_iter": (-1, 50, INT)},
    ),
    public("separation", draw_separation),
    public("majority_vote", draw_majority_vote, check=check_majority_vote),
    public("label_shares", draw_label_shares, check=check_label_shares),
    public("partition_scores", draw_partition_scores, check=check_partition_scores),
    public("adjusted_rand", draw_adjusted_rand, check=check_adjusted_rand),
    public("capture_rows", draw_capture_rows, call_capture_rows, writes=("bank", "norm2"), check=check_capture_rows),
    public("attention", draw_attention, with_gradients(ops.attention), check=check_attention),
    public(
        "packed_attention", draw_packed_attention, with_gradients(ops.packed_attention),
        check=check_composed(ops.packed_attention), threads_show=True,
    ),
    public(
        "mlp_block", draw_mlp_block, with_gradients(call_mlp_block),
        check=check_composed(call_mlp_block), threads_show=True,
    ),
    public(
        "attention_block", draw_attention_block, with_gradients(call_attention_block),
        check=check_composed(call_attention_block), threads_show=True,
    ),
    public(
        "transformer_blocks", draw_transformer_blocks, with_gradients(call_transformer_blocks),
        check=check_composed(call_transformer_blocks), threads_show=True,
    ),
]  # fmt: skip


# ---- the ops as torch knows them


def raw_knn(rng: Random) -> Arguments:
    given = draw_knn(rng)
    views = given.pop("barred") or []
    return {**given, "query_group": [view[0] for view in views], "point_group": [view[1] for view in views]}


def raw_kmeans(rng: Random) -> Arguments:
    given = draw_kmeans(rng)
    init = given.pop("init")
    del given["moves"]
    return {**given, "init": init if isinstance(init, Spec) else None, "is_random": init == "random"}


def in_float32(given: Arguments) -> Arguments:
    """The fused ops take this alone, and no gradient flows through what is called below autograd."""

    def change(value: Any) -> None:
        if isinstance(value, Spec):
            value.grad = False
            if value.dtype.is_floating_point:
                value.dtype = torch.float32
        for part in value if isinstance(value, list) else ():
            change(part)

    change(list(given.values()))
    return given


WEIGHT_NAMES = ops.BlockWeights._fields


def raw_attention(rng: Random) -> Arguments:
    given = draw_attention(rng)
    given["qkv"].grad = False
    return given


def raw_packed_attention(rng: Random) -> Arguments:
    given = draw_packed_attention(rng)
    given["qkv"].grad = False
    return given


def raw_attention_backward(rng: Random) -> Arguments:
    given = raw_attention(rng)
    B, T, _, H, W = given["qkv"].shape
    dtype = given["qkv"].dtype
    lse = Spec((B, T, H), torch.float64 if dtype == torch.float64 else torch.float32)
    return {"grad_out": Spec((B, T, H, W), dtype), "out": Spec((B, T, H, W), dtype), "lse": lse, **given}


def raw_packed_attention_backward(rng: Random) -> Arguments:
    given = raw_packed_attention(rng)
    while given.pop("prefix") is not None:
        given = raw_packed_attention(rng)
    n, _, H, W = given["qkv"].shape
    dtype = given["qkv"].dtype
    lse = Spec((n, H), torch.float64 if dtype == torch.float64 else torch.float32)
    return {"grad_out": Spec((n, H, W), dtype), "out": Spec((n, H, W), dtype), "lse": lse, **given}


def raw_mlp_block(rng: Random) -> Arguments:
    given = in_float32(draw_mlp_block(rng))
    return {"x": given["x"], **dict(zip(WEIGHT_NAMES, given["weights"], strict=True)), "save": rng.random() < 0.5}


def saved_of_mlp(n: int, F: int) -> dict[str, Spec]:
    return {"mean": Spec((n,)), "rstd": Spec((n,)), "hidden": Spec((n, -(-F // 16) * 16)), "slope": Spec((n, F))}


def raw_mlp_block_backward(rng: Random) -> Arguments:
    given = raw_mlp_block(rng)
    del given["save"]
    return {"grad_y": Spec(given["x"].shape), **given, **saved_of_mlp(given["x"].shape[0], given["in_weight"].shape[0])}


def raw_attention_block(rng: Random) -> Arguments:
    given = in_float32(draw_attention_block(rng))
    weights = given.pop("weights")
    del given["max_length"]
    return {**given, **dict(zip(WEIGHT_NAMES, weights, strict=True)), "save": rng.random() < 0.5}


def of_a_backward_pass(draw: Callable[[Random], Arguments], rng: Random) -> Arguments:
    """What a forward pass that can have a gradient was given: there is none with a prefix."""
    given = draw(rng)
    while given["prefix"] is not None:
        given = draw(rng)
    del given["save"], given["prefix"]
    return given


def saved_of_attention(n: int, D: int, R: int, n_heads: int) -> dict[str, Spec]:
    return {
        "mean": Spec((n,)), "rstd": Spec((n,)), "q": Spec((R, D)), "kv": Spec((n, 2, D)), "mixed": Spec((R, D)),
        "lse": Spec((R, n_heads)),
    }  # fmt: skip


def raw_attention_block_backward(rng: Random) -> Arguments:
    given = of_a_backward_pass(raw_attention_block, rng)
    n, D = given["x"].shape
    R = given["kept"].shape[0] if given["kept"] else n
    saved = saved_of_attention(n, D, R, given["n_heads"])
    return {"grad_y": Spec((R, D)), **given, **saved}


def raw_transformer_blocks(rng: Random) -> Arguments:
    given = in_float32(draw_transformer_blocks(rng))
    given["weights"] = [spec for halves in given["weights"] for half in halves for spec in half]
    del given["max_length"], given["n_trained"]
    return {**given, "save": rng.random() < 0.5}


def raw_transformer_blocks_backward(rng: Random) -> Arguments:
    given = of_a_backward_pass(raw_transformer_blocks, rng)
    n, D = given["x"].shape
    n_blocks, F = len(given["weights"]) // 12, given["weights"][8].shape[0]
    saved = []
    for i in range(n_blocks):
        is_last = i + 1 == n_blocks
        wanted = given["kept"] if is_last else given["asking"]
        R = wanted.shape[0] if wanted else n
        saved += saved_of_attention(n, D, R, given["n_heads"]).values()
        saved += [Spec((R, D)), *saved_of_mlp(R, F).values()]
    R = given["kept"].shape[0] if given["kept"] else n
    states = [Spec((n, D)) for _ in range(n_blocks - 1)]
    return {"grad_y": Spec((R, D)), **given, "states": states, "saved": saved, "n_trained": n_trained(rng, given)}


def raw(name: str, draw: Callable[[Random], Arguments], **more: Any) -> Op:
    op = getattr(torch.ops.clmfast, name).default
    names = [argument.name for argument in op._schema.arguments]
    written = [argument.name for argument in op._schema.arguments if argument.is_write]

    def call(**given: Any) -> Any:
        found = op(*[given.get(name) for name in names])
        return [given[name] for name in more.get("writes", ())] if found is None else found

    assert set(more.get("writes", ())) <= set(written)
    return Op(name, draw, call, **more)


RAW = [
    raw("knn", raw_knn),
    raw("kmeans", raw_kmeans, counts={name: PUBLIC[1].counts[name] for name in ("n_init", "max_iter")}),
    raw("kmeans_search", draw_kmeans_search, counts=PUBLIC[2].counts, writes=("directions", "projected")),
    raw("separation", draw_separation),
    raw("majority_vote", draw_majority_vote),
    raw("label_shares", draw_label_shares),
    raw("partition_scores", draw_partition_scores),
    raw("adjusted_rand", draw_adjusted_rand),
    raw("capture_rows", draw_capture_rows, writes=("bank", "norm2")),
    raw("attention", raw_attention),
    raw("attention_backward", raw_attention_backward),
    raw("packed_attention", raw_packed_attention, threads_show=True),
    raw("packed_attention_backward", raw_packed_attention_backward, threads_show=True),
    raw("mlp_block", raw_mlp_block),
    raw("mlp_block_backward", raw_mlp_block_backward),
    raw("attention_block", raw_attention_block),
    raw("attention_block_backward", raw_attention_block_backward),
    raw("transformer_blocks", raw_transformer_blocks),
    raw("transformer_blocks_backward", raw_transformer_blocks_backward),
]


def missing() -> set[str]:
    """Ops and public functions without a generator."""
    registered = {name.removeprefix("clmfast::") for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("clmfast::")}  # fmt: skip
    return (registered - {op.name for op in RAW} | {*ops.__all__} - {op.name for op in PUBLIC}) - EXCLUDED

"""ops.partition_scores against scikit-learn, its special cases included."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import assert_same_bits, assert_threads_do_not_matter, outputs_full_of_nan
from sklearn import metrics
from sklearn.metrics.cluster import contingency_matrix

from clmfast import ops
from clmfast.ops import reference


def by_sklearn(truth, label):
    purity = contingency_matrix(truth, label).max(axis=0).sum() / len(truth) if len(truth) else 1.0
    return (
        metrics.adjusted_rand_score(truth, label),
        metrics.normalized_mutual_info_score(truth, label),
        *metrics.homogeneity_completeness_v_measure(truth, label),
        purity,
    )


def assert_right(truth, label, n_truth=None, n_label=None):
    """Both ways of counting, against scikit-learn and against the reference."""
    with outputs_full_of_nan():
        found = ops.partition_scores(truth, label)
    S = len(found.ari)
    expected = [by_sklearn(t, l) for t, l in zip(truth.expand(S, -1).numpy(), label.expand(S, -1).numpy(), strict=True)]
    for scores in (found, reference.partition_scores(truth, label)):
        torch.testing.assert_close(
            torch.stack(scores, dim=1), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )
    if n_truth is not None:
        with outputs_full_of_nan():
            dense = ops.partition_scores(truth, label, n_truth=n_truth, n_label=n_label)
        assert_same_bits(dense, found)


def draw(n, *shape, seed=0):
    return torch.randint(n, shape, generator=torch.Generator().manual_seed(seed))


# ---- is it right?


def test_by_hand():
    found = ops.partition_scores(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]))
    # 1 pair together in both, 2 and 1 in each, 6 in all: (1 - 1/3) / (3/2 - 1/3)
    assert found.ari.item() == pytest.approx(4 / 7)
    assert found.homogeneity.item() == pytest.approx(1)  # H(truth) = MI = log 2, H(label) = 1.5 log 2
    assert found.completeness.item() == pytest.approx(2 / 3)
    assert found.nmi.item() == found.v_measure.item() == pytest.approx(0.8)
    assert found.purity.item() == 1
    assert ops.partition_scores(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 5, 5])).purity.item() == 0.5


@pytest.mark.parametrize(
    ("n", "n_truth", "n_label"), [(2, 2, 2), (63, 7, 3), (130, 1, 64), (130, 40, 1), (2048, 20, 30)]
)
def test_independent_labelings(n, n_truth, n_label):
    assert_right(draw(n_truth, 3, n), draw(n_label, 3, n, seed=1), n_truth, n_label)


def test_dependent_labelings():
    truth = draw(6, 4, 500)
    label = torch.where(draw(10, 4, 500, seed=1) < 8, (truth + 2) % 6, draw(9, 4, 500, seed=2))
    assert_right(truth, label, 6, 9)
    assert (ops.partition_scores(truth, label).ari > 0.5).all()


@pytest.mark.parametrize(
    ("truth", "label"),
    [
        ([], []),
        ([3], [5]),
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [0, 1, 2]),
        ([0, 1, 2], [0, 0, 0]),
        ([0, 1, 2], [2, 0, 1]),
        ([0, 0, 1, 1], [0, 1, 0, 1]),
        ([0, 0, 1, 1], [1, 1, 0, 0]),
        ([0, 0, 1, 2], [0, 1, 1, 1]),
    ],
)
def test_special_cases(truth, label):
    assert_right(torch.tensor(truth, dtype=torch.int64), torch.tensor(label, dtype=torch.int64), 4, 6)


def test_a_perfect_partition_scores_one_and_no_more():
    """Rounding made nmi, homogeneity, completeness and V-measure 1 + 2e-16 in one of ten of these."""
    for seed in range(60):
        truth = draw(2 + seed % 7, 2 + seed, seed=seed)
        for found in (ops.partition_scores(truth, 7 - truth), reference.partition_scores(truth, 7 - truth)):
            scores = torch.stack(found)
            assert (scores <= 1).all() and (scores > 1 - 1e-12).all()


def test_any_values_without_a_promise():
    values = torch.tensor([-(2**63), -1, 0, 7, 2**63 - 1])
    truth, label = draw(5, 200), draw(4, 200, seed=1)
    assert_right(values[truth], values[label])
    assert_same_bits(ops.partition_scores(values[truth], values[label]), ops.partition_scores(truth, label))


def test_shapes():
    truth, label = draw(4, 3, 50), draw(5, 3, 50, seed=1)
    shared = ops.partition_scores(truth, label[0])
    assert_same_bits(shared, ops.partition_scores(truth, label[:1].repeat(3, 1)))
    assert_same_bits(ops.partition_scores(truth[0], label), ops.partition_scores(truth[:1].repeat(3, 1), label))
    assert ops.partition_scores(truth[0], label[0]).ari.shape == (1,)
    assert ops.partition_scores(truth[:0], label[:0]).ari.shape == (0,)
    assert ops.partition_scores(truth[:0], label[0]).ari.shape == (0,)
    empty = ops.partition_scores(truth[:, :0], label[:, :0], n_truth=2, n_label=2)
    assert all(torch.equal(x, torch.ones(3, dtype=torch.float64)) for x in empty)


def test_views_are_read_as_they_are():
    truth, label = draw(4, 50, 3).T, draw(5, 3, 100, seed=1)[:, ::2]
    assert not truth.is_contiguous() and not label.is_contiguous()
    assert_right(truth, label, 4, 5)


def test_a_million_points():
    n = 10**6
    truth, single = draw(1000, n), torch.randperm(n, generator=torch.Generator().manual_seed(0)) * 10**12
    begin = time.process_time()
    found = torch.stack(ops.partition_scores(truth, single), dim=1)
    assert time.process_time() - begin < 5  # scikit-learn's time is about the same; a dense table would not fit
    np.testing.assert_allclose(found[0, :5], by_sklearn_without_purity(truth, single), rtol=0, atol=1e-12)
    assert found[0, 5] == 1
    label = draw(1000, n, seed=1)
    dense = ops.partition_scores(truth, label, n_truth=1000, n_label=1000)
    assert dense.ari.item() == pytest.approx(metrics.adjusted_rand_score(truth, label), abs=1e-12)
    assert abs(dense.ari.item()) < 1e-4


def by_sklearn_without_purity(truth, label):
    """purity needs a dense table there."""
    return (
        metrics.adjusted_rand_score(truth, label),
        metrics.normalized_mutual_info_score(truth, label),
        *metrics.homogeneity_completeness_v_measure(truth, label),
    )


def test_pair_counts_do_not_overflow():
    truth = torch.arange(4 * 10**6) // (2 * 10**6)  # (N^2)^2 is beyond 2^63
    assert ops.partition_scores(truth, truth, n_truth=2, n_label=2).ari.item() == 1
    moved = truth.roll(1)
    ari = ops.partition_scores(truth, moved, n_truth=2, n_label=2).ari.item()
    assert ari == pytest.approx(metrics.adjusted_rand_score(truth, moved), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 60),
    n_truth=st.integers(1, 9),
    n_label=st.integers(1, 9),
    S=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_any_labels(n, n_truth, n_label, S, seed):
    assert_right(draw(n_truth, S, n, seed=seed), draw(n_label, S, n, seed=seed + 1), n_truth, n_label)


@pytest.mark.parametrize(("V", "S", "N"), [(1, 1, 0), (2, 3, 1), (3, 2, 200), (0, 2, 5)])
def test_adjusted_rand_is_the_ari_of_partition_scores(V, S, N):
    truth, label = draw(70, V, N), draw(6, S, N, seed=1) - 1
    with outputs_full_of_nan():
        found = ops.adjusted_rand(truth, label, 90, 5)
    assert found.shape == (V, S)
    for v in range(V):
        assert_same_bits([found[v]], [ops.partition_scores(truth[v], label).ari])


def test_adjusted_rand_refuses_what_is_out_of_range():
    truth, label = draw(4, 2, 20), draw(5, 3, 20, seed=1)
    for wrong in ((truth - 1, label, 4, 5), (truth, label, 3, 5), (truth, label - 2, 4, 5), (truth, label, 4, 4)):
        with pytest.raises(ValueError, match=r"truth must be in \[0, n_truth\) and label in \[-1, n_label\)"):
            ops.adjusted_rand(*wrong)
    with pytest.raises(ValueError, match=r"truth must be \[V, N\] and label \[S, N\]"):
        ops.adjusted_rand(truth[0], label, 4, 5)


def test_threads_do_not_matter():
    truth, label = draw(9, 5, 1000), draw(7, 5, 1000, seed=1)
    assert_threads_do_not_matter(lambda: ops.partition_scores(truth, label, n_truth=9, n_label=7))


# ---- is it registered right?


def test_opcheck():
    op = torch.ops.clmfast.partition_scores.default
    torch.library.opcheck(op, (draw(4, 3, 20), draw(4, 20), None, None))
    torch.library.opcheck(op, (draw(4, 20), draw(4, 20, seed=1), 4, 5))
    torch.library.opcheck(torch.ops.clmfast.adjusted_rand.default, (draw(4, 2, 20), draw(4, 3, 20, seed=1), 4, 5))


def test_compiled():
    truth, label = draw(4, 3, 20), draw(4, 3, 20, seed=1)
    compiled = torch.compile(lambda t, l: ops.partition_scores(t, l, n_truth=4, n_label=4), fullgraph=True)
    assert_same_bits(compiled(truth, label), ops.partition_scores(truth, label))


# ---- does it refuse what it should?

TRUTH = torch.zeros(3, 8, dtype=torch.int64)
RANGE = "partition_scores: truth must be in [0, n_truth) and label in [0, n_label), with n_truth=2 and n_label=3"


@pytest.mark.parametrize(
    ("truth", "label", "promise", "message"),
    [
        (TRUTH, TRUTH.float(), {}, "partition_scores: label must be integers, got float32"),
        (TRUTH[None], TRUTH, {}, "partition_scores: truth and label must be [N] or [S, N], got [1, 3, 8] and [3, 8]"),
        (TRUTH, TRUTH[0, 0], {}, "partition_scores: truth and label must be [N] or [S, N], got [3, 8] and []"),
        (
            TRUTH,
            TRUTH[:, :5],
            {},
            "partition_scores: truth and label must agree in N, and in S where both have it, got",
        ),
        (TRUTH, TRUTH[:2], {}, "partition_scores: truth and label must agree in N, and in S where both have it, got"),
        (TRUTH[0], TRUTH[:, :5], {}, "partition_scores: truth and label must agree in N, and in S where both have it"),
        (TRUTH, TRUTH, {"n_truth": 2}, "partition_scores: give both n_truth and n_label, or neither"),
        (
            TRUTH,
            TRUTH,
            {"n_truth": 0, "n_label": 3},
            "partition_scores: n_truth and n_label must be at least 1 and their",
        ),
        (
            TRUTH,
            TRUTH,
            {"n_truth": 2**20, "n_label": 2**20},
            "partition_scores: n_truth and n_label must be at least 1",
        ),
        (TRUTH - 1, TRUTH, {"n_truth": 2, "n_label": 3}, RANGE),
        (TRUTH + 2, TRUTH, {"n_truth": 2, "n_label": 3}, RANGE),
        (TRUTH, TRUTH - 1, {"n_truth": 2, "n_label": 3}, RANGE),
        (TRUTH, TRUTH + 3, {"n_truth": 2, "n_label": 3}, RANGE),
    ],
)
def test_refusals(truth, label, promise, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        ops.partition_scores(truth, label, **promise)
    assert str(error.value).startswith(message)

"""clmfast.measure.collapse: against loops over classes and points, a perfect simplex, what it must not depend on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from clmfast.measure.collapse import RIDGE, collapse


def by_loops(x: np.ndarray, label: np.ndarray, weight: np.ndarray | None) -> list[float]:
    """The definitions, one class and one point at a time."""
    classes = sorted(set(label.tolist()))
    n_classes, width = len(classes), x.shape[1]
    means = {c: sum(x[i] for i in range(len(x)) if label[i] == c) / (label == c).sum() for c in classes}
    centre = sum(means.values()) / n_classes
    within, between = np.zeros((width, width)), np.zeros((width, width))
    for c in classes:
        of_class = [x[i] - means[c] for i in range(len(x)) if label[i] == c]
        within += sum(np.outer(d, d) for d in of_class) / len(of_class) / n_classes
        between += np.outer(means[c] - centre, means[c] - centre) / n_classes
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-12)) / n_classes
    norms = [np.linalg.norm(means[c] - centre) for c in classes]
    cosines = [
        (means[a] - centre)
        @ (means[b] - centre)
        / np.linalg.norm(means[a] - centre)
        / np.linalg.norm(means[b] - centre)
        for a in classes
        for b in classes
        if a != b
    ]
    m = np.stack([means[c] - centre for c in classes])
    if weight is None:  # ridge regression with a bias, by a solver that knows nothing of covariances
        scale = np.sqrt([1 / (label == c).sum() / n_classes for c in label])[:, None]
        one_hot = (label[:, None] == np.array(classes)).astype(float)
        ridge = math.sqrt(RIDGE * np.trace(within + between) / width) * np.eye(width, width + 1)
        left = np.concatenate([np.column_stack([x, np.ones(len(x))]) * scale, ridge])
        right = np.concatenate([one_hot * scale, np.zeros((width, n_classes))])
        w = np.linalg.lstsq(left, right, rcond=None)[0][:-1].T
    else:
        w = weight[classes]
    nc3 = ((w / np.linalg.norm(w) - m / np.linalg.norm(m)) ** 2).sum()
    widest = np.mean([abs(cosine + 1 / (n_classes - 1)) for cosine in cosines])
    return [nc1, np.std(norms) / np.mean(norms), np.std(cosines), widest, nc3]


@pytest.mark.parametrize(("n_classes", "width"), [(2, 5), (4, 7), (9, 6)])
@pytest.mark.parametrize("has_weight", [True, False])
def test_against_loops(n_classes, width, has_weight):
    rng = np.random.default_rng(n_classes)
    label = np.concatenate([np.arange(n_classes), rng.integers(n_classes, size=70)]) * 3  # unequal sizes, with gaps
    x = rng.normal(size=(2, len(label), width)) + rng.normal(size=(3 * n_classes, width))[label]
    weight = rng.normal(size=(3 * n_classes, width)) if has_weight else None
    found = collapse(
        torch.from_numpy(x), torch.from_numpy(label), torch.from_numpy(weight) if weight is not None else None
    )
    for s in range(2):
        np.testing.assert_allclose([value[s] for value in found], by_loops(x[s], label, weight), rtol=1e-8, atol=1e-12)


def simplex(n_classes: int, width: int) -> torch.Tensor:
    corners = torch.zeros(n_classes, width, dtype=torch.float64)
    corners[:, :n_classes] = torch.eye(n_classes, dtype=torch.float64) - 1 / n_classes
    return corners


def test_collapsed_states():
    corners = simplex(6, 10)
    label = torch.arange(6).repeat(5)
    for weight in (3 * corners, None):
        for value in collapse(7 + 2 * corners[label][None], label, weight):
            assert value.item() == pytest.approx(0, abs=1e-12)
    assert collapse(corners[label][None], label, -corners).nc3.item() == pytest.approx(4)


def test_a_shift_a_turn_and_a_scale_change_nothing():
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(5, (200,), generator=generator)
    x = torch.randn(1, 200, 8, generator=generator, dtype=torch.float64) + 2 * torch.eye(8).double()[label]
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    for a, b in zip(collapse(x, label), collapse(3 * x @ turn + 5, label), strict=True):
        torch.testing.assert_close(a, b)


def test_shuffled_labels():
    """Means of C random groups of n points: C Sigma_B n is a Wishart matrix, and NC1 is about n (C - 1) / (D - C)."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(20).repeat(100)
    x = torch.randn(1, 2000, 300, generator=generator)
    assert collapse(x, label).nc1.item() == pytest.approx(100 * 19 / 280, rel=0.1)


def test_nothing_to_tell_apart():
    x = torch.randn(2, 6, 3)
    assert all(math.isnan(v) for value in collapse(x, torch.zeros(6, dtype=torch.int64)) for v in value)
    assert all(math.isnan(v) for value in collapse(torch.ones(1, 6, 3), torch.arange(6) % 2) for v in value)

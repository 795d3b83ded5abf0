"""measure/separation.py: against its formulas in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clmfast.measure.separation import separation


def plain(x, label):
    """The two formulas of the docstring, in float64 numpy."""
    groups = np.unique(label)
    centroid = {c: x[label == c].mean(0) for c in groups}
    silhouettes, within = [], 0.0
    for point, own in zip(x, label, strict=True):
        a = np.linalg.norm(point - centroid[own])
        b = min(np.linalg.norm(point - centroid[c]) for c in groups if c != own)
        silhouettes.append((b - a) / max(a, b) if max(a, b) > 0 else 0.0)
        within += a**2
    between = sum((label == c).sum() * np.linalg.norm(centroid[c] - x.mean(0)) ** 2 for c in groups)
    return np.mean(silhouettes), between / within


@pytest.mark.parametrize(("n", "d", "n_labels", "offset"), [(40, 3, 4, 0.0), (131, 64, 7, 0.0), (60, 5, 3, 1e4)])
def test_formulas(n, d, n_labels, offset):
    rng = np.random.default_rng(n)
    label = rng.integers(n_labels, size=n)
    x = (rng.normal(size=(2, n, d)) + 2 * rng.normal(size=(n_labels, d))[label] + offset).astype(np.float32)
    # Two labels more than occur: groups without points are left out.
    silhouette, ratio, total = separation(torch.from_numpy(x), torch.from_numpy(label), n_labels + 2)
    for s in range(2):
        expected = plain(x[s].astype(np.float64), label)
        assert silhouette[s].item() == pytest.approx(expected[0], rel=1e-3, abs=1e-4)
        assert ratio[s].item() == pytest.approx(expected[1], rel=1e-3)
        x64 = x[s].astype(np.float64)
        assert total[s].item() == pytest.approx(((x64 - x64.mean(0)) ** 2).sum(), rel=1e-3)


def test_separated_groups_score_high_and_identical_points_do_not_crash():
    label = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[[0.0], [0.1], [9.0], [9.1]]])
    silhouette, ratio, _ = separation(apart, label, 2)
    assert silhouette.item() > 0.98
    assert ratio.item() > 1000
    silhouette, ratio, _ = separation(torch.ones(1, 4, 3), label, 2)
    assert silhouette.item() == 0
    assert ratio.isnan().all()


def test_points_that_are_not_finite_are_left_out():
    generator = torch.Generator().manual_seed(0)
    points, label = torch.randn(2, 50, 7, generator=generator), torch.arange(50) % 4
    spoilt, of_spoilt = torch.cat([points, points[:, :2]], dim=1), torch.cat([label, label[:2]])
    spoilt[0, 50, 3], spoilt[1, 50, 0], spoilt[:, 51] = torch.nan, torch.inf, -torch.inf
    for a, b in zip(separation(spoilt, of_spoilt, 4), separation(points, label, 4), strict=True):
        assert torch.equal(a, b)

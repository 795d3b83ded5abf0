"""measure/projection.py: the plane of scikit-learn's PCA, up to signs, which are fixed."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.decomposition import PCA

from clmfast.measure.projection import principal_plane


def test_equals_pca():
    x = torch.randn(3, 50, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8.0) + 100
    plane, share = principal_plane(x)
    for s in range(3):
        pca = PCA(2, svd_solver="full").fit(x[s].double().numpy())
        theirs = pca.transform(x[s].double().numpy())
        np.testing.assert_allclose(np.abs(plane[s].numpy()), np.abs(theirs), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(share[s].item(), pca.explained_variance_ratio_.sum())


def test_signs_are_fixed_and_identical_points_lie_in_the_origin():
    x = torch.randn(1, 20, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(principal_plane(x)[0], principal_plane(x + 0)[0])
    plane, share = principal_plane(torch.ones(1, 5, 3))
    assert (plane == 0).all()
    assert share.isnan().all()


def test_states_that_are_not_finite_have_no_plane_and_a_single_direction_has_one():
    x = torch.randn(3, 20, 4, generator=torch.Generator().manual_seed(2))
    x[1, 3, 2] = torch.inf
    plane, share = principal_plane(x)
    assert plane[1].isnan().all()
    assert share.isnan().tolist() == [False, True, False]
    assert torch.equal(plane[::2], principal_plane(x[::2])[0])
    plane, share = principal_plane(x[..., :1][::2])
    assert plane.shape == (2, 20, 2)
    assert (plane[..., 1] == 0).all()
    assert (share == 1).all()

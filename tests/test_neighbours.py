"""measure/neighbours.py: by hand, and against plain loops."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from clmfast.measure.neighbours import knn_accuracy, macro_f1, majority_vote, neighbour_purity, purities

LABEL = torch.tensor([0, 0, 1, 1, 2, 2])


def test_votes_by_hand():
    index = torch.tensor([[[0, 1, 2, 3], [2, 0, 1, 3], [4, 2, 3, -1], [4, 0, 2, -1], [-1, -1, -1, -1]]])
    # 2:2 with a 0 nearest; 2:2 with a 1 nearest; 2 of 3 are 1; all different: the nearest; nobody votes
    assert majority_vote(index, LABEL).tolist() == [[0, 1, 1, 2, -1]]


def plain_vote(neighbours, label):
    labels = [label[i] for i in neighbours if i >= 0]
    if not labels:
        return -1
    counts = collections.Counter(labels)
    return next(c for c in labels if counts[c] == max(counts.values()))


@pytest.mark.parametrize("k", [1, 2, 3, 7, 10])
def test_votes_as_a_loop_counts_them(k):
    generator = torch.Generator().manual_seed(k)
    label = torch.randint(4, (30,), generator=generator)
    index = torch.randint(-1, 30, (3, 50, k), generator=generator)
    expected = [[plain_vote(q, label.tolist()) for q in s] for s in index.tolist()]
    assert majority_vote(index, label).tolist() == expected


def test_accuracy_and_f1_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, voted = rng.integers(5, size=80), rng.integers(-1, 6, size=(2, 80))
    voted[voted == 5] = 4
    for s in range(2):
        # To scikit-learn a query without neighbours is a wrong answer of a class that never occurs in truth.
        expected = f1_score(truth, voted[s], labels=range(5), average="macro")
        assert macro_f1(torch.from_numpy(voted), torch.from_numpy(truth), 7)[s].item() == pytest.approx(expected)
        accuracy = knn_accuracy(torch.from_numpy(voted), torch.from_numpy(truth))[s].item()
        assert accuracy == pytest.approx((voted[s] == truth).mean())


def test_purity_by_hand():
    index = torch.tensor([[[1, 2], [0, 3], [3, 4], [2, -1], [0, 1], [-1, -1]]])
    truth = LABEL
    # own shares: 1/2, 1/2, 1/2, 1/1, 0, none
    assert neighbour_purity(index, LABEL, truth).item() == pytest.approx((0.5 + 0.5 + 0.5 + 1 + 0) / 5)
    _, per_label = purities(index, LABEL, truth, 4)
    assert per_label[0, :3].tolist() == pytest.approx([0.5, 0.75, 0.0])
    assert per_label[0, 3].isnan()


def test_purity_without_any_neighbour_is_not_a_number():
    assert neighbour_purity(torch.full((1, 3, 2), -1), LABEL, LABEL[:3]).isnan().all()

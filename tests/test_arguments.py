"""ops/arguments.py: public ops take arrays, lists and any integers, and refuse the rest in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from op_checks import assert_same_bits
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clmfast import ops
from clmfast.ops import arguments


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


POINTS, LABEL = normal(2, 9, 4), torch.arange(9) % 3
INDEX, SETS = torch.arange(54).view(2, 9, 3) % 9, torch.arange(18).view(2, 9) % 3
START = torch.zeros(1, 2, dtype=torch.int64)


def captured(x: Any, start: Any, stop: Any, slot: Any) -> tuple[Tensor, Tensor]:
    bank, norm2 = torch.zeros(1, 3, 4), torch.zeros(1, 3)
    ops.capture_rows(x, start, stop, slot, bank, norm2)
    return bank, norm2


# name -> (call of points and labels, points, labels)
CALLS: dict[str, tuple[Callable[..., Any], list[Tensor], list[Tensor]]] = {
    "knn": (lambda p, q, w, a, b: ops.knn(p, 2, q, (a, b), within=w), [POINTS, POINTS, normal(2, 9)], [LABEL, LABEL]),
    "kmeans": (lambda p, init: ops.kmeans(p, 3, init=init), [POINTS, POINTS[:, :3]], []),
    "separation": (lambda p, l: [ops.separation(p, l, 3)], [POINTS], [LABEL]),
    "majority_vote": (lambda i, l: [ops.majority_vote(i, l)], [], [INDEX, LABEL]),
    "label_shares": (lambda i, l, t: [ops.label_shares(i, l, t, 3)], [], [INDEX, LABEL, LABEL]),
    "partition_scores": (lambda t, l: ops.partition_scores(t, l, n_truth=3, n_label=3), [], [SETS, LABEL]),
    "adjusted_rand": (lambda t, l: [ops.adjusted_rand(t, l, 3, 3)], [], [SETS, SETS]),
    "capture_rows": (captured, [POINTS], [START, START + 2, START[0, :1]]),
}

POINTS_AS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "array in another order": lambda x: np.asfortranarray(x.numpy()),
    "array of another byte order": lambda x: x.numpy().astype(">f4"),
    "list": lambda x: x.tolist(),
}
LABELS_AS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "reversed array": lambda x: np.ascontiguousarray(x.numpy()[..., ::-1])[..., ::-1],
    **{str(d): lambda x, d=d: x.to(d) for d in (*arguments.INTEGERS[:-1], torch.uint64)},  # type: ignore[misc]
    **{f"array of {d}": lambda x, d=d: x.numpy().astype(d) for d in ("u1", "i2", ">i4", "u8")},  # type: ignore[misc]
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("error")
def test_arrays_lists_and_integers_of_any_size(name):
    op, points, labels = CALLS[name]
    expected = op(*points, *labels)
    for convert in POINTS_AS.values():
        assert_same_bits(op(*map(convert, points), *labels), expected)
    for convert in LABELS_AS.values():
        assert_same_bits(op(*points, *map(convert, labels)), expected)
    assert_same_bits(op(*(p.numpy() for p in points), *(x.tolist() for x in labels)), expected)


def test_booleans_are_integers():
    is_odd = LABEL % 2 == 1
    expected = ops.majority_vote(INDEX, is_odd.long())
    for given in (is_odd, is_odd.numpy(), is_odd.tolist()):
        assert torch.equal(ops.majority_vote(INDEX, given), expected)


def test_arrays_that_may_not_be_written_are_read():
    points = POINTS.numpy().copy()
    points.flags.writeable = False
    assert torch.equal(ops.knn(points, 2).index, ops.knn(POINTS, 2).index)


def test_a_tensor_that_is_right_is_handed_on():
    assert arguments.labels("op", "x", LABEL, ()) is LABEL
    assert arguments.points("op", "x", POINTS, ()).data_ptr() == POINTS.data_ptr()


def test_capture_rows_writes_into_arrays():
    bank, norm2 = np.zeros((1, 3, 4), np.float32), np.zeros((1, 3), np.float32)
    ops.capture_rows(POINTS.numpy(), START, START + 2, 0, bank, norm2)
    assert_same_bits([torch.from_numpy(bank), torch.from_numpy(norm2)], captured(POINTS, START, START + 2, 0))


LARGE = torch.tensor([2**63] * 9, dtype=torch.uint64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.majority_vote(INDEX, LABEL.float()), ValueError, "label must be integers, got float32"),
        (lambda: ops.majority_vote(INDEX, LABEL.double().requires_grad_()), ValueError, "label must be integers"),
        (lambda: ops.majority_vote(INDEX, LABEL.numpy() * 1.0), ValueError, "label must be integers, got float64"),
        (lambda: ops.majority_vote(INDEX, np.array([None] * 9)), ValueError, "label must be integers, got object"),
        (lambda: ops.majority_vote(INDEX, ["a"] * 9), ValueError, "label must be integers, got <U1"),
        (lambda: ops.majority_vote(INDEX, [[1], [2, 3]]), ValueError, "label must be a tensor, an array or a list of"),
        (lambda: ops.majority_vote(INDEX, None), ValueError, "label must be a tensor, an array or a list, got None"),
        (lambda: ops.majority_vote(INDEX, LARGE), ValueError, r"label must be below 2\^63"),
        (lambda: ops.majority_vote(INDEX, [2**63] * 9), ValueError, r"label must be below 2\^63"),
        (lambda: ops.majority_vote(INDEX, [2**70] * 9), ValueError, "label must be integers, got object"),
        (lambda: ops.majority_vote(INDEX, np.ma.array(LABEL, mask=True)), ValueError, "label must have no mask"),
        (
            lambda: ops.knn(POINTS.numpy().astype("f8"), 2),
            ValueError,
            "points must be float32, bfloat16 or float16, got",
        ),
        (
            lambda: ops.knn(POINTS.int().numpy(), 2),
            ValueError,
            "points must be float32, bfloat16 or float16, got int32",
        ),
        (lambda: ops.knn([[[1e39], [0.0]]], 1), ValueError, "points must fit float32, got a number that is too large"),
        (lambda: ops.knn(POINTS.to_sparse(), 2), ValueError, "points must be dense, got sparse_coo"),
        (lambda: ops.knn(POINTS, 2, POINTS.to("meta")), ValueError, "all tensors must be on one device"),
        (
            lambda: ops.knn(POINTS, 2, barred=(LABEL,)),
            ValueError,
            "barred must be .query_group, point_group., or a list of such pairs",
        ),
        (lambda: ops.knn(POINTS, 2.0), TypeError, r"k must be an integer, got 2\.0"),
        (lambda: ops.knn(POINTS, True), TypeError, "k must be an integer, got True"),
        (lambda: ops.knn(POINTS, None), TypeError, "k must be an integer, got None"),
        (lambda: ops.knn(POINTS, 2**64), ValueError, r"k must be in \[-2\^63, 2\^63\), got k=18446744073709551616"),
        (lambda: ops.kmeans(POINTS, 2, n_init=1.5), TypeError, r"n_init must be an integer, got 1\.5"),
        (lambda: ops.kmeans(POINTS, 2, seed=2**64), ValueError, "seed must be in"),
        (lambda: ops.kmeans(POINTS, 2, tol="x"), TypeError, "tol must be a number, got 'x'"),
        (lambda: ops.kmeans(POINTS, 2, init=None), ValueError, "init must be a tensor, an array or a list, got None"),
        (lambda: ops.separation(POINTS, LABEL, 3.0), TypeError, r"n_labels must be an integer, got 3\.0"),
        (
            lambda: ops.capture_rows(POINTS, START, START + 1, 0, [[[0.0] * 4] * 3], torch.zeros(1, 3)),
            TypeError,
            "bank must be a tensor or an array, to be written in place, got list",
        ),
        (
            lambda: ops.capture_rows(POINTS, START, START + 1, 0, np.broadcast_to(np.zeros(1), (1, 3, 4)), None),
            ValueError,
            "bank must be writable",
        ),
        (
            lambda: ops.capture_rows(
                POINTS, START, START + 1, 0, torch.zeros(1, 3, 4, requires_grad=True), torch.zeros(1, 3)
            ),
            ValueError,
            "bank must not require a gradient",
        ),
        (lambda: ops.attention(np.zeros((1, 2, 3, 1, 4))), TypeError, "takes tensors alone, got ndarray"),
        (lambda: ops.packed_attention(normal(4, 3, 2, 4), None, 4), TypeError, "takes tensors alone, got None"),
        (
            lambda: ops.packed_attention(normal(4, 3, 2, 4), torch.tensor([0, 4]), 4.0),
            TypeError,
            "max_length must be an",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=rf"^\w+: {message}") as raised:
        call()
    assert "\n" not in str(raised.value)


def test_integers_of_every_kind_are_counts():
    for k in (np.int32(2), torch.tensor(2)):
        assert ops.knn(POINTS, k).index.shape == (2, 9, 2)
    assert_same_bits(ops.kmeans(POINTS, 2, tol=np.float32(0)), ops.kmeans(POINTS, 2, tol=0))


# ---- as before, but for what is converted: compiled, fake, on meta, whatever torch's defaults are


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_compiled(dtype):
    def both(points: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        index = ops.knn(points, 2, barred=(label, label)).index
        return ops.majority_vote(index, label), ops.separation(points, label, 3)

    label = LABEL.to(dtype)
    assert_same_bits(torch.compile(both, fullgraph=True, backend="aot_eager")(POINTS, label), both(POINTS, label))


def test_fake_and_meta_tensors():
    small = LABEL.int()
    with FakeTensorMode() as mode:
        points, label = (mode.from_tensor(x) for x in (POINTS, small))
        assert ops.knn(points, 2, barred=(label, label)).index.shape == (2, 9, 2)
    assert ops.separation(POINTS.to("meta"), LABEL.to("meta"), 3).device.type == "meta"


@contextmanager
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("name", CALLS)
def test_defaults_of_torch_do_not_matter(name):
    op, points, labels = CALLS[name]
    if name == "capture_rows":
        pytest.skip("its helper here makes tensors of its own")
    expected = op(*points, *labels)
    lists = [x.tolist() for x in (*points, *labels)]
    with other_defaults():
        found, from_lists = op(*points, *labels), op(*lists)
    assert_same_bits(found, expected)
    assert_same_bits(from_lists, expected)

"""torch.ops.clmfast.*: whatever one gives them, they are right or say in one line what is wrong, and never crash."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_checks import assert_same_bits
from torch import Tensor

from clmfast import ops

RAW = torch.ops.clmfast
ROOT = Path(__file__).parent.parent
MUTATING = "capture_rows"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def good_calls() -> dict[str, tuple[Any, ...]]:
    """A good call of every op; backward ops are given what the forward ones returned."""
    points, queries, group = normal(2, 40, 5), normal(2, 6, 5, seed=1), torch.arange(40) % 7
    index = RAW.knn(points, 3, None, [], [], None)[1]
    truth, label = torch.arange(24).view(2, 12) % 4, torch.arange(24).view(2, 12) % 3
    qkv, lengths = normal(2, 5, 3, 2, 4), torch.tensor([5, 2])
    out, lse = RAW.attention(qkv, lengths)
    rows, offset = qkv.flatten(0, 1), torch.tensor([0, 3, 10])
    rows_out, rows_lse = RAW.packed_attention(rows, offset, None, 7)
    x = normal(10, 8)
    of_attention = (normal(8), normal(8), normal(24, 8), normal(24), normal(8, 8), normal(8))
    of_mlp = (normal(8), normal(8), normal(20, 8), normal(20), normal(8, 20), normal(8))
    source, kept = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9]), torch.tensor([2, 5, 11])
    asking = torch.tensor([0, 1, 2, 5, 6, 7, 8, 9, 10, 11])
    shared = torch.tensor([0, 3, 12])
    with torch.no_grad():
        y_mlp, *of_forward_mlp = RAW.mlp_block(x, *of_mlp, True)
        y, *of_forward = RAW.attention_block(x, *of_attention, 2, shared, kept, None, source, True)
        weights = [*of_attention, *of_mlp] * 2
        y_blocks, states, saved = RAW.transformer_blocks(x, weights, 2, shared, asking, kept, None, source, True)
    zero = torch.zeros(2, 3, dtype=torch.int64)
    return {
        "knn": (points, 3, queries, [group[:6], group[:2]], [group, group // 2], torch.ones(2, 6)),
        "kmeans": (points, 4, points[:, :4], False, 1, 10, 1e-4, 0),
        "kmeans_search": (points, 4, None, torch.ones(len(points), dtype=torch.int64), 2, 3, 2, 10, 0, None, None),
        "separation": (points, group, 7),
        "majority_vote": (index, group),
        "label_shares": (index, group, group, 7),
        "partition_scores": (truth, label, 4, 3),
        "adjusted_rand": (truth, label, 4, 3),
        MUTATING: (normal(3, 4, 5), zero, zero + 2, torch.tensor([1]), torch.zeros(2, 6, 5), torch.zeros(2, 6)),
        "attention": (qkv, lengths),
        "attention_backward": (torch.ones_like(out), qkv, out, lse, lengths),
        "packed_attention": (rows, offset, torch.tensor([-1, 0]), 10),
        "packed_attention_backward": (torch.ones_like(rows_out), rows, rows_out, rows_lse, offset, 7),
        "mlp_block": (x, *of_mlp, True),
        "mlp_block_backward": (torch.ones_like(y_mlp), x, *of_mlp, *of_forward_mlp),
        "attention_block": (x, *of_attention, 2, shared, kept, None, source, True),
        "attention_block_backward": (torch.ones_like(y), x, *of_attention, 2, shared, kept, source, *of_forward),
        "transformer_blocks": (x, weights, 2, shared, asking, kept, None, source, True),
        "transformer_blocks_backward": (
            torch.ones_like(y_blocks), x, weights, states, saved, 2, shared, asking, kept, source, 1,
        ),
    }  # fmt: skip


CALLS = good_calls()


def call(op: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    """All that the op returns or writes, the latter into copies."""
    if op == MUTATING:
        is_there = [isinstance(x, Tensor) and x.untyped_storage().nbytes() >= x.nbytes for x in arguments[4:]]
        written = [x.clone() if there else x for x, there in zip(arguments[4:], is_there, strict=True)]
        RAW.capture_rows(*arguments[:4], *written)
        return written
    found = getattr(RAW, op)(*arguments)
    found = found if isinstance(found, tuple | list) else (found,)
    return [x for y in found for x in (y if isinstance(y, list) else [y])]


def places(arguments: tuple[Any, ...]) -> Iterator[tuple[int, ...]]:
    """Where the tensors are; of a list, the first and the last."""
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor):
            yield (i,)
        elif isinstance(x, list):
            yield from ((i, 0), (i, len(x) - 1))


def at(arguments: tuple[Any, ...], place: tuple[int, ...]) -> Tensor:
    return arguments[place[0]] if len(place) == 1 else arguments[place[0]][place[1]]


def replaced(arguments: tuple[Any, ...], place: tuple[int, ...], value: object) -> tuple[Any, ...]:
    changed = list(arguments)
    if len(place) == 1:
        changed[place[0]] = value
    else:
        changed[place[0]] = list(changed[place[0]])
        changed[place[0]][place[1]] = value
    return tuple(changed)


def with_a_gap(x: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack([x, torch.full_like(x, 77)], dim=-1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    """The same values, the first dimension the innermost."""
    dims = [*range(1, x.dim()), 0]
    return x.permute(dims).contiguous().permute([*range(x.dim())][-1:] + [*range(x.dim() - 1)])


def zero_stride(x: Tensor) -> Tensor:
    """Where all rows are equal, they are one."""
    return x[:1].expand(x.shape) if (x == x[:1]).all() else x


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gap": with_a_gap,
    "transposed": transposed,
    "zero stride": zero_stride,
    "negative": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
}


@pytest.mark.parametrize("op", CALLS)
def test_views_are_read_as_they_are(op):
    expected = call(op, CALLS[op])
    for view, place in itertools.product(VIEWS, places(CALLS[op])):
        if op == MUTATING and place[0] >= 4:
            continue  # tests/test_capture_rows.py has what is written
        same = VIEWS[view](at(CALLS[op], place))
        assert torch.equal(same, at(CALLS[op], place))
        assert_same_bits(call(op, replaced(CALLS[op], place, same)), expected)


def shrunk(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.nbytes - 1)
    return x


WRONG: dict[str, Callable[[Tensor], object]] = {
    "another dtype": lambda x: x.to(torch.int32 if x.is_floating_point() else torch.float64),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex64),
    "another dimension": lambda x: x[None, None],
    "a number": lambda x: x.flatten()[0],
    "on meta": lambda x: x.to("meta"),
    "without its memory": shrunk,
    "none": lambda _: None,
}


def refusal(op: str, arguments: tuple[Any, ...]) -> str:
    """What the op says against the call; empty if it takes it."""
    try:
        call(op, arguments)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


ANY_NUMBER = {(MUTATING, 3)}  # a slot without a dimension is a slot


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("op", CALLS)
def test_a_wrong_tensor_is_refused_in_one_line(op, wrong):
    for place in places(CALLS[op]):
        x = at(CALLS[op], place)
        if wrong == "a number" and (op, *place) in ANY_NUMBER:
            continue
        if x.numel() < 2 and wrong == "another dimension":
            continue
        if wrong == "none" and len(place) == 2:
            continue  # torch itself takes no None in a list
        text = refusal(op, replaced(CALLS[op], place, WRONG[wrong](x)))
        if text:
            assert re.match(rf"({op}|(attention|mlp)_\w+): ", text)  # of blocks, that of a half
            assert "\n" not in text and "API call failed" not in text
        else:
            assert wrong == "none" and is_optional(op, place[0]), (op, place)


def is_optional(op: str, i: int) -> bool:
    return "Optional" in str(getattr(RAW, op).default._schema.arguments[i].type)


@pytest.mark.parametrize("op", CALLS)
def test_an_empty_or_shorter_tensor_is_right_or_refused(op):
    for place in places(CALLS[op]):
        x = at(CALLS[op], place)
        for dim in range(x.dim()):
            for n in (0, x.shape[dim] - 1):
                text = refusal(op, replaced(CALLS[op], place, x.narrow(dim, 0, n)))
                assert "\n" not in text and "API call failed" not in text


INDICES = {  # of the arguments that hold indices, lengths or labels
    "majority_vote": (0,), "label_shares": (0, 2), "separation": (1,), "partition_scores": (0, 1),
    "adjusted_rand": (0, 1), MUTATING: (1, 2), "attention": (1,), "attention_backward": (4,),
    "packed_attention": (1, 2), "packed_attention_backward": (4,), "attention_block": (8, 9, 11),
    "attention_block_backward": (9, 10, 11), "transformer_blocks": (3, 4, 5, 7),
    "transformer_blocks_backward": (6, 7, 8, 9),
}  # fmt: skip


@pytest.mark.parametrize("op", INDICES)
@pytest.mark.parametrize("value", [-2, 100, 2**31 + 1, 2**62, -(2**63)])
def test_an_index_out_of_range_is_refused(op, value):
    for i in INDICES[op]:
        x = CALLS[op][i].clone()
        for at_end in (0, -1):
            spoilt = x.clone()
            spoilt.view(-1)[at_end] = value
            with pytest.raises(ValueError, match=rf"^({op}|(attention|mlp)_\w+): "):
                call(op, replaced(CALLS[op], (i,), spoilt))


def test_no_kept_token_is_not_all_of_them():
    x, *weights = (t.clone() for t in CALLS["attention_block"][:7])
    nothing, x = torch.empty(0, dtype=torch.int64), x.requires_grad_()
    for source in (None, CALLS["attention_block"][11]):
        offset = torch.tensor([0, 3, 10 if source is None else 12])
        y = ops.attention_block(x, ops.BlockWeights(*weights), 2, offset, kept=nothing, source=source)
        assert y.shape == (0, 8)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (grad == 0).all()
    none_at_all = ops.attention_block(
        x, ops.BlockWeights(*weights), 2, torch.tensor([0, 0]), kept=nothing, source=nothing
    )
    assert none_at_all.shape == (0, 8)


def test_a_prefix_has_no_prefix():
    x, *weights = CALLS["attention_block"][:7]
    offset, prefix = torch.tensor([0, 3, 5, 10]), torch.tensor([-1, 0, 1])
    with pytest.raises(ValueError, match="attention_block: a prefix must have no prefix itself, got 1 for sequence 2"):
        ops.attention_block(x, ops.BlockWeights(*weights), 2, offset, prefix=prefix)
    qkv = CALLS["packed_attention"][0]
    with pytest.raises(ValueError, match="packed_attention: a prefix must have no prefix itself"):
        ops.packed_attention(qkv, offset, 10, prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_and_composed_halves_refuse_the_same(dtype):
    x, *weights = (t.to(dtype) for t in CALLS["attention_block"][:7])
    w, offset, kept = ops.BlockWeights(*weights), torch.tensor([0, 3, 10]), torch.tensor([2, 5])
    for refused in (
        lambda: ops.attention_block(x, w, 0, offset),
        lambda: ops.attention_block(x, w, 3, offset),
        lambda: ops.attention_block(x[0], w, 2, offset),
        lambda: ops.attention_block(x, w._replace(out_weight=w.out_weight.to("meta")), 2, offset),
        lambda: ops.attention_block(x, w, 2, offset.to("meta")),
        lambda: ops.attention_block(x, w, 2, torch.tensor([0, 3, 11])),
        lambda: ops.attention_block(x, w, 2, offset, kept=-kept),
        lambda: ops.attention_block(x, w, 2, offset, kept=kept + 9),
        lambda: ops.attention_block(x, w, 2, offset, kept=kept.flip(0)),
        lambda: ops.attention_block(x, w, 2, offset, kept=kept.int()),
        lambda: ops.attention_block(x, w, 2, offset, source=torch.arange(10)),
        lambda: ops.attention_block(x, w, 2, offset, kept=kept, source=torch.arange(10) - 1),
        lambda: ops.attention_block(x, w, 2, offset, prefix=torch.tensor([-1, 2])),
        lambda: ops.mlp_block(x, ops.BlockWeights(*weights)._replace(in_weight=w.in_weight.to("meta"))),
    ):
        with pytest.raises(ValueError, match=r"^(attention_block|mlp_block|packed_attention): "):
            refused()


# ---- memory, and counts that no machine can serve

HUGE = [2**62, 2**40]
P, LABEL = normal(2, 9, 4), torch.zeros(9, dtype=torch.int64)
INDEX = torch.zeros(2, 9, 3, dtype=torch.int64)


@pytest.mark.parametrize("n", HUGE)
@pytest.mark.parametrize(
    "call_with",
    [
        lambda n: ops.knn(P, n, P),
        lambda n: ops.label_shares(INDEX, LABEL, LABEL, n),
        lambda n: ops.kmeans(P, 2, n_init=2**31 - 1),
        lambda n: ops.kmeans_search(torch.zeros(1, 2**17, 1), 2, n_cold=2**20 - 1),
        lambda n: ops.separation(P, LABEL, 2**31 - 1),
        lambda n: ops.majority_vote(torch.zeros(1, dtype=torch.int64).expand(2**20, 2**20, 3), LABEL),
        lambda n: ops.attention(torch.zeros(1).expand(2**20, 2**20, 3, 1, 1)),
        lambda n: ops.adjusted_rand(INDEX[:, :0, 0].expand(2, 0).new_empty(2**30, 0), INDEX.new_empty(2**30, 0), 1, 1),
    ],
)
def test_memory_that_no_machine_has(call_with, n):
    with pytest.raises(MemoryError, match=r"^\w+: needs \S+ GB for .*, there can be at most"):
        call_with(n)


@pytest.mark.parametrize("n", [*HUGE, -1, -(2**63), 0])
@pytest.mark.parametrize(
    "call_with",
    [
        lambda n: ops.knn(P, n),
        lambda n: ops.kmeans(P, n),
        lambda n: ops.kmeans(P, 2, n_init=n),
        lambda n: ops.kmeans(P, 2, max_iter=n),
        lambda n: ops.separation(P, LABEL, n),
        lambda n: ops.label_shares(INDEX, LABEL, LABEL, min(n, 0)),
        lambda n: ops.partition_scores(LABEL, LABEL, n_truth=n, n_label=n),
        lambda n: ops.adjusted_rand(LABEL[None], LABEL[None], n, n),
        lambda n: ops.attention_block(P[0], ops.BlockWeights(*CALLS["mlp_block"][1:7]), n, torch.tensor([0, 9])),
    ],
)
def test_counts_that_cannot_be(call_with, n):
    with pytest.raises(ValueError, match=r"^\w+: .*"):
        call_with(n)


def test_nothing_of_many_sets_is_found_at_once():
    many = torch.empty(2**40, 0, 4)
    assert RAW.knn(many, 2, many, [], [], None)[0].shape == (2**40, 0, 2)
    assert RAW.majority_vote(torch.empty(2**40, 0, 3, dtype=torch.int64), LABEL).shape == (2**40, 0)
    assert RAW.attention(torch.empty(2**31, 2**31, 3, 0, 4), None)[0].shape == (2**31, 2**31, 0, 4)


OF_A_SMALL_MACHINE = """
import resource, torch
from clmfast import ops

label = torch.zeros(8, dtype=torch.int64)
ops.separation(torch.ones(2, 8, 4), label, 2)  # what the first call sets up is there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for call in (
    lambda: ops.knn(torch.ones(1, 8, 4), 2**26, torch.ones(1, 1, 4)),
    lambda: ops.separation(torch.ones(2, 8, 4), label, 2**24),
):
    try:
        call()
    except MemoryError as error:
        print(error)
"""


def test_memory_that_this_machine_has_not():
    done = subprocess.run([sys.executable, "-c", OF_A_SMALL_MACHINE], capture_output=True, text=True, cwd=ROOT)
    of_a_result, of_a_task = done.stdout.splitlines()
    assert of_a_result.startswith("knn: needs 0.537 GB for a result of shape [1, 1, 67108864], which could not be had")
    assert of_a_task == "separation: needs more memory to compute in than could be had"


def test_capture_rows_refuses_memory_that_overlaps():
    x, start, stop, slot, bank, norm2 = CALLS[MUTATING]
    whole, flat = torch.zeros(2, 6, 6), torch.zeros(100)
    RAW.capture_rows(x, start, stop, slot, whole[..., :5], whole[..., 5])  # interleaved, and apart
    expected_bank, expected_norm2 = call(MUTATING, CALLS[MUTATING])
    assert torch.equal(whole[..., :5], expected_bank) and torch.equal(whole[..., 5], expected_norm2)
    integers = torch.zeros(12, dtype=torch.int64)
    for of_x, of_start, of_bank, of_norm2, message in [
        (x, start, torch.zeros(2, 1, 5).expand(2, 6, 5), norm2, "bank must have strides that keep its elements apart"),
        (x, start, bank, torch.zeros(2, 1).expand(2, 6), "norm2 must have strides that keep its elements apart"),
        (x, start, whole[..., :5], whole[..., 4], "bank must not share memory with norm2"),
        (flat[:60].view(3, 4, 5), start, flat[40:].view(2, 6, 5), norm2, "bank must not share memory with x"),
        (x, integers[:6].view(2, 3), bank, integers.view(torch.float32)[:12].view(2, 6), "norm2 must not share memory"),
    ]:
        with pytest.raises(ValueError, match=f"^capture_rows: {message}"):
            RAW.capture_rows(of_x, of_start, of_start + 2, slot, of_bank, of_norm2)

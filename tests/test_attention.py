"""ops.attention against dense float64 attention, forward and backward, and its silence about padding."""

import pytest
import torch
from op_checks import assert_threads_do_not_matter, outputs_full_of_nan

from clmfast import ops
from clmfast.ops import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 2, 1, 1), (2, 63, 3, 7), (3, 130, 2, 64), (4, 1, 2, 8), (2, 33, 4, 16)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths_for(B, T):
    return torch.tensor([T, 0, T // 2, min(1, T)])[:B]


def gradient(attention, qkv, grad_out):
    qkv = qkv.detach().requires_grad_()
    attention(qkv).backward(grad_out)
    return qkv.grad


def eager(qkv, lengths):
    """The same dense formula in qkv's own dtype: what its rounding alone costs."""
    B, T, _, _, W = qkv.shape
    q, k, v = qkv.unbind(2)
    scores = torch.einsum("bthw,bshw->bhts", q, k) / W**0.5
    weights = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(dim=3)
    is_valid = torch.arange(T) < (torch.full((B,), T) if lengths is None else lengths)[:, None]
    return torch.einsum("bhts,bshw->bthw", weights, v).masked_fill(~is_valid[..., None, None], 0)


def assert_as_good_as_eager(ours, theirs, exact):
    """|ours - f64| <= 2 |eager - f64| + 4 eps max|f64|; where eager is itself float64, it cannot be the measure."""
    if ours.dtype == torch.float64:
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-13)
        return
    error, their_error = (ours.double() - exact).abs().max(), (theirs.double() - exact).abs().max()
    assert error <= 2 * their_error + 4 * torch.finfo(ours.dtype).eps * exact.abs().max()


# ---- is it right, and no less exact than it must be?


def test_by_hand():
    qkv = torch.zeros(1, 2, 3, 1, 1)
    qkv[0, :, 2, 0, 0] = torch.tensor([1.0, 3.0])
    assert ops.attention(qkv).flatten().tolist() == [1, 2]  # equal scores: the mean of the values so far
    qkv[0, 1, 0], qkv[0, :, 1, 0, 0] = 1.0, torch.log(torch.tensor([1.0, 3.0]))
    assert ops.attention(qkv).flatten().tolist() == pytest.approx([1, 2.5])  # weights 1/4 and 3/4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_lengths", [False, True])
def test_against_reference(shape, dtype, has_lengths):
    B, T, H, W = shape
    qkv, grad_out = normal(B, T, 3, H, W).to(dtype), normal(B, T, H, W, seed=1).to(dtype)
    lengths = lengths_for(B, T) if has_lengths else None
    exact = reference.attention(qkv, lengths)
    exact_grad = gradient(lambda x: reference.attention(x, lengths), qkv.double(), grad_out.double())
    with outputs_full_of_nan():
        out = ops.attention(qkv, lengths)
        grad = gradient(lambda x: ops.attention(x, lengths), qkv, grad_out)
    assert out.shape == (B, T, H, W) and out.dtype == dtype and out.is_contiguous()
    assert_as_good_as_eager(out, eager(qkv, lengths), exact)
    assert_as_good_as_eager(grad, gradient(lambda x: eager(x, lengths), qkv, grad_out), exact_grad)
    if has_lengths:
        is_padding = torch.arange(T) >= lengths[:, None]
        assert (out[is_padding] == 0).all() and (grad[is_padding] == 0).all()


def test_gradcheck():
    qkv = normal(3, 4, 3, 1, 2).requires_grad_()
    lengths = torch.tensor([4, 0, 3])
    assert torch.autograd.gradcheck(ops.attention, (qkv,))
    assert torch.autograd.gradcheck(lambda x: ops.attention(x, lengths), (qkv,))


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_padding_reaches_nothing(rubbish):
    B, T, H, W = 3, 40, 2, 16
    lengths = torch.tensor([40, 0, 17])
    is_padding = torch.arange(T) >= lengths[:, None]
    clean, grad_out = normal(B, T, 3, H, W).float(), normal(B, T, H, W, seed=1).float()
    spoilt = clean.clone()
    spoilt[is_padding] = rubbish
    spoilt_grad_out = grad_out.clone()
    spoilt_grad_out[is_padding] = rubbish
    assert torch.equal(ops.attention(spoilt, lengths), ops.attention(clean, lengths))
    grads = [
        gradient(lambda x: ops.attention(x, lengths), qkv, grad)
        for qkv, grad in ((clean, grad_out), (spoilt, spoilt_grad_out))
    ]
    assert torch.equal(*grads)
    assert grads[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_do_not_matter(dtype):
    qkv, lengths = normal(5, 37, 3, 2, 24).to(dtype), torch.tensor([37, 1, 0, 20, 33])

    def both():
        return ops.attention(qkv, lengths), gradient(lambda x: ops.attention(x, lengths), qkv, qkv[:, :, 0])

    assert_threads_do_not_matter(both)


def test_full_lengths_are_no_lengths():
    qkv = normal(2, 9, 3, 2, 4)
    assert torch.equal(ops.attention(qkv, torch.tensor([9, 9])), ops.attention(qkv))


def test_views_are_read_as_they_are():
    qkv, grad_out = normal(4, 3, 2, 9, 2).permute(4, 3, 1, 2, 0), normal(4, 2, 9, 2, seed=1).permute(3, 2, 1, 0)
    assert not qkv.is_contiguous() and not grad_out.is_contiguous()
    torch.testing.assert_close(ops.attention(qkv), reference.attention(qkv))
    dense = gradient(ops.attention, qkv.contiguous(), grad_out.contiguous())
    assert torch.equal(gradient(ops.attention, qkv, grad_out), dense)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 8), (3, 0, 3, 2, 8), (3, 4, 3, 0, 8), (3, 4, 3, 2, 0)])
def test_empty(shape):
    qkv = torch.zeros(shape, requires_grad=True)
    out = ops.attention(qkv, torch.zeros(shape[0], dtype=torch.int64))
    assert out.shape == (*shape[:2], *shape[3:])
    out.sum().backward()
    assert qkv.grad.shape == shape


# ---- is it registered right?


def test_opcheck():
    op = torch.ops.clmfast.attention.default
    qkv = normal(2, 5, 3, 2, 4).requires_grad_()
    torch.library.opcheck(op, (qkv, None))
    torch.library.opcheck(op, (qkv.detach().float(), torch.tensor([5, 2])))
    out, lse = op(qkv.detach(), torch.tensor([5, 2]))
    arguments = (torch.ones_like(out), qkv.detach(), out, lse, torch.tensor([5, 2]))
    torch.library.opcheck(torch.ops.clmfast.attention_backward.default, arguments)


def test_compiled():
    qkv, lengths = normal(2, 5, 3, 2, 4), torch.tensor([5, 2])
    compiled = torch.compile(ops.attention, fullgraph=True)
    assert torch.equal(compiled(qkv, lengths), ops.attention(qkv, lengths))
    grads = [gradient(lambda x: f(x, lengths), qkv, normal(2, 5, 2, 4)) for f in (compiled, ops.attention)]  # noqa: B023
    assert torch.equal(*grads)


# ---- does it refuse what it should?

QKV = torch.zeros(2, 4, 3, 2, 8)


@pytest.mark.parametrize(
    ("qkv", "lengths", "message"),
    [
        (QKV[0], None, "attention: qkv must be [B, T, 3, H, W], got [4, 3, 2, 8]"),
        (QKV[:, :, :2], None, "attention: qkv must be [B, T, 3, H, W], got [2, 4, 2, 2, 8]"),
        (QKV.int(), None, "attention: qkv must be float32, float64, bfloat16 or float16"),
        (QKV, torch.zeros(3, dtype=torch.int64), "attention: lengths must be [B] with B=2, got [3]"),
        (QKV, torch.zeros(2), "attention: lengths must be int64"),
        (QKV, torch.tensor([5, 4]), "attention: lengths must be in [0, T], got 5 with T=4"),
        (QKV, torch.tensor([-1, 4]), "attention: lengths must be in [0, T], got -1 with T=4"),
    ],
)
def test_refusals(qkv, lengths, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        ops.attention(qkv, lengths)
    assert str(error.value).startswith(message)

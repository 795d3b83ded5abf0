"""ops.mlp_block, ops.attention_block and ops.transformer_blocks: the fused CPU ops against the composition of torch's
operations in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from op_checks import assert_same_bits, assert_threads_do_not_matter, outputs_full_of_nan

from clmfast import ops

LENGTHS = (5, 11, 0, 1, 14, 90, 3)
OFFSET = torch.tensor([0, *LENGTHS]).cumsum(0)
N = int(OFFSET[-1])
SOURCE = torch.tensor([0, 1, 2, 0, 1, 3])  # two sequences of three tokens that begin alike
KEPT = torch.tensor([0, 4, 9, 15, 16, 30, 31, 70, N - 1])
SHAPES = [(128, 4, 512), (48, 3, 96), (33, 3, 70), (8, 1, 5), (4, 2, 1)]  # D, heads, F: whole vectors and none


def make_weights(D, F, out_in, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return ops.BlockWeights(
        1 + 0.1 * normal(D), 0.1 * normal(D), normal(F, D) / D**0.5, 0.1 * normal(F), normal(D, out_in) / out_in**0.5,
        0.1 * normal(D),
    )  # fmt: skip


def make_half(kind, shape):
    """(function of x and weights, weights, rows of its result)"""
    D, n_heads, F = shape
    if kind == "mlp":
        return ops.mlp_block, make_weights(D, F, F), N
    kept = KEPT if kind == "kept" else None

    def attention_block(x, weights):
        return ops.attention_block(x, weights, n_heads, OFFSET, kept=kept)

    return attention_block, make_weights(D, 3 * D, D), N if kept is None else len(kept)


def run(half, x, weights, grad_y):
    """[y, gradient of x, gradients of the weights]"""
    x = x.detach().clone().requires_grad_()
    weights = ops.BlockWeights(*(w.clone().requires_grad_() for w in weights))
    y = half(x, weights)
    y.backward(grad_y)
    return [y.detach(), x.grad, *(w.grad for w in weights)]


def example(kind, shape, offset=0.3):
    half, weights, n_out = make_half(kind, shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, shape[0], generator=generator) + offset
    return half, x, weights, torch.randn(n_out, shape[0], generator=generator)


@pytest.mark.parametrize("kind", ["mlp", "attention", "kept"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_composition_in_float64(kind, shape):
    half, x, weights, grad_y = example(kind, shape)
    with outputs_full_of_nan():
        ours = run(half, x, weights, grad_y)
    exact = run(half, x.double(), ops.BlockWeights(*(w.double() for w in weights)), grad_y.double())
    for a, b in zip(ours, exact, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= 3e-6 * b.abs().max()


@pytest.mark.parametrize("kind", ["mlp", "attention", "kept"])
def test_the_composition_is_differentiated_right(kind):
    _half, x, weights, _ = example(kind, (4, 2, 6))
    inputs = [t.double().requires_grad_() for t in (x[:17], *weights)]
    if kind == "mlp":
        assert torch.autograd.gradcheck(lambda x, *w: ops.mlp_block(x, ops.BlockWeights(*w)), inputs)
        return
    offset, kept = torch.tensor([0, 5, 16, 16, 17]), torch.tensor([4, 9, 16]) if kind == "kept" else None
    assert torch.autograd.gradcheck(
        lambda x, *w: ops.attention_block(x, ops.BlockWeights(*w), 2, offset, kept=kept), inputs
    )


@pytest.mark.parametrize("kind", ["mlp", "attention", "kept"])
def test_threads_do_not_matter(kind):
    half, x, weights, grad_y = example(kind, (48, 3, 96))
    assert_threads_do_not_matter(lambda: run(half, x, weights, grad_y))


@pytest.mark.parametrize("kind", ["mlp", "attention", "kept"])
def test_without_gradient_the_same_bits(kind):
    half, x, weights, grad_y = example(kind, (33, 3, 70))
    with torch.no_grad():
        plain = half(x, weights)
    assert_same_bits([plain], run(half, x, weights, grad_y)[:1])


def test_a_row_does_not_depend_on_those_beside_it():
    half, x, weights, _ = example("attention", (33, 3, 70))
    whole, kept = half(x, weights), make_half("kept", (33, 3, 70))[0](x, weights)
    assert torch.equal(whole[KEPT], kept)
    for first, stop in itertools.pairwise(OFFSET):
        alone = ops.attention_block(x[first:stop], weights, 3, torch.tensor([0, stop - first]))
        assert torch.equal(alone, whole[first:stop])
    mlp, x, weights, _ = example("mlp", (33, 3, 70))
    assert torch.equal(mlp(x[7:9], weights), mlp(x, weights)[7:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_prefix_stands_before_its_sequences(dtype):
    """Sequences 1 and 3 continue 0, sequence 2 stands alone: as if the prefix had been written out."""
    D, n_heads = 33, 3
    weights = ops.BlockWeights(*(w.to(dtype) for w in make_weights(D, 3 * D, D)))
    x = torch.randn(31, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    offset, prefix = torch.tensor([0, 20, 23, 27, 31]), torch.tensor([-1, 0, -1, 0])
    with torch.no_grad():
        tree = ops.attention_block(x, weights, n_heads, offset, prefix=prefix)
        whole = torch.cat([x[:23], x[23:27], x[:20], x[27:31]])
        expected = ops.attention_block(whole, weights, n_heads, torch.tensor([0, 23, 27, 51]))
    expected = torch.cat([expected[:27], expected[47:]])
    if dtype == torch.float32:
        assert torch.equal(tree, expected)
    else:  # composed of torch's operations, which do not promise bits
        torch.testing.assert_close(tree, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [None, [0, 7, 12, 21, 23]])
def test_sequences_that_begin_alike_share_rows(dtype, wanted):
    """Sequences of 20, 9, 0 and 15 tokens; 1 is the beginning of 0, 3 parts from it after 11: 24 rows."""
    D, n_heads = 33, 3
    weights = ops.BlockWeights(*(w.to(dtype) for w in make_weights(D, 3 * D, D)))
    x = torch.randn(24, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    offset = torch.tensor([0, 20, 29, 29, 44])
    source = torch.cat([torch.arange(20), torch.arange(9), torch.arange(11), torch.arange(20, 24)])
    kept = torch.cat([torch.arange(20), torch.arange(40, 44)])
    kept = kept if wanted is None else kept[wanted]
    grad_y = torch.randn(len(kept), D, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)

    def shared(x, weights):
        return ops.attention_block(x, weights, n_heads, offset, kept=kept, source=source)

    def whole(x, weights):
        return ops.attention_block(x[source], weights, n_heads, offset)[kept]

    with outputs_full_of_nan():
        ours = run(shared, x, weights, grad_y)
    y, *grads = run(whole, x, weights, grad_y)
    for a, b in zip(ours, [y, *grads], strict=True):
        assert (a - b).abs().max() <= (3e-6 if dtype == torch.float32 else 1e-13) * b.abs().max()
    if dtype == torch.float32:  # torch's own operations do not promise bits
        assert torch.equal(ours[0], y)
        assert_threads_do_not_matter(lambda: run(shared, x, weights, grad_y))


def test_not_a_number_stays_in_its_sequence():
    half, x, weights, _ = example("attention", (48, 3, 96))
    spoilt = x.clone()
    spoilt[OFFSET[1] + 4] = torch.nan  # the fifth token of the second sequence
    is_clean = torch.ones(N, dtype=torch.bool)
    is_clean[OFFSET[1] + 4 : OFFSET[2]] = False
    clean, dirty = half(x, weights), half(spoilt, weights)
    assert torch.equal(clean[is_clean], dirty[is_clean])
    assert dirty[~is_clean].isnan().all()


@pytest.mark.parametrize("n", [0, 1])
def test_hardly_any_tokens(n):
    weights, offset = make_weights(16, 48, 16), torch.tensor([0, 0, n])
    x = torch.ones(n, 16, requires_grad=True)
    y = ops.attention_block(x, weights, 2, offset) + ops.mlp_block(x, make_weights(16, 20, 20))
    assert y.shape == (n, 16)
    y.sum().backward()
    assert x.grad.shape == (n, 16)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_to_rounding(isa, tmp_path):
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_block import example, run
torch.save([t for kind in ("mlp", "attention", "kept") for t in run(*example(kind, (33, 3, 70)))], sys.argv[2])
"""
    results = []
    for environment in ({}, {"CLMFAST_ISA": isa}):
        path = tmp_path / "results.pt"
        done = subprocess.run(
            [sys.executable, "-c", code, os.path.dirname(__file__), str(path)],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if "this processor does not have it" in done.stderr:
            pytest.skip(f"no {isa} here")
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 3e-6 * max(1e-2, a.abs().max())


# ---- blocks, one after the other

# Sequences of 20, 9 and 15 tokens in 24 rows: the second begins as the first, the third parts from it after 11.
SHARED = {
    "offset": torch.tensor([0, 20, 29, 44]),
    "source": torch.cat([torch.arange(20), torch.arange(9), torch.arange(11), torch.arange(20, 24)]),
    "asking": torch.cat([torch.arange(20), torch.arange(40, 44)]),
    "kept": torch.tensor([3, 19, 43]),
}
ALONE = {"offset": torch.tensor([0, 5, 16, 16, 24]), "kept": torch.tensor([4, 15, 23])}
ALL = {"offset": torch.tensor([0, 5, 16, 16, 24])}


def make_blocks(n_blocks, D=33, F=70):
    return [(make_weights(D, 3 * D, D, seed), make_weights(D, F, F, seed + 50)) for seed in range(n_blocks)]


def run_blocks(blocks, x, weights, grad_y):
    """[states, y, gradient of x, gradients of the weights]"""
    x = x.detach().clone().requires_grad_()
    weights = [tuple(ops.BlockWeights(*(w.clone().requires_grad_() for w in half)) for half in of) for of in weights]
    *states, y = blocks(x, weights)
    y.backward(grad_y)
    return [*states, y.detach(), x.grad, *(w.grad for of in weights for half in of for w in half)]


def one_by_one(x, weights, offset, asking=None, kept=None, **options):
    """The blocks as a loop over their halves."""
    states = []
    for i, (of_attention, of_mlp) in enumerate(weights, start=1):
        wanted = kept if i == len(weights) else asking
        x = ops.mlp_block(ops.attention_block(x, of_attention, 3, offset, kept=wanted, **options), of_mlp)
        states.append(x)
    return [*(state.detach() for state in states[:-1]), x]


@pytest.mark.parametrize("options", [SHARED, ALONE, ALL], ids=["shared", "alone", "all"])
@pytest.mark.parametrize("n_blocks", [1, 3])
def test_blocks_are_their_halves_one_after_the_other(options, n_blocks):
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(24, 33, generator=generator), make_blocks(n_blocks)
    n_out = len(options["kept"]) if "kept" in options else 24
    grad_y = torch.randn(n_out, 33, generator=generator)
    with outputs_full_of_nan():
        ours = run_blocks(lambda x, w: ops.transformer_blocks(x, w, 3, **options), x, weights, grad_y)
    assert_same_bits(ours, run_blocks(lambda x, w: one_by_one(x, w, **options), x, weights, grad_y))
    assert not any(state.requires_grad for state in ours)
    with torch.no_grad():
        assert_same_bits(ops.transformer_blocks(x, weights, 3, **options), ours[:n_blocks])
    double = [tuple(ops.BlockWeights(*(w.double() for w in half)) for half in of) for of in weights]
    exact = run_blocks(lambda x, w: ops.transformer_blocks(x, w, 3, **options), x.double(), double, grad_y.double())
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_blocks_with_a_prefix():
    """Sequences 1 and 3 continue 0."""
    x, weights = torch.randn(24, 33, generator=torch.Generator().manual_seed(5)), make_blocks(2)
    options = {"offset": torch.tensor([0, 10, 13, 18, 24]), "prefix": torch.tensor([-1, 0, -1, 0])}
    with torch.no_grad():
        assert_same_bits(ops.transformer_blocks(x, weights, 3, **options), one_by_one(x, weights, **options))


def test_compiled_blocks():
    x, weights = torch.randn(24, 33, generator=torch.Generator().manual_seed(6)), make_blocks(2)

    def blocks(x, weights):
        return ops.transformer_blocks(x, weights, 3, **SHARED)

    compiled = torch.compile(blocks, fullgraph=True)
    grad_y = torch.ones(len(SHARED["kept"]), 33)
    assert_same_bits(run_blocks(compiled, x, weights, grad_y), run_blocks(blocks, x, weights, grad_y))


@pytest.mark.parametrize("save", [True, False])
def test_opcheck_of_blocks(save):
    op = torch.ops.clmfast.transformer_blocks.default
    weights = [w for of in make_blocks(2) for half in of for w in half]
    wanted = (SHARED["asking"], SHARED["kept"], None, SHARED["source"])
    arguments = (torch.ones(24, 33), weights, 3, SHARED["offset"], *wanted, save)
    torch.library.opcheck(op, arguments)
    if not save:
        return
    y, states, saved = op(*arguments)
    backward = (torch.ones_like(y), *arguments[:2], states, saved, *arguments[2:5], SHARED["kept"], SHARED["source"])
    for n_trained in (None, 1):
        torch.library.opcheck(torch.ops.clmfast.transformer_blocks_backward.default, (*backward, n_trained))
    with pytest.raises(ValueError, match="states and saved must be those of the forward pass"):
        torch.ops.clmfast.transformer_blocks_backward(*backward[:3], [], *backward[4:], None)


def test_opcheck():
    for kind in ("mlp", "attention"):
        _, x, weights, _ = example(kind, (8, 1, 5))
        inputs = [t.detach().requires_grad_() for t in (x, *weights)]
        if kind == "mlp":
            torch.library.opcheck(torch.ops.clmfast.mlp_block.default, (*inputs, True))
            torch.library.opcheck(torch.ops.clmfast.mlp_block.default, (x, *weights, False))
        else:
            op = torch.ops.clmfast.attention_block.default
            torch.library.opcheck(op, (*inputs, 2, OFFSET, KEPT, None, None, True))
            torch.library.opcheck(op, (*inputs, 2, torch.tensor([0, 3, 6]), SOURCE[1:3], None, SOURCE, True))
            torch.library.opcheck(op, (x, *weights, 2, OFFSET, None, torch.full((len(LENGTHS),), -1), None, False))


@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_compiled(kind):
    half, x, weights, grad_y = example(kind, (8, 1, 5))
    compiled = torch.compile(half, fullgraph=True)
    assert_same_bits(run(compiled, x, weights, grad_y), run(half, x, weights, grad_y))


X, W_MLP, W_ATTENTION = torch.zeros(4, 8), make_weights(8, 12, 12), make_weights(8, 24, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.mlp_block(X[0], W_MLP), "mlp_block: x must be [n, D], got [8]"),
        (
            lambda: ops.mlp_block(X[:, :7], W_MLP),
            "mlp_block: weights must be [D], [D], [F, D], [F], [D, .], [D] with D=7",
        ),
        (
            lambda: ops.mlp_block(X, W_MLP._replace(in_bias=torch.zeros(12, dtype=torch.float64))),
            "mlp_block: x and weights must be float32 on the CPU",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 3, torch.tensor([0, 4])),
            "attention_block: in_weight must be [3 D, D] and n_heads must divide D, got n_heads=3 with D=8",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 3])),
            "attention_block: offset must run from 0 to n=4, got 0 to 3",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 3, 2, 4])),
            "attention_block: offset must not descend, got 3 before 2",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 4]), kept=torch.tensor([2, 2])),
            "attention_block: kept must ascend from 0 or more to less than 4, got 2 at 1",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 6]), source=SOURCE),
            "attention_block: source must come with kept and without prefix",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 6]), source=SOURCE + 1, kept=SOURCE[:2]),
            "attention_block: source must be in [0, 4), got 4",
        ),
        (
            lambda: ops.attention_block(
                X, W_ATTENTION, 2, torch.tensor([0, 6]), source=SOURCE, kept=torch.tensor([1, 3])
            ),
            "attention_block: source of kept must ascend, got 0 at 1",
        ),
        (
            lambda: ops.attention_block(X, W_ATTENTION, 2, torch.tensor([0, 4]), prefix=torch.tensor([1])),
            "attention_block: prefix must be -1 or a sequence below 1, got 1",
        ),
        (
            lambda: ops.transformer_blocks(X, [], 2, torch.tensor([0, 4])),
            "transformer_blocks: weights must be 12 for each of one or more blocks, got 0",
        ),
        (
            lambda: ops.transformer_blocks(
                X.clone().requires_grad_(), [(W_ATTENTION, W_MLP)], 2, torch.tensor([0, 4]), prefix=torch.tensor([-1])
            ),
            "transformer_blocks: prefix is for passes without gradient",
        ),
        (
            lambda: ops.attention_block(
                X.clone().requires_grad_(), W_ATTENTION, 2, torch.tensor([0, 4]), prefix=torch.tensor([-1])
            ),
            "attention_block: prefix is for passes without gradient",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is compared as it is, not as a pattern
        call()
    assert str(error.value).startswith(message)

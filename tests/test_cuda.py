"""The CUDA ops in the emulator: kernels and launchers as they are, on tensors of the CPU, against the CPU ops."""

import emulator
import pytest
import torch
from op_checks import assert_same_bits
from torch import Tensor

from clmfast import ops

pytestmark = pytest.mark.skipif(not emulator.is_available(), reason="the emulator needs an x86-64 processor")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(n: int, *shape: int, seed: int = 0, low: int = 0) -> Tensor:
    return torch.randint(low, n, shape, generator=torch.Generator().manual_seed(seed))


# ---- capture_rows


@pytest.fixture(scope="module")
def capture() -> emulator.Library:
    return emulator.build("""
#include "capture.cu"
extern "C" void run(int64_t element, const void* x, const int64_t* start, const int64_t* stop, const int64_t* slot,
                    void* bank, float* norm2, const int64_t* sizes, const int64_t* strides) {
  clmfast::CaptureRows op{};
  op.element = static_cast<clmfast::Element>(element);
  op.x = x, op.start = start, op.stop = stop, op.slot = slot, op.bank = bank, op.norm2 = norm2;
  op.B = sizes[0], op.T = sizes[1], op.D = sizes[2], op.R = sizes[3], op.N = sizes[4];
  std::copy_n(strides, 3, op.x_stride), std::copy_n(strides + 3, 2, op.start_stride);
  std::copy_n(strides + 5, 2, op.stop_stride), std::copy_n(strides + 7, 3, op.bank_stride);
  std::copy_n(strides + 10, 2, op.norm2_stride);
  clmfast::capture_rows_cuda(op, nullptr);
}
""")


def capture_rows(
    library: emulator.Library, x: Tensor, start: Tensor, stop: Tensor, slot: Tensor, bank: Tensor, norm2: Tensor
) -> None:
    sizes = torch.tensor([start.shape[1], *x.shape[-2:], *bank.shape[:2]])
    of_x = x.stride() if x.dim() == 3 else (0, *x.stride())
    strides = torch.tensor([*of_x, *start.stride(), *stop.stride(), *bank.stride(), *norm2.stride()])
    library.run(DTYPES.index(x.dtype), x, start, stop, slot, bank, norm2, sizes, strides)


def spans(R: int, B: int, T: int) -> tuple[Tensor, Tensor]:
    ends = draw(T, 2, R, B).sort(dim=0).values
    return ends[0], ends[1] + 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", ["nothing", "x", "bank"])
@pytest.mark.parametrize(
    ("B", "T", "D", "R", "N", "slot"),
    [(1, 1, 1, 1, 1, 0), (7, 5, 63, 2, 7, 3), (3, 9, 264, 3, 64, 62), (5, 4, 600, 2, 9, 2**62), (0, 2, 3, 1, 1, 0)],
)
def test_capture_rows(
    capture: emulator.Library, dtype: torch.dtype, strided: str, B: int, T: int, D: int, R: int, N: int, slot: int
) -> None:
    x, (start, stop) = normal(B, T, D).to(dtype), spans(R, B, T)
    stop = torch.where(draw(2, R, B, seed=1) == 0, start + 1, stop)  # of one token, or of several
    if strided == "x":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expected = torch.full((R, N, D), -7.0, dtype=dtype), torch.full((R, N), -7.0)
    ops.capture_rows(x, start, stop, torch.tensor(slot), *expected)
    for _ in capture.seeds(2):
        bank, norm2 = torch.full((R, N, D), -7.0, dtype=dtype), torch.full((R, N), -7.0)
        if strided == "bank":
            bank = torch.full((N, R, 2 * D), -7.0, dtype=dtype)[..., ::2].transpose(0, 1)
        capture_rows(capture, x, start, stop, torch.tensor(slot), bank, norm2)
        assert_same_bits([bank.clone(memory_format=torch.contiguous_format)], [expected[0]])
        torch.testing.assert_close(norm2, expected[1], rtol=1e-7, atol=0)


def test_capture_of_a_packed_batch_marks_what_is_out_of_range(capture: emulator.Library) -> None:
    x, start = normal(12, 8), torch.tensor([[0, -1, 7, 11, 3]])
    stop = torch.tensor([[2, 1, 7, 13, 4]])
    bank, norm2 = torch.zeros(1, 6, 8), torch.zeros(1, 6)
    capture_rows(capture, x, start, stop, torch.tensor([4]), bank, norm2)
    assert torch.equal(bank[0, 4], x[:2].double().mean(0).float()) and torch.equal(bank[0, 2], x[3])
    for row in (5, 0, 1):
        assert bank[0, row].isnan().all() and norm2[0, row].isnan()
    assert (bank[0, 3] == 0).all()
    capture_rows(capture, x, start, stop, torch.tensor([-1]), bank, norm2)
    assert bank[0, :5].isnan().all()


# ---- majority_vote, label_shares


@pytest.fixture(scope="module")
def votes() -> emulator.Library:
    return emulator.build("""
#include "votes.cu"
extern "C" void vote(const int64_t* index, const int64_t* label, const int64_t* sizes, int64_t* voted) {
  clmfast::majority_vote_cuda({index, label, sizes[0], sizes[1], sizes[2], sizes[3]}, voted, nullptr);
}
extern "C" void share(const int64_t* index, const int64_t* label, const int64_t* sizes, const int64_t* truth,
                      int64_t n_labels, double* out) {
  clmfast::label_shares_cuda({index, label, sizes[0], sizes[1], sizes[2], sizes[3]}, truth, n_labels, out, nullptr);
}
""")


@pytest.mark.parametrize(
    ("S", "Q", "k", "N", "n_labels"),
    [(1, 2, 1, 3, 2), (3, 45, 10, 40, 4), (2, 7, 77, 100, 5), (1, 0, 3, 4, 2), (1, 600, 3, 50, 1), (2, 4500, 7, 90, 3)],
)
def test_votes(votes: emulator.Library, S: int, Q: int, k: int, N: int, n_labels: int) -> None:
    index, label, truth = draw(N, S, Q, k, low=-1), draw(n_labels, N, seed=1), draw(n_labels, Q, seed=2)
    index[:, : Q // 5] = -1
    sizes = torch.tensor([S, Q, k, N])
    for _ in votes.seeds(2):
        voted, shares = torch.full((S, Q), -9), torch.full((2, S, n_labels + 1), torch.nan, dtype=torch.float64)
        votes.vote(index, label, sizes, voted)
        votes.share(index, label, sizes, truth, n_labels + 1, shares)
        assert torch.equal(voted, ops.majority_vote(index, label))
        assert_same_bits([shares], [ops.label_shares(index, label, truth, n_labels + 1)])


def test_votes_of_what_is_out_of_range(votes: emulator.Library) -> None:
    index, label, truth = torch.tensor([[[9, 1, -7, 1], [5, 5, 0, 9]]]), torch.tensor([3, 1, 1]), torch.tensor([1, 8])
    voted, shares = torch.zeros(1, 2, dtype=torch.int64), torch.full((2, 1, 4), torch.nan, dtype=torch.float64)
    sizes = torch.tensor([1, 2, 4, 3])
    votes.vote(index, label, sizes, voted)
    votes.share(index, label, sizes, truth, 4, shares)
    assert voted.tolist() == [[1, 3]]
    assert shares.tolist() == [[[0, 1, 0, 0]], [[0, 1, 0, 0]]]


# ---- partition_scores, adjusted_rand


@pytest.fixture(scope="module")
def partition() -> emulator.Library:
    return emulator.build("""
#include "partition.cu"
extern "C" void score(const int64_t* truth, const int64_t* label, int64_t truth_stride, int64_t label_stride, int64_t S,
                      int64_t N, int64_t n_truth, int64_t n_label, double* scores) {
  const clmfast::PartitionScores op{truth, label, truth_stride, label_stride, S, N, n_truth, n_label, scores};
  std::vector<char> scratch(clmfast::partition_scores_cuda_scratch(op), 99);
  clmfast::partition_scores_cuda(op, scratch.data(), nullptr);
}
extern "C" void rand_score(const int64_t* truth, const int64_t* label, int64_t V, int64_t S, int64_t N, int64_t n_truth,
                           int64_t n_label, double* score) {
  const clmfast::AdjustedRand op{truth, label, V, S, N, n_truth, n_label, score};
  std::vector<char> scratch(clmfast::adjusted_rand_cuda_scratch(op), 99);
  clmfast::adjusted_rand_cuda(op, scratch.data(), nullptr);
}
extern "C" void scratch_bytes(int64_t N, int64_t n_truth, int64_t n_label, int64_t* of_both) {
  of_both[0] = clmfast::partition_scores_cuda_scratch({nullptr, nullptr, N, N, 1, N, n_truth, n_label, nullptr});
  of_both[1] = clmfast::adjusted_rand_cuda_scratch({nullptr, nullptr, 1, 1, N, n_truth, n_label, nullptr});
}
""")


def scores_of(library: emulator.Library, truth: Tensor, label: Tensor, n_truth: int = -1, n_label: int = -1) -> Tensor:
    """Without a promise by default."""
    S, N = label.shape
    scores = torch.full((6, S), torch.nan, dtype=torch.float64)
    library.score(truth, label, N, N, S, N, n_truth, n_label, scores)
    return scores


def test_a_perfect_partition_scores_one_and_no_more(partition: emulator.Library) -> None:
    for seed in range(60):
        truth = torch.randint(2 + seed % 7, (1, 2 + seed), generator=torch.Generator().manual_seed(seed))
        scores = scores_of(partition, truth, 7 - truth)
        assert (scores <= 1).all() and (scores > 1 - 1e-12).all()


@pytest.mark.parametrize(
    ("S", "N", "n_truth", "n_label"),
    [(1, 0, 2, 2), (1, 1, 3, 3), (2, 63, 7, 3), (1, 130, 1, 64), (2, 130, 40, 1), (3, 700, 20, 30), (1, 9000, 90, 200)],
)
def test_partition_scores(partition: emulator.Library, S: int, N: int, n_truth: int, n_label: int) -> None:
    truth, label = draw(n_truth, S, N), draw(n_label, S, N, seed=1)
    label = torch.where(draw(3, S, N, seed=2) > 0, truth % n_label, label)
    expected = torch.stack(ops.partition_scores(truth, label))
    found = []
    for seed in partition.seeds(2):
        found.append(scores_of(partition, truth, label, n_truth, n_label))
        if seed == 0:
            found.append(scores_of(partition, truth, label))
    for scores in found:
        assert_same_bits([scores], [found[0]])
        assert_same_bits([scores[0], scores[5]], [expected[0], expected[5]])
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("truth", "label"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([0, 0, 0], [0, 1, 2]),
        ([0, 1, 2], [0, 0, 0]),
        ([0, 1, 2], [2, 0, 1]),
        ([0, 1, 0, 1], [0, 0, 1, 1]),
    ],
)
def test_special_partitions(partition: emulator.Library, truth: list[int], label: list[int]) -> None:
    t, l = torch.tensor([truth]), torch.tensor([label])
    found, expected = scores_of(partition, t, l, 3, 3), torch.stack(ops.partition_scores(t, l))
    assert_same_bits([found], [scores_of(partition, t, l)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert torch.equal(found == 0, expected == 0) and torch.equal(found == 1, expected == 1)


def test_partitions_of_any_values(partition: emulator.Library) -> None:
    values = torch.tensor([-(2**63), -1, 0, 7, 2**63 - 1])
    truth, label = draw(5, 2, 90), draw(4, 2, 90, seed=1)
    assert_same_bits([scores_of(partition, values[truth], values[label])], [scores_of(partition, truth, label)])


def test_partitions_out_of_range_are_not_numbers(partition: emulator.Library) -> None:
    truth, label = draw(4, 3, 50), draw(4, 3, 50, seed=1)
    label[0, 7], truth[1, 49] = 4, -1
    found = scores_of(partition, truth, label, 4, 4)
    assert found.isnan().all(dim=0).tolist() == [True, True, False] and not found[:, 2].isnan().any()


def adjusted_rand_of(library: emulator.Library, truth: Tensor, label: Tensor, n_truth: int, n_label: int) -> Tensor:
    score = torch.full((len(truth), len(label)), torch.nan, dtype=torch.float64)
    library.rand_score(truth, label, len(truth), *label.shape, n_truth, n_label, score)
    return score


@pytest.mark.parametrize(
    ("V", "S", "N", "n_truth", "n_label"),
    [(1, 1, 0, 90, 5), (1, 1, 0, 0, 0), (2, 3, 1, 90, 5), (3, 2, 200, 90, 5), (2, 2, 700, 10**6, 20), (1, 1, 64, 1, 1)],
)
def test_adjusted_rand(partition: emulator.Library, V: int, S: int, N: int, n_truth: int, n_label: int) -> None:
    truth, label = draw(max(n_truth, 1), V, N), draw(n_label + 1, S, N, seed=1) - 1
    for _ in partition.seeds(2):
        score = adjusted_rand_of(partition, truth, label, n_truth, n_label)
        assert_same_bits([score], [ops.adjusted_rand(truth, label, n_truth, n_label)])


@pytest.mark.parametrize("n_label", [1, 40, 3000])
def test_adjusted_rand_of_as_many_values_as_points(partition: emulator.Library, n_label: int) -> None:
    """Tables as full as they get: every point is a class and a cell of its own, and there are many or few clusters."""
    N = 341  # of 512 slots, one more would double them
    truth = torch.randperm(N, generator=torch.Generator().manual_seed(0)).mul(1 << 12)[None]
    label = torch.arange(N)[None] % n_label
    for _ in partition.seeds(2):
        score = adjusted_rand_of(partition, truth, label, N << 12, n_label)
        assert_same_bits([score], [ops.adjusted_rand(truth, label, N << 12, n_label)])


def test_adjusted_rand_out_of_range_is_not_a_number(partition: emulator.Library) -> None:
    truth, label = draw(4, 2, 50), draw(4, 3, 50, seed=1)
    truth[0, 7], label[1, 49], label[2, 0] = 4, -2, -1
    score = adjusted_rand_of(partition, truth, label, 4, 4)
    assert score.isnan().tolist() == [[True, True, True], [False, True, False]]
    assert adjusted_rand_of(partition, truth[1:], label[:1], 4, 0).isnan().all()


def test_tables_that_shared_memory_does_not_hold(partition: emulator.Library) -> None:
    N = 9000
    truth, label = draw(7000, 1, N), draw(5000, 1, N, seed=1)
    n_bytes = torch.zeros(2, dtype=torch.int64)
    partition.scratch_bytes(N, 7000, 5000, n_bytes)
    assert (n_bytes > 227 * 1024).all()
    scores, score = (f(partition, truth, label, 7000, 5000) for f in (scores_of, adjusted_rand_of))
    expected = torch.stack(ops.partition_scores(truth, label))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-13)
    assert_same_bits([scores[0], score[0]], [expected[0], expected[0]])
    partition.scratch_bytes(2048, 10**6, 20, n_bytes)  # a window, however many instructions there are
    assert (n_bytes == 0).all()


# ---- separation


@pytest.fixture(scope="module")
def separation() -> emulator.Library:
    return emulator.build("""
#include "separation.cu"
extern "C" void run(const void* points, int64_t element, const int64_t* label, int64_t S, int64_t N, int64_t D,
                    int64_t n_labels, double* out) {
  const clmfast::Separation op{static_cast<const float*>(points), label, S, N, D, n_labels, out};
  std::vector<char> scratch(clmfast::separation_cuda_scratch(op), 99);
  clmfast::separation_cuda(op, static_cast<clmfast::Element>(element), scratch.data(), nullptr);
}
""")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("S", "N", "D", "n_labels"),
    [(1, 2, 1, 2), (2, 63, 7, 3), (3, 131, 140, 5), (1, 300, 17, 1), (1, 4, 0, 2), (1, 33000, 1, 2)],
)
def test_separation(separation: emulator.Library, dtype: torch.dtype, S: int, N: int, D: int, n_labels: int) -> None:
    label = draw(n_labels, N, seed=1)
    points = (normal(S, N, D) + 3 * normal(n_labels, D, seed=2)[label] + 50).to(dtype)
    if N > 50:
        points[0, 7, 0], points[-1, 40, D - 1] = torch.nan, torch.inf
    expected = ops.separation(points, label, n_labels + 2)
    for _ in separation.seeds(2):
        out = torch.full((3, S), torch.nan, dtype=torch.float64)
        separation.run(points, DTYPES.index(dtype), label, S, N, D, n_labels + 2, out)
        assert_same_bits([out[0]], [expected[0]])
        torch.testing.assert_close(out, expected, rtol=1e-13, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-25, 1e-19, 1.0, 1e18, 2.0**126])
def test_separation_where_the_screen_cannot_decide(separation: emulator.Library, scale: float) -> None:
    """Squares that underflow or overflow in float32, and more than 32 centroids, some equal and some nearly so."""
    n_labels, D = 45, 70
    centre = normal(n_labels, D)
    centre[20:30] = centre[10:20]
    centre[30:40] = centre[10:20] * (1 + 1e-7)
    label = draw(n_labels, 120, seed=1)
    spread = 0.3 * draw(2, 120, 1, seed=3)  # half of the points are centroids, but for rounding
    points = (centre[label] + spread * normal(120, D, seed=2)).clamp(-3.9, 3.9)[None] * scale
    points[0, 3, 5] = -torch.inf
    expected = ops.separation(points, label, n_labels)
    out = torch.full((3, 1), torch.nan, dtype=torch.float64)
    separation.run(points, 0, label, 1, 120, D, n_labels, out)
    assert out.isfinite().all()
    assert_same_bits([out[0]], [expected[0]])
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=0)


def test_separation_of_no_points(separation: emulator.Library) -> None:
    out = torch.zeros(3, 2, dtype=torch.float64)
    separation.run(normal(2, 0, 3), 0, draw(2, 0), 2, 0, 3, 2, out)
    assert torch.equal(out.isnan(), ops.separation(normal(2, 0, 3), draw(2, 0), 2).isnan())


def test_separation_of_a_label_out_of_range_is_not_a_number(separation: emulator.Library) -> None:
    out = torch.zeros(3, 1, dtype=torch.float64)
    separation.run(normal(1, 4, 3), 0, torch.tensor([0, 1, 2, 0]), 1, 4, 3, 2, out)
    assert out.isnan().all()

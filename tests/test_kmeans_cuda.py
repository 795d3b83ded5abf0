"""The kernels of csrc/cuda/kmeans.cu give the CPU op's bits: emulated, and on a GPU where there is one."""

import functools
from collections.abc import Callable

import emulator
import pytest
import torch
from op_checks import assert_same_bits

from clmfast import ops
from clmfast.ops.kmeans import KMeans

SOURCE = """
#include "kmeans.cu"
#include <vector>
using namespace clmfast;
extern "C" void run_kmeans(const float* points, int64_t element, const float* init, int64_t S, int64_t N, int64_t D,
                           int64_t K, int64_t is_random, int64_t n_init, int64_t max_iter, double tol, int64_t seed,
                           int64_t path, int64_t* label, float* centroid, double* inertia,
                           int64_t* n_iter) {
  const Kmeans op{points, init, S, N, D, K,
                  is_random ? KmeansStart::random : KmeansStart::plus_plus, n_init, max_iter, tol, seed,
                  label, centroid, inertia, n_iter};
  std::vector<double> scratch(kmeans_cuda_scratch(op) / sizeof(double) + 32);
  std::memset(scratch.data(), 0xcd, scratch.size() * sizeof(double));
  char* aligned = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch.data()) + 255) / 256 * 256);
  kmeans_cuda(op, static_cast<Element>(element), aligned, nullptr, static_cast<KmeansPath>(path));
}
extern "C" void quotients(const double* sum, const double* n, int64_t size, double* quotient) {
  for (int64_t i = 0; i < size; ++i) quotient[i] = kmeans_gpu::quotient(sum[i], n[i], 1 / n[i]);
}
extern "C" void resident_bytes(int64_t N, int64_t D, int64_t n_blocks, int64_t* bytes) {
  bytes[0] = kmeans_gpu::Tiles::bytes((N + n_blocks - 1) / n_blocks, (D + 15) / 16 * 16);
}
"""
ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
RESIDENT, STREAMING = 1, 2

Op = Callable[..., KMeans]


@functools.cache
def library() -> emulator.Library:
    return emulator.build(SOURCE)


def emulated(
    points,
    n_clusters,
    *,
    init="k-means++",
    n_init=1,
    max_iter=100,
    tol=1e-4,
    seed=0,
    path,
    device,
    order=0,
):
    points = points.contiguous()
    S, N, D = points.shape
    found = KMeans(
        torch.full((S, N), -(10**9)),
        torch.full((S, n_clusters, D), torch.nan),
        torch.full((S,), torch.nan, dtype=torch.float64),
        torch.full((S,), -(10**9)),
    )
    centroid = None if isinstance(init, str) else init.float().contiguous()
    library().reset(seed=order, capability=device)
    library().run_kmeans(
        points, ELEMENTS.index(points.dtype), centroid, S, N, D, n_clusters, int(centroid is None and init == "random"),
        n_init, max_iter, float(tol), seed, path, *found,
    )  # fmt: skip
    return found


def on_gpu(points, n_clusters, *, init="k-means++", **options):
    where = init if isinstance(init, str) else init.cuda()
    return KMeans(*(x.cpu() for x in ops.kmeans(points.cuda(), n_clusters, init=where, **options)))


needs_emulator = pytest.mark.skipif(not emulator.is_available(), reason="the emulator needs an x86-64 processor")


@pytest.fixture(
    params=[
        pytest.param({"path": RESIDENT, "device": 90}, marks=needs_emulator, id="resident"),
        pytest.param({"path": STREAMING, "device": 80}, marks=needs_emulator, id="streaming"),
        pytest.param(None, marks=pytest.mark.gpu, id="gpu"),
    ]
)
def op(request) -> Op:
    return functools.partial(emulated, **request.param) if request.param else on_gpu


def assert_like_cpu(op: Op, points, n_clusters, **options) -> KMeans:
    found = op(points, n_clusters, **options)
    assert_same_bits(found, ops.kmeans(points, n_clusters, **options))
    return found


def blobs(S, N, D, K, spread=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(S, K, D, generator=generator)
    which = torch.randint(K, (S, N), generator=generator)
    return centre.gather(1, which[..., None].expand(S, N, D)) + spread * torch.randn(S, N, D, generator=generator)


@pytest.mark.parametrize("start", ["k-means++", "random", "given"])
@pytest.mark.parametrize(
    ("S", "N", "D", "K"),
    [(1, 2, 1, 1), (2, 63, 7, 5), (3, 130, 64, 20), (1, 300, 83, 40), (1, 20, 3, 20), (1, 600, 2, 3), (1, 40, 260, 5)],
)
def test_odd_shapes(op, S, N, D, K, start):
    points = blobs(S, N, D, max(K // 2, 1), spread=1)
    assert_like_cpu(op, points, K, init=points[:, :K] if start == "given" else start)


@pytest.mark.parametrize("dtype", ELEMENTS[1:])
def test_narrow_elements(op, dtype):
    points = blobs(2, 150, 20, 5).to(dtype)
    assert_like_cpu(op, points, 6)
    assert_like_cpu(op, points, 6, init=points[:, :6])


def test_points_that_are_not_aligned(op):
    points = blobs(1, 65, 8, 5).flatten()[3 : 3 + 64 * 8].view(1, 64, 8)
    assert_like_cpu(op, points, 6)


DATA = {
    "offset": lambda x: 1e4 + x,
    "far": lambda x: 1e6 + x,
    "tiny": lambda x: x * 1e-20,
    "denormal": lambda x: x * 1e-40,
    "huge": lambda x: x * 1e37,
    "duplicates": lambda x: x[:, torch.arange(x.shape[1]) % 9],
    "ties": lambda x: (2 * x).round(),
    "alike": lambda x: torch.full_like(x, 0.1),
    "ranges": lambda x: x * torch.logspace(-20, 20, x.shape[2]),
}


@pytest.mark.parametrize("start", ["k-means++", "given"])
@pytest.mark.parametrize("name", DATA)
def test_awkward_data(op, name, start):
    points = DATA[name](blobs(2, 200, 6, 5))
    assert_like_cpu(op, points, 12, init=points[:, :12] if start == "given" else start)


def test_more_close_centroids_than_are_listed(op):
    points = (blobs(1, 270, 24, 4) * 1000).round() / 1000 + 1e4
    copies = points[:, torch.arange(40) % 3]  # each centroid has a dozen equals, of which the first is to be found
    found = assert_like_cpu(op, points, 40, init=copies, max_iter=1)
    assert len(found.label.unique()) > 1


@pytest.mark.parametrize("start", ["k-means++", "random", "given"])
@pytest.mark.parametrize("n_finite", [0, 1, 3, 290])
def test_rows_that_are_not_finite(op, n_finite, start):
    points = blobs(2, 300, 5, 4)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    points[:, order[n_finite:], 2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(100)[n_finite:]
    init = points[:, :5].clone() if start == "given" else start
    found = assert_like_cpu(op, points, 5, init=init)
    assert (found.label >= 0).sum() == 2 * n_finite


def test_empty_clusters_take_the_farthest_points(op):
    points = torch.tensor([[[0.0], [1.0], [2.0], [50.0], [100.0]]])
    found = assert_like_cpu(op, points, 3, init=torch.tensor([[[1.0], [1000.0], [2000.0]]]))
    assert sorted(found.centroid.flatten().tolist()) == [1, 50, 100]
    points = torch.zeros(1, 300, 1)
    points[0, [70, 299, 5]] = torch.tensor([[10.0], [-10.0], [10.0]])  # of equals the smaller index
    found = assert_like_cpu(op, points, 3, init=torch.tensor([[[0.0], [1e3], [2e3]]]), max_iter=1)
    assert found.centroid.flatten()[1:].tolist() == [10, 10]
    points = blobs(2, 300, 4, 6)
    far = torch.cat([points[:, :2], points[:, :6] + 1e3], dim=1)
    for max_iter in (1, 2, 100):
        assert_like_cpu(op, points, 8, init=far, max_iter=max_iter)


@pytest.mark.parametrize("max_iter", [1, 2, 100])
@pytest.mark.parametrize("tol", [0.0, 1e-4, 0.1])
def test_stopping(op, max_iter, tol):
    points = blobs(1, 200, 5, 6, spread=1)
    assert_like_cpu(op, points, 6, init=points[:, :6], max_iter=max_iter, tol=tol)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_stopping_by_a_hair(op, offset):
    points = blobs(1, 300, 5, 6, spread=1) + offset
    init = points[:, :6]
    moved2 = (ops.kmeans(points, 6, init=init, max_iter=1).centroid.double() - init.double()).square().sum()
    variance = points[0].double().var(dim=0, correction=0).mean()
    tol = float(moved2 / variance)
    assert assert_like_cpu(op, points, 6, init=init, tol=tol * (1 + 1e-9)).n_iter.tolist() == [1]
    assert assert_like_cpu(op, points, 6, init=init, tol=tol * (1 - 1e-9)).n_iter.tolist() != [1]


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_best_of_the_restarts_is_returned(op, init):
    points = blobs(2, 150, 4, 10, spread=0.5)
    assert_like_cpu(op, points, 10, init=init, n_init=4, seed=5)


def test_no_sets(op):
    assert [x.shape[0] for x in op(torch.zeros(0, 5, 3), 2)] == [0] * 4


# ---- of the emulated kernels alone


@needs_emulator
@pytest.mark.parametrize("path", [RESIDENT, STREAMING])
def test_the_order_of_threads_does_not_matter(path):
    points = blobs(1, 700, 6, 9, spread=1)
    points[:, 600, 0] = torch.nan
    points[:, 300:500] = points[:, :1]
    for order in range(4):
        assert_same_bits(emulated(points, 70, path=path, device=90, order=order), ops.kmeans(points, 70))


@needs_emulator
def test_seven_layers_of_the_window_stay_resident():
    bytes_needed = torch.zeros(1, dtype=torch.int64)
    library().resident_bytes(2048, 256, 8, bytes_needed)
    assert 0 < bytes_needed.item() <= 227 * 1024 - 12 * 1024


@needs_emulator
def test_a_mean_is_rounded_as_a_division_rounds():
    generator = torch.Generator().manual_seed(0)
    n = torch.randint(1, 2**31, (10**6,), generator=generator) >> torch.randint(0, 31, (10**6,), generator=generator)
    n = n.clamp(min=1).double()
    scale = torch.randint(-160, 128, n.shape, generator=generator).double().exp2()
    near = (torch.rand(n.shape, generator=generator, dtype=torch.float64) + 1) * scale
    awkward = torch.cat([near, near * n, (near.float().double() * (1 + 2**-24)) * n, -near, torch.zeros_like(near)])
    n = n.repeat(5)
    found = torch.full_like(awkward, torch.nan)
    library().quotients(awkward, n, len(n), found)
    assert_same_bits([found], [awkward / n])

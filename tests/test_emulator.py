"""The emulator finds what it is there to find, and multiplies as the hardware's documentation says."""

import emulator
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(not emulator.is_available(), reason="the emulator needs an x86-64 processor")


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


REVERSE = """
using namespace clmfast;
struct Rows {{ float x[64]; }};
__global__ void reverse(const float* from, float* to) {{
  Rows& rows = static_shared<Rows>();
  rows.x[threadIdx.x] = from[threadIdx.x];
  {barrier}
  to[threadIdx.x] = rows.x[63 - threadIdx.x];
}}
extern "C" void run(const float* from, float* to) {{ launch(reverse, 1, 64, 0, nullptr, from, to); }}
"""


@pytest.mark.parametrize("barrier", ["__syncthreads();", "__syncwarp();", ""])
def test_missing_barrier_is_found(barrier: str) -> None:
    library = emulator.build(REVERSE.format(barrier=barrier))
    x = torch.arange(64.0)
    found = []
    for _ in library.seeds(4):
        y = torch.empty(64)
        library.run(x, y)
        found.append(torch.equal(y, x.flip(0)))
    assert all(found) if barrier == "__syncthreads();" else not all(found)


MISTAKES = """
using namespace clmfast;
struct Rows { float x[64]; };
__global__ void mistake(int64_t which, float* memory) {
  Rows& rows = static_shared<Rows>();
  float* dynamic = dynamic_shared<float>();
  const int i = threadIdx.x;
  float sum[32];
  switch (which) {
    case 0: if (i < 40) __syncthreads(); else warp_ballot(true); break;
    case 1: if (i < 8) warp_shuffle(1.0f, 0); else warp_ballot(true); break;
    case 2: rows.x[i + 1] = 0; break;
    case 3: dynamic[i + 1] = 0; break;
    case 4: memory[i] = reinterpret_cast<float4*>(memory + 1)->x; break;
    case 5: cp_async_16(dynamic + 1, memory); break;
    case 6: cp_async_16(dynamic, memory); break;
    case 7: wgmma_bf16<64>(sum, 0, 0, false); break;
    case 8: if (i < 8) { uint32_t r[4]; ldmatrix_x4(r, dynamic); } break;
    case 9: static_cast<int*>(nullptr)[0] = 0; break;
    case 10: memory[0] = 1 << (i + 1); break;
    case 11: map_shared(dynamic, 1); break;
  }
}
extern "C" void run(int64_t which, float* memory) { launch(mistake, 1, 64, 256, nullptr, which, memory); }
extern "C" void run_large(int64_t n_threads, int64_t n_bytes) {
  launch(mistake, 1, static_cast<unsigned>(n_threads), n_bytes, nullptr, 99, nullptr);
}
"""


@pytest.mark.parametrize(
    ("which", "match"),
    list(
        enumerate(
            [
                "40 at __syncthreads .*24 at warp_ballot|8 at __syncthreads|wait for others",
                "threads that must meet are at",
                "index out of an array's bounds at main.cpp",
                "behind its dynamic shared memory",
                "misaligned",
                "cp_async: address is not aligned",
                "before its cp.async were waited for",
                "wgmma without wgmma_fence",
                "not all threads run",
                "null pointer",
                "shift by too much",
                "no such block in the cluster",
            ]
        )
    ),
)
def test_mistakes_are_told(which: int, match: str) -> None:
    library = emulator.build(MISTAKES)
    with pytest.raises(emulator.EmulatorError, match=match):
        library.run(which, torch.zeros(64))
    library.run(99, None)  # and the next launch is a new one


@pytest.mark.parametrize(("n_threads", "n_bytes"), [(1025, 0), (64, 228 * 1024)])
def test_refuses_what_no_device_can_launch(n_threads: int, n_bytes: int) -> None:
    with pytest.raises(emulator.EmulatorError, match=r"1 to 1024 threads|more shared memory"):
        emulator.build(MISTAKES).run_large(n_threads, n_bytes)


MMA = """
using namespace clmfast;
// D 16 x 8 = A 16 x 32, rows of k, times B 32 x 8 given by its columns (or, to be transposed, by its rows).
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d, int64_t is_fp16, int64_t is_transposed) {
  uint16_t* tile = dynamic_shared<uint16_t>();  // [16 + 8][32] or [16 + 32][8]
  for (int i = lane_id(); i < 16 * 32 / 8; i += 32) cp_async_16(tile + 8 * i, a + 8 * i);
  for (int i = lane_id(); i < 8 * 32 / 8; i += 32) cp_async_16(tile + 512 + 8 * i, b + 8 * i);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  float sum[4] = {};
  uint32_t of_b[4];  // all 32 of k
  if (is_transposed) ldmatrix_x4_trans(of_b, tile + 512 + lane_id() * 8);
  else ldmatrix_x4(of_b, tile + 512 + lane_id() % 8 * 32 + lane_id() / 8 * 8);
  for (int k = 0; k < 32; k += 16) {
    uint32_t of_a[4];
    ldmatrix_x4(of_a, tile + lane_id() % 16 * 32 + k + lane_id() / 16 * 8);
    if (is_fp16) mma_m16n8k16_fp16(sum, of_a, of_b + k / 8, sum);
    else mma_m16n8k16_bf16(sum, of_a, of_b + k / 8, sum);
  }
  for (int i = 0; i < 4; ++i) d[(lane_id() / 4 + i / 2 * 8) * 8 + lane_id() % 4 * 2 + i % 2] = sum[i];
}
__global__ void multiply_tf32(const float* a, const float* b, float* d) {  // A 16 x 8, B 8 x 8 given by its columns
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint32_t of_a[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                            to_tf32(a[(g + 8) * 8 + t + 4])};
  const uint32_t of_b[2] = {to_tf32(b[g * 8 + t]), to_tf32(b[g * 8 + t + 4])};
  float sum[4] = {};
  mma_m16n8k8_tf32(sum, of_a, of_b, sum);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sum[i];
}
extern "C" void run(const uint16_t* a, const uint16_t* b, float* d, int64_t is_fp16, int64_t is_transposed) {
  launch(multiply, 1, 32, 1536, nullptr, a, b, d, is_fp16, is_transposed);
}
extern "C" void run_tf32(const float* a, const float* b, float* d) {
  launch(multiply_tf32, 1, 32, 0, nullptr, a, b, d);
}
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_mma(dtype: torch.dtype, is_transposed: bool) -> None:
    library = emulator.build(MMA)
    a, b, d = bf16(16, 32).to(dtype), bf16(8, 32, seed=1).to(dtype), torch.empty(16, 8)
    for _ in library.seeds(2):
        library.run(
            a, b.T.contiguous() if is_transposed else b, d.fill_(float("nan")), dtype == torch.float16, is_transposed
        )
        exact = a.double() @ b.double().T
        bound = 2.0**-22 * 34 * (a.double().abs() @ b.double().abs().T)
        assert ((d - exact).abs() <= bound).all()


def test_mma_tf32() -> None:
    a, b, d = torch.randn(16, 8), torch.randn(8, 8), torch.full((16, 8), float("nan"))
    emulator.build(MMA).run_tf32(a, b, d)
    assert torch.allclose(d, a @ b.T, atol=2e-2)
    assert not torch.equal(d, a @ b.T)


WGMMA = """
using namespace clmfast;
template <int N>
__global__ void multiply(const uint16_t* a, const uint16_t* b, float* d, int64_t width, int64_t is_in_registers) {
  // Rows of 64 elements: 128 bytes, which at a smaller width are two or four matrices side by side.
  unsigned char* tile = dynamic_shared<unsigned char>();
  auto place = [width](int row, int k) {  // of an element, in bytes
    if (width == 0) return row / 8 * 1024 + k / 8 * 128 + row % 8 * 16 + k % 8 * 2;
    const int w = static_cast<int>(width), at = row % 8 * w + k * 2 % w;
    return k * 2 / w * (N + 64) * w + row / 8 * 8 * w + (at ^ (at >> 7 & (w / 16 - 1)) << 4);
  };
  for (int i = threadIdx.x; i < (64 + N) * 64; i += 128) {
    const uint16_t x = i < 64 * 64 ? a[i] : b[i - 64 * 64];
    *reinterpret_cast<uint16_t*>(tile + place(i / 64, i % 64)) = x;
  }
  fence_async_shared();
  __syncthreads();
  const Swizzle swizzle = width == 128  ? Swizzle::b128
                          : width == 64 ? Swizzle::b64
                          : width == 32 ? Swizzle::b32
                                        : Swizzle::none;
  const int row_block = width ? static_cast<int>(width) * 8 : 1024;
  float sum[N / 2];
  wgmma_fence();
  for (int k = 0; k < 64; k += 16) {
    const int at = width ? static_cast<int>(k * 2 / width * (N + 64) * width + k * 2 % width) : k / 8 * 128;
    const uint64_t of_b = matrix_descriptor(tile + 64 / 8 * row_block + at, swizzle, row_block, 128);
    if (is_in_registers) {
      const int g = lane_id() / 4 + warp_id() * 16, t = k + lane_id() % 4 * 2;
      auto two = [a](int row, int k) { return *reinterpret_cast<const uint32_t*>(a + row * 64 + k); };
      const uint32_t of_a[4] = {two(g, t), two(g + 8, t), two(g, t + 8), two(g + 8, t + 8)};
      wgmma_bf16<N>(sum, of_a, of_b, k > 0);
    } else {
      wgmma_bf16<N>(sum, matrix_descriptor(tile + at, swizzle, row_block, 128), of_b, k > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_keep(sum);
  for (int i = 0; i < N / 2; ++i)
    d[(warp_id() * 16 + lane_id() / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane_id() % 4 * 2 + i % 2] = sum[i];
}
extern "C" void run(const uint16_t* a, const uint16_t* b, float* d, int64_t N, int64_t width, int64_t is_in_registers) {
  auto kernel = N == 64 ? multiply<64> : multiply<128>;
  launch(kernel, 1, 128, (64 + N) * 128, nullptr, a, b, d, width, is_in_registers);
}
"""


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("is_in_registers", [False, True])
def test_wgmma(width: int, is_in_registers: bool) -> None:
    library = emulator.build(WGMMA)
    for N in (64, 128):
        a, b, d = bf16(64, 64), bf16(N, 64, seed=1), torch.full((64, N), float("nan"))
        library.run(a, b, d, N, width, is_in_registers)
        bound = 2.0**-22 * 68 * (a.double().abs() @ b.double().abs().T)
        assert ((d - a.double() @ b.double().T).abs() <= bound).all()


CLUSTER = """
using namespace clmfast;
struct Part { double sum; };
__global__ void add(const double* x, int64_t n, double* out) {
  Part& part = static_shared<Part>();
  const int i = blockIdx.x * 32 + threadIdx.x;
  const double sum = warp_sum(i < n ? x[i] : 0);
  if (threadIdx.x == 0) part.sum = sum;
  cluster_sync();
  if (threadIdx.x == 0) {
    double all = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) all += map_shared(&part, rank)->sum;
    out[blockIdx.x] = all;
  }
  END
}
extern "C" void run(const double* x, int64_t n, int64_t cluster, int64_t n_blocks, double* out) {
  launch_cluster(add, static_cast<unsigned>(cluster), static_cast<unsigned>(n_blocks), 32, 0, nullptr, x, n, out);
}
"""


@pytest.mark.parametrize("end", ["cluster_sync();", ""])
def test_sum_of_a_cluster(end: str) -> None:
    library = emulator.build(CLUSTER.replace("END", end))
    x, found = torch.randn(500, dtype=torch.float64), []
    for _ in library.seeds(8):
        out = torch.full((16,), float("nan"), dtype=torch.float64)
        library.run(x, 500, 4, 16, out)
        expected = torch.cat([x, torch.zeros(12)]).view(4, 128).sum(1).repeat_interleave(4)
        found.append(torch.allclose(out, expected))
    # Without the second meeting a block may end before the others have read its part.
    assert all(found) if end else not all(found)


def test_clusters_need_a_device_that_has_them() -> None:
    library = emulator.build(CLUSTER.replace("END", ""))
    library.reset(capability=80)
    with pytest.raises(emulator.EmulatorError, match="clusters on a device that has none"):
        library.run(torch.zeros(1), 1, 4, 4, torch.zeros(4))


BULK = """
using namespace clmfast;
struct Tile { alignas(16) float x[2][64]; Mbarrier barrier; };
__global__ void copy(const float* from, int64_t n, float* to) {
  Tile& tile = static_shared<Tile>();
  if (threadIdx.x == 0) mbarrier_init(&tile.barrier, 1), mbarrier_init_fence();
  __syncthreads();
  for (int64_t i = 0; i < n; ++i) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expecting(&tile.barrier, 256);
      copy_bulk(tile.x[i % 2], from + 64 * i, 256, &tile.barrier);
    }
    WAIT
    to[64 * i + threadIdx.x] = tile.x[i % 2][threadIdx.x];
    __syncthreads();
  }
}
extern "C" void run(const float* from, int64_t n, float* to) { launch(copy, 1, 64, 0, nullptr, from, n, to); }
"""


@pytest.mark.parametrize("wait", ["mbarrier_wait(&tile.barrier, i % 2);", "__syncthreads();"])
def test_bulk_copies(wait: str) -> None:
    library = emulator.build(BULK.replace("WAIT", wait))
    x, y = np.arange(320, dtype=np.float32), np.zeros(320, dtype=np.float32)
    if "mbarrier" in wait:
        library.run(x, 5, y)
        assert np.array_equal(x, y)
    else:
        with pytest.raises(emulator.EmulatorError, match="more arrivals"):
            library.run(x, 5, y)
        library.run(x, 1, y)
        assert not np.array_equal(x[:64], y[:64])


def test_mbarrier_that_nobody_completes() -> None:
    library = emulator.build(BULK.replace("WAIT", "mbarrier_wait(&tile.barrier, 0); mbarrier_wait(&tile.barrier, 1);"))
    with pytest.raises(emulator.EmulatorError, match="waits for ever"):
        library.run(np.zeros(64, dtype=np.float32), 1, np.zeros(64, dtype=np.float32))


ROUNDING = """
extern "C" void run(const float* a, const float* b, int64_t n, float* up, float* down) {
  for (int64_t i = 0; i < n; ++i) up[i] = __fadd_ru(a[i], b[i]), down[i] = __fadd_rd(a[i], b[i]);
}
"""


def test_directed_sums() -> None:
    generator = np.random.default_rng(0)
    a = (generator.standard_normal(5000) * 2.0 ** generator.integers(-18, 18, 5000)).astype(np.float32)
    b = (generator.standard_normal(5000) * 2.0 ** generator.integers(-18, 18, 5000)).astype(np.float32)
    up, down = np.empty_like(a), np.empty_like(a)
    emulator.build(ROUNDING).run(a, b, 5000, up, down)
    exact = a.astype(np.longdouble) + b  # 64 bits: exact for these exponents
    assert (down <= exact).all() and (np.nextafter(down, np.float32(np.inf)) > exact).all()
    assert (up >= exact).all() and (np.nextafter(up, np.float32(-np.inf)) < exact).all()

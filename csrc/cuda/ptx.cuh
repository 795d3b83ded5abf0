// The instructions that CUDA C++ has no name for, and the collectives of warps and clusters: all inline PTX is here.
//
// Kernels call these and write no asm, no __shared__ and no __shfl themselves: the tests then run the same kernels on a
// machine without a GPU, by putting another file of this name in front of this one (tests/emulator).
//
// A function that the target lacks traps when it is called. wgmma is sm_90a alone, clusters and bulk copies are sm_90.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace clmfast {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CLMFAST_SM90A(...) __VA_ARGS__
#else
#define CLMFAST_SM90A(...) __trap()
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CLMFAST_SM90(...) __VA_ARGS__
#else
#define CLMFAST_SM90(...) __trap()
#endif

// ---- shared memory

// The shared memory that the launch asked for, aligned to 1024 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char clmfast_dynamic_shared[];
  return reinterpret_cast<T*>(clmfast_dynamic_shared);
}

// One T per block, without a value at first. The same T is the same memory.
template <class T>
__device__ __forceinline__ T& static_shared() {
  __shared__ T value;
  return value;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- warps: all threads of a warp that are still running take part

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31); }  // in blocks of one dimension
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

constexpr unsigned WARP = 0xffffffff;

template <class T>
__device__ __forceinline__ T warp_shuffle(T x, int lane) {
  return __shfl_sync(WARP, x, lane);
}
template <class T>
__device__ __forceinline__ T warp_shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(WARP, x, mask);
}
// From `delta` lanes above; the own value where there is none.
template <class T>
__device__ __forceinline__ T warp_shuffle_down(T x, int delta) {
  return __shfl_down_sync(WARP, x, delta);
}
template <class T>
__device__ __forceinline__ T warp_shuffle_up(T x, int delta) {
  return __shfl_up_sync(WARP, x, delta);
}
__device__ __forceinline__ uint32_t warp_ballot(bool holds) { return __ballot_sync(WARP, holds); }
__device__ __forceinline__ bool warp_any(bool holds) { return __any_sync(WARP, holds); }
__device__ __forceinline__ bool warp_all(bool holds) { return __all_sync(WARP, holds); }
__device__ __forceinline__ uint32_t warp_match_any(uint32_t x) { return __match_any_sync(WARP, x); }

// combine(a, b) of all lanes' x in every lane: pairs at distance 16, 8, 4, 2, 1, so of one order.
template <class T, class F>
__device__ __forceinline__ T warp_reduce(T x, const F& combine) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = combine(x, warp_shuffle_xor(x, mask));
  return x;
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce(x, [](T a, T b) { return a + b; });
}
template <class T>
__device__ __forceinline__ T warp_max(T x) {
  return warp_reduce(x, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
__device__ __forceinline__ T warp_min(T x) {
  return warp_reduce(x, [](T a, T b) { return b < a ? b : a; });
}

// __syncthreads among `n_threads` (whole warps) that name the same barrier, 1..15.
__device__ __forceinline__ void barrier_sync(int barrier, int n_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(n_threads) : "memory");
}

// Keeps the compiler from computing, and holding in registers, what follows from x before this place.
__device__ __forceinline__ void compute_here(int& x) { asm volatile("" : "+r"(x)); }

// Atomic sums in global memory whose result is not asked for: one instruction. Of an address that the compiler cannot
// tell from one in shared memory atomicAdd takes twenty. (A generic address of global memory is the global one.)
__device__ __forceinline__ void add_global(double* to, double x) {
  asm volatile("red.global.add.f64 [%0], %1;" ::"l"(to), "d"(x) : "memory");
}
__device__ __forceinline__ void add_global(int32_t* to, int32_t x) {
  asm volatile("red.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// ---- cp.async: 16 bytes from global to shared memory, both aligned to 16

__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)), "l"(from) : "memory");
}
// The first n_bytes <= 16 of them, and zeros behind. With 0 nothing is read, but `from` must point at something.
__device__ __forceinline__ void cp_async_16(void* to_shared, const void* from, int n_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
               "r"(n_bytes)
               : "memory");
}
// 4 bytes, or with has_it false a zero.
__device__ __forceinline__ void cp_async_4(void* to_shared, const void* from, bool has_it = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to_shared)), "l"(from),
               "r"(has_it ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the latest N groups of this thread are there; other threads see them after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- mma.sync. Lane l, with g = l / 4 and t = l % 4, holds of
//   A 16 x 16 (16 bit)  a[0] (g, 2t..2t+1)  a[1] (g + 8, same)  a[2] (g, 2t+8..2t+9)  a[3] (g + 8, same)
//   B 16 x  8 (16 bit)  b[0] (2t..2t+1, g)  b[1] (2t+8..2t+9, g)
//   C, D 16 x 8 float32 d[0] (g, 2t)  d[1] (g, 2t+1)  d[2] (g + 8, 2t)  d[3] (g + 8, 2t+1)
// of two in a register the lower half comes first. ldmatrix brings rows of 16 bytes into these places.

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, and receives in r[m]
// elements (g, 2t..2t+1) of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t* r, const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
// Transposed: elements (2t..2t+1, g).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t* r, const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
// Two matrices; lanes 0..15 give the addresses.
__device__ __forceinline__ void ldmatrix_x2(uint32_t* r, const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d = a b + c, d and c may be the same four numbers.
#define CLMFAST_MMA(TYPE)                                                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                          \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"                      \
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),       \
                 "f"(c[2]), "f"(c[3]))
__device__ __forceinline__ void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  CLMFAST_MMA("bf16");
}
__device__ __forceinline__ void mma_m16n8k16_fp16(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  CLMFAST_MMA("f16");
}
#undef CLMFAST_MMA

// A 16 x 8: a[0] (g, t)  a[1] (g + 8, t)  a[2] (g, t + 4)  a[3] (g + 8, t + 4); B 8 x 8: b[0] (t, g)  b[1] (t + 4, g);
// C and D as above. Of a float32 the lowest 13 bits are not looked at.
__device__ __forceinline__ void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, "
      "%12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// The nearest tf32, as a float32 whose lowest 13 bits are zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// ---- wgmma: 4 warps multiply A 64 x 16 by B 16 x N, 16-bit elements, sums in float32.
// Warp w of the four, lane l: d[4 j + 0..1] is (16 w + g, 8 j + 2t..2t+1), d[4 j + 2..3] is (16 w + g + 8, same).
// A and B^T lie in shared memory, rows of k side by side, in one of the layouts below, or A's fragments in registers as
// for mma above. Order of calls: fence; multiply ...; commit; wait<0>, and only then read d or write to A and B again.

enum class Swizzle : uint64_t { none = 0, b128 = 1, b64 = 2, b32 = 3 };

// Describes rows of k: of b128 (b64, b32) a row is 128 (64, 32) bytes, 8 rows form a block that starts at a multiple of
// 1024 (512, 256) bytes, the next 8 rows lie `row_block_bytes` behind, and within a block the 16-byte chunk c of row r
// stands at c ^ (r % 8) (c ^ (r / 2 % 4), c ^ (r / 4 % 2)). To go 16 elements along k, point 32 bytes further.
// Of none, 8 rows x 16 bytes lie together in 128 bytes; the next 8 elements of k are `k_block_bytes` behind.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, Swizzle swizzle, int row_block_bytes,
                                                      int k_block_bytes = 16) {
  return static_cast<uint64_t>(shared_address(shared) >> 4 & 0x3fff) |
         static_cast<uint64_t>(k_block_bytes >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(row_block_bytes >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

// Before the first wgmma, and after registers of a or d were written.
__device__ __forceinline__ void wgmma_fence() {
  CLMFAST_SM90A(asm volatile("wgmma.fence.sync.aligned;" ::: "memory"));
}
__device__ __forceinline__ void wgmma_commit() {
  CLMFAST_SM90A(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"));
}
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  CLMFAST_SM90A(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"));
}
// Keeps the compiler from moving reads and writes of d over a fence or a wait.
template <int N>
__device__ __forceinline__ void wgmma_keep(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Between ordinary writes to shared memory and wgmma (or bulk copies) that use it: in each thread that wrote, before the
// barrier.
__device__ __forceinline__ void fence_async_shared() {
  CLMFAST_SM90(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
}

// The operands d of an asm text, and their names there.
#define CLMFAST_D8(i)                                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define CLMFAST_D32(i) CLMFAST_D8(i), CLMFAST_D8(i + 8), CLMFAST_D8(i + 16), CLMFAST_D8(i + 24)
#define CLMFAST_D64(i) CLMFAST_D32(i), CLMFAST_D32(i + 32)
#define CLMFAST_TEN(t)                                                                                      \
  ", %" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define CLMFAST_N10 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define CLMFAST_N32 CLMFAST_N10 CLMFAST_TEN(1) CLMFAST_TEN(2) ", %30, %31"
#define CLMFAST_N60 CLMFAST_N10 CLMFAST_TEN(1) CLMFAST_TEN(2) CLMFAST_TEN(3) CLMFAST_TEN(4) CLMFAST_TEN(5)
#define CLMFAST_N64 CLMFAST_N60 ", %60, %61, %62, %63"
#define CLMFAST_N128                                                                                       \
  CLMFAST_N60 CLMFAST_TEN(6) CLMFAST_TEN(7) CLMFAST_TEN(8) CLMFAST_TEN(9) CLMFAST_TEN(10) CLMFAST_TEN(11)  \
      ", %120, %121, %122, %123, %124, %125, %126, %127"

// d = a b, plus d where the operand named IS_ADDED is not 0. Behind the names: d's operands : a, b, is_added.
#define CLMFAST_WGMMA(SHAPE, TYPE, NUMBERS, A, B, IS_ADDED, TRANSPOSED, ...)                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " IS_ADDED ", 0;\nwgmma.mma_async.sync.aligned." SHAPE      \
               ".f32." TYPE "." TYPE " {" NUMBERS "}, " A ", " B ", p, 1, 1, " TRANSPOSED ";\n}\n"           \
               : __VA_ARGS__                                                                                 \
               : "memory")
#define CLMFAST_SHARED "l"(a), "l"(b), "r"(static_cast<int>(is_added))
#define CLMFAST_WGMMA_SHARED(TYPE)                                                                           \
  if constexpr (N == 64)                                                                                     \
    CLMFAST_WGMMA("m64n64k16", TYPE, CLMFAST_N32, "%32", "%33", "%34", "0, 0", CLMFAST_D32(0)                \
                  : CLMFAST_SHARED);                                                                         \
  if constexpr (N == 128)                                                                                    \
    CLMFAST_WGMMA("m64n128k16", TYPE, CLMFAST_N64, "%64", "%65", "%66", "0, 0", CLMFAST_D64(0)               \
                  : CLMFAST_SHARED);                                                                         \
  if constexpr (N == 256)                                                                                    \
    CLMFAST_WGMMA("m64n256k16", TYPE, CLMFAST_N128, "%128", "%129", "%130", "0, 0", CLMFAST_D64(0),          \
                  CLMFAST_D64(64)                                                                            \
                  : CLMFAST_SHARED)
#define CLMFAST_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(is_added))
#define CLMFAST_FOUR(i, j, k, l) "{%" #i ", %" #j ", %" #k ", %" #l "}"
#define CLMFAST_WGMMA_REGISTERS(TYPE)                                                                        \
  if constexpr (N == 64)                                                                                     \
    CLMFAST_WGMMA("m64n64k16", TYPE, CLMFAST_N32, CLMFAST_FOUR(32, 33, 34, 35), "%36", "%37", "0",           \
                  CLMFAST_D32(0)                                                                             \
                  : CLMFAST_REGISTERS);                                                                      \
  if constexpr (N == 128)                                                                                    \
    CLMFAST_WGMMA("m64n128k16", TYPE, CLMFAST_N64, CLMFAST_FOUR(64, 65, 66, 67), "%68", "%69", "0",          \
                  CLMFAST_D64(0)                                                                             \
                  : CLMFAST_REGISTERS);                                                                      \
  if constexpr (N == 256)                                                                                    \
    CLMFAST_WGMMA("m64n256k16", TYPE, CLMFAST_N128, CLMFAST_FOUR(128, 129, 130, 131), "%132", "%133", "0",   \
                  CLMFAST_D64(0), CLMFAST_D64(64)                                                            \
                  : CLMFAST_REGISTERS)

// a and b by matrix_descriptor; is_added = false starts a new sum.
template <int N>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], uint64_t a, uint64_t b, bool is_added) {
  static_assert(N == 64 || N == 128 || N == 256, "");
  CLMFAST_SM90A(CLMFAST_WGMMA_SHARED("bf16"));
}
template <int N>
__device__ __forceinline__ void wgmma_fp16(float (&d)[N / 2], uint64_t a, uint64_t b, bool is_added) {
  static_assert(N == 64 || N == 128 || N == 256, "");
  CLMFAST_SM90A(CLMFAST_WGMMA_SHARED("f16"));
}
// a: the calling warp's 16 rows as fragments of mma.
template <int N>
__device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  static_assert(N == 64 || N == 128 || N == 256, "");
  CLMFAST_SM90A(CLMFAST_WGMMA_REGISTERS("bf16"));
}
template <int N>
__device__ __forceinline__ void wgmma_fp16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool is_added) {
  static_assert(N == 64 || N == 128 || N == 256, "");
  CLMFAST_SM90A(CLMFAST_WGMMA_REGISTERS("f16"));
}
#undef CLMFAST_D8
#undef CLMFAST_D32
#undef CLMFAST_D64
#undef CLMFAST_TEN
#undef CLMFAST_N10
#undef CLMFAST_N32
#undef CLMFAST_N60
#undef CLMFAST_N64
#undef CLMFAST_N128
#undef CLMFAST_WGMMA
#undef CLMFAST_SHARED
#undef CLMFAST_WGMMA_SHARED
#undef CLMFAST_REGISTERS
#undef CLMFAST_FOUR
#undef CLMFAST_WGMMA_REGISTERS

// How many registers a thread of this warpgroup keeps: those that one gives up another may ask for. A multiple of 8.
template <int N>
__device__ __forceinline__ void give_up_registers() {
  CLMFAST_SM90A(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)));
}
template <int N>
__device__ __forceinline__ void ask_for_registers() {
  CLMFAST_SM90A(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)));
}

// ---- mbarrier: counts arrivals, and bytes of bulk copies, phase after phase. 8 bytes of shared memory.

using Mbarrier = uint64_t;

// By one thread; then mbarrier_init_fence, and a barrier, before others use it.
__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, int n_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(n_arrivals) : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  CLMFAST_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"));
}
__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}\n" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and makes the phase wait for n_bytes more.
__device__ __forceinline__ void mbarrier_arrive_expecting(Mbarrier* barrier, int n_bytes) {
  CLMFAST_SM90(asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}\n" ::"r"(
                                shared_address(barrier)),
                            "r"(n_bytes)
                            : "memory"));
}
// Until the phase of this parity has ended: 0 for the first, then 1, 0, ...
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, int parity) {
  CLMFAST_SM90(asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
                            "WAIT;\n}\n" ::"r"(shared_address(barrier)),
                            "r"(parity)
                            : "memory"));
}
// One thread copies n_bytes from global to shared memory; addresses and size are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to_shared, const void* from, int n_bytes, Mbarrier* barrier) {
  CLMFAST_SM90(asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                                shared_address(to_shared)),
                            "l"(from), "r"(n_bytes), "r"(shared_address(barrier))
                            : "memory"));
}

// ---- clusters of blocks

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  CLMFAST_SM90(asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank)));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  CLMFAST_SM90(asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(size)));
  return size;
}
// Of all threads of all blocks of the cluster. A block must not end while another may still read its shared memory.
__device__ __forceinline__ void cluster_sync() {
  CLMFAST_SM90(
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory"));
}
// Where what `shared` points at lies in the block of that rank: for ordinary loads, stores and atomics.
template <class T>
__device__ __forceinline__ T* map_shared(T* shared, unsigned rank) {
  T* mapped = nullptr;
  CLMFAST_SM90(asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank)));
  return mapped;
}

#undef CLMFAST_SM90
#undef CLMFAST_SM90A

}  // namespace clmfast

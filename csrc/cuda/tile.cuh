// Two engines that multiply tiles of rows: mma.sync for every GPU from 8.0 on, wgmma for 9.0. Rows lie in shared memory
// in pieces of 64 halves, and both leave the products in the same places: every warp has 16 rows to itself.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace clmfast {

constexpr int PIECE = 64;              // halves of a row: 128 bytes, the widest swizzle
constexpr int PIECE_BYTES = 2 * PIECE;

// Where chunk c (16 bytes) of row r of a piece lies: eight rows of one chunk fall into different banks.
__device__ inline int chunk_place(int row, int chunk) { return row * PIECE_BYTES + ((chunk ^ (row & 7)) * 16); }

// Copies a piece of ROWS rows that are `stride` halves apart.
template <int ROWS, int THREADS>
__device__ inline void load_piece(unsigned char* to, const __half* from, int64_t stride) {
  static_assert(ROWS * 8 % THREADS == 0, "");
#pragma unroll
  for (int i = 0; i < ROWS * 8 / THREADS; ++i) {
    const int row = (static_cast<int>(threadIdx.x) + i * THREADS) / 8, chunk = threadIdx.x % 8;
    cp_async_16(to + chunk_place(row, chunk), from + row * stride + chunk * 8);
  }
}

// products[4 j + e] of lane 4 g + t: of row g (e < 2) or g + 8 of the warp and column 8 j + 2 t + e % 2.
struct MmaEngine {
  static constexpr int ROWS = 64, COLUMNS = 64, THREADS = 128;

  static __device__ void multiply(float (&products)[COLUMNS / 2], const unsigned char* a, const unsigned char* b,
                                  bool is_first) {
    const int lane = lane_id();
    if (is_first)
#pragma unroll
      for (float& product : products) product = 0;
#pragma unroll
    for (int k = 0; k < PIECE / 16; ++k) {
      uint32_t of_a[4];
      ldmatrix_x4(of_a, a + chunk_place(warp_id() * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j += 2) {
        uint32_t of_b[4];
        ldmatrix_x4(of_b, b + chunk_place(8 * j + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        mma_m16n8k16_fp16(&products[4 * j], of_a, of_b, &products[4 * j]);
        mma_m16n8k16_fp16(&products[4 * j + 4], of_a, of_b + 2, &products[4 * j + 4]);
      }
    }
  }
  static __device__ void copied() {}
  template <int N>
  static __device__ void wait(float (&)[COLUMNS / 2]) {}
};

// The products of the latest pieces are still under way when multiply returns.
struct WgmmaEngine {
  static constexpr int ROWS = 128, COLUMNS = 128, THREADS = 256;

  static __device__ void multiply(float (&products)[COLUMNS / 2], const unsigned char* a, const unsigned char* b,
                                  bool is_first) {
    a += warp_id() / 4 * 64 * PIECE_BYTES;  // the rows of this warpgroup
    wgmma_keep(products);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < PIECE / 16; ++k)
      wgmma_fp16<COLUMNS>(products, matrix_descriptor(a + 32 * k, Swizzle::b128, 8 * PIECE_BYTES),
                          matrix_descriptor(b + 32 * k, Swizzle::b128, 8 * PIECE_BYTES), !is_first || k > 0);
    wgmma_commit();
  }
  // What this thread has copied is for wgmma to read.
  static __device__ void copied() { fence_async_shared(); }
  // Until at most N pieces are under way.
  template <int N>
  static __device__ void wait(float (&products)[COLUMNS / 2]) {
    wgmma_wait<N>();
    wgmma_keep(products);
  }
};

}  // namespace clmfast

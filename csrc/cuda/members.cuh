// Stream compaction: a block lists those of its next items that belong to it, in their order.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace clmfast {

template <int THREADS>
struct Members {
  static constexpr int PER_THREAD = 8;                  // whose loads are under way together
  static constexpr int AT_ONCE = PER_THREAD * THREADS;  // items of one call of find
  static constexpr int WARPS = THREADS / 32;

  int n_of_warp[WARPS];
  int item[AT_ONCE];

  // Of items [first, min(first + AT_ONCE, n_items)) those that is_member(i); returns how many, and `item` has them less
  // `first`, until all threads have come to the next call.
  template <class IsMember>
  __device__ int find(int64_t first, int64_t n_items, const IsMember& is_member) {
    bool is_mine[PER_THREAD];
    uint32_t of_warp[PER_THREAD];
    int n_mine = 0;
    const int begin = warp_id() * PER_THREAD * 32 + lane_id();  // a warp's items lie together
#pragma unroll
    for (int e = 0; e < PER_THREAD; ++e) {
      const int64_t i = first + begin + 32 * e;
      is_mine[e] = i < n_items && is_member(i);
    }
#pragma unroll
    for (int e = 0; e < PER_THREAD; ++e) {
      of_warp[e] = warp_ballot(is_mine[e]);
      n_mine += __popc(of_warp[e]);
    }
    if (lane_id() == 0) n_of_warp[warp_id()] = n_mine;
    __syncthreads();
    int at = 0, n = 0;
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp_id()) at += n_of_warp[w];
      n += n_of_warp[w];
    }
#pragma unroll
    for (int e = 0; e < PER_THREAD; ++e) {
      if (is_mine[e]) item[at + __popc(of_warp[e] & ((uint32_t{1} << lane_id()) - 1))] = begin + 32 * e;
      at += __popc(of_warp[e]);
    }
    __syncthreads();
    return n;
  }
};

}  // namespace clmfast

// Sorted lists of a warp: 32 R entries, entry 32 r + lane in register r of that lane.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace clmfast {

// A number and an index as one integer that sorts by the number, NaN excepted, and then by the index.
using Entry = uint64_t;
constexpr Entry NO_ENTRY = ~Entry{0};

__device__ inline Entry make_entry(float number, int32_t index) {
  const uint32_t bits = __float_as_uint(number);
  const uint32_t ordered = bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
  return static_cast<Entry>(ordered) << 32 | static_cast<uint32_t>(index);
}

// NaN of NO_ENTRY, which fminf passes over.
__device__ inline float number_of(Entry entry) {
  const uint32_t ordered = static_cast<uint32_t>(entry >> 32);
  return __uint_as_float(ordered ^ (ordered >> 31 ? 0x80000000u : 0xffffffffu));
}

__device__ inline int32_t index_of(Entry entry) { return static_cast<int32_t>(entry & 0xffffffff); }

__device__ inline Entry smaller(Entry a, Entry b) { return a < b ? a : b; }
__device__ inline Entry larger(Entry a, Entry b) { return a < b ? b : a; }

// A bitonic sequence of 32, sorted.
__device__ inline Entry merge_32(Entry x, int lane) {
#pragma unroll
  for (int h = 16; h >= 1; h /= 2) {
    const Entry other = warp_shuffle_xor(x, h);
    x = lane & h ? larger(x, other) : smaller(x, other);
  }
  return x;
}

__device__ inline Entry sort_32(Entry x, int lane) {
#pragma unroll
  for (int size = 2; size <= 16; size *= 2)
#pragma unroll
    for (int h = size / 2; h >= 1; h /= 2) {
      const Entry other = warp_shuffle_xor(x, h);
      x = !(lane & h) == !(lane & size) ? smaller(x, other) : larger(x, other);
    }
  return merge_32(x, lane);
}

// The 32 R smallest of a sorted list and 32 more entries in any order.
template <int R>
__device__ inline void take_32(Entry (&list)[R], Entry fresh, int lane) {
  // Against the list's end in reverse, the smaller ones are the 32 to keep, and bitonic.
  fresh = warp_shuffle(sort_32(fresh, lane), 31 - lane);
  list[R - 1] = smaller(list[R - 1], fresh);
  if (R > 1) {  // ascending, then descending: the whole is bitonic
    list[R - 1] = warp_shuffle(merge_32(list[R - 1], lane), 31 - lane);
#pragma unroll
    for (int h = R / 2; h >= 1; h /= 2)
#pragma unroll
      for (int r = 0; r < R; ++r)
        if (!(r & h)) {
          const Entry low = smaller(list[r], list[r | h]), high = larger(list[r], list[r | h]);
          list[r] = low, list[r | h] = high;
        }
  }
#pragma unroll
  for (int r = 0; r < R; ++r) list[r] = merge_32(list[r], lane);
}

}  // namespace clmfast

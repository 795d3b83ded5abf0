// Draws that are a pure function of what they are for, so that no order of computing shows in them.
#pragma once

#include <cstdint>

namespace clmfast {

// Uniform in [0, 1): a hash of its coordinates (the finalizer of splitmix64, Steele et al. 2014, once per coordinate).
inline double uniform(int64_t seed, int64_t set, int64_t restart, int64_t draw) {
  uint64_t hash = 0;
  for (int64_t x : {seed, set, restart, draw}) {
    hash += static_cast<uint64_t>(x) + 0x9e3779b97f4a7c15;
    hash = (hash ^ hash >> 30) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ hash >> 27) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  }
  return static_cast<double>(hash >> 11) * 0x1p-53;
}

}  // namespace clmfast

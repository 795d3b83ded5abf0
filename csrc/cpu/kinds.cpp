#include "kinds.h"

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "vector.h"

namespace clmfast {
namespace {

CLMFAST_BODY uint32_t hash_body(const float* row, int64_t D) {
  Vector<uint32_t> lane = {};
  for (int64_t d = 0; d < D; d += LANES) {
    uint32_t bits[LANES] = {};
    copy<LANES>(row + d, std::min(LANES, D - d), reinterpret_cast<float*>(bits));
    lane = (lane ^ load<uint32_t>(bits)) * 0x9e3779b1u;
    lane ^= lane >> 15;
  }
  for (uint32_t l = 0; l < LANES; ++l) lane[l] *= 2 * l + 1;
  return sum_of<uint32_t>(lane);
}

CLMFAST_PER_ISA(uint32_t, hash, (const float* row, int64_t D), (row, D))

// Of rows all over them, are more than three quarters different? Their beginnings tell enough.
bool are_mostly_different(const float* rows, int64_t n, int64_t D) {
  constexpr int64_t SAMPLE = 64;
  if (n < 4 * SAMPLE) return false;
  uint32_t of_row[SAMPLE];
  for (int64_t i = 0; i < SAMPLE; ++i) of_row[i] = hash(rows + i * n / SAMPLE * D, std::min(D, LANES));
  std::sort(of_row, of_row + SAMPLE);
  return std::unique(of_row, of_row + SAMPLE) - of_row > SAMPLE * 3 / 4;
}

}  // namespace

std::vector<std::vector<int64_t>> kinds_of(const float* rows, int64_t n, int64_t D, int64_t most) {
  if (are_mostly_different(rows, n, D)) return {};
  constexpr int64_t NONE = -1;
  std::vector<std::vector<int64_t>> kinds;
  uint64_t n_slots = 2;
  while (static_cast<int64_t>(n_slots) < 2 * std::min(n, most + 1)) n_slots *= 2;
  std::vector<int64_t> kind_in(n_slots, NONE);
  for (int64_t i = 0; i < n; ++i) {
    const float* row = rows + i * D;
    uint64_t at = hash(row, D) & (n_slots - 1);
    auto is_here = [&] { return std::memcmp(row, rows + kinds[kind_in[at]][0] * D, D * sizeof *row) == 0; };
    while (kind_in[at] != NONE && !is_here()) at = (at + 1) & (n_slots - 1);
    if (kind_in[at] == NONE) {
      if (static_cast<int64_t>(kinds.size()) == most) return {};
      kind_in[at] = static_cast<int64_t>(kinds.size());
      kinds.emplace_back();
    }
    kinds[kind_in[at]].push_back(i);
  }
  return kinds;
}

}  // namespace clmfast

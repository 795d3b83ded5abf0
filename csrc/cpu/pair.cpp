#include "pair.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

namespace clmfast {

constexpr int LANES = 16;

CLMFAST_BODY void add_squares(const float* a, const float* b, double* lane) {
  for (int l = 0; l < LANES; ++l) {
    double difference = static_cast<double>(a[l]) - static_cast<double>(b[l]);
    lane[l] += difference * difference;
  }
}

CLMFAST_BODY double pair_dist2_body(const float* a, const float* b, int64_t D) {
  double lane[LANES] = {};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) add_squares(a + d, b + d, lane);
  if (d < D) {  // zeros behind the last coordinates add nothing
    float last_a[LANES] = {}, last_b[LANES] = {};
    std::memcpy(last_a, a + d, (D - d) * sizeof(float));
    std::memcpy(last_b, b + d, (D - d) * sizeof(float));
    add_squares(last_a, last_b, lane);
  }
  double eight[8], four[4];
  for (int l = 0; l < 8; ++l) eight[l] = lane[l] + lane[l + 8];
  for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

CLMFAST_BODY float row_reach_body(const float* row, int64_t D) {
  int32_t reach =
      0;  // of floats without their signs, the larger has the larger bits; infinity is above all, NaN above that
  for (int64_t d = 0; d < D; ++d) {
    int32_t bits;
    std::memcpy(&bits, row + d, sizeof bits);
    reach = std::max(reach, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &reach, sizeof value);
  return value;
}

CLMFAST_PER_ISA(double, pair_dist2, (const float* a, const float* b, int64_t D), (a, b, D))
CLMFAST_PER_ISA(float, row_reach, (const float* row, int64_t D), (row, D))

}  // namespace clmfast

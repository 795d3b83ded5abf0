#include "pair.h"

#include <algorithm>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace clmfast {

constexpr int LANES = 16;

// The first n < LANES numbers, and zeros, which add nothing, behind them.
struct Last {
  float value[LANES];

  CLMFAST_BODY Last(const float* from, int64_t n) {
    for (int l = 0; l < LANES; ++l) value[l] = l < n ? from[l] : 0;
  }
};

double dist2_baseline(const float* a, const float* b, int64_t D) {
  double lane[LANES] = {};
  for (int64_t d = 0; d < D; ++d) {
    const double difference = static_cast<double>(a[d]) - static_cast<double>(b[d]);
    lane[d % LANES] += difference * difference;
  }
  double eight[8], four[4];
  for (int l = 0; l < 8; ++l) eight[l] = lane[l] + lane[l + 8];
  for (int l = 0; l < 4; ++l) four[l] = eight[l] + eight[l + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

#if defined(__x86_64__)
// By intrinsics: GCC 12 clears 16 sums by a string instruction and widens two numbers at a time, half as fast.

CLMFAST_AVX2 inline __m256d four_of(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }

CLMFAST_AVX2 inline double sum_of_four(__m256d four) {
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

CLMFAST_AVX2 inline void add_squares_avx2(const float* a, const float* b, __m256d* sum) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const __m256d difference = _mm256_sub_pd(four_of(a + 4 * part), four_of(b + 4 * part));
    sum[part] = _mm256_add_pd(sum[part], _mm256_mul_pd(difference, difference));
  }
}

CLMFAST_AVX2 double dist2_avx2(const float* a, const float* b, int64_t D) {
  const __m256d zero = _mm256_setzero_pd();
  __m256d sum[4] = {zero, zero, zero, zero};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) add_squares_avx2(a + d, b + d, sum);
  if (d < D) add_squares_avx2(Last(a + d, D - d).value, Last(b + d, D - d).value, sum);
  return sum_of_four(_mm256_add_pd(_mm256_add_pd(sum[0], sum[2]), _mm256_add_pd(sum[1], sum[3])));
}

constexpr __mmask8 ALL = 0xff;  // of the forms without a mask, GCC 12 says that they read what is not set
CLMFAST_AVX512 inline __m512d eight_of(const float* from) {
  return _mm512_maskz_cvtps_pd(ALL, _mm256_loadu_ps(from));
}

CLMFAST_AVX512 inline void add_squares_avx512(const float* a, const float* b, __m512d* sum) {
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const __m512d difference = _mm512_sub_pd(eight_of(a + 8 * part), eight_of(b + 8 * part));
    sum[part] = _mm512_add_pd(sum[part], _mm512_mul_pd(difference, difference));
  }
}

CLMFAST_AVX512 double dist2_avx512(const float* a, const float* b, int64_t D) {
  __m512d sum[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) add_squares_avx512(a + d, b + d, sum);
  if (d < D) add_squares_avx512(Last(a + d, D - d).value, Last(b + d, D - d).value, sum);
  const __m512d eight = _mm512_add_pd(sum[0], sum[1]);
  const __m256d low = _mm512_maskz_extractf64x4_pd(ALL, eight, 0), high = _mm512_maskz_extractf64x4_pd(ALL, eight, 1);
  const __m256d four = _mm256_add_pd(low, high);
  return sum_of_four(four);
}
#else
constexpr auto dist2_avx2 = dist2_baseline, dist2_avx512 = dist2_baseline;
#endif


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

CLMFAST_PER_ISA(float, row_reach, (const float* row, int64_t D), (row, D))

double pair_dist2(const float* a, const float* b, int64_t D) {
  static const auto once = pick(dist2_baseline, dist2_avx2, dist2_avx512);
  return once(a, b, D);
}

}  // namespace clmfast

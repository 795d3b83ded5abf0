// Sixteen numbers as one value. The compiler lowers it to what the instruction set of the function has: one AVX-512
// register, two of AVX2, four of SSE; so a loop is written once, and cpu/isa.h compiles it for each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace clmfast {

constexpr int64_t LANES = 16;

// n <= N floats; where n = N, without a call.
template <int64_t N>
CLMFAST_BODY void copy(const float* from, int64_t n, float* to) {
  if (n == N) std::memcpy(to, from, N * sizeof(float));
  else std::memcpy(to, from, n * sizeof(float));
}

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(LANES * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;
typedef int32_t VectorI __attribute__((vector_size(LANES * sizeof(int32_t)), aligned(4), may_alias));

template <class T>
CLMFAST_BODY Vector<T> load(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
CLMFAST_BODY void store(T* to, Vector<T> x) {
  *reinterpret_cast<Vector<T>*>(to) = x;
}

// Lanes of x turned by n places.
#define CLMFAST_TURNED(x, n)                                                                                     \
  __builtin_shufflevector(x, x, (n) % 16, (n + 1) % 16, (n + 2) % 16, (n + 3) % 16, (n + 4) % 16, (n + 5) % 16,  \
                          (n + 6) % 16, (n + 7) % 16, (n + 8) % 16, (n + 9) % 16, (n + 10) % 16, (n + 11) % 16, \
                          (n + 12) % 16, (n + 13) % 16, (n + 14) % 16, (n + 15) % 16)

// In one fixed order, so that no sum depends on how it was compiled.
template <class T>
CLMFAST_BODY T sum_of(Vector<T> x) {
  x += CLMFAST_TURNED(x, 8);
  x += CLMFAST_TURNED(x, 4);
  x += CLMFAST_TURNED(x, 2);
  x += CLMFAST_TURNED(x, 1);
  return x[0];
}

template <class T>
CLMFAST_BODY Vector<T> larger(Vector<T> x, Vector<T> y) {
  return x > y ? x : y;
}

template <class T>
CLMFAST_BODY T largest_of(Vector<T> x) {
  x = larger<T>(x, CLMFAST_TURNED(x, 8));
  x = larger<T>(x, CLMFAST_TURNED(x, 4));
  x = larger<T>(x, CLMFAST_TURNED(x, 2));
  x = larger<T>(x, CLMFAST_TURNED(x, 1));
  return x[0];
}

// e^x to 2 ulp for float32 from -87 to 88, and what it is there beyond: 1.6e-38 below, 1.7e38 above; NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2. For vectors of any number of lanes, I being the int32 vector of as many.
template <class V, class I>
CLMFAST_BODY V exp_of(V x) {
  const float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  x = x < -87.0f ? V{} - 87.0f : x;
  x = x > 88.0f ? V{} + 88.0f : x;
  const V shifted = x * 1.44269504088896341f + MAGIC;
  const V n = shifted - MAGIC;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V e = r * 1.9875691500e-4f + 1.3981999507e-3f;  // the minimax polynomial of Cephes' expf
  e = e * r + 8.3334519073e-3f;
  e = e * r + 4.1665795894e-2f;
  e = e * r + 1.6666665459e-1f;
  e = e * r + 5.0000001201e-1f;
  e = e * (r * r) + r + 1.0f;
  return e * reinterpret_cast<V>((reinterpret_cast<I>(shifted) - 0x4B400000 + 127) << 23);
}

CLMFAST_BODY Vector<float> exp_of(Vector<float> x) { return exp_of<Vector<float>, VectorI>(x); }

CLMFAST_BODY Vector<double> exp_of(Vector<double> x) {
  Vector<double> e = {};
  for (int64_t i = 0; i < LANES; ++i) e[i] = std::exp(x[i]);
  return e;
}

}  // namespace clmfast

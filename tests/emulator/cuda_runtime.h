// What kernels and launchers use of CUDA C++, for a C++ compiler. What is missing here can be added as it is used.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__

#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::self->block->index)
#define blockDim (emulator::launched->block)
#define gridDim (emulator::launched->grid)
#define warpSize 32

// ---- host

using cudaStream_t = struct CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t n, cudaStream_t) {
  if (emulator::failure.empty()) std::memset(to, value, n);
  return cudaSuccess;
}

// ---- barriers

inline void __syncthreads() { emulator::meet_block("__syncthreads", false); }
inline int __syncthreads_count(int holds) { return emulator::meet_block("__syncthreads_count", holds != 0); }
inline int __syncthreads_or(int holds) { return emulator::meet_block("__syncthreads_or", holds != 0) > 0; }
inline int __syncthreads_and(int holds) { return emulator::meet_block("__syncthreads_and", holds == 0) == 0; }
inline void __syncwarp() {
  int nothing = 0;
  emulator::meet_warp("__syncwarp", nothing, [](int**) {});
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {
  emulator::runnable.insert(emulator::runnable.begin(), emulator::self);
  emulator::to_scheduler();
}
inline void __trap() { emulator::fail("__trap"); }

// ---- atomics, of the types that CUDA has them for

template <class T, class F>
T emulator_atomic(T* at, const F& next) {
  emulator::require_aligned(at, sizeof(T), "atomic");
  const T old = *at;
  *at = static_cast<T>(next(old));
  return old;
}
#define EMULATOR_ATOMIC(NAME, T, NEXT)                                           \
  inline T atomic##NAME(T* at, T x) {                                            \
    return emulator_atomic(at, [x](T old) -> T { return static_cast<T>(NEXT); }); \
  }                                                                              \
  inline T atomic##NAME##_block(T* at, T x) { return atomic##NAME(at, x); }
#define EMULATOR_INTEGER_ATOMICS(T)                \
  EMULATOR_ATOMIC(Exch, T, (void(old), x))         \
  EMULATOR_ATOMIC(Min, T, old < x ? old : x)       \
  EMULATOR_ATOMIC(Max, T, old < x ? x : old)       \
  EMULATOR_ATOMIC(And, T, old & x)                 \
  EMULATOR_ATOMIC(Or, T, old | x)                  \
  EMULATOR_ATOMIC(Xor, T, old ^ x)                 \
  inline T atomicCAS(T* at, T expected, T x) {     \
    return emulator_atomic(at, [=](T old) { return old == expected ? x : old; }); \
  }
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(Min, long long, old < x ? old : x)
EMULATOR_ATOMIC(Max, long long, old < x ? x : old)
EMULATOR_ATOMIC(Add, int, static_cast<unsigned>(old) + static_cast<unsigned>(x))
EMULATOR_ATOMIC(Add, unsigned, old + x)
EMULATOR_ATOMIC(Add, unsigned long long, old + x)
EMULATOR_ATOMIC(Add, float, old + x)
EMULATOR_ATOMIC(Add, double, old + x)
EMULATOR_ATOMIC(Sub, int, static_cast<unsigned>(old) - static_cast<unsigned>(x))
EMULATOR_ATOMIC(Sub, unsigned, old - x)

// ---- bits

template <class To, class From>
To emulator_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned char from[8], to[4];
  std::memcpy(from, &x, 4), std::memcpy(from + 4, &y, 4);
  for (int i = 0; i < 4; ++i) to[i] = from[selector >> 4 * i & 7];
  unsigned z;
  std::memcpy(&z, to, 4);
  return z;
}

// ---- memory

template <class T>
T __ldg(const T* at) {
  return *at;
}
template <class T>
T __ldcs(const T* at) {
  return *at;
}
template <class T>
T __ldcg(const T* at) {
  return *at;
}
template <class T>
void __stcs(T* at, T x) {
  *at = x;
}
template <class T>
void __stcg(T* at, T x) {
  *at = x;
}

// ---- arithmetic

using std::isfinite;
using std::isinf;
using std::isnan;

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
// As CUDA has them: of a number and a NaN, the number.
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(static_cast<double>(a), b); }
inline double max(float a, double b) { return std::fmax(static_cast<double>(a), b); }
inline double min(double a, float b) { return std::fmin(a, static_cast<double>(b)); }
inline double max(double a, float b) { return std::fmax(a, static_cast<double>(b)); }
inline long long min(int a, long long b) { return b < a ? b : a; }
inline long long max(int a, long long b) { return a < b ? b : a; }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
// Rounded up or down: the exact result, or what float64 leaves of it, in float32.
inline float emulator_up(double exact) {
  const float x = static_cast<float>(exact);
  return static_cast<double>(x) < exact ? std::nextafter(x, INFINITY) : x;
}
inline float emulator_down(double exact) { return -emulator_up(-exact); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __double2float_ru(double x) { return emulator_up(x); }
inline float __double2float_rd(double x) { return emulator_down(x); }
inline float __fmul_ru(float a, float b) { return emulator_up(static_cast<double>(a) * b); }
inline float __fmul_rd(float a, float b) { return emulator_down(static_cast<double>(a) * b); }
inline float __fsqrt_ru(float a) {
  const float x = std::sqrt(a);
  return static_cast<double>(x) * x < a ? std::nextafter(x, INFINITY) : x;
}
inline float __fsqrt_rd(float a) {
  const float x = std::sqrt(a);
  return static_cast<double>(x) * x > a ? std::nextafter(x, 0.0f) : x;
}
// A sum of two float32 may need more than float64 holds: what is lost is known exactly (Knuth's two-sum).
inline float __fadd_ru(float a, float b) {
  const double x = a, y = b, sum = x + y, of_y = sum - x, lost = (x - (sum - of_y)) + (y - of_y);
  const float up = emulator_up(sum);
  return static_cast<double>(up) == sum && lost > 0 ? std::nextafter(up, INFINITY) : up;
}
inline float __fadd_rd(float a, float b) { return -__fadd_ru(-a, -b); }
inline float __fsub_ru(float a, float b) { return __fadd_ru(a, -b); }
inline float __fsub_rd(float a, float b) { return __fadd_rd(a, -b); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline double __ull2double_rn(unsigned long long x) { return static_cast<double>(x); }
inline double __int2double_rn(int x) { return x; }

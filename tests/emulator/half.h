// The 16-bit floating-point types of CUDA.
#pragma once

#include "cuda_runtime.h"

inline float float_of_bf16(uint16_t bits) { return emulator_bits<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t bf16_of_float(float x) {
  const uint32_t bits = emulator_bits<uint32_t>(x);
  return static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float float_of_fp16(uint16_t bits) { return static_cast<float>(emulator_bits<_Float16>(bits)); }
inline uint16_t fp16_of_float(float x) {
  return std::isnan(x) ? 0x7fff : emulator_bits<uint16_t>(static_cast<_Float16>(x));
}

#define EMULATOR_HALF(NAME, PAIR, KIND)                 \
  struct NAME {                                        \
    uint16_t bits;                                     \
    NAME() = default;                                  \
    NAME(float x) : bits(KIND##_of_float(x)) {}        \
    operator float() const { return float_of_##KIND(bits); } \
  };                                                   \
  struct alignas(4) PAIR {                             \
    NAME x, y;                                         \
  };
EMULATOR_HALF(__nv_bfloat16, __nv_bfloat162, bf16)
EMULATOR_HALF(__half, __half2, fp16)
#undef EMULATOR_HALF

inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  __nv_bfloat16 y;
  y.bits = x;
  return y;
}
inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) {
  __half y;
  y.bits = x;
  return y;
}

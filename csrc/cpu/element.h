// The 16-bit floating-point types as they lie in memory, and their exact widening and round-to-nearest-even narrowing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace clmfast {

struct BFloat16 {
  uint16_t bits;
};  // the upper half of a float32
struct Float16 {
  uint16_t bits;
};  // IEEE 754 binary16: 1 sign, 5 exponent, 10 fraction bits

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Float16 x) {
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float size = exponent == 31 ? float_of_bits(0x7f800000 | fraction << 13)
               : exponent     ? float_of_bits((exponent + 112) << 23 | fraction << 13)
                              : static_cast<float>(fraction) * 0x1p-24f;  // denormal
  return float_of_bits(bits_of_float(size) | sign);
}

template <class T>
T narrow(float x);

template <>
inline float narrow<float>(float x) {
  return x;
}

template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits = bits_of_float(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 64)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 narrow<Float16>(float x) {
  uint16_t sign = static_cast<uint16_t>(bits_of_float(x) >> 16 & 0x8000);
  uint32_t size = bits_of_float(std::fabs(x));
  if (size > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};   // NaN
  if (size >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  // Below 2^-14 the result is a multiple of 2^-24: let float32 do the rounding, at 0.5 where its own last place is
  // 2^-24.
  if (size < 0x38800000)
    return {static_cast<uint16_t>(sign | (bits_of_float(std::fabs(x) + 0.5f) - bits_of_float(0.5f)))};
  uint32_t rebiased = size - (112u << 23);
  return {static_cast<uint16_t>(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13)};
}

}  // namespace clmfast

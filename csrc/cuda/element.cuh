// The three element types of points on the device, and how a launcher turns an Element into a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../element.h"

namespace clmfast {

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// To the nearest, of equals the even one.
template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}

// Calls f(T{}) with the type that `element` names.
template <class F>
void with_element(Element element, const F& f) {
  if (element == Element::float32) f(float{});
  if (element == Element::bfloat16) f(__nv_bfloat16{});
  if (element == Element::float16) f(__half{});
}

}  // namespace clmfast

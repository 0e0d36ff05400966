// Stands in for CUDA's header of this name: the type, and its conversions to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
using nv_bfloat16 = __nv_bfloat16;

inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_emulator::unpacked<float>(static_cast<uint64_t>(x.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto bits = static_cast<uint32_t>(cuda_emulator::packed(x));
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rz(float x) {
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>(cuda_emulator::packed(x) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float2 __bfloat1622float2(__nv_bfloat162 x) {
  return {__bfloat162float(x.x), __bfloat162float(x.y)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) {
  return {__float2bfloat16_rn(x.x), __float2bfloat16_rn(x.y)};
}

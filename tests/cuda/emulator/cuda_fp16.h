// Stands in for CUDA's header of this name: the type, and its conversions to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
using half = __half;

inline float __half2float(__half x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? __builtin_nanf("") : __builtin_inff();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa | 1024), exponent - 25);
  }
  return std::copysign(magnitude, sign ? -1.0f : 1.0f);
}

namespace cuda_emulator {

// `round` makes a whole number of a magnitude in units of the last place.
template <typename F>
__half to_half(float x, float infinite_from, const F& round) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(sign | 0x7fff)};
  if (magnitude >= infinite_from) return {static_cast<uint16_t>(sign | 0x7c00)};
  // In units of the last place: an integer of up to 11 bits, 10 where the number is subnormal.
  const int exponent = std::min(std::max(magnitude > 0 ? std::ilogb(magnitude) : -24, -14), 15);
  const float most = exponent < 15 ? 2048.0f : 2047.0f;  // the next power of two, or 65504
  const auto units = static_cast<int>(std::min(round(std::ldexp(magnitude, 10 - exponent)), most));
  return {static_cast<uint16_t>(sign | (units + ((exponent + 14) << 10)))};
}

}  // namespace cuda_emulator

inline __half __float2half_rn(float x) {
  return cuda_emulator::to_half(x, 65520.0f, [](float units) { return std::nearbyint(units); });
}
inline __half __float2half_rz(float x) {
  return cuda_emulator::to_half(x, __builtin_inff(), [](float units) { return std::trunc(units); });
}
inline __half __float2half(float x) { return __float2half_rn(x); }

struct alignas(4) __half2 {
  __half x, y;
};
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__float2half_rn(x.x), __float2half_rn(x.y)}; }

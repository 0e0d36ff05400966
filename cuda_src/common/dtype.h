// The four element types every op serves, under a name both compilers know.
#pragma once

#include <cstdint>

namespace jitops {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

}  // namespace jitops

// How a loss is reduced, by the numbers of ops/_core/checks.py.
#pragma once

#include <cstdint>

namespace jitops {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

}  // namespace jitops

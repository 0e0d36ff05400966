// The four element types of every op, with names for both compilers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define JITOPS_BOTH __host__ __device__  // a function of the CPU's and of the CUDA kernels
#else
#define JITOPS_BOTH
#endif
#define JITOPS_INLINE __attribute__((always_inline)) inline  // so that a loop over calls vectorises

namespace jitops {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

// The type of computation: float32 for half precisions.
template <typename T>
struct Acc { using type = float; };
template <>
struct Acc<double> { using type = double; };
template <typename T>
using acc_t = typename Acc<T>::type;

}  // namespace jitops

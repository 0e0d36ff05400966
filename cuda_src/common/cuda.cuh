// What the CUDA kernels share: element types, 128-bit packs, sums over a row, dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"
#include "launch.cuh"

namespace jitops::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;  // threads of a block, in every kernel
constexpr int kPackBytes = 16;    // the widest load there is

// ---- element types: load widens to the type to compute in, store rounds to nearest even ---------

__device__ inline double load(double x) { return x; }
__device__ inline float load(float x) { return x; }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }

__device__ inline void store(double& out, double x) { out = x; }
__device__ inline void store(float& out, float x) { out = x; }
__device__ inline void store(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ inline void store(__half& out, float x) { out = __float2half_rn(x); }

// kWidth elements moved by one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// ---- a row belongs to blockDim.x threads: one warp, or a whole block of several warps -----------

// The threads of a row for `packs` packs: a warp unless the row is wide enough for a block.
inline dim3 row_block(int64_t packs) {
  return packs >= 4 * kMaxThreads ? dim3(kMaxThreads, 1) : dim3(kWarp, kMaxThreads / kWarp);
}

// The sum over the threads of a row, in a fixed order; every one of them gets it.
// `shared` holds one value a warp; only rows of several warps use it, and then all threads of the
// block are on the same row, so that they meet at the barrier. Two sums in a row have one each: a
// thread is past the barrier of the second when it writes for the third.
template <typename A>
__device__ inline A row_sum(A x, A* shared) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  if (blockDim.x == kWarp) return x;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < warps; ++warp) x += shared[warp];
  return x;
}

// ---- dispatch -----------------------------------------------------------------------------------

// f(T{}) for the element type T that `dtype` names; returns what f returns.
template <typename F>
const char* dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64: return f(double{});
    case DType::kFloat32: return f(float{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
    case DType::kFloat16: return f(__half{});
  }
  return "unknown dtype";
}

// Whether rows that start at `data` and lie `stride` elements apart can be moved in whole packs.
template <typename T>
inline bool packs_fit(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % kPackBytes == 0;
}

}  // namespace jitops::cuda

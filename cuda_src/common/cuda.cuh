// What the CUDA kernels share: element types, 128-bit packs, sums over a row, dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"
#include "launch.cuh"

namespace jitops::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;  // threads of a block, in every launch
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

// ---- a row belongs to blockDim.x threads: part of a warp, a warp, or a whole block --------------

// The threads of a row for `packs` packs: as many, up to a warp; a block where each then has four.
inline dim3 row_block(int64_t packs) {
  if (packs >= 4 * kMaxThreads) return dim3(kMaxThreads, 1);
  int threads = 1;
  while (threads < kWarp && threads < packs) threads *= 2;
  return dim3(threads, kMaxThreads / threads);
}

// The sum over `count` neighbouring lanes, a power of two, which are those that call it.
template <typename A>
__device__ inline A lanes_sum(A x, int count) {
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) % kWarp;
  const unsigned mask = (0xffffffffu >> (kWarp - count)) << (lane / count * count);
  for (int offset = count / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}

// The sum over the threads of a block, in a fixed order; every one of them gets it.
// `shared` holds one value a warp. Two sums in a row have one each: a thread is past the barrier of
// the second when it writes for the third.
template <typename A>
__device__ inline A block_sum(A x, A* shared) {
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  x = lanes_sum(x, kWarp);
  if (thread % kWarp == 0) shared[thread / kWarp] = x;
  __syncthreads();
  x = 0;
  for (int warp = 0; warp < kMaxThreads / kWarp; ++warp) x += shared[warp];
  return x;
}

// The sum over the threads of a row, likewise. Of several warps it has the block to itself.
template <typename A>
__device__ inline A row_sum(A x, A* shared) {
  const int threads = static_cast<int>(blockDim.x);
  return threads <= kWarp ? lanes_sum(x, threads) : block_sum(x, shared);
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

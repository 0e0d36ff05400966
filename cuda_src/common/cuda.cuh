// Shared by CUDA kernels: element types, 128-bit packs, sums over a row, dispatch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dtype.h"
#include "launch.cuh"

namespace jitops::cuda {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;  // threads of a block, in every launch
constexpr int kPackBytes = 16;    // the widest load

// ---- element types: load widens to acc_t<T>, store rounds to nearest even -----------------------

__device__ inline double load(double x) { return x; }
__device__ inline float load(float x) { return x; }
__device__ inline float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float load(__half x) { return __half2float(x); }

__device__ inline void store(double& out, double x) { out = x; }
__device__ inline void store(float& out, float x) { out = x; }
__device__ inline void store(__nv_bfloat16& out, float x) { out = __float2bfloat16_rn(x); }
__device__ inline void store(__half& out, float x) { out = __float2half_rn(x); }

// kWidth elements, loaded or stored by one instruction.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];
};

// ---- blockDim.x threads take a row: part of a warp, a warp, or a whole block --------------------

// The number of threads for a row of `packs` packs: one a pack up to a warp, else a block if each
// thread then has four.
inline dim3 row_block(int64_t packs) {
  if (packs >= 4 * kMaxThreads) return dim3(kMaxThreads, 1);
  int threads = 1;
  while (threads < kWarp && threads < packs) threads *= 2;
  return dim3(threads, kMaxThreads / threads);
}

// The sum over the `count` neighbouring lanes that call it. `count` is a power of two.
template <typename A>
__device__ inline A lanes_sum(A x, int count) {
  const int lane = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x) % kWarp;
  const unsigned mask = (0xffffffffu >> (kWarp - count)) << (lane / count * count);
  for (int offset = count / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}

// The sum over the threads of a block, in a fixed order. Every thread gets it. `shared` holds one
// value a warp. Two consecutive sums need two buffers. A third may use the first buffer again,
// because by then all threads have passed the barrier of the second.
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

// The sum over the threads of a row. A row of several warps has a block of its own.
template <typename A>
__device__ inline A row_sum(A x, A* shared) {
  const int threads = static_cast<int>(blockDim.x);
  return threads <= kWarp ? lanes_sum(x, threads) : block_sum(x, shared);
}

// ---- dispatch -----------------------------------------------------------------------------------

// Calls f(T{}) for the element type T of `dtype`, and returns its result.
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

// Whether rows that start at `data` and lie `stride` elements apart are aligned for packs.
template <typename T>
inline bool packs_fit(const void* data, int64_t stride) {
  return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0 &&
         stride * static_cast<int64_t>(sizeof(T)) % kPackBytes == 0;
}

}  // namespace jitops::cuda

// Stands in for CUDA's header of this name: the part of the language that is not C++, for kernels
// that run on the emulator. What is missing here is an error of the compiler, never of the result.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __shared__ thread_local  // of the one host thread that is the device
#define __launch_bounds__(...)   // tests/test_structure.py holds kernels to theirs
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))  // also after __shared__

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

using std::isfinite, std::isinf, std::isnan, std::max, std::min;

// ---- vector types -------------------------------------------------------------------------------

using uint3 = cuda_emulator::Index;

struct dim3 : uint3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : uint3{x_, y_, z_} {}
};

#define JITOPS_VECTORS(T, name)                                                          \
  struct alignas(2 * sizeof(T)) name##2 {                                                \
    T x, y;                                                                              \
  };                                                                                     \
  struct name##3 {                                                                       \
    T x, y, z;                                                                           \
  };                                                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 {                      \
    T x, y, z, w;                                                                        \
  };                                                                                     \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                             \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                     \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
JITOPS_VECTORS(float, float)
JITOPS_VECTORS(double, double)
JITOPS_VECTORS(int, int)
JITOPS_VECTORS(short, short)
JITOPS_VECTORS(unsigned char, uchar)
JITOPS_VECTORS(long long, longlong)
#undef JITOPS_VECTORS
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- launching, and errors: one code, whose text is the emulator's report -----------------------

inline const char* cudaGetErrorName(cudaError_t) { return "error of the emulator"; }
inline const char* cudaGetErrorString(cudaError_t) { return cuda_emulator::report(); }
inline cudaError_t cudaPeekAtLastError() { return cuda_emulator::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulator::last_error, 0); }

namespace cuda_emulator {

template <typename... Args>
struct CallOf : Call {
  void (*kernel)(Args...);
  std::tuple<Args...> args;

  template <size_t... places>
  CallOf(void (*kernel_)(Args...), void** pointers, std::index_sequence<places...>)
      : Call{run, sizeof(CallOf)},
        kernel(kernel_),
        args(*static_cast<Args*>(pointers[places])...) {}

  static void run(const Call* call) {
    const auto* self = static_cast<const CallOf*>(call);
    std::apply(self->kernel, self->args);
  }
};

}  // namespace cuda_emulator

template <typename... Args>
cudaError_t cudaLaunchKernel(void (*kernel)(Args...), dim3 grid, dim3 block, void** pointers,
                             size_t shared_bytes, cudaStream_t stream) {
  const cuda_emulator::CallOf<Args...> call(kernel, pointers, std::index_sequence_for<Args...>{});
  const bool failed = cuda_emulator::run(grid, block, shared_bytes, stream, call) != nullptr;
  if (failed) cuda_emulator::last_error = 1;
  return failed;
}

// ---- where a thread is --------------------------------------------------------------------------

#define threadIdx (::cuda_emulator::thread_index())
#define blockIdx (::cuda_emulator::block_index())
#define blockDim (::cuda_emulator::block_size())
#define gridDim (::cuda_emulator::grid_size())
constexpr int warpSize = cuda_emulator::kWarp;

// ---- barriers -----------------------------------------------------------------------------------

#define JITOPS_WHERE cuda_emulator::Where where = cuda_emulator::Where::current()

inline void __syncthreads(JITOPS_WHERE) { cuda_emulator::barrier(false, "__syncthreads", where); }
inline int __syncthreads_count(int predicate, JITOPS_WHERE) {
  return cuda_emulator::barrier(predicate, "__syncthreads_count", where);
}
inline int __syncthreads_or(int predicate, JITOPS_WHERE) {
  return cuda_emulator::barrier(predicate, "__syncthreads_or", where) != 0;
}
inline int __syncthreads_and(int predicate, JITOPS_WHERE) {
  return cuda_emulator::barrier(!predicate, "__syncthreads_and", where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, JITOPS_WHERE) {
  cuda_emulator::meet(mask, 0, "__syncwarp", where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline unsigned __activemask() { return cuda_emulator::active_lanes(); }

// ---- shuffles, votes, reductions ----------------------------------------------------------------

namespace cuda_emulator {

template <typename T>
uint64_t packed(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  return bits;
}

template <typename T>
T unpacked(uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int from, const char* name, Where where) {
  return unpacked<T>(value_of(meet(mask, packed(value), name, where), from));
}

// f of the values of all lanes that meet, in their order.
template <typename T, typename F>
T reduce(unsigned mask, T value, const char* name, Where where, const F& f) {
  const Meeting* meeting = meet(mask, packed(value), name, where);
  bool first = true;
  T total{};
  for (int i = 0; i < kWarp; ++i) {
    if (!(lanes_of(meeting) >> i & 1)) continue;
    const T one = unpacked<T>(value_of(meeting, i));
    total = first ? one : f(total, one);
    first = false;
  }
  return total;
}

}  // namespace cuda_emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, JITOPS_WHERE) {
  const int me = cuda_emulator::lane();
  return cuda_emulator::shuffle(mask, value, (me & ~(width - 1)) | (from & (width - 1)),
                                "__shfl_sync", where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, JITOPS_WHERE) {
  const int me = cuda_emulator::lane(), from = me ^ with;
  return cuda_emulator::shuffle(mask, value, from / width > me / width ? me : from,
                                "__shfl_xor_sync", where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, JITOPS_WHERE) {
  const int me = cuda_emulator::lane(), from = me - static_cast<int>(by);
  return cuda_emulator::shuffle(mask, value, from < (me & ~(width - 1)) ? me : from,
                                "__shfl_up_sync", where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, JITOPS_WHERE) {
  const int me = cuda_emulator::lane(), from = me + static_cast<int>(by);
  return cuda_emulator::shuffle(mask, value, from > (me | (width - 1)) ? me : from,
                                "__shfl_down_sync", where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, JITOPS_WHERE) {
  const unsigned mine = predicate ? 1u << cuda_emulator::lane() : 0u;
  return cuda_emulator::reduce(mask, mine, "__ballot_sync", where,
                               [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, JITOPS_WHERE) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, JITOPS_WHERE) {
  return __ballot_sync(mask, !predicate, where) == 0;
}

#define JITOPS_REDUCE(name, T, expression)                                          \
  inline T name(unsigned mask, T value, JITOPS_WHERE) {                             \
    return cuda_emulator::reduce(mask, value, #name, where,                         \
                                 [](T a, T b) -> T { return expression; });         \
  }
JITOPS_REDUCE(__reduce_add_sync, unsigned, a + b)
JITOPS_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
JITOPS_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
JITOPS_REDUCE(__reduce_and_sync, unsigned, a & b)
JITOPS_REDUCE(__reduce_or_sync, unsigned, a | b)
JITOPS_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
JITOPS_REDUCE(__reduce_add_sync, int, a + b)
JITOPS_REDUCE(__reduce_min_sync, int, a < b ? a : b)
JITOPS_REDUCE(__reduce_max_sync, int, a < b ? b : a)
#undef JITOPS_REDUCE

// ---- atomics: fibers are never interrupted, so that plain code is atomic ------------------------

namespace cuda_emulator {

template <typename T, typename F>
[[gnu::no_sanitize("thread")]] T atomic(T* at, const F& f) {
  atomic_access(at, sizeof(T));
  const T old = *at;
  *at = f(old);
  return old;
}

}  // namespace cuda_emulator

#define JITOPS_ATOMIC(name, expression)                                              \
  template <typename T>                                                              \
  T name(T* at, std::type_identity_t<T> value) {                                     \
    return cuda_emulator::atomic(at, [&](T old) -> T { return expression; });        \
  }
JITOPS_ATOMIC(atomicAdd, old + value)
JITOPS_ATOMIC(atomicSub, old - value)
JITOPS_ATOMIC(atomicMin, value < old ? value : old)
JITOPS_ATOMIC(atomicMax, old < value ? value : old)
JITOPS_ATOMIC(atomicAnd, old & value)
JITOPS_ATOMIC(atomicOr, old | value)
JITOPS_ATOMIC(atomicXor, old ^ value)
JITOPS_ATOMIC(atomicExch, value)
#undef JITOPS_ATOMIC
template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return cuda_emulator::atomic(at, [&](T old) { return old == compare ? value : old; });
}

#undef JITOPS_WHERE

// ---- intrinsics ---------------------------------------------------------------------------------

template <typename T>
T __ldg(const T* at) {
  return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

// ---- functions that give up accuracy for speed: as inaccurate as the programming guide allows ---

namespace cuda_emulator {

// Off by up to three units in the last place.
inline float coarse(float x) {
  return std::isfinite(x) ? unpacked<float>(packed(x) & ~uint64_t{3}) : x;
}

}  // namespace cuda_emulator

inline float __expf(float x) { return cuda_emulator::coarse(std::exp2(x * 1.44269504f)); }
inline float __logf(float x) {
  const float logarithm = std::log2(x);
  const bool near_one = 0.5f <= x && x <= 2.0f;  // an absolute error there
  return 0.693147181f * (near_one ? std::nearbyint(logarithm * 0x1p21f) * 0x1p-21f
                                  : cuda_emulator::coarse(logarithm));
}
inline float __fdividef(float x, float y) {
  if (std::fabs(y) > 0x1p126f && std::isfinite(y)) return std::isinf(x) ? __builtin_nanf("") : 0.0f;
  return cuda_emulator::coarse(x * cuda_emulator::coarse(1 / y));
}

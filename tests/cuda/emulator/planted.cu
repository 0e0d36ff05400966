// Kernels that are right, and kernels with a bug of a known kind, for tests of the emulator.
// Real CUDA: nvcc compiles this file too.
#include <cstdint>
#include <cstring>

#include "common/cuda.cuh"

extern __shared__ unsigned char dynamic_shared[];

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- right --------------------------------------------------------------------------------------

__global__ void indices(const float* x, float* out, int64_t n) {
  const int64_t block = blockIdx.x + static_cast<int64_t>(gridDim.x) *
                                         (blockIdx.y + static_cast<int64_t>(gridDim.y) * blockIdx.z);
  const int64_t thread =
      threadIdx.x + blockDim.x * (threadIdx.y + static_cast<int64_t>(blockDim.y) * threadIdx.z);
  const int64_t i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  if (i < n) out[i] = x[i] + static_cast<float>(i);
}

__global__ void reversed_in_blocks(const float* x, float* out, int64_t n) {
  __shared__ float part[64];
  const int64_t base = static_cast<int64_t>(blockIdx.x) * 64;
  if (base + threadIdx.x < n) part[threadIdx.x] = x[base + threadIdx.x];
  __syncthreads();
  const int64_t count = n - base < 64 ? n - base : 64;
  if (threadIdx.x < count) out[base + threadIdx.x] = part[count - 1 - threadIdx.x];
}

__global__ void dynamic_sum(const float* x, float* out, int64_t n) {
  auto* part = reinterpret_cast<float*>(dynamic_shared);
  part[threadIdx.x] = threadIdx.x < n ? x[threadIdx.x] : 0.0f;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out = part[0];
}

// The bits of each number after `store`.
template <typename T>
__global__ void stores(const float* x, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  T value;
  jitops::cuda::store(value, x[i]);
  unsigned short bits;
  memcpy(&bits, &value, sizeof bits);
  out[i] = static_cast<float>(bits);
}

// A line of `out` a function that gives up accuracy for speed.
__global__ void fast(const float* x, float* out, int64_t) {
  out[threadIdx.x] = __expf(x[threadIdx.x]);
  out[32 + threadIdx.x] = __logf(fabsf(x[threadIdx.x]));
  out[64 + threadIdx.x] = __fdividef(1.0f, x[threadIdx.x]);
}

// A line of `out` an intrinsic.
__global__ void intrinsics(const float* x, float* out, int64_t) {
  const int lane = static_cast<int>(threadIdx.x) % warpSize;
  const float mine = x[lane];
  const bool odd = lane % 2 == 1;
  const int number = lane - 7;
  float* line = out + lane;
  const auto put = [&](double value) {
    *line = static_cast<float>(value);
    line += 32;
  };
  put(__shfl_sync(kAll, mine, 5));
  put(__shfl_sync(kAll, mine, 3, 8));
  put(__shfl_xor_sync(kAll, mine, 6));
  put(__shfl_up_sync(kAll, mine, 3));
  put(__shfl_up_sync(kAll, mine, 3, 16));
  put(__shfl_down_sync(kAll, mine, 2));
  put(__shfl_down_sync(kAll, static_cast<double>(mine), 2, 4));
  put(__ballot_sync(kAll, odd) >> 16);
  put(__any_sync(kAll, lane == 31));
  put(__all_sync(kAll, lane < 31));
  put(__reduce_add_sync(kAll, number));
  put(__reduce_min_sync(kAll, number));
  put(__reduce_max_sync(kAll, static_cast<unsigned>(lane)));
  put(__reduce_or_sync(kAll, 1u << (lane / 8)));
  put(__syncthreads_count(odd));
  put(__syncthreads_or(lane == 3));
  put(__syncthreads_and(lane != 3));
  if (odd) {
    put(__shfl_xor_sync(0xaaaaaaaau, mine, 2));
  } else {
    put(__reduce_add_sync(0x55555555u, lane));
  }
  put(__popc(lane) + __clz(lane) + __ffs(lane));
}

__global__ void atomics(const float* x, float* out, int64_t n) {
  __shared__ int count, most, owner;
  if (threadIdx.x == 0) count = 0, most = -1, owner = -1;
  __syncthreads();
  if (threadIdx.x < n) {
    atomicAdd(&count, 1);
    atomicMax(&most, static_cast<int>(x[threadIdx.x]));
    if (atomicCAS(&owner, -1, static_cast<int>(threadIdx.x)) == -1) out[2] = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<float>(count), out[1] = static_cast<float>(most);
}

__global__ void passed_on_in_a_warp(const float* x, float* out, int64_t) {
  __shared__ float part[32];
  part[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = part[31 - threadIdx.x];
}

__global__ void passed_on_in_halves_of_a_warp(const float* x, float* out, int64_t) {
  __shared__ __align__(16) float part[32];
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int round = 0; round < 3; ++round) {
    part[threadIdx.x] = x[threadIdx.x] + static_cast<float>(round);
    __syncwarp(mask);
    out[threadIdx.x] = part[threadIdx.x ^ 15];
    __syncwarp(mask);
  }
}

__global__ void adds_up_atomically(const float* x, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) out[i] = 0;  // a block its own
  __syncthreads();
  if (i < n) atomicAdd(&out[i / blockDim.x * blockDim.x], x[i]);
}

__global__ void fours(const float* x, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n / 4) reinterpret_cast<float4*>(out)[i] = reinterpret_cast<const float4*>(x)[i];
  if (i < n % 4) out[n / 4 * 4 + i] = x[n / 4 * 4 + i];
}

__device__ void count_up(float* numbers, int count) {
  for (int i = 0; i < count; ++i) numbers[i] = static_cast<float>(i);
}

__global__ void large_local_array(const float* x, float* out, int64_t n) {
  float numbers[128000];  // CUDA allows 512 KiB
  count_up(numbers, n > 0 ? 128000 : 0);
  out[threadIdx.x] = x[threadIdx.x] + numbers[127999 - threadIdx.x];
}

// ---- wrong --------------------------------------------------------------------------------------

__global__ void reads_one_too_many(const float* x, float* out, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i <= n; ++i) sum += x[i];
  out[threadIdx.x] = sum;
}

__global__ void writes_one_too_many(const float* x, float* out, int64_t n) {
  for (int64_t i = threadIdx.x; i <= n; i += blockDim.x) out[i] = i < n ? x[i] : 0.0f;
}

__global__ void reads_before_the_begin(const float* x, float* out, int64_t n) {
  if (threadIdx.x < n) out[threadIdx.x] = x[static_cast<int64_t>(threadIdx.x) - 1];
}

__global__ void forgets_the_tail(const float* x, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n / 4) reinterpret_cast<float4*>(out)[i] = reinterpret_cast<const float4*>(x)[i];
}

__global__ void reads_its_result(const float*, float* out, int64_t n) {
  if (threadIdx.x < n) out[threadIdx.x] += 1;
}

__global__ void misaligned(const float* x, float* out, int64_t n) {
  const int64_t i = threadIdx.x;
  if (i < n / 4 - 1) reinterpret_cast<float4*>(out)[i] = *reinterpret_cast<const float4*>(x + 4 * i + 1);
}

__global__ void without_a_barrier(const float* x, float* out, int64_t) {
  __shared__ float part[64];
  part[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = part[63 - threadIdx.x];
}

__global__ void without_the_second_barrier(const float* x, float* out, int64_t) {
  __shared__ float part[64];
  for (int round = 0; round < 2; ++round) {
    part[threadIdx.x] = x[threadIdx.x] + static_cast<float>(round);
    __syncthreads();
    out[threadIdx.x] = part[63 - threadIdx.x];
  }
}

__global__ void without_syncwarp(const float* x, float* out, int64_t) {
  __shared__ float part[32];
  part[threadIdx.x] = x[threadIdx.x];
  __shfl_sync(kAll, 0, 0);  // brings the lanes together, and orders no memory
  out[threadIdx.x] = part[31 - threadIdx.x];
}

__global__ void all_write_one(const float* x, float* out, int64_t) {
  __shared__ float one;
  one = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = one;
}

__global__ void counts_without_atomics(const float*, float* out, int64_t) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  count += 1;
  __syncthreads();
  out[threadIdx.x] = static_cast<float>(count);
}

__global__ void unset_shared(const float*, float* out, int64_t) {
  __shared__ float part[64];
  if (threadIdx.x < 63) part[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x];
}

__global__ void shared_of_the_block_before(const float*, float* out, int64_t) {
  __shared__ float part[1];
  if (blockIdx.x == 0 || threadIdx.x > 0) part[0] = 1;
  __syncthreads();
  out[blockIdx.x] = part[0];
}

__global__ void beyond_its_array(const float* x, float* out, int64_t n) {
  __shared__ float part[64];
  part[threadIdx.x + (n > 0)] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x];
}

__device__ inline float sum_of(const float* numbers, int count) {
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += numbers[i];
  return sum;
}

__global__ void beyond_its_array_by_a_pointer(const float* x, float* out, int64_t n) {
  __shared__ float part[64], other[64];
  part[threadIdx.x] = x[threadIdx.x];
  other[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = sum_of(part, 64 + (n > 0)) + sum_of(other, 64 + (n > 0));
}

__device__ inline void add_to(float& sum, float x) { sum += x; }

__global__ void unset_sum(const float* x, float* out, int64_t n) {
  float sum;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) add_to(sum, x[i]);
  out[threadIdx.x] = sum;
}

__global__ void unset_local_array(const float* x, float* out, int64_t n) {
  float sums[4];
  for (int64_t i = 0; i < n; ++i) add_to(sums[i % 4], x[i]);
  out[threadIdx.x] = sums[threadIdx.x % 4];
}

__global__ void divides_by_zero(const float* x, float* out, int64_t n) {
  out[threadIdx.x] = x[threadIdx.x % (n - 64)];
}

__global__ void shifts_by_all_bits(const float* x, float* out, int64_t n) {
  const unsigned lanes = (1u << (n / 2)) - 1;
  out[threadIdx.x] = lanes >> (threadIdx.x % 32) & 1 ? x[threadIdx.x] : 0.0f;
}

__global__ void waits_for_another_thread(const float*, float* out, int64_t) {
  __shared__ volatile int done;
  if (threadIdx.x == 0) done = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    while (done == 0) out[0] = 0;
  }
  if (threadIdx.x == 63) out[1] = 0;
}

__global__ void waits_for_another_block(const float*, float* out, int64_t) {
  atomicAdd(&out[1], 1.0f);
  while (atomicAdd(&out[1], 0.0f) < static_cast<float>(gridDim.x * blockDim.x)) continue;
}

__global__ void some_wait(const float* x, float* out, int64_t) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void wait_apart(const float* x, float* out, int64_t) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = x[threadIdx.x];
}

__global__ void leaves_before_the_barrier(const float* x, float* out, int64_t n) {
  if (threadIdx.x >= n) return;
  out[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
}

// The races below are between accesses that others of the same kind follow.

__global__ void lanes_in_place(const float* x, float* out, int64_t) {
  __shared__ float part[64];
  const unsigned lane = threadIdx.x % 32;
  part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  float sum = part[threadIdx.x] + (lane < 31 ? part[threadIdx.x + 1] : 0.0f);
  sum += __shfl_xor_sync(kAll, sum, 1);
  part[threadIdx.x] = sum;
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x];
}

__global__ void warps_in_place(const float* x, float* out, int64_t) {
  __shared__ float all;
  if (threadIdx.x == 0) all = x[0];
  __syncthreads();
  const float mine = all;
  __syncwarp();
  if (threadIdx.x == 63) all = x[1];
  __syncthreads();
  out[threadIdx.x] = mine + all;
}

__global__ void counts_and_reads(const float*, float* out, int64_t) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  __syncwarp();
  out[threadIdx.x] = threadIdx.x == 63 ? static_cast<float>(count) : 0.0f;
}

// On results of another launch.
__global__ void blocks_in_place(const float*, float* out, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const float sum = out[i] + (i + 1 < n ? out[i + 1] : 0.0f);
  __syncthreads();
  out[i] = sum;
}

__global__ void blocks_count_and_one_reads(const float*, float* out, int64_t) {
  if (threadIdx.x == 0) atomicAdd(&out[0], 1.0f);
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 0) out[1] = out[0];
}

__global__ void without_syncwarp_at_last(const float* x, float* out, int64_t) {
  __shared__ float part[32];
  for (int i = 0; i < 70000; ++i) __syncwarp();
  part[threadIdx.x] = x[threadIdx.x];
  __shfl_sync(kAll, 0, 0);
  __shfl_sync(kAll, 0, 0);
  out[threadIdx.x] = part[31 - threadIdx.x];
}

__global__ void mask_of_too_few(const float* x, float* out, int64_t) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1);
}

__global__ void mask_of_too_many(const float* x, float* out, int64_t n) {
  if (threadIdx.x < n) out[threadIdx.x] = __shfl_xor_sync(kAll, x[threadIdx.x], 1);
}

__global__ void reads_an_absent_lane(const float* x, float* out, int64_t) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 20);
}

__global__ void blocks_write_one(const float* x, float* out, int64_t) { out[0] = x[blockIdx.x]; }

__global__ void blocks_read_what_another_writes(const float* x, float* out, int64_t) {
  out[blockIdx.x] = x[blockIdx.x];
  if (blockIdx.x == 1) out[1] += out[0];
}

__global__ void reads_beside_atomics(const float* x, float* out, int64_t) {
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    for (int i = 0; i < 64; ++i) out[i] = x[i];
  } else {
    atomicAdd(&out[threadIdx.x], 1.0f);
  }
}

__global__ void all_write_one_result(const float* x, float* out, int64_t) {
  out[threadIdx.x] = 0;
  __syncthreads();
  out[0] = x[threadIdx.x];
}

__global__ void misaligned_in_pieces(const float* x, float* out, int64_t n) {
  const int64_t i = threadIdx.x;
  if (i >= n - 4) return;
  const float4 four = *reinterpret_cast<const float4*>(x + i);
  out[i] = four.x + four.y * four.z - four.w;
}

__global__ void copies_too_much(const float* x, float* out, int64_t n) {
  if (threadIdx.x == 0) memcpy(out, x, static_cast<size_t>(n) * 4 + 4);
}

__global__ void much_static_shared(const float* x, float* out, int64_t n) {
  __shared__ float part[10000];
  for (int i = threadIdx.x; i < 10000; i += blockDim.x) part[i] = x[i % n];
  __syncthreads();
  out[threadIdx.x] = part[threadIdx.x + 9900];
}

__global__ void counts_in_a_static_variable(const float*, float* out, int64_t) {
  static int count;
  out[threadIdx.x] = static_cast<float>(++count);
}

__global__ void writes_its_input(const float* x, float* out, int64_t) {
  out[threadIdx.x] = const_cast<float*>(x)[threadIdx.x] = 1;
}

__global__ void more_than_asked_for(const float*, float* out, int64_t n) {
  reinterpret_cast<float*>(dynamic_shared)[n] = 1;
  out[threadIdx.x] = 1;
}

struct Shape {
  const char* name;
  void (*kernel)(const float*, float*, int64_t);
  dim3 grid, block;
};

}  // namespace

const char* launch_planted(const char* name, const float* x, float* out, int64_t n, void* stream,
                           size_t shared_bytes) {
  const dim3 one(1), warp(32), two_warps(64);
  const Shape shapes[] = {
      {"indices", indices, dim3(2, 3, 2), dim3(4, 5, 3)},
      {"reversed_in_blocks", reversed_in_blocks, dim3(3), two_warps},
      {"dynamic_sum", dynamic_sum, one, dim3(128)},
      {"stores_float16", stores<__half>, dim3(1024), dim3(256)},
      {"stores_bfloat16", stores<__nv_bfloat16>, dim3(1024), dim3(256)},
      {"fast", fast, one, warp},
      {"intrinsics", intrinsics, one, warp},
      {"atomics", atomics, one, dim3(128)},
      {"passed_on_in_a_warp", passed_on_in_a_warp, one, warp},
      {"passed_on_in_halves_of_a_warp", passed_on_in_halves_of_a_warp, one, warp},
      {"adds_up_atomically", adds_up_atomically, dim3(2), warp},
      {"fours", fours, dim3(2), warp},
      {"large_local_array", large_local_array, one, warp},
      {"reads_one_too_many", reads_one_too_many, one, warp},
      {"writes_one_too_many", writes_one_too_many, one, warp},
      {"reads_before_the_begin", reads_before_the_begin, one, two_warps},
      {"forgets_the_tail", forgets_the_tail, dim3(2), warp},
      {"reads_its_result", reads_its_result, one, two_warps},
      {"misaligned", misaligned, one, two_warps},
      {"without_a_barrier", without_a_barrier, one, two_warps},
      {"without_the_second_barrier", without_the_second_barrier, one, two_warps},
      {"without_syncwarp", without_syncwarp, one, warp},
      {"all_write_one", all_write_one, one, two_warps},
      {"counts_without_atomics", counts_without_atomics, one, two_warps},
      {"unset_shared", unset_shared, one, two_warps},
      {"shared_of_the_block_before", shared_of_the_block_before, dim3(2), one},
      {"beyond_its_array", beyond_its_array, one, two_warps},
      {"beyond_its_array_by_a_pointer", beyond_its_array_by_a_pointer, one, two_warps},
      {"unset_sum", unset_sum, one, two_warps},
      {"unset_local_array", unset_local_array, one, two_warps},
      {"divides_by_zero", divides_by_zero, one, two_warps},
      {"shifts_by_all_bits", shifts_by_all_bits, one, two_warps},
      {"waits_for_another_thread", waits_for_another_thread, one, two_warps},
      {"some_wait", some_wait, one, two_warps},
      {"wait_apart", wait_apart, one, two_warps},
      {"leaves_before_the_barrier", leaves_before_the_barrier, one, two_warps},
      {"lanes_in_place", lanes_in_place, one, two_warps},
      {"warps_in_place", warps_in_place, one, two_warps},
      {"counts_and_reads", counts_and_reads, one, two_warps},
      {"without_syncwarp_at_last", without_syncwarp_at_last, one, warp},
      {"mask_of_too_few", mask_of_too_few, one, warp},
      {"mask_of_too_many", mask_of_too_many, one, warp},
      {"reads_an_absent_lane", reads_an_absent_lane, one, warp},
      {"blocks_write_one", blocks_write_one, dim3(2), one},
      {"blocks_read_what_another_writes", blocks_read_what_another_writes, dim3(2), one},
      {"reads_beside_atomics", reads_beside_atomics, dim3(2), two_warps},
      {"all_write_one_result", all_write_one_result, one, two_warps},
      {"misaligned_in_pieces", misaligned_in_pieces, one, two_warps},
      {"copies_too_much", copies_too_much, one, two_warps},
      {"much_static_shared", much_static_shared, one, two_warps},
      {"counts_in_a_static_variable", counts_in_a_static_variable, one, two_warps},
      {"writes_its_input", writes_its_input, one, two_warps},
      {"more_than_asked_for", more_than_asked_for, one, one},
      {"block_of_2048", indices, one, dim3(2048)},
      {"block_of_1_by_1_by_65", indices, one, dim3(1, 1, 65)},
      {"grid_of_65536_in_y", indices, dim3(1, 65536), one},
      {"empty_grid", indices, dim3(0), one},
  };
  for (const Shape& shape : shapes) {
    if (std::strcmp(shape.name, name) == 0) {
      return jitops::launch(shape.kernel, shape.grid, shape.block, shared_bytes, stream, x, out, n);
    }
  }
  if (std::strcmp(name, "default_stream") == 0) {
    return jitops::launch(indices, one, one, 0, nullptr, x, out, n);
  }
  const Shape in_place[] = {
      {"blocks_in_place", blocks_in_place, dim3(2), warp},
      {"blocks_count_and_one_reads", blocks_count_and_one_reads, dim3(2), warp},
      {"waits_for_another_block", waits_for_another_block, dim3(2), warp},
  };
  for (const Shape& shape : in_place) {
    if (std::strcmp(shape.name, name) != 0) continue;
    const char* error = jitops::launch(fours, dim3(2), warp, 0, stream, x, out, n);
    if (error) return error;
    return jitops::launch(shape.kernel, shape.grid, shape.block, 0, stream, x, out, n);
  }
  if (std::strcmp(name, "beside_an_error_of_another") == 0) {
    void* arguments[] = {&x, &out, &n};
    const auto theirs = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernel(indices, dim3(0), one, arguments, 0, theirs);
    const char* ours = jitops::launch(indices, one, dim3(64), 0, stream, x, out, n);
    if (ours) return ours;
    return cudaGetLastError() == error ? nullptr : "the other's error is lost";
  }
  return "no such kernel";
}

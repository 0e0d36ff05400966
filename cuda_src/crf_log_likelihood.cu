// The linear-chain conditional random field on CUDA: kernels and launchers. No torch header.
//
// The floor is latency: the steps of a sequence depend on each other, at about a microsecond each,
// because a step needs labels^2 exponentials in float64. A block takes a sequence. In the backward
// pass it takes several, adds up their gradients of the parameters, and a last kernel adds the
// blocks, in a fixed order. No atomics, so results are bitwise deterministic.
#include "crf_log_likelihood.h"

#include "common/cuda.cuh"

namespace jitops::crf {
namespace {

using cuda::kMaxThreads;
using cuda::kWarp;
using cuda::load;
using cuda::store;

constexpr int64_t kMaxBlocks = 65535;

// A sequence, with numbers in float64.
template <typename T>
struct Chain {
  const T* emissions;
  const T* transitions;
  const T* start;
  const T* end;
  const int64_t* tags;
  double* sums;
  int64_t stride, count, length;

  __device__ Chain(const Params& params, int64_t pair)
      : emissions(static_cast<const T*>(params.emissions) + pair * params.strides[0]),
        transitions(static_cast<const T*>(params.transitions)),
        start(static_cast<const T*>(params.start)),
        end(static_cast<const T*>(params.end)),
        tags(params.tags ? params.tags + pair * params.steps : nullptr),
        sums(params.sums ? params.sums + pair * params.steps * params.labels : nullptr),
        stride(params.strides[1]),
        count(params.labels),
        length(length_of(params, pair)) {}

  __device__ double emission(int64_t t, int64_t k) const {
    return static_cast<double>(load(emissions[t * stride + k]));
  }
  __device__ double transition(int64_t i, int64_t k) const {
    return static_cast<double>(load(transitions[i * count + k]));
  }
  __device__ double a(int64_t t, int64_t k) const { return sums[t * count + k] + emission(t, k); }
  __device__ double last(int64_t k) const {
    return a(length - 1, k) + static_cast<double>(load(end[k]));
  }
};

// log sum_i exp(x(i)), also of infinite ones.
template <typename F>
__device__ double log_sum(int64_t count, const F& x) {
  double most = -static_cast<double>(INFINITY), sum = 0;
  for (int64_t i = 0; i < count; ++i) most = x(i) > most ? x(i) : most;
  for (int64_t i = 0; i < count; ++i) {
    const double one = x(i);
    sum += one == most ? 1.0 : exp(one - most);
  }
  return most + log(sum);
}

// Budget: 64 registers, 64 bytes shared, 48 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  __shared__ double shared[kMaxThreads / kWarp];
  for (int64_t pair = blockIdx.x; pair < params.pairs; pair += gridDim.x) {
    const Chain<T> chain(params, pair);
    const int64_t count = params.labels;
    for (int64_t n = chain.length * count + threadIdx.x; n < params.steps * count;
         n += blockDim.x) {
      chain.sums[n] = 0;
    }
    if (chain.length == 0) {
      if (threadIdx.x == 0) params.value[pair] = static_cast<double>(NAN);
      continue;
    }
    for (int64_t t = 0; t < chain.length; ++t) {
      for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
        chain.sums[t * count + k] =
            t == 0 ? static_cast<double>(load(chain.start[k])) : log_sum(count, [&](int64_t i) {
              return chain.a(t - 1, i) + chain.transition(i, k);
            });
      }
      __syncthreads();
    }
    double score = 0;
    for (int64_t t = threadIdx.x; t < chain.length; t += blockDim.x) {
      const int64_t tag = chain.tags[t], before = t > 0 ? chain.tags[t - 1] : 0;
      if (tag < 0 || tag >= count || before < 0 || before >= count) {
        score = static_cast<double>(NAN);
        continue;
      }
      score += chain.emission(t, tag);
      score += t > 0 ? chain.transition(before, tag) : static_cast<double>(load(chain.start[tag]));
      if (t == chain.length - 1) score += static_cast<double>(load(chain.end[tag]));
    }
    score = cuda::block_sum(score, shared);
    if (threadIdx.x == 0) {
      params.value[pair] = score - log_sum(count, [&](int64_t k) { return chain.last(k); });
    }
    __syncthreads();
  }
}

// Budget: 80 registers, 0 bytes shared, 48 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  const int64_t count = params.labels, size = elements_of_block(count);
  double* partial = params.partial + blockIdx.x * size;
  double* starts = partial + count * count;
  double* ends = starts + count;
  double* flow = ends + count;
  double* next = flow + count;
  for (int64_t n = threadIdx.x; n < size; n += blockDim.x) partial[n] = 0;
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t last = params.pairs * (blockIdx.x + 1) / params.blocks;
  for (int64_t pair = params.pairs * blockIdx.x / params.blocks; pair < last; ++pair) {
    const Chain<T> chain(params, pair);
    T* gradients = static_cast<T*>(params.grad_emissions);
    if (gradients) gradients += pair * params.steps * count;
    const double value = params.value[pair];
    // A value that is not finite has no gradient.
    const double grad = value - value == 0 ? params.grad_value[pair] : static_cast<double>(NAN);
    const bool known = grad == grad;
    for (int64_t n = threadIdx.x; gradients && n < params.steps * count; n += blockDim.x) {
      if (n >= chain.length * count || !known) {
        store(gradients[n], static_cast<acc_t<T>>(n < chain.length * count ? grad : 0.0));
      }
    }
    if (!known) {
      for (int64_t n = threadIdx.x; n < count * (count + 2); n += blockDim.x) partial[n] = grad;
      __syncthreads();
      continue;
    }
    const double total = log_sum(count, [&](int64_t k) { return chain.last(k); });
    for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
      flow[k] = exp(chain.last(k) - total);
      ends[k] += grad * ((k == chain.tags[chain.length - 1] ? 1.0 : 0.0) - flow[k]);
    }
    __syncthreads();
    for (int64_t t = chain.length - 1;; --t) {
      for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
        const double given = k == chain.tags[t] ? 1.0 : 0.0;
        if (gradients) {
          store(gradients[t * count + k], static_cast<acc_t<T>>(grad * (given - flow[k])));
        }
        if (t == 0) starts[k] += grad * (given - flow[k]);
      }
      if (t == 0) break;
      // A warp takes a row: all transitions from label i.
      for (int64_t i = warp; i < count; i += warps) {
        const double a = chain.a(t - 1, i);
        double sum = 0;
        for (int64_t k = lane; k < count; k += kWarp) {
          const double arrived = flow[k];
          const double share =
              arrived > 0
                  ? arrived * exp(a + chain.transition(i, k) - chain.sums[t * count + k])
                  : 0.0;
          const bool given = i == chain.tags[t - 1] && k == chain.tags[t];
          partial[i * count + k] += grad * ((given ? 1.0 : 0.0) - share);
          sum += share;
        }
        sum = cuda::lanes_sum(sum, kWarp);
        if (lane == 0) next[i] = sum;
      }
      __syncthreads();
      double* free = flow;
      flow = next;
      next = free;
    }
    __syncthreads();
  }
}

// A thread adds up one number of all blocks. Budget: 48 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) sum_kernel(Params params) {
  const int64_t count = params.labels, square = count * count, size = elements_of_block(count);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       n < square + 2 * count; n += step) {
    double sum = 0;
    for (int64_t block = 0; block < params.blocks; ++block) sum += params.partial[block * size + n];
    void* out = n < square             ? params.grad_transitions
                : n < square + count ? params.grad_start
                                       : params.grad_end;
    const int64_t place = n < square ? n : (n - square) % count;
    if (out) store(static_cast<T*>(out)[place], static_cast<acc_t<T>>(sum));
  }
}

// Budget: 64 registers, 0 bytes shared.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) decode_kernel(Params params) {
  const double infinity = static_cast<double>(INFINITY);
  for (int64_t pair = blockIdx.x; pair < params.pairs; pair += gridDim.x) {
    const Chain<T> chain(params, pair);
    const int64_t count = params.labels;
    int64_t* path = params.path + pair * params.steps;
    int32_t* before = params.before + pair * params.steps * count;
    double* scores = params.scores + pair * 2 * count;
    for (int64_t t = 0; t < chain.length; ++t) {
      for (int64_t k = threadIdx.x; k < count; k += blockDim.x) {
        double best = -infinity;
        int32_t at = 0;
        if (t == 0) best = static_cast<double>(load(chain.start[k]));
        for (int64_t i = 0; t > 0 && i < count; ++i) {
          const double one = scores[(t + 1) % 2 * count + i] + chain.transition(i, k);
          if (one > best) {
            best = one;
            at = static_cast<int32_t>(i);
          }
        }
        before[t * count + k] = at;
        scores[t % 2 * count + k] = best + chain.emission(t, k);
      }
      __syncthreads();
    }
    for (int64_t t = chain.length + threadIdx.x; t < params.steps; t += blockDim.x) path[t] = -1;
    if (threadIdx.x == 0 && chain.length > 0) {
      int64_t label = 0;
      double most = -infinity;
      for (int64_t k = 0; k < count; ++k) {
        const double one = scores[(chain.length - 1) % 2 * count + k] +
                           static_cast<double>(load(chain.end[k]));
        if (one > most) {
          most = one;
          label = k;
        }
      }
      for (int64_t t = chain.length - 1; t >= 0; --t) {
        path[t] = label;
        label = before[t * count + label];
      }
    }
  }
}

unsigned blocks_for(int64_t wanted) {
  return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

}  // namespace

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    return launch(forward_kernel<decltype(zero)>, dim3(blocks_for(params.pairs)),
                  dim3(kMaxThreads), 0, stream, params);
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) -> const char* {
    using T = decltype(zero);
    if (params.blocks > 0) {
      const char* error = launch(backward_kernel<T>, dim3(blocks_for(params.blocks)),
                                 dim3(kMaxThreads), 0, stream, params);
      if (error) return error;
    }
    const int64_t numbers = params.labels * (params.labels + 2);
    return launch(sum_kernel<T>, dim3(blocks_for((numbers + kMaxThreads - 1) / kMaxThreads)),
                  dim3(kMaxThreads), 0, stream, params);
  });
}

const char* launch_decode(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    return launch(decode_kernel<decltype(zero)>, dim3(blocks_for(params.pairs)), dim3(kMaxThreads),
                  0, stream, params);
  });
}

}  // namespace jitops::crf

// The LLTM on CUDA: kernels and launchers. No torch header.
//
// Both passes are bound by memory. The floor of a step, for rows * size elements of s bytes, with a
// running state of a bytes an element:
//   forward   7 s read and 5 s written; in half precision 6 s, 5 s and 2 a
//   backward  5 s read and 3 s written (one s more after the last step); 2 a, but of a single step
// An element is a thread's work, in packs where they fit; each is written by the thread that reads
// it, so that there is nothing to synchronise and nothing to add up between threads.
#include "lltm.h"

#include "common/cuda.cuh"

namespace jitops::lltm {
namespace {

using cuda::load;
using cuda::Pack;
using cuda::store;

__device__ inline float exp_minus_1(float x) { return expm1f(x); }
__device__ inline double exp_minus_1(double x) { return expm1(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }

template <typename T, int kWidth>
__device__ Pack<T, kWidth>& pack_at(const void* data, int64_t at) {
  return *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(const_cast<void*>(data)) + at);
}

// Budget: 104 registers, 0 bytes shared.
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t packs = params.size / kWidth, count = params.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  A* state = static_cast<A*>(params.state);
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += step) {
    const int64_t row = n / packs, at = n * kWidth, gate = at + row * 2 * params.size;
    auto& input = pack_at<T, kWidth>(params.gates, gate);
    auto& output = pack_at<T, kWidth>(params.gates, gate + params.size);
    auto& candidate = pack_at<T, kWidth>(params.gates, gate + 2 * params.size);
    Pack<T, kWidth> pi = input, po = output, pz = candidate, h, cell;
    Pack<T, kWidth> ri{}, ro{}, rz{};
    if (params.recurrent) {
      ri = pack_at<T, kWidth>(params.recurrent, gate);
      ro = pack_at<T, kWidth>(params.recurrent, gate + params.size);
      rz = pack_at<T, kWidth>(params.recurrent, gate + 2 * params.size);
    }
    const int64_t of_row = at - row * params.size;
    const Pack<T, kWidth> bi = pack_at<T, kWidth>(params.bias, of_row);
    const Pack<T, kWidth> bo = pack_at<T, kWidth>(params.bias, of_row + params.size);
    const Pack<T, kWidth> bz = pack_at<T, kWidth>(params.bias, of_row + 2 * params.size);
    Pack<T, kWidth> old{};
    if (params.old_cell) old = pack_at<T, kWidth>(params.old_cell, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const A i = load(pi.values[k]) + load(ri.values[k]) + load(bi.values[k]);
      const A o = load(po.values[k]) + load(ro.values[k]) + load(bo.values[k]);
      const A z = load(pz.values[k]) + load(rz.values[k]) + load(bz.values[k]);
      store(pi.values[k], i);
      store(po.values[k], o);
      store(pz.values[k], z);
      const A before = params.old_cell ? A(load(old.values[k])) : state[at + k];
      const A c = before + (z > A(0) ? z : exp_minus_1(z)) * sigmoid(i);
      if (state) state[at + k] = c;
      store(cell.values[k], c);
      store(h.values[k], hyperbolic_tangent(c) * sigmoid(o));
    }
    input = pi;
    output = po;
    candidate = pz;
    pack_at<T, kWidth>(params.cell, at) = cell;
    pack_at<T, kWidth>(params.h, at) = h;
  }
}

// Budget: 80 registers, 0 bytes shared, 48 bytes spilt (float64).
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t packs = params.size / kWidth, count = params.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  A* state = static_cast<A*>(params.state);
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += step) {
    const int64_t row = n / packs, at = n * kWidth, gate = at + row * 2 * params.size;
    const Pack<T, kWidth> pi = pack_at<T, kWidth>(params.gates, gate);
    const Pack<T, kWidth> po = pack_at<T, kWidth>(params.gates, gate + params.size);
    const Pack<T, kWidth> pz = pack_at<T, kWidth>(params.gates, gate + 2 * params.size);
    const Pack<T, kWidth> cell = pack_at<T, kWidth>(params.cell, at);
    Pack<T, kWidth> outside{}, next{}, last{}, gi, go, gz, old;
    if (params.grad_h) outside = pack_at<T, kWidth>(params.grad_h, at);
    if (params.grad_next) next = pack_at<T, kWidth>(params.grad_next, at);
    if (params.grad_cell) last = pack_at<T, kWidth>(params.grad_cell, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const A i = sigmoid(A(load(pi.values[k]))), o = sigmoid(A(load(po.values[k])));
      const A before = load(pz.values[k]), below = exp_minus_1(before);
      const A z = before > A(0) ? before : below, slope = before > A(0) ? A(1) : below + A(1);
      const A t = hyperbolic_tangent(A(load(cell.values[k])));
      const A grad_h = A(load(outside.values[k])) + A(load(next.values[k]));
      const A arrived = params.last ? A(load(last.values[k])) : state[at + k];
      const A grad_c = arrived + grad_h * o * (A(1) - t * t);
      if (state) state[at + k] = grad_c;
      store(gi.values[k], grad_c * z * (i * (A(1) - i)));
      store(go.values[k], grad_h * t * (o * (A(1) - o)));
      store(gz.values[k], grad_c * i * slope);
      store(old.values[k], grad_c);
    }
    pack_at<T, kWidth>(params.grad_gates, gate) = gi;
    pack_at<T, kWidth>(params.grad_gates, gate + params.size) = go;
    pack_at<T, kWidth>(params.grad_gates, gate + 2 * params.size) = gz;
    if (params.grad_old_cell) pack_at<T, kWidth>(params.grad_old_cell, at) = old;
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

template <typename T>
bool in_packs(const Params& params) {
  const void* all[] = {params.gates,  params.recurrent, params.bias, params.old_cell, params.h,
                       params.cell,   params.grad_h,    params.grad_next,  params.grad_cell,
                       params.grad_gates, params.grad_old_cell};
  for (const void* data : all) {
    if (!cuda::packs_fit<T>(data, params.size)) return false;
  }
  return true;
}

constexpr int64_t kMaxBlocks = 4096;  // more elements than these threads: each takes several

template <typename T, int kWidth, typename Kernel>
const char* run(Kernel kernel, const Params& params, void* stream) {
  const int64_t packs = params.rows * (params.size / kWidth);
  if (packs == 0) return nullptr;
  const int64_t wanted = (packs + cuda::kMaxThreads - 1) / cuda::kMaxThreads;
  const auto blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  return launch(kernel, dim3(blocks), dim3(cuda::kMaxThreads), 0, stream, params);
}

}  // namespace

const char* launch_forward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = cuda::kPackBytes / sizeof(T);
    return in_packs<T>(params) ? run<T, kWidth>(forward_kernel<T, kWidth>, params, stream)
                               : run<T, 1>(forward_kernel<T, 1>, params, stream);
  });
}

const char* launch_backward(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = cuda::kPackBytes / sizeof(T);
    return in_packs<T>(params) ? run<T, kWidth>(backward_kernel<T, kWidth>, params, stream)
                               : run<T, 1>(backward_kernel<T, 1>, params, stream);
  });
}

}  // namespace jitops::lltm

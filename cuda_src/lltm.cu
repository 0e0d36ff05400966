// The LLTM on CUDA: kernels and launchers. No torch header.
//
// Both passes are bound by memory. The floor of a step, in bytes for each element of h, where T has
// s bytes and acc_t<T> has a bytes:
//   forward   reads 6 s and writes 4 s; the cell: reads and writes s, in a sequence a
//   backward  reads 4 s and writes 3 s (s more before the last step); the cell: reads s, in a
//             sequence a; its gradient: 2 a in a sequence
// A thread takes one element at a time, or a pack where packs fit. Threads share no data, so there
// is no synchronisation.
#include "lltm.cuh"

namespace jitops::lltm {
namespace {

using cuda::Pack;

template <typename T, int kWidth>
__device__ Pack<T, kWidth>& pack_at(const void* data, int64_t at) {
  return *reinterpret_cast<Pack<T, kWidth>*>(static_cast<T*>(const_cast<void*>(data)) + at);
}

// kWidth elements, in packs of at most kPackBytes.
template <typename A, int kWidth>
struct Packs {
  static constexpr int kEach = kWidth * static_cast<int>(sizeof(A)) <= cuda::kPackBytes
                                   ? kWidth
                                   : cuda::kPackBytes / static_cast<int>(sizeof(A));
  Pack<A, kEach> packs[kWidth / kEach];

  __device__ A& operator[](int k) { return packs[k / kEach].values[k % kEach]; }
  __device__ void load_from(const void* data, int64_t at) {
#pragma unroll
    for (int n = 0; n < kWidth / kEach; ++n) packs[n] = pack_at<A, kEach>(data, at + n * kEach);
  }
  __device__ void store_to(void* data, int64_t at) const {
#pragma unroll
    for (int n = 0; n < kWidth / kEach; ++n) pack_at<A, kEach>(data, at + n * kEach) = packs[n];
  }
};

// The cells before a step, in the type in which they accumulate.
template <typename T, int kWidth, typename A = acc_t<T>>
__device__ inline Packs<A, kWidth> old_state_at(const Params& params, int64_t at) {
  Packs<A, kWidth> old;
  if (params.old_cell) {
    const Pack<T, kWidth> cell = pack_at<T, kWidth>(params.old_cell, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) old[k] = load(cell.values[k]);
  } else {
    old.load_from(params.old_state, at);
  }
  return old;
}

// Budget: 84 registers, 0 bytes shared.
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) forward_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t packs = params.size / kWidth, count = params.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += step) {
    const int64_t row = n / packs, at = n * kWidth, gate = at + row * 2 * params.size;
    auto& input = pack_at<T, kWidth>(params.gates, gate);
    auto& output = pack_at<T, kWidth>(params.gates, gate + params.size);
    auto& candidate = pack_at<T, kWidth>(params.gates, gate + 2 * params.size);
    Pack<T, kWidth> pi = input, po = output, pz = candidate, h, cell;
    const int64_t of_row = at - row * params.size;
    const Pack<T, kWidth> bi = pack_at<T, kWidth>(params.bias, of_row);
    const Pack<T, kWidth> bo = pack_at<T, kWidth>(params.bias, of_row + params.size);
    const Pack<T, kWidth> bz = pack_at<T, kWidth>(params.bias, of_row + 2 * params.size);
    Packs<A, kWidth> state = old_state_at<T, kWidth>(params, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const A i = load(pi.values[k]) + load(bi.values[k]);
      const A o = load(po.values[k]) + load(bo.values[k]);
      const A z = load(pz.values[k]) + load(bz.values[k]);
      store(pi.values[k], i);
      store(po.values[k], o);
      store(pz.values[k], z);
      state[k] += elu(z).value * sigmoid(i).value;
      store(cell.values[k], state[k]);
      store(h.values[k], hyperbolic_tangent(state[k]) * sigmoid(o).value);
    }
    input = pi;
    output = po;
    candidate = pz;
    if (params.cell) pack_at<T, kWidth>(params.cell, at) = cell;
    if (params.state) state.store_to(params.state, at);
    pack_at<T, kWidth>(params.h, at) = h;
  }
}

// Budget: 104 registers, 0 bytes shared, 48 bytes spilt (float64).
template <typename T, int kWidth>
__global__ void __launch_bounds__(cuda::kMaxThreads) backward_kernel(Params params) {
  using A = acc_t<T>;
  const int64_t packs = params.size / kWidth, count = params.rows * packs;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < count;
       n += step) {
    const int64_t row = n / packs, at = n * kWidth, gate = at + row * 2 * params.size;
    const Pack<T, kWidth> pi = pack_at<T, kWidth>(params.gates, gate);
    const Pack<T, kWidth> po = pack_at<T, kWidth>(params.gates, gate + params.size);
    const Pack<T, kWidth> pz = pack_at<T, kWidth>(params.gates, gate + 2 * params.size);
    Packs<A, kWidth> state = old_state_at<T, kWidth>(params, at), grad_state;
    Pack<T, kWidth> outside{}, next{}, last{}, gi, go, gz, old;
    if (params.grad_h) outside = pack_at<T, kWidth>(params.grad_h, at);
    if (params.grad_next) next = pack_at<T, kWidth>(params.grad_next, at);
    if (params.grad_cell) last = pack_at<T, kWidth>(params.grad_cell, at);
    if (!params.last) grad_state.load_from(params.grad_state, at);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const auto i = sigmoid(A(load(pi.values[k]))), o = sigmoid(A(load(po.values[k])));
      const auto z = elu(A(load(pz.values[k])));
      const auto t = tanh_of(state[k] + z.value * i.value);
      const A grad_h = A(load(outside.values[k])) + A(load(next.values[k]));
      const A arrived = params.last ? A(load(last.values[k])) : grad_state[k];
      const A grad_c = arrived + grad_h * o.value * t.slope;
      grad_state[k] = grad_c;
      store(gi.values[k], grad_c * z.value * i.slope);
      store(go.values[k], grad_h * t.value * o.slope);
      store(gz.values[k], grad_c * i.value * z.slope);
      store(old.values[k], grad_c);
    }
    if (params.grad_state) grad_state.store_to(params.grad_state, at);
    pack_at<T, kWidth>(params.grad_gates, gate) = gi;
    pack_at<T, kWidth>(params.grad_gates, gate + params.size) = go;
    pack_at<T, kWidth>(params.grad_gates, gate + 2 * params.size) = gz;
    if (params.grad_old_cell) pack_at<T, kWidth>(params.grad_old_cell, at) = old;
  }
}

// ---- launch shapes ------------------------------------------------------------------------------

template <typename T>
bool in_packs(const Params& params) {
  const void* all[] = {params.gates,      params.old_cell,     params.old_state, params.bias,
                       params.h,          params.cell,         params.state,     params.grad_h,
                       params.grad_next,  params.grad_cell,    params.grad_state,
                       params.grad_gates, params.grad_old_cell};
  for (const void* data : all) {
    if (!cuda::packs_fit<T>(data, params.size)) return false;  // if T fits, wider types fit
  }
  return true;
}

constexpr int64_t kMaxBlocks = 4096;  // with more elements, a thread takes several

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

const char* launch_forward_sequence(DType dtype, const Sequence& sequence, void* stream) {
  return dispatch_sequence(dtype, sequence, [&](auto zero, auto size) {
    constexpr int kS = decltype(size)::value;
    return run_sequence<kS>(forward_sequence_kernel<decltype(zero), kS>, sequence, stream);
  });
}

const char* launch_backward_sequence(DType dtype, const Sequence& sequence, void* stream) {
  return dispatch_sequence(dtype, sequence, [&](auto zero, auto size) {
    constexpr int kS = decltype(size)::value;
    return run_sequence<kS>(backward_sequence_kernel<decltype(zero), kS>, sequence, stream);
  });
}

}  // namespace jitops::lltm

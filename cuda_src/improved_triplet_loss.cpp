// The improved triplet loss: host side, CPU kernels, registration.
#include "improved_triplet_loss.h"

#include <tuple>

#include "common/run.h"

namespace jitops::improved_triplet_loss {
namespace {

// ---- checks, and the parameters of both passes --------------------------------------------------

struct Inputs {
  Rows anchor, positive, negative;

  Inputs(const Tensor& a, const Tensor& p, const Tensor& n) : anchor(a), positive(p), negative(n) {
    check_alike("positive", p, a);
    check_alike("negative", n, a);
  }

  Params params(double beta, double eps, int64_t reduction) const {
    check(reduction >= 0 && reduction <= 2, "reduction", " must be 0, 1 or 2");
    Params params{};
    params.anchor = anchor.tensor.const_data_ptr();
    params.positive = positive.tensor.const_data_ptr();
    params.negative = negative.tensor.const_data_ptr();
    params.anchor_stride = anchor.stride;
    params.positive_stride = positive.stride;
    params.negative_stride = negative.stride;
    params.rows = anchor.count;
    params.cols = anchor.cols;
    params.beta = beta;
    params.eps = eps;
    params.reduction = static_cast<Reduction>(reduction);
    return params;
  }
};

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kBlockElements = 32768;  // for less, a second thread does not pay off
constexpr int64_t kSumElements = 1024;     // summed in acc_t<T>; these sums are added in float64

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void squared_distances(const T* a, const T* p, const T* n, int64_t cols, A eps,
                                     double* d_pos, double* d_neg) {
  A pos = 0, neg = 0;
#pragma omp simd reduction(+ : pos, neg)
  for (int64_t j = 0; j < cols; ++j) {
    const A x = cpu::load(a[j]);
    const A u = x - cpu::load(p[j]) + eps;
    const A v = x - cpu::load(n[j]) + eps;
    pos += u * u;
    neg += v * v;
  }
  *d_pos += pos;
  *d_neg += neg;
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void gradient_row(const T* a, const T* p, const T* n, T* grad_a, T* grad_p,
                                T* grad_n, int64_t cols, A eps, A c_pos, A c_neg) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    const A x = cpu::load(a[j]);
    const A u = c_pos * (x - cpu::load(p[j]) + eps);
    const A v = c_neg * (x - cpu::load(n[j]) + eps);
    cpu::store(grad_a[j], u + v);
    cpu::store(grad_p[j], -u);
    cpu::store(grad_n[j], -v);
  }
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void gradient_row_without_negative(const T* a, const T* p, T* grad_a, T* grad_p,
                                                 T* grad_n, int64_t cols, A eps, A c_pos) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    const A u = c_pos * (cpu::load(a[j]) - cpu::load(p[j]) + eps);
    cpu::store(grad_a[j], u);
    cpu::store(grad_p[j], -u);
    cpu::store(grad_n[j], A(0));
  }
}

template <typename T>
const T* row_of(const void* data, int64_t stride, int64_t row) {
  return static_cast<const T*>(data) + row * stride;
}

template <typename T>
void forward_cpu(const Params& params) {
  using A = acc_t<T>;
  const A eps = static_cast<A>(params.eps);
  const bool reduces = params.reduction != Reduction::kNone;
  const cpu::RowBlocks blocks(params.rows, params.cols, kBlockElements);
  std::vector<double> sums(blocks.count);

  blocks.for_each([&](int64_t block, int64_t begin, int64_t end) {
    double sum = 0;
    for (int64_t row = begin; row < end; ++row) {
      const T* a = row_of<T>(params.anchor, params.anchor_stride, row);
      const T* p = row_of<T>(params.positive, params.positive_stride, row);
      const T* n = row_of<T>(params.negative, params.negative_stride, row);
      double pos = 0, neg = 0;
      for (int64_t j = 0; j < params.cols; j += kSumElements) {
        const int64_t count = std::min(kSumElements, params.cols - j);
        squared_distances(a + j, p + j, n + j, count, eps, &pos, &neg);
      }
      const auto [loss, state] = row_loss(params, static_cast<A>(pos), static_cast<A>(neg));
      params.state[row] = state;
      sum += loss;
      if (!reduces) cpu::store(static_cast<T*>(params.loss)[row], loss);
    }
    sums[block] = sum;
  });

  if (!reduces) return;
  double total = 0;
  for (const double sum : sums) total += sum;
  if (params.reduction == Reduction::kMean) total /= static_cast<double>(params.rows);
  cpu::store(*static_cast<T*>(params.loss), static_cast<A>(total));
}

template <typename T>
void backward_cpu(const Params& params) {
  using A = acc_t<T>;
  const A beta = static_cast<A>(params.beta), eps = static_cast<A>(params.eps);
  const bool reduces = params.reduction != Reduction::kNone;
  const A weight = row_weight<A>(params);
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  const cpu::RowBlocks blocks(params.rows, params.cols, kBlockElements);

  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    // A gradient that is not needed is written to a scratch row, which stays in the CPU's cache.
    const bool all = params.grad_anchor && params.grad_positive && params.grad_negative;
    std::vector<T> scratch(all ? 0 : params.cols);
    const auto destination = [&](void* gradient, int64_t row) {
      return gradient ? static_cast<T*>(gradient) + row * params.cols : scratch.data();
    };
    for (int64_t row = begin; row < end; ++row) {
      const T* a = row_of<T>(params.anchor, params.anchor_stride, row);
      const T* p = row_of<T>(params.positive, params.positive_stride, row);
      const T* n = row_of<T>(params.negative, params.negative_stride, row);
      T* grad_a = destination(params.grad_anchor, row);
      T* grad_p = destination(params.grad_positive, row);
      T* grad_n = destination(params.grad_negative, row);

      const A grad = cpu::load(grad_loss[reduces ? 0 : row]) * weight;
      const RowFactors<A> factors = row_factors(params.state[row], beta, grad);
      if (factors.reads_negative) {
        gradient_row(a, p, n, grad_a, grad_p, grad_n, params.cols, eps, factors.pos, factors.neg);
      } else {
        gradient_row_without_negative(a, p, grad_a, grad_p, grad_n, params.cols, eps, factors.pos);
      }
    }
  });
}
#endif

// ---- the two operators ------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(const Tensor& anchor, const Tensor& positive,
                                   const Tensor& negative, double t1, double t2, double beta,
                                   double eps, int64_t reduction) {
  const Inputs inputs(anchor, positive, negative);
  Params params = inputs.params(beta, eps, reduction);
  params.t1 = t1;
  params.t2 = t2;

  const auto batch = anchor.sizes().slice(0, anchor.dim() - 1);
  const bool reduces = params.reduction != Reduction::kNone;
  Tensor loss = empty(reduces ? batch.slice(0, 0) : batch, anchor);
  Tensor state = empty(batch, ScalarType::Byte, anchor);
  params.loss = loss.mutable_data_ptr();
  params.state = static_cast<uint8_t*>(state.mutable_data_ptr());
#ifdef USE_CUDA
  const int64_t scratch = kMaxBlocks;
  const Tensor partials = empty({&scratch, 1}, ScalarType::Double, anchor);
  params.partials = static_cast<double*>(partials.mutable_data_ptr());
#endif
  const OnDeviceOf device(anchor);
  JITOPS_RUN("improved_triplet_loss", forward, anchor, params, device);
  return {loss, state};
}

std::vector<Tensor> backward(const Tensor& grad_loss, const Tensor& anchor, const Tensor& positive,
                             const Tensor& negative, const Tensor& state, double beta, double eps,
                             int64_t reduction, bool needs_anchor, bool needs_positive,
                             bool needs_negative) {
  const Inputs inputs(anchor, positive, negative);
  Params params = inputs.params(beta, eps, reduction);
  const Tensor grad = dense(grad_loss), saved = dense(state);
  check_same_kind("grad_loss", grad, anchor);
  check(grad.numel() == (params.reduction == Reduction::kNone ? params.rows : 1), "grad_loss",
        " must have the shape of the loss");
  check(saved.numel() == params.rows && saved.scalar_type() == ScalarType::Byte, "state",
        " must hold one byte per row");
  params.grad_loss = grad.const_data_ptr();
  params.state = static_cast<uint8_t*>(const_cast<void*>(saved.const_data_ptr()));

  std::vector<Tensor> gradients;
  const auto allocate = [&](bool needed) -> void* {
    if (!needed) return nullptr;
    return gradients.emplace_back(empty_gradient(anchor)).mutable_data_ptr();
  };
  params.grad_anchor = allocate(needs_anchor);
  params.grad_positive = allocate(needs_positive);
  params.grad_negative = allocate(needs_negative);
  const OnDeviceOf device(anchor);
  JITOPS_RUN("improved_triplet_loss", backward, anchor, params, device);
  return gradients;
}

}  // namespace
}  // namespace jitops::improved_triplet_loss

// ---- registration (schemas and shapes: ops/losses/improved_triplet_loss.py) ---------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("improved_triplet_loss_forward", TORCH_BOX(&jitops::improved_triplet_loss::forward));
  m.impl("improved_triplet_loss_backward", TORCH_BOX(&jitops::improved_triplet_loss::backward));
}

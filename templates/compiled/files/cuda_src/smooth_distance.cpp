// smooth_distance: host side, CPU kernels, registration.
#include "smooth_distance.h"

#include <tuple>

#include "common/run.h"

namespace jitops::smooth_distance {
namespace {

// ---- checks, and the parameters of both passes --------------------------------------------------

struct Inputs {
  Rows input, target;

  Inputs(const Tensor& x, const Tensor& y) : input(x), target(y) { check_alike("target", y, x); }

  Params params(int64_t reduction) const {
    check(reduction >= 0 && reduction <= 2, "reduction", " must be 0, 1 or 2");
    Params params{};
    params.input = input.tensor.const_data_ptr();
    params.target = target.tensor.const_data_ptr();
    params.input_stride = input.stride;
    params.target_stride = target.stride;
    params.rows = input.count;
    params.cols = input.cols;
    params.reduction = static_cast<Reduction>(reduction);
    return params;
  }
};

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kBlockElements = 32768;  // for less, a second thread does not pay off

template <typename T>
JITOPS_KERNEL double squared_distance(const T* x, const T* y, int64_t cols) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < cols; ++j) {
    const double difference = cpu::load(x[j]) - cpu::load(y[j]);
    sum += difference * difference;
  }
  return sum;
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void gradient_row(const T* x, const T* y, T* gradient, int64_t cols, A factor) {
#pragma omp simd
  for (int64_t j = 0; j < cols; ++j) {
    cpu::store(gradient[j], factor * (cpu::load(x[j]) - cpu::load(y[j])));
  }
}

template <typename T>
const T* row_of(const void* data, int64_t stride, int64_t row) {
  return static_cast<const T*>(data) + row * stride;
}

template <typename T>
void forward_cpu(const Params& params) {
  using A = acc_t<T>;
  const cpu::RowBlocks blocks(params.rows, params.cols, kBlockElements);
  T* loss = static_cast<T*>(params.loss);
  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = row_of<T>(params.input, params.input_stride, row);
      const T* y = row_of<T>(params.target, params.target_stride, row);
      const double root = row_loss(params, squared_distance(x, y, params.cols));
      params.roots[row] = root;
      if (params.reduction == Reduction::kNone) cpu::store(loss[row], static_cast<A>(root));
    }
  });
  if (params.reduction == Reduction::kNone) return;
  double sum = 0;
  for (int64_t row = 0; row < params.rows; ++row) sum += params.roots[row];
  cpu::store(*loss, static_cast<A>(reduced(params, sum)));
}

template <typename T>
void backward_cpu(const Params& params) {
  using A = acc_t<T>;
  const bool reduces = params.reduction != Reduction::kNone;
  const T* grad_loss = static_cast<const T*>(params.grad_loss);
  T* grad_input = static_cast<T*>(params.grad_input);
  T* grad_target = static_cast<T*>(params.grad_target);
  const cpu::RowBlocks blocks(params.rows, params.cols, kBlockElements);
  blocks.for_each([&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = row_of<T>(params.input, params.input_stride, row);
      const T* y = row_of<T>(params.target, params.target_stride, row);
      const A grad = cpu::load(grad_loss[reduces ? 0 : row]);
      const A factor = row_factor(params, params.roots[row], grad);
      const int64_t at = row * params.cols;
      if (grad_input) gradient_row(x, y, grad_input + at, params.cols, factor);
      if (grad_target) gradient_row(y, x, grad_target + at, params.cols, factor);
    }
  });
}
#endif

// ---- the two operators ------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& target, double width,
                                   int64_t reduction) {
  const Inputs inputs(input, target);
  Params params = inputs.params(reduction);
  params.width = width;

  const auto batch = input.sizes().slice(0, input.dim() - 1);
  const bool reduces = params.reduction != Reduction::kNone;
  Tensor loss = empty(reduces ? batch.slice(0, 0) : batch, input);
  Tensor roots = empty(batch, ScalarType::Double, input);
  params.loss = loss.mutable_data_ptr();
  params.roots = static_cast<double*>(roots.mutable_data_ptr());
#ifdef USE_CUDA
  const int64_t scratch = kMaxBlocks;
  const Tensor partials = empty({&scratch, 1}, ScalarType::Double, input);
  params.partials = static_cast<double*>(partials.mutable_data_ptr());
#endif
  const OnDeviceOf device(input);
  JITOPS_RUN("smooth_distance", forward, input, params, device);
  return {loss, roots};
}

std::vector<Tensor> backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                             const Tensor& roots, int64_t reduction, bool needs_input,
                             bool needs_target) {
  const Inputs inputs(input, target);
  Params params = inputs.params(reduction);
  const Tensor grad = dense(grad_loss), saved = dense(roots);
  check_same_kind("grad_loss", grad, input);
  check(grad.numel() == (params.reduction == Reduction::kNone ? params.rows : 1), "grad_loss",
        " must have the shape of the loss");
  check(saved.numel() == params.rows && saved.scalar_type() == ScalarType::Double, "roots",
        " must hold one float64 per row");
  params.grad_loss = grad.const_data_ptr();
  params.roots = static_cast<double*>(const_cast<void*>(saved.const_data_ptr()));

  std::vector<Tensor> gradients;
  const auto allocate = [&](bool needed) -> void* {
    if (!needed) return nullptr;
    return gradients.emplace_back(empty_gradient(input)).mutable_data_ptr();
  };
  params.grad_input = allocate(needs_input);
  params.grad_target = allocate(needs_target);
  const OnDeviceOf device(input);
  JITOPS_RUN("smooth_distance", backward, input, params, device);
  return gradients;
}

}  // namespace
}  // namespace jitops::smooth_distance

// ---- registration (schemas and shapes: ops/losses/smooth_distance.py) ---------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("smooth_distance_forward", TORCH_BOX(&jitops::smooth_distance::forward));
  m.impl("smooth_distance_backward", TORCH_BOX(&jitops::smooth_distance::backward));
}

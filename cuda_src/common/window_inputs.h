// The host side of a loss of local windows: checks, parameters, gradients.
#pragma once

#include <cmath>

#include "tensor.h"
#include "windows.h"

namespace jitops {

enum class Window : int64_t { kGaussian = 0, kRectangular = 1, kTriangular = 2 };

// The weights of a window along one dimension, which add up to 1.
inline void set_taps(Window window, int64_t size, double sigma, double* taps) {
  double sum = 0;
  for (int64_t k = 0; k < size; ++k) {
    const double from = static_cast<double>(k - size / 2);
    if (window == Window::kGaussian) taps[k] = std::exp(-(from / sigma) * (from / sigma) / 2);
    if (window == Window::kRectangular) taps[k] = 1;
    if (window == Window::kTriangular) taps[k] = static_cast<double>(size / 2 + 1) - std::abs(from);
    sum += taps[k];
  }
  for (int64_t k = 0; k < size; ++k) taps[k] /= sum;
}

// Two images (batch, channels, width), (.., height, width) or (.., depth, height, width).
class WindowInputs {
 public:
  // Sums have the dtype `number`.
  WindowInputs(const Tensor& input, const Tensor& target, ScalarType number_)
      : number(number_), input_(dense(input)), target_(dense(target)) {
    check_alike("target", target, input);
    check(input.dim() >= 3 && input.dim() <= 5, "input", " must have three to five dimensions");
  }

  void fill(WindowParams& params, Window window, int64_t size, double sigma,
            int64_t padding) const {
    check(size >= 1 && size <= kMaxWindow && size % 2 == 1, "window_size", " must be odd");
    check(padding >= 0 && padding <= 2, "padding", " must be 0, 1 or 2");
    params.input = input_.const_data_ptr();
    params.target = target_.const_data_ptr();
    params.padding = static_cast<Padding>(padding);
    params.planes = input_.size(0) * input_.size(1);
    set_taps(window, size, sigma, params.taps);
    Extent* const extents[] = {&params.width, &params.height, &params.depth};
    for (int64_t d = 0; d < input_.dim() - 2; ++d) {
      Extent& one = *extents[d];
      one.size = input_.size(input_.dim() - 1 - d);
      one.taps = size;
      one.pad = params.padding == Padding::kValid ? 0 : size / 2;
      one.windows = one.size + 2 * one.pad - size + 1;
      check(one.size > 0 && one.windows > 0, "input", " must be as large as a window");
      check(params.padding != Padding::kReflect || one.pad < one.size, "input",
            " must be larger than the padding");
    }
  }

  // (batch, channels, 1, ...), or the shape of the map.
  Tensor result(const WindowParams& params, bool reduces) const {
    std::vector<int64_t> sizes(input_.sizes().begin(), input_.sizes().end());
    const Extent* const extents[] = {&params.width, &params.height, &params.depth};
    for (size_t d = 0; d + 2 < sizes.size(); ++d) {
      sizes[sizes.size() - 1 - d] = reduces ? 1 : extents[d]->windows;
    }
    const IntHeaderOnlyArrayRef shape(sizes.data(), sizes.size());
    return reduces ? empty(shape, number, input_) : empty(shape, input_);
  }

  // Takes the gradient of the result.
  void take_grad(WindowParams& params, const Tensor& grad, bool reduces) const {
    if (reduces) {
      check(grad.numel() == params.planes && grad.scalar_type() == number, "grad",
            " must have the shape of the losses");
      params.grad_losses = grad.const_data_ptr();
    } else {
      check_same_kind("grad", grad, input_);
      check(grad.numel() == params.planes * params.windows(), "grad",
            " must have the shape of the map");
      params.grad_map = grad.const_data_ptr();
    }
  }

  const Tensor& input() const { return input_; }

  const ScalarType number;

 private:
  Tensor input_, target_;
};

// Gradients of both images in the dtype of sums. Those that are not needed are empty.
class WindowGradients {
 public:
  WindowGradients(WindowParams& params, const WindowInputs& inputs, bool needs_input,
                  bool needs_target)
      : needs_{needs_input, needs_target},
        of_input(make(needs_input, inputs)),
        of_target(make(needs_target, inputs)) {
    if (needs_input) params.grad_input = of_input.mutable_data_ptr();
    if (needs_target) params.grad_target = of_target.mutable_data_ptr();
  }

  // Those that are needed, rounded once.
  std::vector<Tensor> in_dtype_of(const Tensor& like) const {
    std::vector<Tensor> gradients;
    if (needs_[0]) gradients.push_back(of_input);
    if (needs_[1]) gradients.push_back(of_target);
    for (Tensor& one : gradients) {
      if (one.scalar_type() != like.scalar_type()) {
        one = torch::stable::to(one, like.scalar_type());
      }
    }
    return gradients;
  }

 private:
  static Tensor make(bool needed, const WindowInputs& inputs) {
    constexpr int64_t kNone = 0;
    const Tensor& like = inputs.input();
    const auto sizes = needed ? like.sizes() : IntHeaderOnlyArrayRef(&kNone, size_t{1});
    Tensor gradient = empty(sizes, inputs.number, like);
    if (needed && !gradient.is_cuda()) advise_huge_pages(gradient);
    return gradient;
  }

  bool needs_[2];

 public:
  const Tensor of_input, of_target;
};

#ifdef USE_CUDA
// Scratch memory of the kernels: partial sums, and with gradients the derivatives of each window,
// for some planes at a time.
class WindowScratch {
 public:
  WindowScratch(WindowParams& params, int64_t derivatives, const WindowInputs& inputs)
      : partials_(make(params.losses ? 2 * params.planes * params.blocks() : 0,
                       ScalarType::Double, inputs.input())),
        moments_(derive(params, derivatives, inputs)) {
    params.partials = static_cast<double*>(partials_.mutable_data_ptr());
  }

 private:
  static constexpr int64_t kWindows = int64_t{1} << 22;  // of all planes at a time

  static Tensor make(int64_t count, ScalarType dtype, const Tensor& like) {
    return empty({&count, 1}, dtype, like);
  }
  static Tensor derive(WindowParams& params, int64_t derivatives, const WindowInputs& inputs) {
    const bool derives = params.grad_input || params.grad_target;
    const int64_t most = derives ? kWindows / params.windows() : params.planes;
    params.chunk = most < 1 ? 1 : most < params.planes ? most : params.planes;
    const int64_t count = derives ? derivatives * params.chunk * params.windows() : 0;
    Tensor moments = make(count, inputs.number, inputs.input());
    if (derives) params.moments = moments.mutable_data_ptr();
    return moments;
  }

  Tensor partials_, moments_;
};
#endif

}  // namespace jitops

// The structural similarity: host side, CPU kernels, registration.
#include "ssim.h"

#include <tuple>

#include "common/run.h"
#include "common/window_inputs.h"
#ifndef USE_CUDA
#include "common/cpu_windows.h"
#endif

namespace jitops::ssim {
namespace {

#ifndef USE_CUDA
template <typename T>
void windows_cpu(const Params& params) {
  cpu::run_windows<T>(params, Formula<acc_t<T>>(params));
}
#endif

Params params_of(const WindowInputs& inputs, double data_range, int64_t window_size, double sigma,
                 double k1, double k2, int64_t padding, double l1_weight, double ssim_weight,
                 bool contrast) {
  Params params{};
  inputs.fill(params, Window::kGaussian, window_size, sigma, padding);
  params.c1 = (k1 * data_range) * (k1 * data_range);
  params.c2 = (k2 * data_range) * (k2 * data_range);
  params.l1_weight = l1_weight;
  params.window_weight = ssim_weight;
  params.contrast = contrast;
  return params;
}

void run(Params& params, const WindowInputs& inputs) {
  if (params.planes == 0) return;
#ifdef USE_CUDA
  using F = Formula<float>;
  const WindowScratch scratch(params, F::kShared + 2 * F::kOwn, inputs);
#endif
  const OnDeviceOf device(inputs.input());
  JITOPS_RUN("ssim", windows, inputs.input(), params, device);
}

// Returns the losses of all planes and the gradients of their sum, or the map.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                           double data_range, int64_t window_size, double sigma,
                                           double k1, double k2, int64_t padding, double l1_weight,
                                           double ssim_weight, bool contrast, bool reduces,
                                           bool needs_input, bool needs_target) {
  const WindowInputs inputs(input, target, wide(input));
  Params params = params_of(inputs, data_range, window_size, sigma, k1, k2, padding, l1_weight,
                            ssim_weight, contrast);
  const Tensor result = inputs.result(params, reduces);
  (reduces ? params.losses : params.map) = result.mutable_data_ptr();
  const WindowGradients gradients(params, inputs, reduces && needs_input,
                                  reduces && needs_target);
  run(params, inputs);
  return {result, gradients.of_input, gradients.of_target};
}

std::vector<Tensor> backward(const Tensor& grad_result, const Tensor& input, const Tensor& target,
                             double data_range, int64_t window_size, double sigma, double k1,
                             double k2, int64_t padding, double l1_weight, double ssim_weight,
                             bool contrast, bool reduces, bool needs_input, bool needs_target) {
  const WindowInputs inputs(input, target, wide(input));
  Params params = params_of(inputs, data_range, window_size, sigma, k1, k2, padding, l1_weight,
                            ssim_weight, contrast);
  const Tensor grad = dense(grad_result);
  inputs.take_grad(params, grad, reduces);
  const WindowGradients gradients(params, inputs, needs_input, needs_target);
  if (needs_input || needs_target) run(params, inputs);
  return gradients.in_dtype_of(input);
}

}  // namespace
}  // namespace jitops::ssim

// ---- registration (schemas and shapes: ops/losses/ssim.py) --------------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("ssim_forward", TORCH_BOX(&jitops::ssim::forward));
  m.impl("ssim_backward", TORCH_BOX(&jitops::ssim::backward));
}

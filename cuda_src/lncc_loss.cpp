// The local normalised cross-correlation: host side, CPU kernels, registration.
#include "lncc_loss.h"

#include <tuple>

#include "common/run.h"
#include "common/window_inputs.h"
#ifndef USE_CUDA
#include "common/cpu_windows.h"
#endif

namespace jitops::lncc_loss {
namespace {

#ifndef USE_CUDA
template <typename T>
void windows_cpu(const Params& params) {
  cpu::run_windows<T>(params, Formula(params));
}
#endif

Params params_of(const WindowInputs& inputs, int64_t window, int64_t kernel_size, double sigma,
                 double volume, double smooth_nr, double smooth_dr, bool adds) {
  check(window >= 0 && window <= 2, "window", " must be 0, 1 or 2");
  Params params{};
  inputs.fill(params, static_cast<Window>(window), kernel_size, sigma,
              static_cast<int64_t>(Padding::kSame));
  params.window_weight = 1;
  params.volume = volume;
  params.smooth_nr = smooth_nr;
  params.smooth_dr = smooth_dr;
  params.adds = adds;
  return params;
}

void run(Params& params, const WindowInputs& inputs) {
  if (params.planes == 0) return;
#ifdef USE_CUDA
  const WindowScratch scratch(params, Formula::kShared + 2 * Formula::kOwn, inputs);
#endif
  const OnDeviceOf device(inputs.input());
  JITOPS_RUN("lncc_loss", windows, inputs.input(), params, device);
}

// Returns the losses of all planes and the gradients of their sum, or the map.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& target,
                                           int64_t window, int64_t kernel_size, double sigma,
                                           double volume, double smooth_nr, double smooth_dr,
                                           bool adds, bool reduces, bool needs_input,
                                           bool needs_target) {
  const WindowInputs inputs(input, target, ScalarType::Double);
  Params params =
      params_of(inputs, window, kernel_size, sigma, volume, smooth_nr, smooth_dr, adds);
  const Tensor result = inputs.result(params, reduces);
  (reduces ? params.losses : params.map) = result.mutable_data_ptr();
  const WindowGradients gradients(params, inputs, reduces && needs_input,
                                  reduces && needs_target);
  run(params, inputs);
  return {result, gradients.of_input, gradients.of_target};
}

std::vector<Tensor> backward(const Tensor& grad_result, const Tensor& input, const Tensor& target,
                             int64_t window, int64_t kernel_size, double sigma, double volume,
                             double smooth_nr, double smooth_dr, bool adds, bool reduces,
                             bool needs_input, bool needs_target) {
  const WindowInputs inputs(input, target, ScalarType::Double);
  Params params =
      params_of(inputs, window, kernel_size, sigma, volume, smooth_nr, smooth_dr, adds);
  const Tensor grad = dense(grad_result);
  inputs.take_grad(params, grad, reduces);
  const WindowGradients gradients(params, inputs, needs_input, needs_target);
  if (needs_input || needs_target) run(params, inputs);
  return gradients.in_dtype_of(input);
}

}  // namespace
}  // namespace jitops::lncc_loss

// ---- registration (schemas and shapes: ops/losses/lncc_loss.py) ---------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("lncc_loss_forward", TORCH_BOX(&jitops::lncc_loss::forward));
  m.impl("lncc_loss_backward", TORCH_BOX(&jitops::lncc_loss::backward));
}

// The local normalised cross-correlation: the contract between the host (.cpp) and the kernels
// (.cu).
#pragma once

#include "common/windows.h"

namespace jitops::lncc_loss {

struct Params : WindowParams {
  double volume;  // the sum of the weights of a window, before they are scaled to add up to 1
  double smooth_nr, smooth_dr;
  bool adds;  // smooth_dr is added to the product of the variances, else it is their least value
};

// The negative squared correlation of a window. All numbers are float64: where both images are flat,
// the rounding of float32 would be divided by variances that are no larger.
struct Formula {
  using Number = double;
  double volume, smooth_nr, smooth_dr;
  bool adds;

  static constexpr int kMeans = 5;             // of x, y, x^2, y^2, x y
  static constexpr int kShared = 1, kOwn = 2;  // of x y; of an image and of its square
  static constexpr int kSigned = 1;

  JITOPS_BOTH explicit Formula(const Params& params)
      : volume(params.volume),
        smooth_nr(params.smooth_nr),
        smooth_dr(params.smooth_dr),
        adds(params.adds) {}

  template <typename V>
  JITOPS_FORMULA static void products(V x, V y, V* out) {
    out[0] = x;
    out[1] = y;
    out[2] = x * x;
    out[3] = y * y;
    out[4] = x * y;
  }

  // A variance is not negative, but rounding may make it so. NaN stays.
  template <typename V>
  JITOPS_FORMULA static V not_negative(V x) {
    return x < V{} ? V{} : x;
  }

  template <bool kDerivatives, typename V>
  JITOPS_FORMULA V window(const V* means, V, V, V g, V* out) const {
    const V var_x = volume * not_negative(means[2] - means[0] * means[0]);
    const V var_y = volume * not_negative(means[3] - means[1] * means[1]);
    const V cross = volume * (means[4] - means[0] * means[1]);
    const V least = V{} + smooth_dr;
    const V floor_x = var_x < least ? least : var_x, floor_y = var_y < least ? least : var_y;
    const V divisor = 1.0 / (adds ? var_x * var_y + smooth_dr : floor_x * floor_y);
    const V squared = (cross * cross + smooth_nr) * divisor;
    if (kDerivatives) {
      const V scaled = volume * g * divisor;
      const V of_cross = -2.0 * scaled * cross;
      const V slope_x = adds ? var_y : (var_x < least ? V{} : floor_y);
      const V slope_y = adds ? var_x : (var_y < least ? V{} : floor_x);
      const V of_var_x = scaled * squared * slope_x, of_var_y = scaled * squared * slope_y;
      out[0] = of_cross;
      out[1] = -2.0 * of_var_x * means[0] - of_cross * means[1];
      out[2] = 2.0 * of_var_x;
      out[3] = -2.0 * of_var_y * means[1] - of_cross * means[0];
      out[4] = 2.0 * of_var_y;
    }
    return -squared;
  }

  template <typename V>
  JITOPS_FORMULA static V shown(V loss) {
    return loss;
  }

  template <typename V>
  JITOPS_FORMULA static V gradient_of_input(const V* shared, const V* own, V x, V y) {
    return own[0] + own[1] * x + shared[0] * y;
  }
  template <typename V>
  JITOPS_FORMULA static V gradient_of_target(const V* shared, const V* own, V x, V y) {
    return own[0] + own[1] * y + shared[0] * x;
  }
};

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_windows(DType dtype, const Params& params, void* stream);

}  // namespace jitops::lncc_loss

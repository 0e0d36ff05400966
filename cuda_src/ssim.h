// The structural similarity: the contract between the host (.cpp) and the kernels (.cu).
#pragma once

#include "common/windows.h"

namespace jitops::ssim {

struct Params : WindowParams {
  double c1, c2;  // (k1 * data_range)^2, (k2 * data_range)^2
  bool contrast;  // leave the luminance out
};

// 1 - SSIM of a window. With u = x + y and v = x - y it is
//   1 - (1 - l) (1 - s),  l = 2 mean(v)^2 / (mean(u)^2 + mean(v)^2 + 2 c1),
//                         s = 2 var(v) / (var(u) + var(v) + 2 c2).
// This has no difference of large numbers where the images are alike, and needs four means.
template <typename A>
struct Formula {
  using Number = A;
  A c1, c2, light;  // twice the constants; 0 to leave the luminance out

  static constexpr int kMeans = 4;          // of u, v, u^2, v^2
  static constexpr int kShared = 2, kOwn = 1;  // of var(u), var(v); of an image
  static constexpr int kSigned = -1;

  JITOPS_BOTH explicit Formula(const Params& params)
      : c1(static_cast<A>(2 * params.c1)),
        c2(static_cast<A>(2 * params.c2)),
        light(static_cast<A>(params.contrast ? 0 : 1)) {}

  template <typename V>
  JITOPS_FORMULA static void products(V x, V y, V* out) {
    out[0] = x + y;
    out[1] = x - y;
    out[2] = out[0] * out[0];
    out[3] = out[1] * out[1];
  }

  // A variance is not negative, but rounding may make it so. NaN stays.
  template <typename V>
  JITOPS_FORMULA static V not_negative(V x) {
    return x < V{} ? V{} : x;
  }

  template <bool kDerivatives, typename V>
  JITOPS_FORMULA V window(const V* means, V shift_x, V shift_y, V g, V* out) const {
    const V sum = means[0] + (shift_x + shift_y), difference = means[1] + (shift_x - shift_y);
    const V var_u = not_negative(means[2] - means[0] * means[0]);
    const V var_v = not_negative(means[3] - means[1] * means[1]);
    const V of_means = sum * sum + difference * difference + c1, of_variances = var_u + var_v + c2;
    const V by_means = A(1) / of_means, by_variances = A(1) / of_variances;
    // An infinite sum makes NaN, because the rest would look like a similarity.
    const V luminance = light * (A(2) * difference * difference * by_means + A(0) * of_means);
    const V structure = A(2) * var_v * by_variances + A(0) * of_variances;
    if (kDerivatives) {
      const V outer = g * (A(1) - luminance) * by_variances;
      const V of_var_u = -outer * structure, of_var_v = outer * (A(2) - structure);
      const V inner = A(2) * light * g * (A(1) - structure) * by_means;
      const V of_sum = -inner * luminance * sum;
      const V of_difference = inner * (A(2) - luminance) * difference;
      const V of_u = of_sum - A(2) * of_var_u * means[0];
      const V of_v = of_difference - A(2) * of_var_v * means[1];
      out[0] = A(2) * of_var_u;
      out[1] = A(2) * of_var_v;
      out[2] = of_u + of_v;
      out[3] = of_u - of_v;
    }
    return luminance + structure - luminance * structure;
  }

  template <typename V>
  JITOPS_FORMULA static V shown(V loss) {
    return V{} + A(1) - loss;
  }

  template <typename V>
  JITOPS_FORMULA static V gradient_of_input(const V* shared, const V* own, V x, V y) {
    return own[0] + shared[0] * (x + y) + shared[1] * (x - y);
  }
  template <typename V>
  JITOPS_FORMULA static V gradient_of_target(const V* shared, const V* own, V x, V y) {
    return own[0] + shared[0] * (x + y) - shared[1] * (x - y);
  }
};

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_windows(DType dtype, const Params& params, void* stream);

}  // namespace jitops::ssim

// The tensors of an alignment of two sequences on the host, checked.
#pragma once

#include <optional>

#include "tensor.h"
#include "warping.h"

namespace jitops {

struct WarpingInputs {
  Tensor x, y, cost, lengths;  // of `cost` alone, or of the other two

  WarpingInputs(const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& lengths_)
      : x(dense(x_)), y(dense(y_)) {
    check(x.dim() == 3, "x", " must have three dimensions");
    check(y.dim() == 3 && y.size(0) == x.size(0) && y.size(2) == x.size(2), "y",
          " must have the batch and the features of x");
    check_same_kind("y", y, x);
    take(lengths_);
  }
  WarpingInputs(const Tensor& cost_, const std::optional<Tensor>& lengths_)
      : cost(dense(cost_)), of_costs_(true) {
    check(cost.dim() == 3, "cost", " must have three dimensions");
    take(lengths_);
  }

  const Tensor& first() const { return of_costs_ ? cost : x; }

  // `bandwidth` is negative if there is no band.
  void fill(warping::Inputs& out, int64_t bandwidth) const {
    if (of_costs_) {
      out.cost = cost.const_data_ptr();
    } else {
      out.x = x.const_data_ptr();
      out.y = y.const_data_ptr();
      out.features = x.size(2);
    }
    out.pairs = first().size(0);
    out.rows = first().size(1);
    out.cols = of_costs_ ? cost.size(2) : y.size(1);
    check(out.rows > 0 && out.cols > 0, "a sequence", " must have at least one step");
    out.bandwidth = bandwidth < 0 ? out.rows + out.cols : bandwidth;
    if (has_lengths_) out.lengths = static_cast<const int64_t*>(lengths.const_data_ptr());
  }

 private:
  void take(const std::optional<Tensor>& lengths_) {
    if (!lengths_) return;
    has_lengths_ = true;
    lengths = dense(*lengths_);
    check(lengths.numel() == 2 * first().size(0) && lengths.scalar_type() == ScalarType::Long &&
              lengths.is_cuda() == first().is_cuda() &&
              lengths.get_device_index() == first().get_device_index(),
          "lengths", " must hold two int64 for each pair, on the device of the inputs");
  }

  bool of_costs_ = false, has_lengths_ = false;
};

}  // namespace jitops

// Soft-DTW: host side, CPU kernels, registration.
#include "soft_dtw.h"

#include <cmath>
#include <tuple>

#include "common/run.h"
#include "common/warping_inputs.h"

#ifndef USE_CUDA
#include "common/cpu_warping.h"
#endif

namespace jitops::soft_dtw {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------
//
// Strips of rows from the first to the last. A lane takes a row of the strip, and at step k it is
// at column k - lane. So the lanes of a step lie on an anti-diagonal, and depend on the two steps
// before alone. The forward pass keeps the last row of each strip. The backward pass computes a
// strip again from the row above, with its weights, and then runs its steps backwards.

using cpu::kLanes;
static_assert(kLanes == kStripRows);

// The cells of a step. Place 0 is the row above the strip, place `lane + 1` a row of the strip.
template <typename A>
struct Diagonal {
  A mantissas[kLanes + 1];
  double exponents[kLanes + 1];

  void clear() {
    std::fill_n(mantissas, kLanes + 1, A(1));
    std::fill_n(exponents, kLanes + 1, -kFar);
  }
};

// The weights of a step: the shares of a cell's predecessors, which sum to 1.
template <typename A>
struct Weights {
  A up[kLanes], left[kLanes], diagonal[kLanes];
};

template <bool kMasked, bool kWeighs, typename A>
JITOPS_KERNEL void take_step(const double* __restrict cost, double scale,
                             const Diagonal<A>& __restrict previous,
                             const Diagonal<A>& __restrict earlier,
                             const cpu::Steps& __restrict steps, double k,
                             Diagonal<A>& __restrict out, Weights<A>* __restrict weights) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const Step<A> step(cost[lane] * scale, {previous.mantissas[lane], previous.exponents[lane]},
                       {previous.mantissas[lane + 1], previous.exponents[lane + 1]},
                       {earlier.mantissas[lane], earlier.exponents[lane]});
    const bool valid = !kMasked || (k >= steps.first[lane] && k <= steps.last[lane]);
    out.mantissas[lane + 1] = valid ? step.cell.mantissa : A(1);
    out.exponents[lane + 1] = valid ? step.cell.exponent : -kFar;
    if constexpr (kWeighs) {
      const A inverse = 1 / step.sum;
      weights->up[lane] = valid ? step.up * inverse : A(0);
      weights->left[lane] = valid ? step.left * inverse : A(0);
      weights->diagonal[lane] = valid ? step.diagonal * inverse : A(0);
    }
  }
}

// What flows back from the cells of a step to their predecessors. Place kLanes is the strip below.
template <typename A>
struct Flow {
  A up[kLanes + 1], left[kLanes], diagonal[kLanes + 1];

  void clear() {
    std::fill_n(up, kLanes + 1, A(0));
    std::fill_n(left, kLanes, A(0));
    std::fill_n(diagonal, kLanes + 1, A(0));
  }
};

// `arrived` is the gradient of the cells of this step.
template <typename A>
JITOPS_KERNEL void step_back(const Weights<A>& __restrict weights, const Flow<A>& __restrict next,
                             const Flow<A>& __restrict later, A* __restrict arrived,
                             Flow<A>& __restrict out) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    A sum = next.up[lane + 1] + next.left[lane] + later.diagonal[lane + 1];
    sum = sum < kLeast<A> ? A(0) : sum;
    arrived[lane] = sum;
    out.up[lane] = sum * weights.up[lane];
    out.left[lane] = sum * weights.left[lane];
    out.diagonal[lane] = sum * weights.diagonal[lane];
  }
}

// ---- costs and their gradients -------------------------------------------------------------------

template <typename A>
JITOPS_KERNEL void add_gradients(const A* __restrict x, const A* __restrict y, int64_t x_stride,
                                 int64_t y_stride, int64_t features, const A* __restrict arrived,
                                 A* __restrict grad_x, A* __restrict grad_y) {
  for (int64_t d = 0; d < features; ++d) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const A term = arrived[lane] * (x[lane] - y[lane]);
      grad_x[lane] += term;
      grad_y[lane] -= term;
    }
    x += x_stride, y += y_stride, grad_x += x_stride, grad_y += y_stride;
  }
}

// Two sequences, and their gradients.
template <typename T>
class Sequences : public cpu::SequenceCosts<T> {
  using A = acc_t<T>;
  using Costs = cpu::SequenceCosts<T>;
  using Costs::features_, Costs::pair_, Costs::place, Costs::x_, Costs::x_stride_, Costs::y_;
  using Costs::y_stride_;

 public:
  Sequences(const Params& params, bool gradients)
      : Costs(params),
        narrow_x_(gradients ? x_.size() : 0),
        narrow_y_(gradients ? y_.size() : 0),
        grad_x_(narrow_x_.size()),
        grad_y_(narrow_y_.size()) {}

  void start(const Params& params, const Pair& pair, A) {
    Costs::start(params, pair);
    if (grad_x_.empty()) return;
    for (size_t n = 0; n < x_.size(); ++n) narrow_x_[n] = static_cast<A>(x_[n]);
    for (size_t n = 0; n < y_.size(); ++n) narrow_y_[n] = static_cast<A>(y_[n]);
    std::fill(grad_x_.begin(), grad_x_.end(), A(0));
    std::fill(grad_y_.begin(), grad_y_.end(), A(0));
  }

  void gradients(int64_t first_row, int64_t k, const A* arrived) {
    add_gradients(narrow_x_.data() + first_row, narrow_y_.data() + place(k), x_stride_, y_stride_,
                  features_, arrived, grad_x_.data() + first_row, grad_y_.data() + place(k));
  }

  void finish(const Params& params, A seed) const {
    if (params.grad_x) {
      write(params.grad_x, params.rows, pair_->rows, seed,
            [&](int64_t i, int64_t d) { return grad_x_[d * x_stride_ + i]; });
    }
    if (params.grad_y) {
      write(params.grad_y, params.cols, pair_->cols, seed,
            [&](int64_t j, int64_t d) { return grad_y_[d * y_stride_ + place(j)]; });
    }
  }

 private:
  template <typename F>
  void write(void* gradient, int64_t steps, int64_t length, A seed, const F& of) const {
    T* out = static_cast<T*>(gradient) + pair_->number * steps * features_;
    for (int64_t i = 0; i < length; ++i) {
      for (int64_t d = 0; d < features_; ++d) {
        cpu::store(out[i * features_ + d], 2 * seed * of(i, d));
      }
    }
    for (int64_t n = length * features_; n < steps * features_; ++n) cpu::store(out[n], A(0));
  }

  std::vector<A> narrow_x_, narrow_y_, grad_x_, grad_y_;
};

// Given costs, and their gradient.
template <typename T>
class Costs : public cpu::GivenCosts<T> {
  using A = acc_t<T>;
  using Given = cpu::GivenCosts<T>;
  using Given::each, Given::pair_;

 public:
  Costs(const Params& params, bool) : Given(params) {}

  void start(const Params& params, const Pair& pair, A seed) {
    Given::start(params, pair);
    seed_ = seed;
    if (!params.grad_cost) return;
    gradient_ = static_cast<T*>(params.grad_cost) + pair.number * params.rows * params.cols;
    std::memset(static_cast<void*>(gradient_), 0,
                static_cast<size_t>(params.rows * params.cols) * sizeof(T));
  }

  void gradients(int64_t first_row, int64_t k, const A* arrived) {
    each(first_row, k,
         [&](int64_t lane, int64_t at) { cpu::store(gradient_[at], seed_ * arrived[lane]); });
  }

  void finish(const Params& params, A seed) const {
    if (pair_->valid) return;
    for (int64_t n = 0; n < params.rows * params.cols; ++n) cpu::store(gradient_[n], seed);
  }

 private:
  A seed_ = 0;
  T* gradient_ = nullptr;
};

// ---- the strips of a pair -----------------------------------------------------------------------

template <typename T, typename Source>
class Strips {
  using A = acc_t<T>;

 public:
  Strips(const Params& params, bool backward)
      : params_(params),
        source_(params, backward),
        scale_(kInverseLn2 / params.gamma),
        weights_(backward ? std::min(params.cols, params.kept + kLanes) + kLanes : 0),
        flow_(backward ? params.cols : 0) {}

  void forward(const Pair& pair) {
    if (not_all_kept(params_)) {
      const int64_t count = params_.strips * params_.kept, at = pair.number * count;
      std::fill_n(static_cast<A*>(params_.mantissas) + at, count, A(0));
      std::fill_n(params_.exponents + at, count, 0.0);
    }
    if (!pair.valid) {
      params_.value[pair.number] = NAN;
      return;
    }
    source_.start(params_, pair, A(0));
    Cell<A> last = outside<A>();
    for (int64_t row = 0; row < pair.rows; row += kLanes) last = sweep<false>(pair, row);
    params_.value[pair.number] = value_of(params_, last);
  }

  void backward(const Pair& pair) {
    // A value that is not finite has no gradient.
    const bool finite = std::isfinite(params_.value[pair.number]);
    const A seed = static_cast<A>(finite ? params_.grad_value[pair.number] : NAN);
    source_.start(params_, pair, seed);
    const int64_t last = (pair.rows - 1) / kLanes * kLanes;
    for (int64_t row = last; pair.valid && row >= 0; row -= kLanes) {
      sweep<true>(pair, row);
      sweep_back(pair, row);
    }
    source_.finish(params_, seed);
  }

 private:
  // Computes the strip. Returns its last cell. A strip above another one keeps its last row.
  template <bool kWeighs>
  Cell<A> sweep(const Pair& pair, int64_t row) {
    strip_ = cpu::Strip(pair, row);
    const int64_t strip = row / kLanes;
    const auto kept = [&](int64_t number) {
      return (pair.number * params_.strips + number) * params_.kept;
    };
    const A* above_mantissas = nullptr;
    const double* above_exponents = nullptr;
    if (strip > 0) {
      const int64_t at = kept(strip - 1) - pair.first(row - 1);
      above_mantissas = static_cast<const A*>(params_.mantissas) + at;
      above_exponents = params_.exponents + at;
    }
    A* last_mantissas = nullptr;
    double* last_exponents = nullptr;
    if (!kWeighs && row + kLanes < pair.rows) {
      const int64_t at = kept(strip) - pair.first(row + kLanes - 1);
      last_mantissas = static_cast<A*>(params_.mantissas) + at;
      last_exponents = params_.exponents + at;
    }
    const int64_t above_first = strip > 0 ? pair.first(row - 1) : 0;
    const int64_t above_end = strip > 0 ? pair.end(row - 1) : 0;
    const int64_t last_first = pair.first(row + kLanes - 1), last_end = pair.end(row + kLanes - 1);
    // The cell above lane 0 at column j.
    const auto put_above = [&](Diagonal<A>& diagonal, int64_t j) {
      const bool there = j >= above_first && j < above_end;
      diagonal.mantissas[0] = there ? above_mantissas[j] : A(1);
      diagonal.exponents[0] = there ? above_exponents[j] : -kFar;
    };
    for (Diagonal<A>& diagonal : diagonals_) diagonal.clear();
    Diagonal<A>*earlier = &diagonals_[0], *previous = &diagonals_[1], *out = &diagonals_[2];
    put_above(*earlier, strip_.first - 1);
    if (strip == 0) earlier->exponents[0] = 0;  // the origin
    put_above(*previous, strip_.first);
    alignas(64) double cost[kLanes];
    for (int64_t k = strip_.first; k < strip_.end; ++k) {
      source_.costs(row, k, cost);
      Weights<A>* weights = kWeighs ? &weights_[k - strip_.first] : nullptr;
      const auto step = strip_.full(k) ? take_step<false, kWeighs, A> : take_step<true, kWeighs, A>;
      step(cost, scale_, *previous, *earlier, strip_.steps, static_cast<double>(k), *out, weights);
      put_above(*out, k + 1);
      const int64_t j = k - (kLanes - 1);
      if (last_mantissas && j >= last_first && j < last_end) {
        last_mantissas[j] = out->mantissas[kLanes];
        last_exponents[j] = out->exponents[kLanes];
      }
      Diagonal<A>* free = earlier;
      earlier = previous, previous = out, out = free;
    }
    return {previous->mantissas[strip_.rows], previous->exponents[strip_.rows]};
  }

  // `flow_` is what flows back from the strip below into its row above, by columns.
  void sweep_back(const Pair& pair, int64_t row) {
    for (Flow<A>& flow : flows_) flow.clear();
    Flow<A>*later = &flows_[0], *next = &flows_[1], *out = &flows_[2];
    alignas(64) A arrived[kLanes];
    const int64_t last_row = row + kLanes - 1;
    const bool last = last_row >= pair.rows - 1;
    const int64_t last_first = pair.first(last_row), last_end = last ? 0 : pair.end(last_row);
    A next_diagonal = 0;
    if (last) next->left[strip_.rows - 1] = 1;  // of the last cell, before it is scaled
    for (int64_t k = strip_.end - 1; k >= strip_.first; --k) {
      const int64_t below = k - (kLanes - 1);
      next->up[kLanes] = below >= last_first && below < last_end ? flow_[below] : A(0);
      step_back(weights_[k - strip_.first], *next, *later, arrived, *out);
      source_.gradients(row, k, arrived);
      // Column k of `flow_` was read kLanes - 1 steps ago.
      if (k < pair.cols) flow_[k] = out->up[0] + next_diagonal;
      next_diagonal = out->diagonal[0];
      Flow<A>* free = later;
      later = next, next = out, out = free;
    }
    if (strip_.first > 0) flow_[strip_.first - 1] = next_diagonal;
  }

  const Params& params_;
  Source source_;
  double scale_;
  std::vector<Weights<A>> weights_;
  std::vector<A> flow_;
  Diagonal<A> diagonals_[3];
  Flow<A> flows_[3];
  cpu::Strip strip_;
};

template <typename T, typename Source, typename F>
void each_pair(const Params& params, bool backward, const F& f) {
  torch::stable::parallel_for(0, params.pairs, 1, [&](int64_t begin, int64_t end) {
    Strips<T, Source> strips(params, backward);
    for (int64_t number = begin; number < end; ++number) f(strips, Pair(params, number));
  });
}

template <typename T>
void forward_cpu(const Params& params) {
  const auto run = [](auto& strips, const Pair& pair) { strips.forward(pair); };
  if (params.cost) return each_pair<T, Costs<T>>(params, false, run);
  each_pair<T, Sequences<T>>(params, false, run);
}

template <typename T>
void backward_cpu(const Params& params) {
  const auto run = [](auto& strips, const Pair& pair) { strips.backward(pair); };
  if (params.cost) return each_pair<T, Costs<T>>(params, true, run);
  each_pair<T, Sequences<T>>(params, true, run);
}
#endif

// ---- the operators ------------------------------------------------------------------------------

int32_t wide(const Tensor& tensor) {
  using torch::stable::detail::from, torch::stable::detail::to;
  return tensor.element_size() == 2 ? to<int32_t>(from(ScalarType::Float)) : dtype_number(tensor);
}

// The inputs, and the sizes of the tensors that the forward pass keeps.
struct Inputs : WarpingInputs {
  Params params{};

  Inputs(const Tensor& x_, const Tensor& y_, const std::optional<Tensor>& lengths_, double gamma,
         int64_t bandwidth)
      : WarpingInputs(x_, y_, lengths_) {
    fill(gamma, bandwidth);
  }
  Inputs(const Tensor& cost_, const std::optional<Tensor>& lengths_, double gamma,
         int64_t bandwidth)
      : WarpingInputs(cost_, lengths_) {
    fill(gamma, bandwidth);
  }

  std::array<int64_t, 3> kept() const { return {params.pairs, params.strips, params.kept}; }

 private:
  void fill(double gamma, int64_t bandwidth) {
    WarpingInputs::fill(params, bandwidth);
    check(gamma > 0, "gamma", " must be greater than 0");
    params.gamma = gamma;
    params.strips = (params.rows - 1) / kStripRows;
    params.kept = std::min(params.cols, 2 * params.bandwidth + 1);
  }
};

std::tuple<Tensor, Tensor, Tensor> run_forward(Inputs& inputs) {
  Params& params = inputs.params;
  const Tensor& first = inputs.first();
  const std::array<int64_t, 3> kept = inputs.kept();
  const Tensor value = empty({&params.pairs, 1}, ScalarType::Double, first);
  const Tensor mantissas = empty(kept, wide(first), first);
  const Tensor exponents = empty(kept, ScalarType::Double, first);
  params.value = static_cast<double*>(value.mutable_data_ptr());
  params.mantissas = mantissas.mutable_data_ptr();
  params.exponents = static_cast<double*>(exponents.mutable_data_ptr());
  const OnDeviceOf device(first);
  if (params.pairs > 0) JITOPS_RUN("soft_dtw", forward, first, params, device);
  return {value, mantissas, exponents};
}

// `gradients` are those that are needed. Their memory is in `params`.
std::vector<Tensor> run_backward(Inputs& inputs, std::vector<Tensor> gradients,
                                 const Tensor& grad_value, const Tensor& value_,
                                 const Tensor& mantissas_, const Tensor& exponents_) {
  Params& params = inputs.params;
  const Tensor& first = inputs.first();
  const Tensor grad = dense(grad_value), value = dense(value_), mantissas = dense(mantissas_);
  const Tensor exponents = dense(exponents_);
  const int64_t kept = params.pairs * params.strips * params.kept;
  for (const Tensor* one : {&grad, &value}) {
    check(one->numel() == params.pairs && one->scalar_type() == ScalarType::Double,
          "value and its gradient", " must hold a float64 for each pair");
  }
  check(mantissas.numel() == kept && dtype_number(mantissas) == wide(first) &&
            exponents.numel() == kept && exponents.scalar_type() == ScalarType::Double,
        "mantissas and exponents", " must be those of the forward pass");
  if (gradients.empty() || params.pairs == 0) return gradients;
  params.grad_value = static_cast<const double*>(grad.const_data_ptr());
  params.value = static_cast<double*>(const_cast<void*>(value.const_data_ptr()));
  params.mantissas = const_cast<void*>(mantissas.const_data_ptr());
  params.exponents = static_cast<double*>(const_cast<void*>(exponents.const_data_ptr()));
#ifdef USE_CUDA
  const int64_t elements = scratch_elements(params);
  const Tensor weights = empty({&elements, 1}, wide(first), first);
  params.weights = weights.mutable_data_ptr();
  const std::array<int64_t, 3> all{params.pairs, params.rows, params.cols};
  Tensor alignment;
  if (!params.cost) {
    alignment = empty(all, wide(first), first);
    params.alignment = alignment.mutable_data_ptr();
  }
#endif
  const OnDeviceOf device(first);
  JITOPS_RUN("soft_dtw", backward, first, params, device);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& y,
                                           const std::optional<Tensor>& lengths, double gamma,
                                           int64_t bandwidth) {
  Inputs inputs(x, y, lengths, gamma, bandwidth);
  return run_forward(inputs);
}

std::vector<Tensor> backward(const Tensor& grad_value, const Tensor& x, const Tensor& y,
                             const std::optional<Tensor>& lengths, const Tensor& value,
                             const Tensor& mantissas, const Tensor& exponents, double gamma,
                             int64_t bandwidth, bool needs_x, bool needs_y) {
  Inputs inputs(x, y, lengths, gamma, bandwidth);
  std::vector<Tensor> gradients;
  if (needs_x) {
    gradients.push_back(empty_gradient(inputs.x));
    inputs.params.grad_x = gradients.back().mutable_data_ptr();
  }
  if (needs_y) {
    gradients.push_back(empty_gradient(inputs.y));
    inputs.params.grad_y = gradients.back().mutable_data_ptr();
  }
  return run_backward(inputs, std::move(gradients), grad_value, value, mantissas, exponents);
}

std::tuple<Tensor, Tensor, Tensor> forward_from_cost(const Tensor& cost,
                                                     const std::optional<Tensor>& lengths,
                                                     double gamma, int64_t bandwidth) {
  Inputs inputs(cost, lengths, gamma, bandwidth);
  return run_forward(inputs);
}

std::vector<Tensor> backward_from_cost(const Tensor& grad_value, const Tensor& cost,
                                       const std::optional<Tensor>& lengths, const Tensor& value,
                                       const Tensor& mantissas, const Tensor& exponents,
                                       double gamma, int64_t bandwidth, bool needs_cost) {
  Inputs inputs(cost, lengths, gamma, bandwidth);
  std::vector<Tensor> gradients;
  if (needs_cost) {
    gradients.push_back(empty_gradient(inputs.cost));
    inputs.params.grad_cost = gradients.back().mutable_data_ptr();
  }
  return run_backward(inputs, std::move(gradients), grad_value, value, mantissas, exponents);
}

}  // namespace
}  // namespace jitops::soft_dtw

// ---- registration (schemas and shapes: ops/losses/soft_dtw.py) ----------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("soft_dtw_forward", TORCH_BOX(&jitops::soft_dtw::forward));
  m.impl("soft_dtw_backward", TORCH_BOX(&jitops::soft_dtw::backward));
  m.impl("soft_dtw_from_cost_forward", TORCH_BOX(&jitops::soft_dtw::forward_from_cost));
  m.impl("soft_dtw_from_cost_backward", TORCH_BOX(&jitops::soft_dtw::backward_from_cost));
}

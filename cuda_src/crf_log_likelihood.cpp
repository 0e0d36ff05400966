// The linear-chain conditional random field: host side, CPU kernels, registration.
#include "crf_log_likelihood.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/run.h"

#ifndef USE_CUDA
#include "common/cpu_math.h"
#endif

namespace jitops::crf {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------
//
// If no transition is much less likely than another one, the recursion is a product of a vector with
// the matrix exp(T), scaled at each step. An entry that underflows is below exp(-700), and no later
// step can raise it by more than exp(2 kMostRange). Otherwise each sum has its own maximum.

constexpr double kMostRange = 100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// exp(x - most) for x <= most, also for infinite ones.
JITOPS_INLINE double relative(double x, double most) {
  const double one = cpu::Exponential<double>(x - most).exp() * (1 / 0x1p64);
  return x == most ? 1.0 : one;
}

JITOPS_KERNEL double most_of(const double* x, int64_t count) {
  double most = -kInfinity;
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < count; ++k) most = x[k] > most ? x[k] : most;
  return most;
}

JITOPS_KERNEL void relatives(const double* __restrict x, double most, int64_t count,
                             double* __restrict out) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) out[k] = relative(x[k], most);
}

// out = sum_i v(i) matrix(i, :), four rows at a time.
JITOPS_KERNEL void product(const double* __restrict v, const double* __restrict matrix,
                           int64_t count, double* __restrict out) {
  for (int64_t k = 0; k < count; ++k) out[k] = 0;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4, matrix += 4 * count) {
    const double a = v[i], b = v[i + 1], c = v[i + 2], d = v[i + 3];
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      out[k] += (a * matrix[k] + b * matrix[count + k]) +
                (c * matrix[2 * count + k] + d * matrix[3 * count + k]);
    }
  }
  for (; i < count; ++i, matrix += count) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) out[k] += v[i] * matrix[k];
  }
}

JITOPS_KERNEL void add_outer(const double* __restrict a, const double* __restrict b, double factor,
                             int64_t count, double* __restrict out) {
  for (int64_t i = 0; i < count; ++i, out += count) {
    const double scaled = factor * a[i];
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) out[k] += scaled * b[k];
  }
}

// s(j) = log sum_i exp(a(i) + T(i, j)). `most` is scratch memory.
JITOPS_KERNEL void log_product(const double* __restrict a, const double* __restrict transitions,
                               int64_t count, double* __restrict most, double* __restrict out) {
  for (int64_t k = 0; k < count; ++k) most[k] = -kInfinity, out[k] = 0;
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const double one = a[i] + transitions[i * count + k];
      most[k] = one > most[k] ? one : most[k];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      out[k] += relative(a[i] + transitions[i * count + k], most[k]);
    }
  }
  for (int64_t k = 0; k < count; ++k) out[k] = most[k] + std::log(out[k]);
}

// The shares of a row: adds them to `out`, and returns their sum.
JITOPS_KERNEL double log_shares(double a, const double* __restrict transitions,
                                const double* __restrict sums, const double* __restrict flow,
                                double factor, int64_t count, double* __restrict out) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    const double one = cpu::Exponential<double>(a + transitions[k] - sums[k]).exp() * (1 / 0x1p64);
    const double share = flow[k] > 0 ? one * flow[k] : 0.0;
    sum += share;
    out[k] += factor * share;
  }
  return sum;
}

// The best predecessor of each label. Of equal ones the first counts. NaN counts as
// minus infinity.
JITOPS_KERNEL void best_before(const double* __restrict scores,
                               const double* __restrict transitions, int64_t count,
                               double* __restrict best, int64_t* __restrict at) {
  for (int64_t k = 0; k < count; ++k) best[k] = -kInfinity, at[k] = 0;
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const double one = scores[i] + transitions[i * count + k];
      const bool above = one > best[k];
      best[k] = above ? one : best[k];
      at[k] = above ? i : at[k];
    }
  }
}

// The parameters in float64.
template <typename T>
struct Model {
  const Params& params;
  int64_t count;
  std::vector<double> transitions, start, end;
  double most_transition = 0;
  bool linear;
  std::vector<double> matrix, transposed;  // exp(T - the largest), if linear

  explicit Model(const Params& params_)
      : params(params_),
        count(params.labels),
        transitions(widened(params.transitions, count * count)),
        start(widened(params.start, count)),
        end(widened(params.end, count)) {
    linear = range(transitions) <= kMostRange && range(end) <= kMostRange;
    if (!linear) return;
    most_transition = most_of(transitions.data(), count * count);
    matrix.resize(count * count);
    relatives(transitions.data(), most_transition, count * count, matrix.data());
    transposed.resize(count * count);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < count; ++k) transposed[k * count + i] = matrix[i * count + k];
    }
  }

  void emissions(int64_t pair, int64_t step, double* out) const {
    const T* from = static_cast<const T*>(params.emissions) + pair * params.strides[0] +
                    step * params.strides[1];
    for (int64_t k = 0; k < count; ++k) out[k] = cpu::load(from[k]);
  }
  double emission(int64_t pair, int64_t step, int64_t label) const {
    return cpu::load(static_cast<const T*>(params.emissions)[pair * params.strides[0] +
                                                             step * params.strides[1] + label]);
  }

  // The score of the given tags; NaN if one is out of range.
  double score(int64_t pair, int64_t length) const {
    const int64_t* tags = params.tags + pair * params.steps;
    double sum = 0;
    for (int64_t t = 0; t < length; ++t) {
      if (tags[t] < 0 || tags[t] >= count) return NAN;
      sum += t == 0 ? start[tags[0]] : transitions[tags[t - 1] * count + tags[t]];
      sum += emission(pair, t, tags[t]);
    }
    return sum + end[tags[length - 1]];
  }

 private:
  static std::vector<double> widened(const void* data, int64_t size) {
    std::vector<double> out(size);
    for (int64_t k = 0; k < size; ++k) out[k] = cpu::load(static_cast<const T*>(data)[k]);
    return out;
  }
  static double range(const std::vector<double>& values) {
    double least = kInfinity, most = -kInfinity;
    for (const double one : values) {
      if (one != one) return one;
      least = std::min(least, one), most = std::max(most, one);
    }
    return most - least;
  }
};

// A sequence, step by step. In the linear mode the kept sums are exp(s), scaled. Those of the first
// step stay logarithms, because the range of the starts has no limit.
template <typename T>
class Chain {
 public:
  explicit Chain(const Model<T>& model)
      : model_(model), count_(model.count), emissions_(count_), a_(count_), flow_(count_),
        share_(count_), scratch_(count_) {}

  double log_likelihood(int64_t pair) {
    const int64_t length = length_of(model_.params, pair);
    double* sums = sums_of(pair, 0);
    std::fill(sums + length * count_, sums + model_.params.steps * count_, 0.0);
    if (length == 0) return NAN;
    std::copy(model_.start.begin(), model_.start.end(), sums);
    double scale = 0;
    for (int64_t t = 0; t < length; ++t) {
      scale += take(pair, t);
      if (t + 1 == length) break;
      double* next = sums_of(pair, t + 1);
      if (model_.linear) {
        product(a_.data(), model_.matrix.data(), count_, next);
        scale += model_.most_transition;
      } else {
        log_product(a_.data(), model_.transitions.data(), count_, scratch_.data(), next);
      }
    }
    return model_.score(pair, length) - (scale + finish());
  }

  // Adds the gradients of the parameters to `partial`, which has them without the matrix.
  void backward(int64_t pair, double* partial) {
    const Params& params = model_.params;
    const int64_t length = length_of(params, pair);
    T* gradients = static_cast<T*>(params.grad_emissions);
    if (gradients) gradients += pair * params.steps * count_;
    if (gradients) {
      for (int64_t n = length * count_; n < params.steps * count_; ++n) {
        cpu::store(gradients[n], acc_t<T>(0));
      }
    }
    const double value = params.value[pair];
    // A value that is not finite has no gradient.
    const double grad = std::isfinite(value) ? params.grad_value[pair] : NAN;
    if (grad != grad) {
      for (int64_t n = 0; n < count_ * (count_ + 2); ++n) partial[n] = NAN;
      for (int64_t n = 0; gradients && n < length * count_; ++n) {
        cpu::store(gradients[n], static_cast<acc_t<T>>(NAN));
      }
      return;
    }
    double* starts = partial + count_ * count_;
    take(pair, length - 1);
    flow_from_end();
    for (int64_t k = 0; k < count_; ++k) starts[count_ + k] -= grad * flow_[k];
    for (int64_t t = length - 1;; --t) {
      if (gradients) write(gradients + t * count_, params.tags[pair * params.steps + t], grad);
      if (t == 0) break;
      take(pair, t - 1);
      flow_back(sums_of(pair, t), grad, partial);
    }
    for (int64_t k = 0; k < count_; ++k) starts[k] -= grad * flow_[k];
  }

 private:
  double* sums_of(int64_t pair, int64_t step) const {
    return model_.params.sums + (pair * model_.params.steps + step) * count_;
  }

  // a_t from the kept sums: linear with a maximum of 1, or logarithms. Returns the logarithm of the
  // factor that it lacks.
  double take(int64_t pair, int64_t step) {
    const double* sums = sums_of(pair, step);
    model_.emissions(pair, step, emissions_.data());
    if (!model_.linear) {
      for (int64_t k = 0; k < count_; ++k) a_[k] = sums[k] + emissions_[k];
      return 0;
    }
    if (step == 0) {
      for (int64_t k = 0; k < count_; ++k) emissions_[k] += sums[k];
    }
    const double most = most_of(emissions_.data(), count_);
    relatives(emissions_.data(), most, count_, a_.data());
    if (step == 0) return most;
    for (int64_t k = 0; k < count_; ++k) a_[k] *= sums[k];
    const double largest = most_of(a_.data(), count_);
    const double inverse = largest > 0 ? 1 / largest : 1.0;
    for (int64_t k = 0; k < count_; ++k) a_[k] *= inverse;
    return most + std::log(largest > 0 ? largest : 0.0);
  }

  // log sum_k exp(a(k) + end(k)), with the terms over the largest in `flow_`.
  double finish() {
    if (model_.linear) {
      const double most = most_of(model_.end.data(), count_);
      relatives(model_.end.data(), most, count_, flow_.data());
      for (int64_t k = 0; k < count_; ++k) flow_[k] *= a_[k];
      return most + std::log(sum_of_flow());
    }
    for (int64_t k = 0; k < count_; ++k) share_[k] = a_[k] + model_.end[k];
    const double most = most_of(share_.data(), count_);
    relatives(share_.data(), most, count_, flow_.data());
    return most + std::log(sum_of_flow());
  }
  double sum_of_flow() const {
    double sum = 0;
    for (const double one : flow_) sum += one;
    return sum;
  }

  // The probabilities of the labels of the last step.
  void flow_from_end() {
    finish();
    const double inverse = 1 / sum_of_flow();
    for (double& one : flow_) one *= inverse;
  }

  // From the probabilities of a step to those of the step before.
  void flow_back(const double* sums, double grad, double* partial) {
    if (model_.linear) {
      for (int64_t k = 0; k < count_; ++k) share_[k] = flow_[k] / sums[k];
      product(share_.data(), model_.transposed.data(), count_, flow_.data());
      for (int64_t k = 0; k < count_; ++k) flow_[k] *= a_[k];
      add_outer(a_.data(), share_.data(), -grad, count_, partial);
      return;
    }
    for (int64_t i = 0; i < count_; ++i) {
      share_[i] = log_shares(a_[i], model_.transitions.data() + i * count_, sums, flow_.data(),
                             -grad, count_, partial + i * count_);
    }
    std::swap(share_, flow_);
  }

  void write(T* out, int64_t tag, double grad) const {
    for (int64_t k = 0; k < count_; ++k) {
      cpu::store(out[k], static_cast<acc_t<T>>(grad * ((k == tag ? 1.0 : 0.0) - flow_[k])));
    }
  }

  const Model<T>& model_;
  int64_t count_;
  std::vector<double> emissions_, a_, flow_, share_, scratch_;
};

template <typename T>
void forward_cpu(const Params& params) {
  const Model<T> model(params);
  torch::stable::parallel_for(0, params.pairs, 1, [&](int64_t begin, int64_t end) {
    Chain<T> chain(model);
    for (int64_t pair = begin; pair < end; ++pair) params.value[pair] = chain.log_likelihood(pair);
  });
}

// The gradients of the parameters from the given tags.
void add_tags(const Params& params, int64_t pair, double* partial) {
  const double grad = params.grad_value[pair];
  const int64_t length = length_of(params, pair), count = params.labels;
  const int64_t* tags = params.tags + pair * params.steps;
  if (!std::isfinite(params.value[pair])) return;
  partial[count * count + tags[0]] += grad;
  partial[count * count + count + tags[length - 1]] += grad;
  for (int64_t t = 1; t < length; ++t) partial[tags[t - 1] * count + tags[t]] += grad;
}

template <typename T>
void backward_cpu(const Params& params) {
  const Model<T> model(params);
  const int64_t count = params.labels, elements = elements_of_block(count);
  torch::stable::parallel_for(0, params.blocks, 1, [&](int64_t begin, int64_t end) {
    Chain<T> chain(model);
    for (int64_t block = begin; block < end; ++block) {
      double* partial = params.partial + block * elements;
      std::fill_n(partial, elements, 0.0);
      const int64_t first = params.pairs * block / params.blocks;
      const int64_t last = params.pairs * (block + 1) / params.blocks;
      for (int64_t pair = first; pair < last; ++pair) chain.backward(pair, partial);
      for (int64_t n = 0; model.linear && n < count * count; ++n) partial[n] *= model.matrix[n];
      for (int64_t pair = first; pair < last; ++pair) add_tags(params, pair, partial);
    }
  });
  const auto reduce = [&](void* gradient, int64_t place, int64_t size) {
    for (int64_t n = 0; gradient && n < size; ++n) {
      double sum = 0;
      for (int64_t block = 0; block < params.blocks; ++block) {
        sum += params.partial[block * elements + place + n];
      }
      cpu::store(static_cast<T*>(gradient)[n], static_cast<acc_t<T>>(sum));
    }
  };
  reduce(params.grad_transitions, 0, count * count);
  reduce(params.grad_start, count * count, count);
  reduce(params.grad_end, count * count + count, count);
}

template <typename T>
void decode_cpu(const Params& params) {
  const Model<T> model(params);
  const int64_t count = params.labels;
  torch::stable::parallel_for(0, params.pairs, 1, [&](int64_t begin, int64_t end) {
    std::vector<double> scores(count), best(count), emissions(count);
    std::vector<int64_t> before(params.steps * count);
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t length = length_of(params, pair);
      int64_t* path = params.path + pair * params.steps;
      std::fill(path + length, path + params.steps, int64_t{-1});
      if (length == 0) continue;
      std::copy(model.start.begin(), model.start.end(), best.begin());
      for (int64_t t = 0; t < length; ++t) {
        if (t > 0) {
          best_before(scores.data(), model.transitions.data(), count, best.data(),
                      before.data() + t * count);
        }
        model.emissions(pair, t, emissions.data());
        for (int64_t k = 0; k < count; ++k) scores[k] = best[k] + emissions[k];
      }
      int64_t label = 0;
      double most = -kInfinity;
      for (int64_t k = 0; k < count; ++k) {
        const double one = scores[k] + model.end[k];
        if (one > most) most = one, label = k;
      }
      for (int64_t t = length - 1; t >= 0; --t) {
        path[t] = label;
        if (t > 0) label = before[t * count + label];
      }
    }
  });
}
#endif

// ---- the operators ------------------------------------------------------------------------------

// The inputs on the host, checked. It keeps copies alive.
struct Inputs {
  Tensor emissions, tags, lengths, transitions, start, end;
  Params params{};

  Inputs(const Tensor& emissions_, const std::optional<Tensor>& tags_,
         const std::optional<Tensor>& lengths_, const Tensor& transitions_, const Tensor& start_,
         const Tensor& end_)
      : emissions(emissions_),
        transitions(dense(transitions_)),
        start(dense(start_)),
        end(dense(end_)) {
    check(emissions.dim() == 3, "emissions", " must have three dimensions");
    if (emissions.stride(2) != 1) emissions = torch::stable::contiguous(emissions);
    params.pairs = emissions.size(0);
    params.steps = emissions.size(1);
    params.labels = emissions.size(2);
    check(params.steps > 0 && params.labels > 0, "emissions", " must have a step and a tag");
    params.emissions = emissions.const_data_ptr();
    params.strides[0] = emissions.stride(0);
    params.strides[1] = emissions.stride(1);
    const int64_t labels = params.labels;
    check_same_kind("transitions", transitions, emissions);
    check_same_kind("start_transitions", start, emissions);
    check_same_kind("end_transitions", end, emissions);
    check(transitions.numel() == labels * labels, "transitions", " must be a number for two tags");
    check(start.numel() == labels && end.numel() == labels, "start_transitions, end_transitions",
          " must have a number for each tag");
    params.transitions = transitions.const_data_ptr();
    params.start = start.const_data_ptr();
    params.end = end.const_data_ptr();
    if (tags_) params.tags = integers(tags, *tags_, params.pairs * params.steps);
    if (lengths_) params.lengths = integers(lengths, *lengths_, params.pairs);
  }

 private:
  const int64_t* integers(Tensor& kept, const Tensor& given, int64_t count) {
    kept = dense(given);
    check(kept.scalar_type() == ScalarType::Long && kept.numel() == count &&
              kept.is_cuda() == emissions.is_cuda() &&
              kept.get_device_index() == emissions.get_device_index(),
          "tags and lengths", " must be int64, one for each step or sequence, on the same device");
    return static_cast<const int64_t*>(kept.const_data_ptr());
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& emissions, const Tensor& tags,
                                   const std::optional<Tensor>& lengths, const Tensor& transitions,
                                   const Tensor& start, const Tensor& end) {
  Inputs inputs(emissions, tags, lengths, transitions, start, end);
  Params& params = inputs.params;
  const Tensor value = empty({&params.pairs, 1}, ScalarType::Double, emissions);
  const Tensor sums = empty(emissions.sizes(), ScalarType::Double, emissions);
  if (params.pairs == 0) return {value, sums};
  params.value = static_cast<double*>(value.mutable_data_ptr());
  params.sums = static_cast<double*>(sums.mutable_data_ptr());
  const OnDeviceOf device(emissions);
  JITOPS_RUN("crf_log_likelihood", forward, emissions, params, device);
  return {value, sums};
}

std::vector<Tensor> backward(const Tensor& grad_value, const Tensor& emissions, const Tensor& tags,
                             const std::optional<Tensor>& lengths, const Tensor& transitions,
                             const Tensor& start, const Tensor& end, const Tensor& value_,
                             const Tensor& sums_, bool needs_emissions, bool needs_transitions,
                             bool needs_start, bool needs_end) {
  Inputs inputs(emissions, tags, lengths, transitions, start, end);
  Params& params = inputs.params;
  const Tensor grad = dense(grad_value), value = dense(value_), sums = dense(sums_);
  for (const Tensor* one : {&grad, &value}) {
    check(one->numel() == params.pairs && one->scalar_type() == ScalarType::Double,
          "value and its gradient", " must hold a float64 for each sequence");
  }
  check(sums.numel() == emissions.numel() && sums.scalar_type() == ScalarType::Double, "sums",
        " must be those of the forward pass");
  std::vector<Tensor> gradients;
  const auto needed = [&](bool needs, const Tensor& input, void*& data) {
    if (!needs) return;
    gradients.push_back(empty_gradient(input));
    data = gradients.back().mutable_data_ptr();
  };
  needed(needs_emissions, inputs.emissions, params.grad_emissions);
  needed(needs_transitions, inputs.transitions, params.grad_transitions);
  needed(needs_start, inputs.start, params.grad_start);
  needed(needs_end, inputs.end, params.grad_end);
  if (gradients.empty()) return gradients;
  params.blocks = blocks_of(params.pairs, params.labels);
  const int64_t size = params.blocks * elements_of_block(params.labels);
  const Tensor partial = empty({&size, 1}, ScalarType::Double, emissions);
  params.partial = static_cast<double*>(partial.mutable_data_ptr());
  params.grad_value = static_cast<const double*>(grad.const_data_ptr());
  params.value = static_cast<double*>(const_cast<void*>(value.const_data_ptr()));
  params.sums = static_cast<double*>(const_cast<void*>(sums.const_data_ptr()));
  const OnDeviceOf device(emissions);
  JITOPS_RUN("crf_log_likelihood", backward, emissions, params, device);
  return gradients;
}

Tensor decode(const Tensor& emissions, const std::optional<Tensor>& lengths,
              const Tensor& transitions, const Tensor& start, const Tensor& end) {
  Inputs inputs(emissions, std::nullopt, lengths, transitions, start, end);
  Params& params = inputs.params;
  const int64_t sizes[] = {params.pairs, params.steps};
  const Tensor path = empty({sizes, 2}, ScalarType::Long, emissions);
  if (params.pairs == 0) return path;
  params.path = static_cast<int64_t*>(path.mutable_data_ptr());
#ifdef USE_CUDA
  const int64_t doubles = params.pairs * 2 * params.labels;
  const Tensor before = empty(emissions.sizes(), ScalarType::Int, emissions);
  const Tensor scores = empty({&doubles, 1}, ScalarType::Double, emissions);
  params.before = static_cast<int32_t*>(before.mutable_data_ptr());
  params.scores = static_cast<double*>(scores.mutable_data_ptr());
#endif
  const OnDeviceOf device(emissions);
  JITOPS_RUN("crf_log_likelihood_decode", decode, emissions, params, device);
  return path;
}

}  // namespace
}  // namespace jitops::crf

// ---- registration (schemas and shapes: ops/losses/crf_log_likelihood.py) ------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("crf_log_likelihood_forward", TORCH_BOX(&jitops::crf::forward));
  m.impl("crf_log_likelihood_backward", TORCH_BOX(&jitops::crf::backward));
  m.impl("crf_log_likelihood_decode_forward", TORCH_BOX(&jitops::crf::decode));
}

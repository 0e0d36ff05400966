// The LLTM: host side, the loop over time, CPU kernels, registration.
#include "lltm.h"

#include <tuple>

#include "common/cpu_math.h"
#include "common/product.h"
#include "common/run.h"

namespace jitops::lltm {
namespace {

#ifndef USE_CUDA
// ---- kernels: CPU -----------------------------------------------------------------------------

constexpr int64_t kBlockElements = 4096;  // an element costs four exponentials

// Whether `gates` store the input and the output gate in the form of cpu::Sigmoid. This saves the
// backward pass two exponentials. In half precision the form would lose too many digits.
template <typename T>
constexpr bool kKeepsSigmoids = std::is_same_v<T, acc_t<T>>;

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void forward_row(T* gates, const T* bias, const A* old_state, A* state, T* h,
                               int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    const A i = A(cpu::load(gates[j])) + cpu::load(bias[j]);
    const A o = A(cpu::load(gates[size + j])) + cpu::load(bias[size + j]);
    const A z = A(cpu::load(gates[2 * size + j])) + cpu::load(bias[2 * size + j]);
    const auto in = cpu::Sigmoid<A>::of(i), out = cpu::Sigmoid<A>::of(o);
    cpu::store(gates[j], kKeepsSigmoids<T> ? in.kept : i);
    cpu::store(gates[size + j], kKeepsSigmoids<T> ? out.kept : o);
    cpu::store(gates[2 * size + j], z);
    const A c = old_state[j] + cpu::elu_and_slope(z).value * in.function().value;
    state[j] = c;
    cpu::store(h[j], cpu::tanh_and_slope(c).value * out.function().value);
  }
}

// The gradient of h is `from_outside` + `from_next`. Each may be a row of zeros.
template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void backward_row(const T* gates, const A* old_state, const T* from_outside,
                                const T* from_next, A* grad_state, T* grad_gates, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) {
    cpu::Sigmoid<A> in{cpu::load(gates[j])}, out{cpu::load(gates[size + j])};
    if constexpr (!kKeepsSigmoids<T>) in = in.of(in.kept), out = out.of(out.kept);
    const auto i = in.function(), o = out.function();
    const auto z = cpu::elu_and_slope(A(cpu::load(gates[2 * size + j])));
    const auto t = cpu::tanh_and_slope(A(old_state[j] + z.value * i.value));
    const A grad_h = A(cpu::load(from_outside[j])) + A(cpu::load(from_next[j]));
    const A grad_c = grad_state[j] + grad_h * o.value * t.slope;
    grad_state[j] = grad_c;
    cpu::store(grad_gates[j], grad_c * z.value * i.slope);
    cpu::store(grad_gates[size + j], grad_h * t.value * o.slope);
    cpu::store(grad_gates[2 * size + j], grad_c * i.value * z.slope);
  }
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void widen(const T* from, A* to, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) to[j] = cpu::load(from[j]);
}

template <typename T, typename A = acc_t<T>>
JITOPS_KERNEL void narrow(const A* from, T* to, int64_t size) {
#pragma omp simd
  for (int64_t j = 0; j < size; ++j) cpu::store(to[j], from[j]);
}

// A row of a matrix with `cols` columns. Null if the matrix is null.
template <typename T>
T* row_of(const void* matrix, int64_t row, int64_t cols) {
  return matrix ? static_cast<T*>(const_cast<void*>(matrix)) + row * cols : nullptr;
}

// The cells before a step, in the type in which they accumulate.
template <typename T, typename A = acc_t<T>>
const A* old_state_of(const Params& params, int64_t row, A* scratch) {
  if (params.old_state) return row_of<A>(params.old_state, row, params.size);
  const T* old_cell = row_of<T>(params.old_cell, row, params.size);
  if constexpr (std::is_same_v<T, A>) {
    return old_cell;
  } else {
    widen(old_cell, scratch, params.size);
    return scratch;
  }
}

template <typename T>
void forward_cpu(const Params& params) {
  using A = acc_t<T>;
  const int64_t size = params.size;
  const cpu::RowBlocks blocks(params.rows, size, kBlockElements);
  blocks.for_each([&](int64_t, int64_t from, int64_t to) {
    std::vector<A> scratch(std::is_same_v<T, A> ? 0 : size);
    for (int64_t row = from; row < to; ++row) {
      T* cell = row_of<T>(params.cell, row, size);
      A* state = row_of<A>(params.state, row, size);
      if (!state) {
        if constexpr (std::is_same_v<T, A>) {
          state = cell;
        } else {
          state = scratch.data();
        }
      }
      forward_row(row_of<T>(params.gates, row, 3 * size), static_cast<const T*>(params.bias),
                  old_state_of<T>(params, row, scratch.data()), state,
                  row_of<T>(params.h, row, size), size);
      if constexpr (!std::is_same_v<T, A>) {
        if (cell) narrow(state, cell, size);
      }
    }
  });
}

template <typename T>
void backward_cpu(const Params& params) {
  using A = acc_t<T>;
  const int64_t size = params.size;
  const std::vector<T> zeros(params.grad_h && params.grad_next ? 0 : size);
  const auto or_zeros = [&](const T* row) { return row ? row : zeros.data(); };
  const cpu::RowBlocks blocks(params.rows, size, kBlockElements);
  blocks.for_each([&](int64_t, int64_t from, int64_t to) {
    std::vector<A> old_scratch(std::is_same_v<T, A> ? 0 : size);
    std::vector<A> grad_scratch(params.grad_state ? 0 : size);
    for (int64_t row = from; row < to; ++row) {
      A* grad_state = params.grad_state ? row_of<A>(params.grad_state, row, size)
                                        : grad_scratch.data();
      if (params.grad_cell) {
        widen(row_of<T>(params.grad_cell, row, size), grad_state, size);
      } else if (params.last) {
        std::fill_n(grad_state, size, A(0));
      }
      backward_row(row_of<T>(params.gates, row, 3 * size),
                   old_state_of<T>(params, row, old_scratch.data()),
                   or_zeros(row_of<T>(params.grad_h, row, size)),
                   or_zeros(row_of<T>(params.grad_next, row, size)), grad_state,
                   row_of<T>(params.grad_gates, row, 3 * size), size);
      if (params.grad_old_cell) {
        narrow(grad_state, row_of<T>(params.grad_old_cell, row, size), size);
      }
    }
  });
}
#endif

// ---- the two operators ------------------------------------------------------------------------

// Inputs (steps, rows, features), or without the first for a single step.
struct Inputs {
  Tensor input, weights, h, cell;
  int64_t steps, rows, features, size;

  Inputs(const Tensor& input_, const Tensor& weights_, const Tensor& h_, const Tensor& cell_)
      : input(dense(input_)), weights(dense(weights_)), h(dense(h_)), cell(dense(cell_)) {
    const auto sizes = input.sizes();
    check(sizes.size() == 2 || sizes.size() == 3, "input", " must have two or three dimensions");
    steps = sizes.size() == 3 ? sizes[0] : 1;
    rows = sizes[sizes.size() - 2];
    features = sizes[sizes.size() - 1];
    check(steps > 0, "input", " must have at least one step");
    check(h.dim() == 2 && h.size(0) == rows, "h", " must have the batch of input");
    size = h.size(1);
    check(size > 0, "h", " must have a state of at least one element");
    check_alike("cell", cell, h);
    check(weights.dim() == 2 && weights.size(0) == 3 * size && weights.size(1) == size + features,
          "weights", " must have shape (3 size, size + features)");
    check_same_kind("weights", weights, input);
    check_same_kind("h", h, input);
  }

  MatrixOf of_h() const { return {weights, 3 * size, size, size + features, 0}; }
  MatrixOf of_both() const { return {weights, 3 * size, size + features}; }
  MatrixOf of_input() const { return {weights, 3 * size, features, size + features, size}; }

  bool sequence() const { return input.dim() == 3; }
  // A matrix with `cols` columns for each row and step, with the dimensions of input.
  Tensor for_each_step(int64_t cols, int32_t dtype) const {
    const std::array<int64_t, 3> all{steps, rows, cols};
    const size_t dims = static_cast<size_t>(input.dim());
    return empty({all.data() + 3 - dims, dims}, dtype, input);
  }
  Tensor for_each_step(int64_t cols) const { return for_each_step(cols, dtype_number(input)); }
  Tensor for_each_row(int64_t cols, int32_t dtype) const {
    const std::array<int64_t, 2> sizes{rows, cols};
    return empty(sizes, dtype, input);
  }
  Tensor for_each_row(int64_t cols) const { return for_each_row(cols, dtype_number(input)); }
#ifdef USE_CUDA
  Sequence all_steps(const Tensor& gates, const Tensor& cells) const {
    Sequence all{};
    all.steps = steps;
    all.rows = rows;
    all.size = size;
    all.weights = weights.const_data_ptr();
    all.weights_row = size + features;
    all.gates = const_cast<void*>(gates.const_data_ptr());
    all.old_cell = cell.const_data_ptr();
    all.states = const_cast<void*>(cells.const_data_ptr());
    return all;
  }
#endif
  // h and input side by side. On the CPU one product of both is faster than two.
  std::optional<Tensor> joined() const {
#ifndef USE_CUDA
    if (steps == 1) {
      const Tensor both = for_each_row(size + features);
      const auto bytes = static_cast<int64_t>(input.element_size());
      char* to = static_cast<char*>(both.mutable_data_ptr());
      const auto append = [&](const Tensor& from, int64_t row, int64_t cols) {
        std::memcpy(to, static_cast<const char*>(from.const_data_ptr()) + row * cols * bytes,
                    static_cast<size_t>(cols * bytes));
        to += cols * bytes;
      };
      for (int64_t row = 0; row < rows; ++row) {
        append(h, row, size);
        append(input, row, features);
      }
      return both;
    }
#endif
    return std::nullopt;
  }
  // The type in which cells accumulate.
  int32_t state_dtype() const {
    using torch::stable::detail::from, torch::stable::detail::to;
    return input.element_size() == 2 ? to<int32_t>(from(ScalarType::Float)) : dtype_number(input);
  }
};

// The memory of a tensor at each step. Null if there is no tensor.
struct Steps {
  char* data = nullptr;
  int64_t bytes = 0;

  Steps(const Tensor* tensor, int64_t elements) {
    if (!tensor) return;
    data = static_cast<char*>(const_cast<void*>(tensor->const_data_ptr()));
    bytes = elements * static_cast<int64_t>(tensor->element_size());
  }
  void* at(int64_t t) const { return data ? data + t * bytes : nullptr; }
};

// The outputs, cells and gates of all steps. The backward pass needs all digits of the cells of a
// sequence, so these have the type in which they accumulate.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& input, const Tensor& weights,
                                           const Tensor& bias_, const Tensor& h,
                                           const Tensor& cell) {
  const Inputs in(input, weights, h, cell);
  const Tensor bias = dense(bias_);
  const int64_t steps = in.steps, rows = in.rows, size = in.size;
  const int64_t last = bias.dim() - 1;
  check(last >= 0 && bias.size(last) == 3 * size && (last == 0 || (last == 1 && bias.size(0) == 1)),
        "bias", " must have shape (3 size) or (1, 3 size)");
  check_same_kind("bias", bias, in.input);
  const OnDeviceOf device(in.input);
  const Tensor output = in.for_each_step(size), gates = in.for_each_step(3 * size);
  const Tensor cells = in.sequence() ? in.for_each_step(size, in.state_dtype())
                                     : in.for_each_step(size);
  const std::optional<Tensor> joined = in.joined();
  if (joined) {
    multiply({*joined, rows, size + in.features}, in.of_both().transposed(),
             {gates, rows, 3 * size});
  } else {
    multiply({in.input, steps * rows, in.features}, in.of_input().transposed(),
             {gates, steps * rows, 3 * size});
  }
#ifdef USE_CUDA
  if (one_kernel_takes(dtype_of(in.input), steps, rows, size)) {
    Sequence all = in.all_steps(gates, cells);
    all.bias = bias.const_data_ptr();
    all.old_h = in.h.const_data_ptr();
    all.output = output.mutable_data_ptr();
    check_launch("lltm", launch_forward_sequence(dtype_of(in.input), all, device.stream()));
    return {output, cells, gates};
  }
#endif
  const int64_t state = rows * size;
  const Steps at_gates(&gates, 3 * state), at_output(&output, state), at_cells(&cells, state);
  Params params{};
  params.rows = rows;
  params.size = size;
  params.bias = bias.const_data_ptr();
  for (int64_t t = 0; t < steps; ++t) {
    if (!joined) {
      const MatrixOf before = t == 0 ? MatrixOf(in.h, rows, size)
                                     : MatrixOf(output, rows, size, (t - 1) * state);
      multiply(before, in.of_h().transposed(), {gates, rows, 3 * size, t * 3 * state},
               Into::kSum);
    }
    params.gates = at_gates.at(t);
    params.old_cell = t == 0 ? in.cell.const_data_ptr() : nullptr;
    params.old_state = params.state;
    params.h = at_output.at(t);
    (in.sequence() ? params.state : params.cell) = at_cells.at(t);
    JITOPS_RUN("lltm", forward, in.input, params, device);
  }
  return {output, cells, gates};
}

// The needed gradients of input, weights, bias, h and cell, from the results of `forward`.
std::vector<Tensor> backward(const std::optional<Tensor>& grad_output,
                             const std::optional<Tensor>& grad_cell, const Tensor& input,
                             const Tensor& weights, const Tensor& bias, const Tensor& h,
                             const Tensor& cell, const std::optional<Tensor>& saved_output,
                             const std::optional<Tensor>& saved_cells, const Tensor& saved_gates,
                             bool needs_input, bool needs_weights, bool needs_bias, bool needs_h,
                             bool needs_cell) {
  const Inputs in(input, weights, h, cell);
  const int64_t steps = in.steps, rows = in.rows, size = in.size, features = in.features;
  const int64_t all = steps * rows;
  // Hooks on saved tensors may give back the same values with other strides.
  const Tensor gates = dense(saved_gates);
  check(gates.numel() == 3 * all * size, "gates", " must be those of the forward pass");
  check_same_kind("gates", gates, in.input);
  check((saved_output && saved_cells) || steps == 1, "output and cells",
        " must be there for more than one step");
  Tensor output, cells;
  if (saved_output) {
    output = dense(*saved_output);
    check(output.numel() == all * size, "output", " must be that of the forward pass");
    check_same_kind("output", output, in.input);
  }
  if (saved_cells) {
    cells = dense(*saved_cells);
    check(cells.numel() == all * size && dtype_number(cells) == in.state_dtype() &&
              cells.is_cuda() == in.input.is_cuda() &&
              cells.get_device_index() == in.input.get_device_index(),
          "cells", " must be those of the forward pass");
  }
  Tensor outside, last_cell;
  if (grad_output) {
    outside = dense(*grad_output);
    check_same_kind("grad_output", outside, in.input);
    check(outside.numel() == all * size, "grad_output", " must have the shape of the output");
  }
  if (grad_cell) {
    last_cell = dense(*grad_cell);
    check_alike("grad_cell", last_cell, in.h);
  }
  const OnDeviceOf device(in.input);
  const Tensor grad_gates = in.for_each_step(3 * size);
  Tensor grad_old_cell;
  if (needs_cell) grad_old_cell = in.for_each_row(size);
  const int64_t state = rows * size;
  const auto of_gates = [&](int64_t t) {
    return MatrixOf(grad_gates, rows, 3 * size, t * 3 * state);
  };
#ifdef USE_CUDA
  const bool one_kernel = one_kernel_takes(dtype_of(in.input), steps, rows, size);
  if (one_kernel) {
    Sequence all_steps = in.all_steps(gates, cells);
    all_steps.grad_output = grad_output ? outside.const_data_ptr() : nullptr;
    all_steps.grad_cell = grad_cell ? last_cell.const_data_ptr() : nullptr;
    all_steps.grad_gates = grad_gates.mutable_data_ptr();
    all_steps.grad_old_cell = needs_cell ? grad_old_cell.mutable_data_ptr() : nullptr;
    check_launch("lltm", launch_backward_sequence(dtype_of(in.input), all_steps, device.stream()));
  }
#else
  constexpr bool one_kernel = false;
#endif
  if (!one_kernel) {
    Tensor next, grad_state;
    if (steps > 1) {
      next = in.for_each_row(size);
      grad_state = in.for_each_row(size, in.state_dtype());
    }
    const Steps at_gates(&gates, 3 * state), at_grad_gates(&grad_gates, 3 * state);
    const Steps at_cells(saved_cells ? &cells : nullptr, state);
    const Steps at_outside(grad_output ? &outside : nullptr, state);
    Params params{};
    params.rows = rows;
    params.size = size;
    params.grad_state = steps > 1 ? grad_state.mutable_data_ptr() : nullptr;
    for (int64_t t = steps - 1; t >= 0; --t) {
      params.last = t == steps - 1;
      if (!params.last) multiply(of_gates(t + 1), in.of_h(), {next, rows, size});
      params.gates = at_gates.at(t);
      params.old_cell = t == 0 ? in.cell.const_data_ptr() : nullptr;
      params.old_state = t == 0 ? nullptr : at_cells.at(t - 1);
      params.grad_h = at_outside.at(t);
      params.grad_next = params.last ? nullptr : next.const_data_ptr();
      params.grad_cell = params.last && grad_cell ? last_cell.const_data_ptr() : nullptr;
      params.grad_gates = at_grad_gates.at(t);
      params.grad_old_cell = t == 0 && needs_cell ? grad_old_cell.mutable_data_ptr() : nullptr;
      JITOPS_RUN("lltm", backward, in.input, params, device);
    }
  }

  const MatrixOf every(grad_gates, all, 3 * size);
  std::vector<Tensor> gradients;
  if (needs_input) {
    gradients.push_back(in.for_each_step(features));
    multiply(every, in.of_input(), {gradients.back(), all, features});
  }
  if (needs_weights) {
    const Tensor gradient = gradients.emplace_back(empty_gradient(in.weights));
    const MatrixOf of_h(gradient, 3 * size, size, size + features, 0);
    multiply(of_gates(0).transposed(), {in.h, rows, size}, of_h);
    if (steps > 1) {
      const MatrixOf later(grad_gates, all - rows, 3 * size, 3 * state);
      multiply(later.transposed(), {output, all - rows, size}, of_h, Into::kSum);
    }
    multiply(every.transposed(), {in.input, all, features},
             {gradient, 3 * size, features, size + features, size});
  }
  if (needs_bias) gradients.push_back(column_sums(every, bias.sizes()));
  if (needs_h) {
    gradients.push_back(in.for_each_row(size));
    multiply(of_gates(0), in.of_h(), {gradients.back(), rows, size});
  }
  if (needs_cell) gradients.push_back(grad_old_cell);
  return gradients;
}

// ---- the operators: a step, and a sequence ----------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> step_forward_op(const Tensor& input, const Tensor& weights,
                                                   const Tensor& bias, const Tensor& h,
                                                   const Tensor& cell) {
  check(input.dim() == 2, "input", " must have two dimensions");
  return forward(input, weights, bias, h, cell);
}

std::vector<Tensor> step_backward_op(const std::optional<Tensor>& grad_h,
                                     const std::optional<Tensor>& grad_cell, const Tensor& input,
                                     const Tensor& weights, const Tensor& bias, const Tensor& h,
                                     const Tensor& cell, const Tensor& gates, bool needs_input,
                                     bool needs_weights, bool needs_bias, bool needs_h,
                                     bool needs_cell) {
  return backward(grad_h, grad_cell, input, weights, bias, h, cell, std::nullopt, std::nullopt,
                  gates, needs_input, needs_weights, needs_bias, needs_h, needs_cell);
}

// Also returns the last cell in the type of the first one. It is a copy, because the backward pass
// keeps the states.
std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_forward_op(const Tensor& input,
                                                               const Tensor& weights,
                                                               const Tensor& bias, const Tensor& h,
                                                               const Tensor& cell) {
  check(input.dim() == 3, "input", " must have three dimensions");
  const auto [output, cells, gates] = forward(input, weights, bias, h, cell);
  const Tensor last = empty(cell.sizes(), cell);
  const int64_t rows = cell.size(0), size = cell.size(1);
  Tensor into = MatrixOf(last, rows, size).view();
  torch::stable::copy_(into, MatrixOf(cells, rows, size, (input.size(0) - 1) * rows * size).view());
  return {output, last, cells, gates};
}

std::vector<Tensor> sequence_backward_op(const std::optional<Tensor>& grad_output,
                                         const std::optional<Tensor>& grad_cell,
                                         const Tensor& input, const Tensor& weights,
                                         const Tensor& bias, const Tensor& h, const Tensor& cell,
                                         const Tensor& output, const Tensor& cells,
                                         const Tensor& gates, bool needs_input, bool needs_weights,
                                         bool needs_bias, bool needs_h, bool needs_cell) {
  return backward(grad_output, grad_cell, input, weights, bias, h, cell, output, cells, gates,
                  needs_input, needs_weights, needs_bias, needs_h, needs_cell);
}

}  // namespace
}  // namespace jitops::lltm

// ---- registration (schemas and shapes: ops/layers/lltm.py) --------------------------------------

STABLE_TORCH_LIBRARY_IMPL(jitops, JITOPS_DISPATCH_KEY, m) {
  m.impl("lltm_forward", TORCH_BOX(&jitops::lltm::step_forward_op));
  m.impl("lltm_backward", TORCH_BOX(&jitops::lltm::step_backward_op));
  m.impl("lltm_sequence_forward", TORCH_BOX(&jitops::lltm::sequence_forward_op));
  m.impl("lltm_sequence_backward", TORCH_BOX(&jitops::lltm::sequence_backward_op));
}

// Products of matrices on the host side: torch's, or on the CPU our own where they are small.
#pragma once

#include <array>

#include "tensor.h"

#ifndef USE_CUDA
#include "cpu_gemm.h"
#endif

namespace jitops {

// rows x cols elements within a tensor, `row` and `col` apart; the tensor must outlive it.
struct MatrixOf {
  const Tensor* tensor;
  char* data;
  int64_t rows, cols, row, col;

  // Dense, from element `offset` on.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t offset = 0)
      : MatrixOf(within, rows_, cols_, cols_, offset) {}
  // Some columns of a matrix whose rows lie `stride` apart.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t stride, int64_t offset)
      : tensor(&within),
        data(static_cast<char*>(const_cast<void*>(within.const_data_ptr())) +
             offset * static_cast<int64_t>(within.element_size())),
        rows(rows_),
        cols(cols_),
        row(stride),
        col(1) {}

  MatrixOf transposed() const {
    MatrixOf other = *this;
    std::swap(other.rows, other.cols);
    std::swap(other.row, other.col);
    return other;
  }

  // The same as a tensor, which owns nothing.
  Tensor view() const {
    const int64_t sizes[] = {rows, cols}, strides[] = {row, col};
    int32_t device_type = 0;
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor->get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        data, 2, sizes, strides, 0,
        dtype_number(*tensor), device_type, tensor->get_device_index(), &handle));
    return Tensor(handle);
  }

#ifndef USE_CUDA
  template <typename T>
  cpu::Matrix<T> as() const {
    return {reinterpret_cast<T*>(data), rows, cols, row, col};
  }
#endif
};

// c = a b; one of a and its transpose is dense, and so is c.
inline void multiply(const MatrixOf& a, const MatrixOf& b, const MatrixOf& c) {
#ifndef USE_CUDA
  constexpr int64_t kSmall = int64_t{1} << 22;  // multiplications: some 20 us of work
  const ScalarType dtype = c.tensor->scalar_type();
  if (c.rows * c.cols * a.cols <= kSmall) {
    if (dtype == ScalarType::Float) {
      return cpu::multiply<float>(a.as<const float>(), b.as<const float>(), c.as<float>());
    }
    if (dtype == ScalarType::Double) {
      return cpu::multiply<double>(a.as<const double>(), b.as<const double>(), c.as<double>());
    }
  }
#endif
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(a.view()), from(b.view()), from(c.view())};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  to<Tensor>(stack[0]);  // the result is c again, and a reference to give back
}

// The sums of the columns of a dense matrix, with the given sizes.
inline Tensor column_sums(const MatrixOf& a, IntHeaderOnlyArrayRef sizes) {
#ifndef USE_CUDA
  const ScalarType dtype = a.tensor->scalar_type();
  if (a.rows <= 256 && (dtype == ScalarType::Float || dtype == ScalarType::Double)) {
    Tensor out = empty(sizes, *a.tensor);
    if (dtype == ScalarType::Float) {
      cpu::sum_columns<float>(a.as<const float>(), static_cast<float*>(out.mutable_data_ptr()));
    } else {
      cpu::sum_columns<double>(a.as<const double>(), static_cast<double*>(out.mutable_data_ptr()));
    }
    return out;
  }
#endif
  constexpr int64_t kRows = 0;
  return torch::stable::sum(a.view(), IntHeaderOnlyArrayRef(&kRows, 1), sizes.size() == 2);
}

}  // namespace jitops

// Matrix products of the host side: torch's, or our own for small ones on the CPU.
#pragma once

#include <array>

#include "tensor.h"

#ifndef USE_CUDA
#include "cpu_gemm.h"
#endif

// torch's product, from its stable C interface: out = beta self + alpha a b. A call through the
// dispatcher is slower, and the stable ABI has no Scalar for it.
#ifdef USE_CUDA
#define JITOPS_ADDMM_OUT aoti_torch_cuda_addmm_out
#else
#define JITOPS_ADDMM_OUT aoti_torch_cpu_addmm_out
#endif
extern "C" AOTITorchError JITOPS_ADDMM_OUT(AtenTensorHandle out, AtenTensorHandle self,
                                           AtenTensorHandle a, AtenTensorHandle b, double beta,
                                           double alpha);

namespace jitops {

// A matrix inside a tensor, with strides `row` and `col`. The tensor must outlive it.
struct MatrixOf {
  const Tensor* tensor;
  int64_t rows, cols, row, col, offset;

  // Dense, from element `offset` on.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t offset_ = 0)
      : MatrixOf(within, rows_, cols_, cols_, offset_) {}
  // Columns of a matrix whose rows lie `stride` apart.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t stride, int64_t offset_)
      : tensor(&within), rows(rows_), cols(cols_), row(stride), col(1), offset(offset_) {}

  MatrixOf transposed() const {
    MatrixOf other = *this;
    std::swap(other.rows, other.cols);
    std::swap(other.row, other.col);
    return other;
  }

  // A tensor that shares the memory. torch adds the offset to that of the tensor.
  Tensor view() const {
    const int64_t sizes[] = {rows, cols}, strides[] = {row, col};
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(tensor->get(), 2, sizes, strides, offset, &handle));
    return Tensor(handle);
  }

#ifndef USE_CUDA
  template <typename T>
  cpu::Matrix<T> as() const {
    T* data = static_cast<T*>(const_cast<void*>(tensor->const_data_ptr()));
    return {data + offset, rows, cols, row, col};
  }
#endif
};

enum class Into { kFresh, kSum };

// c = a b, or c += a b. c is dense, and a or its transpose is dense.
inline void multiply(const MatrixOf& a, const MatrixOf& b, const MatrixOf& c,
                     Into into = Into::kFresh) {
  const bool add = into == Into::kSum;
#ifndef USE_CUDA
  constexpr int64_t kSmall = int64_t{1} << 22;  // multiplications: about 20 us of work
  const ScalarType dtype = c.tensor->scalar_type();
  if (c.rows * c.cols * a.cols <= kSmall) {
    if (dtype == ScalarType::Float) {
      return cpu::multiply<float>(a.as<const float>(), b.as<const float>(), c.as<float>(), add);
    }
    if (dtype == ScalarType::Double) {
      return cpu::multiply<double>(a.as<const double>(), b.as<const double>(), c.as<double>(), add);
    }
  }
#endif
  const Tensor left = a.view(), right = b.view(), out = c.view();
  TORCH_ERROR_CODE_CHECK(
      JITOPS_ADDMM_OUT(out.get(), out.get(), left.get(), right.get(), add ? 1 : 0, 1));
}

// The sum of each column of a dense matrix.
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

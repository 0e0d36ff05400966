// Products of matrices on the host side: torch's, or on the CPU our own where they are small.
#pragma once

#include <array>

#include "tensor.h"

#ifndef USE_CUDA
#include "cpu_gemm.h"
#endif

// torch's own, of its stable C interface: out = beta self + alpha a b. The dispatcher's road to it
// is longer, and takes no Scalar from here.
#ifdef USE_CUDA
#define JITOPS_ADDMM_OUT aoti_torch_cuda_addmm_out
#else
#define JITOPS_ADDMM_OUT aoti_torch_cpu_addmm_out
#endif
extern "C" AOTITorchError JITOPS_ADDMM_OUT(AtenTensorHandle out, AtenTensorHandle self,
                                           AtenTensorHandle a, AtenTensorHandle b, double beta,
                                           double alpha);

namespace jitops {

// rows x cols elements within a tensor, `row` and `col` apart; the tensor must outlive it.
struct MatrixOf {
  const Tensor* tensor;
  int64_t rows, cols, row, col, offset;

  // Dense, from element `offset` on.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t offset_ = 0)
      : MatrixOf(within, rows_, cols_, cols_, offset_) {}
  // Some columns of a matrix whose rows lie `stride` apart.
  MatrixOf(const Tensor& within, int64_t rows_, int64_t cols_, int64_t stride, int64_t offset_)
      : tensor(&within), rows(rows_), cols(cols_), row(stride), col(1), offset(offset_) {}

  MatrixOf transposed() const {
    MatrixOf other = *this;
    std::swap(other.rows, other.cols);
    std::swap(other.row, other.col);
    return other;
  }

  // The same as a tensor, which shares the memory. Torch adds the offset to the tensor's own.
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

// c = a b, or c += a b; one of a and its transpose is dense, and so is c.
inline void multiply(const MatrixOf& a, const MatrixOf& b, const MatrixOf& c,
                     Into into = Into::kFresh) {
  const bool add = into == Into::kSum;
#ifndef USE_CUDA
  constexpr int64_t kSmall = int64_t{1} << 22;  // multiplications: some 20 us of work
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

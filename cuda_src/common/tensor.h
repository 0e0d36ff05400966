// Tensors on the host side of every op: checks, a view as rows, new memory, the stream. It includes
// only torch's stable ABI, because torch/extension.h takes far longer to compile.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "dtype.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// The dispatch key that this file registers for. An extension is built for one device.
#ifdef JITOPS_DISPATCH_KEY  // the tests run CUDA code on CPU tensors
#elif defined(USE_CUDA)
#define JITOPS_DISPATCH_KEY CUDA
#else
#define JITOPS_DISPATCH_KEY CPU
#endif

namespace jitops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks, which keep memory safe; those in Python have better messages -----------------------

// One function, out of line, because STD_TORCH_CHECK in many places doubles the compile time.
[[gnu::noinline]] inline void check(bool ok, const char* name, const char* must) {
  STD_TORCH_CHECK(ok, name, must);
}

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: break;
  }
  check(false, "dtype", " must be float64, float32, bfloat16 or float16");
  return DType::kFloat32;
}

// The dtype of sums.
inline ScalarType wide(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// torch's number of a dtype, to compare and pass on. A conversion to its name is ten times slower.
inline int32_t dtype_number(const Tensor& tensor) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &number));
  return number;
}

inline void check_same_kind(const char* name, const Tensor& tensor, const Tensor& reference) {
  check(dtype_number(tensor) == dtype_number(reference) &&
            tensor.is_cuda() == reference.is_cuda() &&
            tensor.get_device_index() == reference.get_device_index(),
        name, " must have the dtype and device of the first tensor");
}

inline void check_alike(const char* name, const Tensor& tensor, const Tensor& reference) {
  check_same_kind(name, tensor, reference);
  const auto ours = tensor.sizes(), theirs = reference.sizes();
  bool same = ours.size() == theirs.size();
  for (size_t d = 0; same && d < ours.size(); ++d) same = ours[d] == theirs[d];
  check(same, name, " must have the shape of the first tensor");
}

// ---- new memory -------------------------------------------------------------------------------

// Calls the allocator directly. aten::new_empty through the dispatcher is five times slower.
inline Tensor empty(IntHeaderOnlyArrayRef sizes, int32_t dtype, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= sizes[d] > 1 ? sizes[d] : 1) strides[d] = step;
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
      dtype, device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType dtype, const Tensor& like) {
  return empty(sizes, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), like);
}
inline Tensor empty(IntHeaderOnlyArrayRef sizes, const Tensor& like) {
  return empty(sizes, dtype_number(like), like);
}

// Requests pages of 2 MiB, because new large memory costs page faults. This alone makes a gradient
// of 64 MiB four times as fast. The kernel may ignore the advice.
inline void advise_huge_pages([[maybe_unused]] const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = end / kHuge * kHuge;
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// An uninitialised dense gradient for `input`.
inline Tensor empty_gradient(const Tensor& input) {
  Tensor gradient = empty(input.sizes(), input);
  if (!gradient.is_cuda()) advise_huge_pages(gradient);
  return gradient;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// ---- a tensor seen as rows along its last dimension -------------------------------------------

// Copies a tensor only if no single row stride describes it. A broadcast row has stride 0.
struct Rows {
  Tensor tensor;  // keeps the memory alive
  int64_t count = 1;
  int64_t cols;
  int64_t stride;

  explicit Rows(const Tensor& input) : tensor(input) {
    const auto sizes = input.sizes();
    check(sizes.size() > 0, "a tensor of rows", " must have at least one dimension");
    cols = sizes[sizes.size() - 1];
    for (size_t d = 0; d + 1 < sizes.size(); ++d) count *= sizes[d];
    stride = cols;
    if (input.is_contiguous()) return;
    if (const auto uniform = uniform_stride(input)) {
      stride = *uniform;
    } else {
      tensor = torch::stable::contiguous(input);
    }
  }

 private:
  static std::optional<int64_t> uniform_stride(const Tensor& input) {
    const auto sizes = input.sizes(), strides = input.strides();
    const size_t last = sizes.size() - 1;
    if (sizes[last] > 1 && strides[last] != 1) return std::nullopt;
    std::optional<int64_t> stride;
    int64_t outer = 0;  // the required stride of the next outer dimension
    for (size_t d = last; d-- > 0;) {
      if (sizes[d] == 1) continue;
      if (!stride) {
        stride = strides[d];
      } else if (strides[d] != outer) {
        return std::nullopt;
      }
      outer = strides[d] * sizes[d];
    }
    return stride.value_or(0);
  }
};

// ---- the device of a tensor, made current, and its current stream -------------------------------

#ifdef USE_CUDA
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

[[gnu::noinline]] inline void check_launch(const char* op, const char* error) {
  STD_TORCH_CHECK(error == nullptr, op, ": ", error ? error : "");
}
#else
struct OnDeviceOf {  // the CPU needs neither
  explicit OnDeviceOf(const Tensor&) {}
};
#endif

}  // namespace jitops

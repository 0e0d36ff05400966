// The host side of planted.cu: kernel `name` on x, with a fresh result of `size` elements.
#include <string>

#include "common/tensor.h"

const char* launch_planted(const char* name, const float* x, float* out, int64_t n, void* stream,
                           size_t shared_bytes);

namespace {

using jitops::Tensor;

Tensor planted(std::string name, const Tensor& x, int64_t n, int64_t size, int64_t shared_bytes) {
  Tensor out = jitops::empty({&size, 1}, jitops::ScalarType::Float, x);
  const jitops::OnDeviceOf device(x);
  jitops::check_launch(
      name.c_str(), launch_planted(name.c_str(), static_cast<const float*>(x.const_data_ptr()),
                                   static_cast<float*>(out.mutable_data_ptr()), n, device.stream(),
                                   static_cast<size_t>(shared_bytes)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(jitops_planted, m) {
  m.def("run(str name, Tensor x, int n, int size, int shared_bytes) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(jitops_planted, CPU, m) { m.impl("run", TORCH_BOX(&planted)); }

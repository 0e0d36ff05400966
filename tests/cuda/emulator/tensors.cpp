// Between an op's host side and torch: which memory kernels may touch, and that a device was chosen.
//
// These functions have the names of torch's own, of its stable ABI, and are linked into the op's
// library, where they come first. Each calls torch's. The host side is compiled as for CUDA, with
// tensors on the CPU: an op's device is whatever its tensors are on.
#include <dlfcn.h>

#include <cstring>
#include <stdexcept>

#include "device.h"

#define JITOPS_HIDDEN __attribute__((visibility("hidden")))

using Handle = void*;
using Error = int32_t;

extern "C" {  // torch's
Error aoti_torch_get_dim(Handle, int64_t*);
Error aoti_torch_get_numel(Handle, int64_t*);
Error aoti_torch_get_sizes(Handle, int64_t**);
Error aoti_torch_get_strides(Handle, int64_t**);
Error aoti_torch_get_dtype(Handle, int32_t*);
Error aoti_torch_delete_tensor_object(Handle);
size_t aoti_torch_dtype_element_size(int32_t);
}

namespace cuda_emulator {
namespace {

template <typename F>
F torchs(F, const char* name) {
  static void* library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  void* found = library ? dlsym(library, name) : nullptr;
  if (!found) throw std::runtime_error(std::string("torch has no ") + name);
  return reinterpret_cast<F>(found);
}
#define JITOPS_TORCHS(name) \
  static const auto original = torchs(&name, #name)

int guards = 0;
int stream;        // its address stands for the tensors' current stream
int other_stream;  // and this one for the stream of a device that nobody made current
constexpr int32_t kDevice = -1;  // the tensors' device: torch gives the CPU no number

// All that a tensor's view spans, from its first element to its last.
Span span_of(Handle tensor, const void* data) {
  int64_t count = 0, dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_numel(tensor, &count);
  aoti_torch_get_dim(tensor, &dim);
  aoti_torch_get_sizes(tensor, &sizes);
  aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  const auto begin = reinterpret_cast<uintptr_t>(data);
  if (count == 0) return {begin, begin};
  int64_t last = 0;
  for (int64_t d = 0; d < dim; ++d) last += (sizes[d] - 1) * strides[d];
  return {begin, begin + static_cast<uintptr_t>(last + 1) * aoti_torch_dtype_element_size(dtype)};
}

Error torchs_delete(Handle tensor) {
  JITOPS_TORCHS(aoti_torch_delete_tensor_object);
  return original(tensor);
}

}  // namespace

void* expected_stream() { return guards ? &stream : &other_stream; }

}  // namespace cuda_emulator

using namespace cuda_emulator;

extern "C" {

JITOPS_HIDDEN Error torch_get_const_data_ptr(Handle tensor, const void** data) {
  JITOPS_TORCHS(torch_get_const_data_ptr);
  const Error error = original(tensor, data);
  if (!error) know(tensor, span_of(tensor, *data), false);
  return error;
}

JITOPS_HIDDEN Error torch_get_mutable_data_ptr(Handle tensor, void** data) {
  JITOPS_TORCHS(torch_get_mutable_data_ptr);
  const Error error = original(tensor, data);
  if (!error) know(tensor, span_of(tensor, *data), true);
  return error;
}

// Fresh memory is filled with NaN. That of a tensor too large to be touched keeps the system's zeros.
JITOPS_HIDDEN Error aoti_torch_empty_strided(int64_t dim, const int64_t* sizes,
                                             const int64_t* strides, int32_t dtype, int32_t type,
                                             int32_t index, Handle* tensor) {
  JITOPS_TORCHS(aoti_torch_empty_strided);
  const Error error = original(dim, sizes, strides, dtype, type, index, tensor);
  if (error) return error;
  void* data = nullptr;
  torchs(&torch_get_mutable_data_ptr, "torch_get_mutable_data_ptr")(*tensor, &data);
  const Span memory = span_of(*tensor, data);
  if (only_last_block) {
    const size_t size = memory.end - memory.begin;
    if (size < (size_t{64} << 20)) std::memset(data, 0, size);
    know(*tensor, memory, true);
    return 0;
  }
  if (memory.begin != memory.end) std::memset(data, 0xff, memory.end - memory.begin);  // NaN
  know_fresh(*tensor, memory);
  return error;
}

// A view that an op makes for torch's operators, which write to it or read it.
JITOPS_HIDDEN Error aoti_torch_create_tensor_from_blob(void* data, int64_t dim, const int64_t* sizes,
                                                       const int64_t* strides, int64_t offset,
                                                       int32_t dtype, int32_t type, int32_t index,
                                                       Handle* tensor) {
  JITOPS_TORCHS(aoti_torch_create_tensor_from_blob);
  const Error error = original(data, dim, sizes, strides, offset, dtype, type, index, tensor);
  if (!error) count_as_written(span_of(*tensor, data));
  return error;
}

// Likewise, of memory that the view shares with a tensor.
JITOPS_HIDDEN Error aoti_torch__reinterpret_tensor(Handle of, int64_t dim, const int64_t* sizes,
                                                   const int64_t* strides, int64_t offset,
                                                   Handle* tensor) {
  JITOPS_TORCHS(aoti_torch__reinterpret_tensor);
  const Error error = original(of, dim, sizes, strides, offset, tensor);
  if (error) return error;
  const void* data = nullptr;
  torchs(&torch_get_const_data_ptr, "torch_get_const_data_ptr")(*tensor, &data);
  count_as_written(span_of(*tensor, data));
  return error;
}

// A product of such views, on the tensors' own device. It would touch all of their memory: it is left
// out where only the last block runs.
JITOPS_HIDDEN Error aoti_torch_cuda_addmm_out(Handle out, Handle self, Handle a, Handle b,
                                              double beta, double alpha) {
  static const auto original = torchs(&aoti_torch_cuda_addmm_out, "aoti_torch_cpu_addmm_out");
  if (only_last_block) return 0;
  return original(out, self, a, b, beta, alpha);
}

// Another handle of a tensor, as an operator returns it: by now it must have its content.
JITOPS_HIDDEN Error aoti_torch_new_tensor_handle(Handle tensor, Handle* other) {
  JITOPS_TORCHS(aoti_torch_new_tensor_handle);
  if (const size_t count = unwritten(tensor)) {
    throw std::runtime_error("a result of which " + std::to_string(count) +
                             " bytes were never written");
  }
  return original(tensor, other);
}

JITOPS_HIDDEN Error aoti_torch_delete_tensor_object(Handle tensor) {
  forget(tensor);
  return torchs_delete(tensor);
}

// ---- a device that is made current, and its current stream --------------------------------------

JITOPS_HIDDEN Error aoti_torch_create_device_guard(int32_t index, void** guard) {
  if (index != kDevice) throw std::runtime_error("a guard of another device than the tensors'");
  ++guards;
  *guard = &guards;
  return 0;
}

JITOPS_HIDDEN Error aoti_torch_delete_device_guard(void*) {
  --guards;
  return 0;
}

JITOPS_HIDDEN Error aoti_torch_get_current_cuda_stream(int32_t index, void** current) {
  if (index != kDevice) throw std::runtime_error("the stream of another device than the tensors'");
  *current = &stream;
  return 0;
}
}

// The one way a kernel is launched: an explicit stream, and the launch checked.
#ifndef JITOPS_LAUNCH_CUH  // a name, so that tests can put their own in its place
#define JITOPS_LAUNCH_CUH

#include <cuda_runtime.h>

#include <cstddef>

namespace jitops {

// Returns null, or the text of CUDA's error.
template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Args... args) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace jitops

#endif

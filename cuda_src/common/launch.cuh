// The one way a kernel is launched: an explicit stream, and the launch checked.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

namespace jitops {

// Returns null, or the reason why the launch failed, which stands until this thread's next failure.
// An error that somebody else's call left behind is neither reported nor cleared.
template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Args... args) {
  const cudaError_t earlier = cudaPeekAtLastError();
  void* pointers[] = {&args...};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes,
                                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  if (earlier == cudaSuccess) cudaGetLastError();  // the caller raises it, so nobody else finds it
  static thread_local char text[512];
  std::snprintf(text, sizeof text,
                "%s%s: %s; grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory",
                earlier == error ? "an earlier call left " : "", cudaGetErrorName(error),
                cudaGetErrorString(error), grid.x, grid.y, grid.z, block.x, block.y, block.z,
                shared_bytes);
  return text;
}

}  // namespace jitops

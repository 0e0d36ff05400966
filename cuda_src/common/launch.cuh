// Launches a kernel on an explicit stream, and checks the launch.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdio>

namespace jitops {

// Returns null, or the reason for a failed launch. The text is valid until this thread's next
// failure. An earlier error of other code is neither reported nor cleared.
template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Args... args) {
  const cudaError_t earlier = cudaPeekAtLastError();
  void* pointers[] = {&args...};
  const cudaError_t error = cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes,
                                             static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return nullptr;
  if (earlier == cudaSuccess) cudaGetLastError();  // the caller raises it, so clear it
  static thread_local char text[512];
  std::snprintf(text, sizeof text,
                "%s%s: %s; grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of dynamic shared memory",
                earlier == error ? "an earlier call left " : "", cudaGetErrorName(error),
                cudaGetErrorString(error), grid.x, grid.y, grid.z, block.x, block.y, block.z,
                shared_bytes);
  return text;
}

}  // namespace jitops

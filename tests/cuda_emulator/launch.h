// The CPU's variant of cuda_src/common/launch.cuh, whose guard it takes.
#pragma once
#define JITOPS_LAUNCH_CUH

#include <tuple>

#include "cuda_runtime.h"

namespace cuda_emulator {

template <typename... Args>
struct CallOf : Call {
  void (*kernel)(Args...);
  std::tuple<Args...> args;

  CallOf(void (*kernel_)(Args...), Args... args_)
      : Call{run, sizeof(CallOf)}, kernel(kernel_), args(args_...) {}

  static void run(const Call* call) {
    const auto* self = static_cast<const CallOf*>(call);
    std::apply(self->kernel, self->args);
  }
};

}  // namespace cuda_emulator

namespace jitops {

template <typename... Args>
const char* launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared_bytes,
                   void* stream, Args... args) {
  const cuda_emulator::CallOf<Args...> call(kernel, args...);
  return cuda_emulator::run(grid, block, shared_bytes, stream, call);
}

}  // namespace jitops

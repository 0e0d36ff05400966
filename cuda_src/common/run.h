// Runs a pass of an op: the launcher of its CUDA kernels, or its CPU kernel.
#pragma once

#include "cpu.h"
#include "tensor.h"

// JITOPS_RUN(op, pass, tensor, params, device) calls launch_<pass> or <pass>_cpu<T>, where T is the
// element type of `tensor`. It is a macro because a build has only one of the two functions.
#ifdef USE_CUDA
#define JITOPS_RUN(op, pass, tensor, params, device) \
  check_launch(op, launch_##pass(dtype_of(tensor), params, (device).stream()))
#else
#define JITOPS_RUN(op, pass, tensor, params, device) \
  cpu::dispatch(dtype_of(tensor), [&](auto zero) { pass##_cpu<decltype(zero)>(params); })
#endif

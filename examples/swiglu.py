"""C++ and CUDA in a string: SwiGLU, silu(gate) * value, in one pass instead of two.

N. Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import torch
import torch.nn.functional as F

import ops
from ops import jit

# One source for the CPU and for the host side of the GPU. Torch's stable headers compile several
# times as fast as torch/extension.h.
CPP = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <vector>

using torch::stable::Tensor;

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#define KEY CUDA
const char* launch(bool is_double, long count, const void* grad, const void* gate,
                   const void* value, void* out, void* to_gate, void* to_value, void* stream);
void run(const Tensor& like, const void* grad, const void* gate, const void* value, void* out,
         void* to_gate, void* to_value) {
  torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  const char* error = launch(like.element_size() == 8, like.numel(), grad, gate, value, out,
                             to_gate, to_value, stream);
  STD_TORCH_CHECK(!error, "swiglu: ", error);
}
#else
#define KEY CPU
template <typename T>
void loop(long count, const T* grad, const T* gate, const T* value, T* out, T* to_gate,
          T* to_value) {
  for (long i = 0; i < count; ++i) {
    const T s = 1 / (1 + std::exp(-gate[i]));
    if (out) {
      out[i] = gate[i] * s * value[i];
    } else {
      to_gate[i] = grad[i] * value[i] * s * (1 + gate[i] * (1 - s));
      to_value[i] = grad[i] * gate[i] * s;
    }
  }
}
void run(const Tensor& like, const void* grad, const void* gate, const void* value, void* out,
         void* to_gate, void* to_value) {
  if (like.element_size() == 8) {
    loop(like.numel(), (const double*)grad, (const double*)gate, (const double*)value,
         (double*)out, (double*)to_gate, (double*)to_value);
  } else {
    loop(like.numel(), (const float*)grad, (const float*)gate, (const float*)value, (float*)out,
         (float*)to_gate, (float*)to_value);
  }
}
#endif

Tensor forward(const Tensor& gate, const Tensor& value) {
  Tensor out = torch::stable::empty_like(gate);
  run(gate, nullptr, gate.const_data_ptr(), value.const_data_ptr(), out.mutable_data_ptr(),
      nullptr, nullptr);
  return out;
}

std::vector<Tensor> backward(const Tensor& grad, const Tensor& gate, const Tensor& value) {
  Tensor to_gate = torch::stable::empty_like(gate), to_value = torch::stable::empty_like(gate);
  run(gate, grad.const_data_ptr(), gate.const_data_ptr(), value.const_data_ptr(), nullptr,
      to_gate.mutable_data_ptr(), to_value.mutable_data_ptr());
  return {to_gate, to_value};
}

STABLE_TORCH_LIBRARY_IMPL(swiglu, KEY, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}
"""

CUDA = r"""
template <typename T>
__global__ void kernel(long count, const T* grad, const T* gate, const T* value, T* out,
                       T* to_gate, T* to_value) {
  const long step = long(gridDim.x) * blockDim.x;
  for (long i = long(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const T s = 1 / (1 + exp(-gate[i]));
    if (out) {
      out[i] = gate[i] * s * value[i];
    } else {
      to_gate[i] = grad[i] * value[i] * s * (1 + gate[i] * (1 - s));
      to_value[i] = grad[i] * gate[i] * s;
    }
  }
}

const char* launch(bool is_double, long count, const void* grad, const void* gate,
                   const void* value, void* out, void* to_gate, void* to_value, void* stream) {
  const int blocks = count < 1024 * 256 ? (count + 255) / 256 : 1024;
  if (blocks == 0) return nullptr;
  if (is_double) {
    kernel<<<blocks, 256, 0, (cudaStream_t)stream>>>(
        count, (const double*)grad, (const double*)gate, (const double*)value, (double*)out,
        (double*)to_gate, (double*)to_value);
  } else {
    kernel<<<blocks, 256, 0, (cudaStream_t)stream>>>(
        count, (const float*)grad, (const float*)gate, (const float*)value, (float*)out,
        (float*)to_gate, (float*)to_value);
  }
  const cudaError_t error = cudaGetLastError();
  return error ? cudaGetErrorString(error) : nullptr;
}
"""

FLAGS = {"is_python_module": False, "no_implicit_headers": True}
op = ops.Op(
    "swiglu",
    cpp=jit.text("swiglu_cpp", CPP, extra_cflags=["-O2"], **FLAGS),
    cuda=jit.text("swiglu_cuda", CPP, CUDA, extra_cflags=["-DUSE_CUDA"], **FLAGS),
)

if not hasattr(torch.ops.swiglu, "forward"):  # importlib.reload runs this again
    library = torch.library.Library("swiglu", "DEF")
    library.define("forward(Tensor gate, Tensor value) -> Tensor")
    library.define("backward(Tensor grad, Tensor gate, Tensor value) -> Tensor[]")
    # Only shapes: torch.compile traces with these.
    library.impl("forward", lambda gate, value: torch.empty_like(gate), "Meta")
    library.impl("backward", lambda g, *both: [torch.empty_like(one) for one in both], "Meta")


def torch_path(gate, value):
    return F.silu(gate) * value


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, value):
        gate, value = gate.contiguous(), value.contiguous()
        ctx.save_for_backward(gate, value)
        return torch.ops.swiglu.forward(gate, value)

    @staticmethod
    @torch.autograd.function.once_differentiable  # a second derivative raises an error
    def backward(ctx, grad):
        return tuple(torch.ops.swiglu.backward(grad.contiguous(), *ctx.saved_tensors))


def swiglu(gate, value):
    """Compute silu(gate) * value for tensors of one shape, dtype and device."""
    if gate.shape != value.shape or gate.dtype != value.dtype or gate.device != value.device:
        raise ValueError("gate and value must have one shape, dtype and device")
    compiled = gate.dtype in (torch.float32, torch.float64) and op.backend_for(gate) != "torch"
    return SwiGLU.apply(gate, value) if compiled else torch_path(gate, value)

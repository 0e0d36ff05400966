// The structural similarity on CUDA: kernels and launchers. No torch header.
//
// The floor is the bytes of memory, for n pixels of s bytes in each image:
//   losses     2 n s read
//   gradients  2 n s read, n * 4 written for each image, and 3 or 4 derivatives of each window,
//              4 bytes each, written and read
// Sums run in a fixed order without atomics, so results are bitwise deterministic.
#include "ssim.h"

#include "common/windows.cuh"

namespace jitops::ssim {
namespace {

// Budget: 96 registers, 128 bytes shared, 48 bytes spilt (float64).
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) windows_kernel(Params params, int64_t first) {
  cuda::take_windows<T, Formula<acc_t<T>>>(params, first);
}

// Budget: 128 registers, 128 bytes shared, 48 bytes spilt.
template <typename T>
__global__ void __launch_bounds__(cuda::kMaxThreads) gradients_kernel(Params params,
                                                                      int64_t first) {
  cuda::take_gradients<T, Formula<acc_t<T>>>(params, first);
}

// Budget: 64 registers, 128 bytes shared.
template <typename A>
__global__ void __launch_bounds__(cuda::kMaxThreads) sum_kernel(Params params) {
  cuda::sum_up_plane<A>(params);
}

}  // namespace

const char* launch_windows(DType dtype, const Params& params, void* stream) {
  return cuda::dispatch(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    return cuda::launch_all<A>(params, stream, windows_kernel<T>, gradients_kernel<T>,
                               sum_kernel<A>);
  });
}

}  // namespace jitops::ssim

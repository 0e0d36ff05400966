// The LLTM: the contract between the host (.cpp) and the kernels (.cu).
// No torch header and no CUDA header: both compilers read this file in no time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::lltm {

// One time step, all between two matrix products. All matrices are dense, of the element type T but
// those said to be of acc_t<T>, in which cells and their gradients are added up over time.
//   gates (rows, 3 size): input gate i, output gate o, candidate z, before their functions; on the
//     CPU the forward pass may leave there what these gave
//   cell = old_cell + elu(z) sigmoid(i);  h = tanh(cell) sigmoid(o)
struct Params {
  int64_t rows;
  int64_t size;

  // Forward: `gates` holds what the inputs give; the sum with the others is written to it.
  void* gates;            // (rows, 3 size)
  const void* recurrent;  // (rows, 3 size): what the previous h gives; null: `gates` has it already
  const void* bias;       // (3 size,)
  const void* old_cell;   // (rows, size): null in all steps but 0 if there is a `state`
  void* state;            // (rows, size) of acc_t<T>: the running cell, null where T is acc_t<T>;
                          // backward: the running gradient of the cell, null for a single step
  void* h;                // (rows, size): written
  void* cell;             // (rows, size): written; backward: read

  // Backward: each is null where there is none.
  const void* grad_h;      // (rows, size): what arrives at this step's h from outside
  const void* grad_next;   // (rows, size): what arrives from the next step
  const void* grad_cell;   // (rows, size): what arrives at the last cell; in the last step
  bool last;               // `state` holds nothing yet
  void* grad_gates;        // (rows, 3 size): written
  void* grad_old_cell;     // (rows, size): written in step 0
};

// CUDA launchers, on the current device. They return null, or the text of CUDA's error.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);

}  // namespace jitops::lltm

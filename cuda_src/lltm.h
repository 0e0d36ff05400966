// The LLTM: the contract between the host (.cpp) and the kernels (.cu).
// It includes no header of torch or CUDA, so both compilers read it fast.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::lltm {

// One time step: the work between two matrix products. All matrices are dense. Elements have the
// type T, except where acc_t<T> is named: cells and their gradients accumulate in it.
//   gates (rows, 3 size): input gate i, output gate o, candidate z, before their functions. On the
//     CPU the forward pass may store i and o in another form (lltm.cpp).
//   cell = old_cell + elu(z) sigmoid(i);  h = tanh(cell) sigmoid(o)
// The backward pass computes the functions and the cell again, because rounded results lose the
// derivatives where the functions are flat.
struct Params {
  int64_t rows;
  int64_t size;

  void* gates;            // (rows, 3 size): without the bias; the forward pass adds it
  const void* old_cell;   // (rows, size): only in step 0, else null
  const void* old_state;  // (rows, size) of acc_t<T>: null in step 0

  // Forward.
  const void* bias;       // (3 size,)
  void* h;           // (rows, size): written
  void* cell;        // (rows, size): written by a single step, else null
  void* state;       // (rows, size) of acc_t<T>: written by a step of a sequence, else null

  // Backward. Each pointer may be null.
  const void* grad_h;     // (rows, size): gradient of this step's h from outside
  const void* grad_next;  // (rows, size): gradient of this step's h from the next step
  const void* grad_cell;  // (rows, size): gradient of the last cell, only in the last step
  void* grad_state;       // (rows, size) of acc_t<T>: running gradient of the cell of a sequence
  bool last;              // `grad_state` is not written yet
  void* grad_gates;       // (rows, 3 size): written
  void* grad_old_cell;    // (rows, size): written in step 0
};

// All time steps in one CUDA kernel. Matrices as above, with the steps one after the other.
struct Sequence {
  int64_t steps;
  int64_t rows;
  int64_t size;

  const void* weights;   // (3 size, size): the recurrent weights
  int64_t weights_row;   // distance from one row of the weights to the next, in elements
  void* gates;           // (steps, rows, 3 size): the forward pass adds the recurrent part
  const void* old_cell;  // (rows, size)
  void* states;          // (steps, rows, size) of acc_t<T>: cells, written by the forward pass

  // Forward.
  const void* bias;   // (3 size,)
  const void* old_h;  // (rows, size)
  void* output;       // (steps, rows, size): written

  // Backward. Each pointer may be null.
  const void* grad_output;  // (steps, rows, size)
  const void* grad_cell;    // (rows, size): gradient of the last cell
  void* grad_gates;         // (steps, rows, 3 size): written
  void* grad_old_cell;      // (rows, size): written
};

// Whether one kernel runs all steps. A block keeps the weights in registers and takes a few rows
// through all steps, in about 400 clocks for a row and step at size 128 (lltm.cuh). A product and a
// kernel for each step take at least 6 us for any number of rows. 512 rows make 171 blocks of 3
// rows. A GPU of 130 multiprocessors runs them in two waves, 2 us for a step; one of 40 in five
// waves, 5 us. These figures are predictions. Nobody has measured them yet.
inline bool one_kernel_takes(DType dtype, int64_t steps, int64_t rows, int64_t size) {
  return dtype != DType::kFloat64 && steps > 1 && rows <= 512 && size <= 128;
}

// CUDA launchers for the current device. They return null, or CUDA's error message.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);
const char* launch_forward_sequence(DType dtype, const Sequence& sequence, void* stream);
const char* launch_backward_sequence(DType dtype, const Sequence& sequence, void* stream);

}  // namespace jitops::lltm

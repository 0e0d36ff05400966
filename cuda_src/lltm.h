// The LLTM: the contract between the host (.cpp) and the kernels (.cu).
// No torch header and no CUDA header: both compilers read this file in no time.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace jitops::lltm {

// One time step, all between two matrix products. All matrices are dense, of the element type T but
// those said to be of acc_t<T>, in which cells and their gradients are added up over time.
//   gates (rows, 3 size): input gate i, output gate o, candidate z, before their functions; on the
//     CPU the forward pass may leave there something else of i and o, which says as much
//   cell = old_cell + elu(z) sigmoid(i);  h = tanh(cell) sigmoid(o)
// The backward pass computes the functions and the cell once more: their derivatives where they are
// flat cannot be told from rounded results.
struct Params {
  int64_t rows;
  int64_t size;

  void* gates;            // (rows, 3 size): without the bias; the forward pass adds it
  const void* old_cell;   // (rows, size): in step 0, else null
  const void* old_state;  // (rows, size) of acc_t<T>: in all other steps, else null

  // Forward.
  const void* bias;       // (3 size,)
  void* h;           // (rows, size): written
  void* cell;        // (rows, size): written where there is one step, else null
  void* state;       // (rows, size) of acc_t<T>: written where there are several, else null

  // Backward: each is null where there is none.
  const void* grad_h;     // (rows, size): what arrives at this step's h from outside
  const void* grad_next;  // (rows, size): what arrives from the next step
  const void* grad_cell;  // (rows, size): what arrives at the last cell; in the last step
  void* grad_state;       // (rows, size) of acc_t<T>: the running gradient of the cell, of several steps
  bool last;              // `grad_state` holds nothing yet
  void* grad_gates;       // (rows, 3 size): written
  void* grad_old_cell;    // (rows, size): written in step 0
};

// All time steps in one kernel, on CUDA. Matrices as above, of all steps one after the other.
struct Sequence {
  int64_t steps;
  int64_t rows;
  int64_t size;

  const void* weights;   // (3 size, size): those of h
  int64_t weights_row;   // elements from one row of them to the next
  void* gates;           // (steps, rows, 3 size): forward: what the inputs give; the rest is added
  const void* old_cell;  // (rows, size)
  void* states;          // (steps, rows, size) of acc_t<T>: the cells; forward: written

  // Forward.
  const void* bias;   // (3 size,)
  const void* old_h;  // (rows, size)
  void* output;       // (steps, rows, size): written

  // Backward: each is null where there is none.
  const void* grad_output;  // (steps, rows, size)
  const void* grad_cell;    // (rows, size): of the last step
  void* grad_gates;         // (steps, rows, 3 size): written
  void* grad_old_cell;      // (rows, size): written
};

// Whether such a kernel takes them. A block keeps the weights in its registers and takes a few rows
// through all steps, at some 400 clocks a row and step for a state of 128 (lltm.cuh). A product and a
// kernel a step take 6 us or more whatever the rows are. 512 rows make 171 blocks of 3 rows: on a GPU
// of 130 multiprocessors they come in two waves, together 2 us a step; on one of 40 in five, 5 us.
// These are predictions: nobody has timed them yet.
inline bool one_kernel_takes(DType dtype, int64_t steps, int64_t rows, int64_t size) {
  return dtype != DType::kFloat64 && steps > 1 && rows <= 512 && size <= 128;
}

// CUDA launchers, on the current device. They return null, or the text of CUDA's error.
const char* launch_forward(DType dtype, const Params& params, void* stream);
const char* launch_backward(DType dtype, const Params& params, void* stream);
const char* launch_forward_sequence(DType dtype, const Sequence& sequence, void* stream);
const char* launch_backward_sequence(DType dtype, const Sequence& sequence, void* stream);

}  // namespace jitops::lltm

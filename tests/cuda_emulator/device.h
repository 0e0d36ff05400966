// What the two halves of the emulator know of each other: threads.cpp runs, memory.cpp watches.
#pragma once

#include <vector>

#include "emulator.h"

namespace cuda_emulator {

// The first fault of a launch, as "<what> in block (..), thread (..)"; ends the calling thread's
// fiber, and with it the launch.
[[noreturn]] void fault(const std::string& what);

struct Span {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t at, size_t size) const { return begin <= at && at + size <= end; }
};

// Which thread runs, and how far it is: what happened before what.
struct Now {
  bool running = false;  // else the host's own code does
  uint32_t launch = 0;   // serial numbers, from 1
  uint32_t block = 0;    // of the launch
  uint64_t visit = 0;    // of a block in a launch, of all launches: shared memory starts anew
  uint16_t thread = 0;   // of the block
  uint32_t phase = 0;    // barriers that the block has passed
  std::vector<uint32_t> warp_phase;  // __syncwarp that all lanes of a warp have passed
  Span stack, arguments;
};
extern Now now;

// ---- memory.cpp ---------------------------------------------------------------------------------

// Where shared memory is, and what no thread has touched of it. Says so where there is too much.
void begin_launch(size_t shared_bytes, std::string* problem);

// Memory that kernels may touch, for as long as its owner lives: all that a tensor's view spans.
void know(const void* owner, Span memory);
// Fresh memory, whose content is nobody's.
void know_fresh(const void* owner, Span memory);
void forget(const void* owner);
// Others than kernels (torch's operators) write it, or have written it.
void count_as_written(Span memory);
// Bytes of the owner's fresh memory that nobody has written.
size_t unwritten(const void* owner);

// ---- tensors.cpp --------------------------------------------------------------------------------

// The stream to launch on; null where the tensors' device was not made current.
void* expected_stream();

}  // namespace cuda_emulator

// What the two halves of the emulator know of each other: threads.cpp runs, memory.cpp watches.
#pragma once

#include <array>
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

// What a lane knows of its warp: how far each lane was, when both last met in a __syncwarp. Of
// itself, how far it is.
using Clock = std::array<uint32_t, kWarp>;

// Which thread runs, and how far it is: what happened before what.
struct Now {
  bool running = false;  // else the host's own code does
  uint32_t visit = 0;    // serial number of a block's run, of all launches
  uint32_t first = 0;    // that of the launch's first block
  uint32_t phase = 0;    // barriers that the block has passed
  uint16_t thread = 0;   // of the block
  Span stack, arguments;
  uint64_t steps = 0;         // accesses of the block, and visits to a barrier
  std::vector<Clock> clocks;  // of the block's threads

  const Clock& clock() const { return clocks[thread]; }
};
extern Now now;

// Fibers are not interrupted: a thread that waits for another one in a loop would wait for ever.
constexpr uint64_t kMostSteps = uint64_t{1} << 26;
inline void count_step() {
  if (++now.steps > kMostSteps) fault("a block without end, because its threads wait in a loop");
}

// Run the last block of a grid and no other, for tensors that are too large to be touched as a
// whole. Then only bounds are checked, and matrix products are left out.
extern bool only_last_block;

// ---- memory.cpp ---------------------------------------------------------------------------------

// Where shared memory is, and what no thread has touched of it. Says so where there is too much.
void begin_launch(size_t shared_bytes, std::string* problem);

// Memory that kernels may read, or write, for as long as its owner lives: all that a tensor's view
// spans.
void know(const void* owner, Span memory, bool writable);
// Fresh memory, whose content is nobody's; kernels may write it.
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

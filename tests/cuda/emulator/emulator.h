// A CUDA device of one core: what kernels compiled for the CPU call, and what it checks.
//
// Every thread of a block is a fiber with a stack of its own, so that barriers and shuffles mean what
// they mean; blocks run one after the other, in another order at each launch. The compiler tells of
// every access to memory (-fsanitize=thread calls a function before each, and these are ours), so
// that each is looked up: is it inside a tensor, was it ever written, does another thread of the block
// or another block touch it without a barrier between? The first fault ends the launch, which returns
// its text as CUDA returns an error's.
//
// Not seen: a pointer that leaves one shared or local array for the next, unless the compiler knows
// the array; more threads than __launch_bounds__ allows; a loop without end that touches no memory.
// Refused, although it can be right: blocks that wait for each other; blocks that pass their results
// on through atomics and fences; threads that return before a barrier of the others.
//
// Test only. `cuda_runtime.h` beside it is what a .cu includes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

namespace cuda_emulator {

struct Index {
  unsigned x, y, z;
};

using Where = std::source_location;

constexpr int kWarp = 32;

// ---- limits of the device, those that all architectures we name have in common -----------------

constexpr unsigned kMaxThreads = 1024;
constexpr Index kMaxBlock{1024, 1024, 64};
constexpr Index kMaxGrid{2147483647, 65535, 65535};
constexpr size_t kMaxShared = size_t{48} << 10;  // static and dynamic, without asking for more

// ---- what kernels call (const: the same for all of a thread's life) -----------------------------

[[gnu::const]] Index thread_index();
[[gnu::const]] Index block_index();
[[gnu::const]] Index block_size();
[[gnu::const]] Index grid_size();
[[gnu::const]] int lane();

// Waits for all threads of the block; returns for how many of them `predicate` is true.
int barrier(bool predicate, const char* name, Where where);

// What the lanes of a warp that meet in one intrinsic bring along.
struct Meeting;

// Waits for all lanes of `mask`.
const Meeting* meet(unsigned mask, uint64_t value, const char* name, Where where);
unsigned lanes_of(const Meeting* meeting);
uint64_t value_of(const Meeting* meeting, int lane);  // a fault where that lane takes no part
unsigned active_lanes();

// An atomic operation on `size` bytes follows.
void atomic_access(const void* at, size_t size);

// ---- launching ----------------------------------------------------------------------------------

// A kernel with its arguments, `size` bytes that its threads may read.
struct Call {
  void (*run)(const Call*);
  size_t size;
};

// Runs it once for each thread of the grid. Returns null, or a report of the first fault.
const char* run(Index grid, Index block, size_t shared_bytes, void* stream, const Call& call);
const char* report();  // of the last launch that failed

extern int last_error;  // CUDA's, of whichever call came last: 0 is none

}  // namespace cuda_emulator

// Threads as fibers: blocks, barriers, warps.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "device.h"

namespace cuda_emulator {

Now now;
bool only_last_block = false;
int last_error = 0;

struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* name = nullptr;
  uint64_t values[kWarp] = {};
};

namespace {

// ---- fibers: stacks that are used again; switched by _longjmp, which asks the kernel nothing -----

constexpr size_t kStack = size_t{640} << 10, kGuard = 4096;  // CUDA allows local memory of 512 KiB

enum class State { kReady, kAtBarrier, kMeeting, kDone };

struct Thread {
  Index index;
  State state = State::kReady;
  const char* waits_in = nullptr;
  Where where;
  bool predicate = false;
  int counted = 0;
  std::shared_ptr<Meeting> meeting;
};

struct Fiber {
  char* stack = nullptr;
  bool started = false;
  jmp_buf context;
};

std::vector<Fiber> fibers;
std::vector<Thread> threads;
jmp_buf scheduler;
int current = 0;
Index grid_, block_, at_;
const Call* call_ = nullptr;
std::string problem;
std::vector<std::vector<std::shared_ptr<Meeting>>> meetings;  // of a warp, not complete yet

void suspend() {
  if (!_setjmp(fibers[current].context)) _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    call_->run(call_);
    threads[current].state = State::kDone;
    suspend();
  }
}

void resume(int number) {
  Fiber& fiber = fibers[number];
  current = number;
  now.thread = static_cast<uint16_t>(number);
  const auto low = reinterpret_cast<uintptr_t>(fiber.stack) + kGuard;
  now.stack = {low, low + kStack};
  now.running = true;
  if (!_setjmp(scheduler)) {
    if (fiber.started) _longjmp(fiber.context, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack + kGuard;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;  // fiber_main never returns
    makecontext(&context, fiber_main, 0);
    setcontext(&context);
  }
  now.running = false;
}

void grow_fibers(size_t count) {
  while (fibers.size() < count) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("the emulator has no memory for stacks");
    mprotect(memory, kGuard, PROT_NONE);
    fibers.emplace_back().stack = static_cast<char*>(memory);
  }
}

// ---- words --------------------------------------------------------------------------------------

std::string text(const Index& i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string place(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

std::string hex(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

// Why no thread of the block can go on.
std::string stuck() {
  std::string said = "divergent threads: ";
  int done = 0;
  std::vector<std::pair<std::string, int>> waiting;
  for (const Thread& thread : threads) {
    if (thread.state == State::kDone) {
      ++done;
      continue;
    }
    std::string what = std::string(thread.waits_in) + " at " + place(thread.where);
    if (thread.state == State::kMeeting) {
      what += " with mask " + hex(thread.meeting->mask) + ", of which lanes " +
              hex(thread.meeting->arrived) + " have come";
    }
    const auto same = std::find_if(waiting.begin(), waiting.end(),
                                   [&](const auto& one) { return one.first == what; });
    if (same == waiting.end()) {
      waiting.emplace_back(what, 1);
    } else {
      ++same->second;
    }
  }
  for (const auto& [what, count] : waiting) {
    said += std::to_string(count) + " wait in " + what + ", ";
  }
  return said + std::to_string(done) + " have returned";
}

// ---- a block ------------------------------------------------------------------------------------

int warp_of(int thread) { return thread / kWarp; }

unsigned lanes_with(int warp, State state, bool equal) {
  unsigned lanes = 0;
  for (int i = 0; i < kWarp; ++i) {
    const auto thread = static_cast<size_t>(warp * kWarp + i);
    if (thread < threads.size() && (threads[thread].state == state) == equal) lanes |= 1u << i;
  }
  return lanes;
}

// If all threads of the block are at one barrier, they pass it.
bool pass_barrier() {
  int count = 0;
  for (const Thread& thread : threads) {
    if (thread.state != State::kAtBarrier || thread.waits_in != threads[0].waits_in ||
        thread.where.line() != threads[0].where.line() ||
        thread.where.column() != threads[0].where.column()) {
      return false;
    }
    count += thread.predicate;
  }
  ++now.phase;
  for (Thread& thread : threads) {
    thread.counted = count;
    thread.state = State::kReady;
  }
  return true;
}

// All that these lanes did comes before all that they will do.
void order(int warp, unsigned mask) {
  Clock joined{};
  const auto each = [&](const auto& f) {
    for (int i = 0; i < kWarp; ++i) {
      if (mask >> i & 1) f(now.clocks[static_cast<size_t>(warp * kWarp + i)], i);
    }
  };
  each([&](const Clock& clock, int) {
    for (int i = 0; i < kWarp; ++i) joined[i] = std::max(joined[i], clock[i]);
  });
  each([&](Clock& clock, int lane) {
    clock = joined;
    ++clock[lane];
  });
}

void run_block(uint64_t seed) {
  const int count = static_cast<int>(threads.size());
  for (;;) {
    bool progress = false;
    int done = 0;
    for (int i = 0; i < count; ++i) {
      const int number = static_cast<int>((i + seed) % static_cast<uint64_t>(count));
      if (threads[number].state == State::kReady) {
        resume(number);
        if (!problem.empty()) return;
        progress = true;
      }
      done += threads[number].state == State::kDone;
    }
    if (done == count) return;
    if (progress || pass_barrier()) continue;
    problem = stuck() + "; in block " + text(at_);
    return;
  }
}

const char* invalid(Index grid, Index block, void* stream, void* expected) {
  const auto outside = [](Index size, Index most) {
    return !size.x || !size.y || !size.z || size.x > most.x || size.y > most.y || size.z > most.z;
  };
  if (outside(grid, kMaxGrid) || outside(block, kMaxBlock)) return "invalid configuration argument";
  if (uint64_t{block.x} * block.y * block.z > kMaxThreads) return "invalid configuration argument";
  if (stream != expected) return "launched on another stream than the tensors' current one";
  return nullptr;
}

}  // namespace

// ---- what kernels call --------------------------------------------------------------------------

Index thread_index() { return threads[current].index; }
Index block_index() { return at_; }
Index block_size() { return block_; }
Index grid_size() { return grid_; }
int lane() { return current % kWarp; }

int barrier(bool predicate, const char* name, Where where) {
  count_step();
  Thread& thread = threads[current];
  thread.state = State::kAtBarrier;
  thread.waits_in = name;
  thread.where = where;
  thread.predicate = predicate;
  suspend();
  return threads[current].counted;
}

const Meeting* meet(unsigned mask, uint64_t value, const char* name, Where where) {
  count_step();
  const int warp = warp_of(current), me = lane();
  if (!(mask >> me & 1)) {
    fault(std::string(name) + " at " + place(where) + " with mask " + hex(mask) +
          ", which has not the lane that calls it, " + std::to_string(me));
  }
  Thread& thread = threads[current];
  auto& pending = meetings[warp];
  const auto found = std::find_if(pending.begin(), pending.end(), [&](const auto& one) {
    return one->mask == mask && one->name == name && !(one->arrived >> me & 1);
  });
  std::shared_ptr<Meeting> meeting;
  if (found == pending.end()) {
    meeting = pending.emplace_back(std::make_shared<Meeting>());
    meeting->mask = mask;
    meeting->name = name;
  } else {
    meeting = *found;
  }
  meeting->arrived |= 1u << me;
  meeting->values[me] = value;
  thread.meeting = meeting;
  const unsigned living = lanes_with(warp, State::kDone, false);
  if (mask & ~living) {
    fault(std::string(name) + " at " + place(where) + " with mask " + hex(mask) + ", of which lanes " +
          hex(mask & ~living) + " are not there or have returned");
  }
  if (meeting->arrived != mask) {
    thread.state = State::kMeeting;
    thread.waits_in = name;
    thread.where = where;
    suspend();
    return threads[current].meeting.get();
  }
  pending.erase(std::find(pending.begin(), pending.end(), meeting));
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) threads[static_cast<size_t>(warp * kWarp + i)].state = State::kReady;
  }
  if (std::string(name) == "__syncwarp") order(warp, mask);  // shuffles and votes order no memory
  return meeting.get();
}

unsigned lanes_of(const Meeting* meeting) { return meeting->arrived; }

uint64_t value_of(const Meeting* meeting, int from) {
  if (from < 0 || from >= kWarp || !(meeting->mask >> from & 1)) {
    fault(std::string(meeting->name) + " reads from lane " + std::to_string(from) +
          ", which its mask " + hex(meeting->mask) + " has not");
  }
  return meeting->values[from];
}

unsigned active_lanes() { return 1u << lane(); }  // all that is guaranteed

void fault(const std::string& what) {
  now.running = false;
  problem = what + "; in block " + text(at_) + ", thread " + text(threads[current].index);
  for (Fiber& fiber : fibers) fiber.started = false;  // their stacks are used again, from the top
  _longjmp(scheduler, 1);
}

// ---- launching ----------------------------------------------------------------------------------

const char* report() { return problem.c_str(); }

const char* run(Index grid, Index block, size_t shared_bytes, void* stream, const Call& call) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> guard(one_at_a_time);
  problem.clear();
  if (const char* error = invalid(grid, block, stream, expected_stream())) problem = error;
  if (!problem.empty()) return problem.c_str();
  static uint32_t launches = 0;
  ++launches;
  now.first = now.visit + 1;
  begin_launch(shared_bytes, &problem);
  if (!problem.empty()) return problem.c_str();
  grid_ = grid;
  block_ = block;
  call_ = &call;
  const auto arguments = reinterpret_cast<uintptr_t>(&call);
  now.arguments = {arguments, arguments + call.size};
  const size_t count = size_t{block.x} * block.y * block.z;
  grow_fibers(count);
  threads.assign(count, {});
  for (size_t i = 0; i < count; ++i) {
    const auto n = static_cast<unsigned>(i);
    threads[i].index = {n % block.x, n / block.x % block.y, n / block.x / block.y};
  }
  meetings.assign((count + kWarp - 1) / kWarp, {});
  // Blocks and threads in another order each time: a result that depends on it shows.
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t seed = launches * 0x9e3779b97f4a7c15u >> 33;
  uint64_t step = seed % blocks + 1;
  while (std::gcd(step, blocks) != 1) ++step;
  uint64_t number = only_last_block ? blocks - 1 : seed % blocks;
  const uint64_t wanted = only_last_block ? 1 : blocks;
  for (uint64_t i = 0; i < wanted && problem.empty(); ++i, number = (number + step) % blocks) {
    at_ = {static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
           static_cast<unsigned>(number / grid.x / grid.y)};
    ++now.visit;
    now.phase = 0;
    now.steps = 0;
    now.clocks.assign(count, {});
    for (size_t one = 0; one < count; ++one) now.clocks[one][one % kWarp] = 1;
    for (Thread& one : threads) one.state = State::kReady;
    run_block(seed + i);
  }
  for (auto& warp : meetings) warp.clear();
  if (!problem.empty()) {
    for (Fiber& fiber : fibers) fiber.started = false;
    return problem.c_str();
  }
  return nullptr;
}

}  // namespace cuda_emulator

extern "C" __attribute__((visibility("default"))) void jitops_only_last_block(bool only) {
  cuda_emulator::only_last_block = only;
}

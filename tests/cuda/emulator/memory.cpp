// Every access of a kernel to memory, looked up. The compiler calls the functions at the end.
// For one host thread at a time, as tests are.
#include <link.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>

#include "device.h"

// What kernels declare as `extern __shared__ unsigned char dynamic_shared[]`, and launch with a size.
alignas(16) thread_local unsigned char dynamic_shared[cuda_emulator::kMaxShared];

namespace cuda_emulator {
namespace {

// ---- memory of tensors --------------------------------------------------------------------------

struct Known {
  const void* owner;
  Span memory;
  bool writable;
};
std::vector<Known> known;

struct Fresh {
  const void* owner;
  Span memory;
  std::vector<bool> written;
};
std::vector<std::unique_ptr<Fresh>> fresh;

Fresh* fresh_at(uintptr_t at) {
  for (const auto& one : fresh) {
    if (one->memory.contains(at, 1)) return one.get();
  }
  return nullptr;
}

// ---- what happened before what ------------------------------------------------------------------

// The last access of its kind. Of other accesses, which nothing orders before it, flags are kept.
struct Moment {
  uint32_t visit = 0, phase = 0;
  uint32_t clock = 0;  // of its lane
  uint16_t thread : 11 = 0;
  bool atomic : 1 = false;
  bool lanes : 1 = false;   // other lanes of the warp
  bool warps : 1 = false;   // other warps of the block
  bool blocks : 1 = false;  // other blocks

  void set(bool is_atomic) {
    blocks = in_launch() && (blocks || !in_block());
    lanes = in_phase() && same_warp() && unordered_lane();
    warps = in_phase() && (warps || !same_warp());
    visit = now.visit;
    phase = now.phase;
    clock = now.clock()[now.thread % kWarp];
    thread = now.thread;
    atomic = is_atomic;
  }
  // Whether it, or another access that a flag stands for, does not come before the present.
  bool concurrent() const {
    if (!in_launch()) return false;
    if (blocks || !in_block()) return true;  // nothing orders blocks
    return in_phase() && (warps || !same_warp() || unordered_lane());
  }
  std::string who() const {
    if (blocks || !in_block()) return "another block";
    if (thread == now.thread) return "another thread of the block";
    return "thread " + std::to_string(thread) + " of the block";
  }

  bool in_launch() const { return visit >= now.first; }
  bool in_block() const { return visit == now.visit; }
  bool in_phase() const { return in_block() && phase == now.phase; }
  bool same_warp() const { return thread / kWarp == now.thread / kWarp; }
  // Of two lanes of a warp. A thread that passed a __syncwarp since has met the other lanes.
  bool unordered_lane() const {
    const uint32_t known = now.clock()[thread % kWarp];
    return thread == now.thread ? lanes && clock == known : clock > known;
  }
};

// Of a byte.
struct Cell {
  Moment written, read;
};

// Notes an access of a byte; a fault where another one is not ordered before or after it.
void check_race(Cell& cell, const char* where, bool write, bool atomic) {
  const char* done = write ? "written" : "read";
  if (cell.written.concurrent() && !(atomic && cell.written.atomic)) {
    fault(std::string("race in ") + where + ": " + done + " without a barrier after " +
          cell.written.who() + " wrote it");
  }
  if (write && cell.read.concurrent()) {
    fault(std::string("race in ") + where + ": written without a barrier after " +
          cell.read.who() + " read it");
  }
  (write ? cell.written : cell.read).set(atomic);
}

// The cells of memory that kernels may write, by pages.
constexpr size_t kPage = 4096;
using Page = std::array<Cell, kPage>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* last = nullptr;  // found
uintptr_t last_number = 0;

Cell& global_cell(uintptr_t at) {
  const uintptr_t number = at / kPage;
  if (!last || last_number != number) {
    auto& page = pages[number];
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last = page.get();
  }
  return (*last)[at % kPage];
}

// ---- shared memory ------------------------------------------------------------------------------

Span static_shared, dynamic;  // of this host thread
std::vector<Cell> cells;      // of each byte of both; the dynamic part lies within the static one
size_t used = 0;              // bytes of the static part that the block has written
uint32_t used_in = 0;         // which visit
Span own_data;                // constants and variables of the kernels' own library

int find_library(dl_phdr_info* info, size_t, void*) {
  const auto here = reinterpret_cast<uintptr_t>(&find_library);
  Span data;
  bool mine = false;
  Span local;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr, end = begin + part.p_memsz;
    if (part.p_type == PT_LOAD) {
      mine = mine || (begin <= here && here < end);
      data.begin = data.begin ? std::min(data.begin, begin) : begin;
      data.end = std::max(data.end, end);
    } else if (part.p_type == PT_TLS) {
      local.begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      local.end = local.begin + part.p_memsz;
    }
  }
  if (!mine) return 0;
  own_data = data;
  static_shared = local;
  return 1;
}

// ---- the checks ---------------------------------------------------------------------------------

std::string bytes(size_t count) { return std::to_string(count) + (count == 1 ? " byte" : " bytes"); }

std::string nearest(uintptr_t at, size_t size) {
  const Known* best = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Known& one : known) {
    const Span& memory = one.memory;
    const uintptr_t apart = at < memory.begin ? memory.begin - at : std::max(at, memory.end) - memory.end;
    if (apart < distance) best = &one, distance = apart;
  }
  if (!best) return "in no tensor";
  if (distance > (uintptr_t{1} << 32)) return "far from every tensor";
  const Span& memory = best->memory;
  const std::string tensor = " a tensor of " + bytes(memory.end - memory.begin);
  if (at < memory.begin) return bytes(distance) + " before" + tensor;
  if (at >= memory.end) return bytes(distance) + " behind" + tensor;
  return "the last " + std::to_string(at + size - memory.end) + " behind" + tensor;
}

// nvcc refuses a kernel with more than there is; here all kernels' arrays lie side by side.
void count_static(uintptr_t at) {
  if (dynamic.begin <= at && at < dynamic.begin + kMaxShared) return;
  if (used_in != now.visit) used = 0, used_in = now.visit;
  if (++used + (dynamic.end - dynamic.begin) > kMaxShared) {
    fault("more than " + bytes(kMaxShared) + " of shared memory");
  }
}

void check_shared(uintptr_t at, size_t size, bool write, bool atomic) {
  if (at >= dynamic.begin && at < reinterpret_cast<uintptr_t>(dynamic_shared + kMaxShared) &&
      !dynamic.contains(at, size)) {
    fault("dynamic shared memory: an access " + bytes(at - dynamic.begin) + " from its begin, with " +
          bytes(dynamic.end - dynamic.begin) + " asked for at the launch");
  }
  for (size_t i = 0; i < size; ++i) {
    Cell& cell = cells[at + i - static_shared.begin];
    if (!cell.written.in_block()) {
      if (!write || atomic) fault("shared memory read before it was written");
      cell = {};  // of a block before
      count_static(at + i);
    }
    check_race(cell, "shared memory", write, atomic);
  }
}

void check_global(uintptr_t at, size_t size, bool write, bool atomic) {
  if (only_last_block) return;  // a note of each byte would take more memory than there is
  Fresh* new_memory = fresh_at(at);
  for (size_t i = 0; i < size; ++i) {
    if (new_memory) {
      const size_t offset = at + i - new_memory->memory.begin;
      if ((!write || atomic) && !new_memory->written[offset]) {
        fault("memory of a tensor read before it was written");
      }
      if (write) new_memory->written[offset] = true;
    }
    check_race(global_cell(at + i), "global memory", write, atomic);
  }
}

void check(const void* address, size_t size, bool write, bool aligned, bool atomic = false) {
  if (!now.running || size == 0) return;  // the host's own code
  count_step();
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (now.stack.contains(at, size) || (!write && now.arguments.contains(at, size))) return;
  if (aligned && at % size != 0) {
    fault("misaligned address: " + bytes(size) + " at one that is no multiple of them");
  }
  if (static_shared.contains(at, size)) return check_shared(at, size, write, atomic);
  bool read_only = false;
  for (size_t i = known.size(); i-- > 0;) {
    if (!known[i].memory.contains(at, size)) continue;
    if (known[i].writable || fresh_at(at)) return check_global(at, size, write, atomic);
    if (!write) {
      std::swap(known[i], known.back());  // the next access is likely to be near
      return;
    }
    read_only = true;
  }
  if (read_only) fault("write to a tensor that the host side asked a const pointer of");
  if (own_data.contains(at, size)) {  // the kernels' own constants and variables
    for (size_t i = 0; i < size; ++i) {
      check_race(global_cell(at + i), "a static variable", write, atomic);
    }
    return;
  }
  fault(std::string(write ? "write" : "read") + " out of bounds: " + bytes(size) + ", " + nearest(at, size));
}

}  // namespace

// ---- what the rest of the emulator tells --------------------------------------------------------

void begin_launch(size_t shared_bytes, std::string* problem) {
  if (pages.size() > 1536) {  // 200 MiB: of launches long ago
    pages.clear();
    last = nullptr;
  }
  dynamic_shared[0] = 0;  // memory of a thread is made when it is first touched
  dl_iterate_phdr(find_library, nullptr);
  dynamic.begin = reinterpret_cast<uintptr_t>(dynamic_shared);
  dynamic.end = dynamic.begin + shared_bytes;
  cells.resize(static_shared.end - static_shared.begin);
  if (shared_bytes > kMaxShared) {
    *problem = "invalid argument: " + bytes(shared_bytes) + " of shared memory, more than " +
               bytes(kMaxShared);
  }
}

void know(const void* owner, Span memory, bool writable) {
  for (Known& one : known) {
    if (one.owner != owner || one.memory.begin != memory.begin) continue;
    one.writable = one.writable || writable;
    return;
  }
  if (memory.begin != memory.end) known.push_back({owner, memory, writable});
}

void know_fresh(const void* owner, Span memory) {
  if (memory.begin == memory.end) return;
  fresh.push_back(std::make_unique<Fresh>(
      Fresh{owner, memory, std::vector<bool>(memory.end - memory.begin)}));
}

void forget(const void* owner) {
  std::erase_if(known, [&](const Known& one) { return one.owner == owner; });
  std::erase_if(fresh, [&](const auto& one) { return one->owner == owner; });
}

void count_as_written(Span memory) {
  for (const auto& one : fresh) {
    const uintptr_t begin = std::max(memory.begin, one->memory.begin);
    const uintptr_t end = std::min(memory.end, one->memory.end);
    for (uintptr_t at = begin; at < end; ++at) one->written[at - one->memory.begin] = true;
  }
}

size_t unwritten(const void* owner) {
  for (const auto& one : fresh) {
    if (one->owner != owner) continue;
    return static_cast<size_t>(std::count(one->written.begin(), one->written.end(), false));
  }
  return 0;
}

void atomic_access(const void* at, size_t size) { check(at, size, true, true, true); }

}  // namespace cuda_emulator

// ---- what the compiler calls before each access, and where an index is beyond an array ----------

extern "C" {

#define JITOPS_HOOKS(size)                                                                        \
  void __tsan_read##size(void* at) { cuda_emulator::check(at, size, false, true); }               \
  void __tsan_write##size(void* at) { cuda_emulator::check(at, size, true, true); }               \
  void __tsan_unaligned_read##size(void* at) { cuda_emulator::check(at, size, false, false); }    \
  void __tsan_unaligned_write##size(void* at) { cuda_emulator::check(at, size, true, false); }    \
  void __tsan_volatile_read##size(void* at) { cuda_emulator::check(at, size, false, true); }      \
  void __tsan_volatile_write##size(void* at) { cuda_emulator::check(at, size, true, true); }
JITOPS_HOOKS(1)
JITOPS_HOOKS(2)
JITOPS_HOOKS(4)
JITOPS_HOOKS(8)
JITOPS_HOOKS(16)
void __tsan_read_range(void* at, long size) {
  cuda_emulator::check(at, static_cast<size_t>(size), false, false);
}
void __tsan_write_range(void* at, long size) {
  cuda_emulator::check(at, static_cast<size_t>(size), true, false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

struct Place {  // the first argument of each of -fsanitize's functions below, or its begin
  const char* file;
  uint32_t line, column;
};
struct TypedPlace {
  Place place;
  const void* type;
  unsigned char log_alignment, kind;
};
static void at_place(const Place* place, const std::string& what) {
  const std::string file = place->file;
  if (!cuda_emulator::now.running) return;
  cuda_emulator::fault(what + " at " + file.substr(file.rfind('/') + 1) + ":" +
                       std::to_string(place->line));
}
void __ubsan_handle_out_of_bounds(Place* place, uintptr_t index) {
  at_place(place, "index " + std::to_string(static_cast<intptr_t>(index)) + " beyond an array");
}
#define JITOPS_OVERFLOWS(operation)                                              \
  void __ubsan_handle_##operation##_overflow(Place* place, uintptr_t, uintptr_t) { \
    at_place(place, "a number beyond its type");                                 \
  }
JITOPS_OVERFLOWS(add)
JITOPS_OVERFLOWS(sub)
JITOPS_OVERFLOWS(mul)
void __ubsan_handle_divrem_overflow(Place* place, uintptr_t, uintptr_t divisor) {
  at_place(place, divisor == 0 ? "division by zero" : "a number beyond its type");
}
void __ubsan_handle_shift_out_of_bounds(Place* place, uintptr_t, uintptr_t) {
  at_place(place, "a shift by more bits than there are, or by less than 0");
}
void __ubsan_handle_negate_overflow(Place* place, uintptr_t) {
  at_place(place, "a number beyond its type");
}
void __ubsan_handle_type_mismatch_v1(TypedPlace* typed, uintptr_t at) {
  const bool aligned = at % (uintptr_t{1} << typed->log_alignment) == 0;
  at_place(&typed->place, aligned ? "an access beyond an array" : "misaligned address");
}

// What kernels call in the place of these (__init__.py renames them in their object).
void* jitops_memcpy(void* to, const void* from, size_t size) {
  __tsan_read_range(const_cast<void*>(from), static_cast<long>(size));
  __tsan_write_range(to, static_cast<long>(size));
  return std::memcpy(to, from, size);
}
void* jitops_memmove(void* to, const void* from, size_t size) {
  __tsan_read_range(const_cast<void*>(from), static_cast<long>(size));
  __tsan_write_range(to, static_cast<long>(size));
  return std::memmove(to, from, size);
}
void* jitops_memset(void* to, int value, size_t size) {
  __tsan_write_range(to, static_cast<long>(size));
  return std::memset(to, value, size);
}
}

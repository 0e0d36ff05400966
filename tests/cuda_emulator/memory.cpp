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

// Which block of the launch wrote a byte, for pages that blocks write to.
constexpr size_t kPage = 4096;
struct Page {
  uint32_t launch = 0;
  uint32_t block[kPage];  // and 1; 0: none
};
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
Page* last = nullptr;  // found
uintptr_t last_number = 0;

uint32_t* writer_of(uintptr_t at, bool make) {
  const uintptr_t number = at / kPage;
  if (!last || last_number != number) {
    const auto found = pages.find(number);
    if (found == pages.end() && !make) return nullptr;
    auto& page = found == pages.end() ? pages[number] : found->second;
    if (!page) page = std::make_unique<Page>();
    last_number = number;
    last = page.get();
  }
  if (last->launch != now.launch) {
    if (!make) return nullptr;
    std::memset(last->block, 0, sizeof last->block);
    last->launch = now.launch;
  }
  return &last->block[at % kPage];
}

// ---- shared memory ------------------------------------------------------------------------------

// A moment of a thread, to tell whether what it did then comes before what another does now.
struct Moment {
  uint64_t visit = 0;
  uint32_t phase = 0, warp_phase = 0;
  uint16_t thread = 0;
  bool several = false;  // readers, of one warp or of more
  bool several_warps = false;
  bool atomic = false;

  void set(bool is_atomic) {
    *this = {now.visit, now.phase, now.warp_phase[now.thread / kWarp], now.thread,
             false,     false,     is_atomic};
  }
  bool here() const { return visit == now.visit; }
  // Whether no barrier lies between it and another thread's present.
  bool concurrent() const {
    if (!here() || phase != now.phase) return false;
    if (several_warps) return true;
    if (thread / kWarp != now.thread / kWarp) return true;
    return warp_phase == now.warp_phase[now.thread / kWarp] && (several || thread != now.thread);
  }
};

struct Cell {
  Moment written, read;
};

Span static_shared, dynamic;  // of this host thread
std::vector<Cell> cells;      // of each byte of both; the dynamic part lies within the static one
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

std::string nearest(uintptr_t at) {
  const Known* best = nullptr;
  uintptr_t distance = UINTPTR_MAX;
  for (const Known& one : known) {
    const uintptr_t apart = at < one.memory.begin ? one.memory.begin - at : at - one.memory.end;
    if (apart < distance) best = &one, distance = apart;
  }
  if (!best) return "in no tensor";
  if (distance > (uintptr_t{1} << 32)) return "far from every tensor";
  return bytes(distance) + (at < best->memory.begin ? " before" : " behind") + " a tensor of " +
         bytes(best->memory.end - best->memory.begin);
}

void check_shared(uintptr_t at, size_t size, bool write, bool atomic) {
  if (at >= dynamic.begin && at < reinterpret_cast<uintptr_t>(dynamic_shared + kMaxShared) &&
      !dynamic.contains(at, size)) {
    fault("dynamic shared memory: an access " + bytes(at - dynamic.begin) + " from its begin, with " +
          bytes(dynamic.end - dynamic.begin) + " asked for at the launch");
  }
  for (size_t i = 0; i < size; ++i) {
    Cell& cell = cells[at + i - static_shared.begin];
    if ((!write || atomic) && !cell.written.here()) fault("shared memory read before it was written");
    if (cell.written.concurrent() && !(atomic && cell.written.atomic)) {
      fault(std::string("race in shared memory: ") + (write ? "written" : "read") +
            " without a barrier after thread " + std::to_string(cell.written.thread) +
            " of the block wrote it");
    }
    if (write && cell.read.concurrent()) {
      fault("race in shared memory: written without a barrier after thread " +
            std::to_string(cell.read.thread) + " of the block read it");
    }
    if (write) {
      cell.written.set(atomic);
    } else if (cell.read.concurrent()) {
      cell.read.several = true;
      cell.read.several_warps |= cell.read.thread / kWarp != now.thread / kWarp;
    } else {
      cell.read.set(false);
    }
  }
}

void check_global(uintptr_t at, size_t size, bool write, bool atomic) {
  Fresh* new_memory = fresh_at(at);
  for (size_t i = 0; i < size; ++i) {
    if (new_memory) {
      const size_t offset = at + i - new_memory->memory.begin;
      if ((!write || atomic) && !new_memory->written[offset]) {
        fault("memory of a tensor read before it was written");
      }
      if (write) new_memory->written[offset] = true;
    }
    uint32_t* writer = writer_of(at + i, write);
    if (!writer) continue;
    if (*writer && *writer != now.block + 1 && !atomic) {
      fault("race between blocks: memory that block " + std::to_string(*writer - 1) +
            " wrote in the same launch");
    }
    if (write && !atomic) *writer = now.block + 1;
  }
}

void check(const void* address, size_t size, bool write, bool aligned, bool atomic = false) {
  if (!now.running) return;  // the host's own code
  const auto at = reinterpret_cast<uintptr_t>(address);
  if (now.stack.contains(at, size) || (!write && now.arguments.contains(at, size))) return;
  if (aligned && at % size != 0) {
    fault("misaligned address: " + bytes(size) + " at one that is no multiple of them");
  }
  if (static_shared.contains(at, size)) return check_shared(at, size, write, atomic);
  for (size_t i = known.size(); i-- > 0;) {
    if (!known[i].memory.contains(at, size)) continue;
    check_global(at, size, write, atomic);
    std::swap(known[i], known.back());  // the next access is likely to be near
    return;
  }
  if (own_data.contains(at, size)) return;  // constants of the kernel
  fault(std::string(write ? "write" : "read") + " out of bounds: " + bytes(size) + ", " + nearest(at));
}

}  // namespace

// ---- what the rest of the emulator tells --------------------------------------------------------

void begin_launch(size_t shared_bytes, std::string* problem) {
  if (pages.size() > 8192) {  // 128 MiB: of launches long ago
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

void know(const void* owner, Span memory) {
  for (const Known& one : known) {
    if (one.owner == owner && one.memory.begin == memory.begin) return;
  }
  if (memory.begin != memory.end) known.push_back({owner, memory});
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

struct Place {  // what -fsanitize=bounds tells first
  const char* file;
  uint32_t line, column;
};
void __ubsan_handle_out_of_bounds(Place* place, uintptr_t index) {
  const std::string file = place->file;
  const std::string what = "index " + std::to_string(static_cast<intptr_t>(index)) +
                           " beyond an array at " + file.substr(file.rfind('/') + 1) + ":" +
                           std::to_string(place->line);
  if (cuda_emulator::now.running) cuda_emulator::fault(what);
}
void __ubsan_handle_out_of_bounds_abort(Place* place, uintptr_t index) {
  __ubsan_handle_out_of_bounds(place, index);
}
}

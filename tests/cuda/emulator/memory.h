// Memory as kernels see it: which global addresses exist, and one block's shared memory with a
// detector of races between warps.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <array>
#include <map>
#include <string>
#include <vector>

#include "numbers.h"

namespace emulator {

constexpr int kMaxWarps = 32;
constexpr int kSectorBytes = 32;

[[noreturn]] void stop(const std::string& message);

// Everything that is counted. A warp instruction counts once, whatever its active lanes.
struct Counters {
  uint64_t warp_instructions = 0, thread_instructions = 0;
  uint64_t load_requests = 0, load_sectors = 0, store_requests = 0, store_sectors = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0, atomic_requests = 0, atomic_serial = 0;
  uint64_t barriers = 0, divergent_branches = 0;
  std::map<std::string, uint64_t> opcodes;  // warp instructions, by opcode with its modifiers
  int warnings = 0;

  // Prints the first few warnings and counts all.
  void warn(const std::string& message);
  void count_global(uint32_t lanes, const uint64_t* addresses, int bytes, bool store);
  void count_shared(uint32_t lanes, const uint64_t* addresses, int bytes);
  void count_atomic(uint32_t lanes, const uint64_t* addresses);
};

// The buffers that kernels may touch, at their real addresses.
class GlobalMemory {
 public:
  void allow(const void* start, size_t bytes, bool writable);
  void clear() { regions_.clear(); }
  // Why this access is wrong, or null.
  const char* fault(uint64_t address, int bytes, bool write) const;

 private:
  struct Region {
    uint64_t begin, end;
    bool writable;
  };
  std::vector<Region> regions_;
};

enum class Access { kRead, kWrite, kAtomic };

// A block's shared memory. Every warp has a vector clock; a barrier joins the clocks of the warps
// that take part. Two accesses to a cell of two bytes by different warps race if at least one writes and neither
// clock knows of the other.
class SharedMemory {
 public:
  void start_block(size_t bytes, int warps);
  size_t size() const { return bytes_.size(); }
  uint8_t* data() { return bytes_.data(); }

  // Records an access; returns what is wrong with it, or an empty string.
  std::string touch(uint64_t address, int bytes, Access access, int warp);
  // An asynchronous copy will write here: the bytes are undefined until it arrives.
  std::string promise(uint64_t address, int bytes, int warp);

  using Clock = std::array<uint32_t, kMaxWarps>;
  // A warp arrives at a barrier: the barrier's clock learns what the warp knows.
  void release(int warp, Clock& barrier);
  // A warp leaves a barrier.
  void acquire(int warp, const Clock& barrier);

 private:
  // What is known of this many bytes: warps may write neighbouring halves of a word.
  static constexpr uint64_t kCellBytes = 2;
  struct Cell {
    uint32_t block = 0, write_clock = 0, readers = 0;
    int writer = -1;
    bool defined = false, atomic = false;
    Clock read_clock;
  };
  Cell& cell(uint64_t index);
  std::string race(const Cell& cell, Access access, int warp) const;

  std::vector<uint8_t> bytes_;
  std::vector<Cell> cells_;
  std::array<Clock, kMaxWarps> clocks_;
  uint32_t block_ = 0;
};

}  // namespace emulator

#include "memory.h"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <set>

namespace emulator {

namespace {
constexpr int kPrintedWarnings = 5;
constexpr uint8_t kUndefinedByte = 0xcd;
}  // namespace

void stop(const std::string& message) {
  fflush(stdout);
  fprintf(stderr, "emulator: %s\n", message.c_str());
  exit(98);
}

// ---- Counters -----------------------------------------------------------------------------------

void Counters::warn(const std::string& message) {
  if (warnings++ < kPrintedWarnings) fprintf(stderr, "emulator warning: %s\n", message.c_str());
}

void Counters::count_global(uint32_t lanes, const uint64_t* addresses, int bytes, bool store) {
  std::vector<uint64_t> sectors;
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const uint64_t last = (addresses[lane] + bytes - 1) / kSectorBytes;
    for (uint64_t sector = addresses[lane] / kSectorBytes; sector <= last; ++sector)
      sectors.push_back(sector);
  }
  std::sort(sectors.begin(), sectors.end());
  const uint64_t distinct = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  (store ? store_requests : load_requests) += 1;
  (store ? store_sectors : load_sectors) += distinct;
}

// A request of 4 bytes a lane takes one pass over the 32 banks unless two lanes need different words
// of one bank; wider requests go in two or four parts.
void Counters::count_shared(uint32_t lanes, const uint64_t* addresses, int bytes) {
  ++shared_requests;
  const int part = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
  for (int first = 0; first < kWarpLanes; first += part) {
    std::set<uint64_t> words;
    for (int lane = first; lane < first + part; ++lane)
      if (lanes >> lane & 1)
        for (int byte = 0; byte < bytes; byte += 4) words.insert((addresses[lane] + byte) / 4);
    int of_bank[kWarpLanes] = {}, most = 0;
    for (uint64_t word : words) most = std::max(most, ++of_bank[word % kWarpLanes]);
    shared_wavefronts += most;
  }
}

void Counters::count_atomic(uint32_t lanes, const uint64_t* addresses) {
  std::map<uint64_t, int> times;
  int most = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (lanes >> lane & 1) most = std::max(most, ++times[addresses[lane]]);
  ++atomic_requests;
  atomic_serial += most;
}

// ---- Global memory ------------------------------------------------------------------------------

void GlobalMemory::allow(const void* start, size_t bytes, bool writable) {
  const uint64_t begin = reinterpret_cast<uint64_t>(start);
  regions_.push_back({begin, begin + bytes, writable});
}

const char* GlobalMemory::fault(uint64_t address, int bytes, bool write) const {
  if (address % bytes) return "misaligned global access";
  for (const Region& region : regions_) {
    if (address < region.begin || address + bytes > region.end) continue;
    return write && !region.writable ? "write to read-only memory" : nullptr;
  }
  return "global address out of bounds";
}

// ---- Shared memory ------------------------------------------------------------------------------

void SharedMemory::start_block(size_t bytes, int warps) {
  ++block_;
  bytes_.assign(bytes, kUndefinedByte);
  if (cells_.size() < bytes / kCellBytes + 1) cells_.resize(bytes / kCellBytes + 1);
  for (int warp = 0; warp < warps; ++warp) {
    clocks_[warp].fill(0);
    clocks_[warp][warp] = 1;
  }
}

SharedMemory::Cell& SharedMemory::cell(uint64_t index) {
  Cell& cell = cells_[index];
  if (cell.block != block_) {
    cell = Cell();
    cell.block = block_;
  }
  return cell;
}

std::string SharedMemory::race(const Cell& cell, Access access, int warp) const {
  const Clock& known = clocks_[warp];
  const char* what = access == Access::kRead ? "read" : "write";
  const bool both_atomic = access == Access::kAtomic && cell.atomic;
  if (cell.writer >= 0 && cell.writer != warp && cell.write_clock > known[cell.writer] &&
      !both_atomic)
    return std::string(what) + " after a write by warp " + std::to_string(cell.writer);
  if (access == Access::kRead || !cell.readers) return "";
  for (int reader = 0; reader < kMaxWarps; ++reader)
    if (cell.readers >> reader & 1 && reader != warp && cell.read_clock[reader] > known[reader])
      return std::string(what) + " after a read by warp " + std::to_string(reader);
  return "";
}

std::string SharedMemory::touch(uint64_t address, int bytes, Access access, int warp) {
  std::string wrong;
  for (uint64_t index = address / kCellBytes; index <= (address + bytes - 1) / kCellBytes; ++index) {
    Cell& at = cell(index);
    const std::string found = race(at, access, warp);
    if (!found.empty()) wrong = "shared race: " + found + " with no barrier between";
    if (access != Access::kWrite && !at.defined)
      wrong = "read of shared memory that this block has not written (or still copies)";
    if (!wrong.empty()) wrong += ", at byte " + std::to_string(index * kCellBytes);
    if (access == Access::kRead) {
      at.readers |= 1u << warp;
      at.read_clock[warp] = clocks_[warp][warp];
    } else {
      at.writer = warp;
      at.write_clock = clocks_[warp][warp];
      at.defined = true;
      at.atomic = access == Access::kAtomic;
    }
  }
  return wrong;
}

std::string SharedMemory::promise(uint64_t address, int bytes, int warp) {
  const std::string wrong = touch(address, bytes, Access::kWrite, warp);
  for (uint64_t index = address / kCellBytes; index <= (address + bytes - 1) / kCellBytes; ++index)
    cell(index).defined = false;
  memset(&bytes_[address], kUndefinedByte, bytes);
  return wrong;
}

void SharedMemory::release(int warp, Clock& barrier) {
  for (int i = 0; i < kMaxWarps; ++i) barrier[i] = std::max(barrier[i], clocks_[warp][i]);
  ++clocks_[warp][warp];  // the barrier does not cover what the warp does from here on
}

void SharedMemory::acquire(int warp, const Clock& barrier) {
  for (int i = 0; i < kMaxWarps; ++i)
    clocks_[warp][i] = std::max(clocks_[warp][i], barrier[i]);
}

}  // namespace emulator

// cp.async of one warp. The data is copied when a lane waits for it, so that a kernel that does not
// wait reads undefined memory.
#pragma once

#include <string>
#include <vector>

#include "memory.h"

namespace emulator {

class AsyncCopies {
 public:
  void start_block() {
    copies_.clear();
    for (int& group : open_group_) group = 0;
  }

  // Returns what is wrong with the access to shared memory, or an empty string.
  std::string add(int lane, uint64_t to, uint64_t from, int bytes, int read_bytes,
                  SharedMemory& shared, int warp) {
    copies_.push_back({to, from, bytes, read_bytes, lane, open_group_[lane]});
    return shared.promise(to, bytes, warp);
  }

  void commit(uint32_t lanes) {
    for (int lane = 0; lane < kWarpLanes; ++lane) open_group_[lane] += lanes >> lane & 1;
  }

  // Copies what belongs to all but the last `allowed` groups of these lanes; -1 is everything.
  std::string wait(uint32_t lanes, int allowed, SharedMemory& shared, int warp) {
    std::string wrong;
    std::vector<Copy> remaining;
    for (const Copy& copy : copies_) {
      const int last = open_group_[copy.lane] - allowed - 1;
      if (!(lanes >> copy.lane & 1) || copy.group > last) {
        remaining.push_back(copy);
        continue;
      }
      wrong += shared.touch(copy.to, copy.bytes, Access::kWrite, warp);
      memset(shared.data() + copy.to, 0, copy.bytes);
      memcpy(shared.data() + copy.to, reinterpret_cast<uint8_t*>(copy.from), copy.read_bytes);
    }
    copies_ = remaining;
    return wrong;
  }

 private:
  struct Copy {
    uint64_t to, from;
    int bytes, read_bytes;  // the rest is zeros
    int lane, group;
  };
  std::vector<Copy> copies_;
  int open_group_[kWarpLanes] = {};
};

}  // namespace emulator

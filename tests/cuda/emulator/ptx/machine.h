// One block of a grid, executed warp by warp. Lanes have their own program counters; of a warp's
// lanes that can run, those with the lowest one run next.
#pragma once

#include <string>
#include <vector>

#include "async_copies.h"
#include "executor.h"
#include "memory.h"
#include "program.h"

namespace emulator::ptx {

enum class State : uint8_t { kReady, kAtBarrier, kAtWarpOperation, kDone };

struct Warp {
  int index = 0;
  std::vector<uint64_t> registers;  // [register][lane]
  int pc[kWarpLanes];
  State state[kWarpLanes];
  AsyncCopies copies;
};

struct Barrier {
  int pc = -1;
  unsigned arrived = 0, expected = 0;
  unsigned true_count = 0;  // of bar.red's predicates
  uint64_t warps = 0;
  SharedMemory::Clock clock{};
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch, const GlobalMemory& memory,
          Counters& counters);
  void run();

  // ---- For handlers ----
  uint64_t get(const Operand& operand, int lane) const;
  void set(const Operand& operand, int lane, uint64_t value);
  void set_register(int reg, int lane, uint64_t value);
  // Calls f(lane) for each lane of the mask.
  template <class F>
  void each(uint32_t lanes, F f) const {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
  [[noreturn]] void fail(const std::string& message, int lane) const;
  void warn(const std::string& message, int lane);
  uint64_t address(const Operand& operand, int lane) const;
  uint8_t* at(Space space, uint64_t address, int bytes, Access access, int lane);
  Space resolve(Space space, uint64_t address) const;

  void branch(uint32_t lanes);
  void leave(uint32_t lanes);
  void barrier(uint32_t lanes);
  bool warp_operation(uint32_t lanes);  // whether all lanes of the mask are here
  void copy_async(uint32_t lanes);
  void wait_async(uint32_t lanes, int allowed_groups);
  void commit_async(uint32_t lanes) { warp_->copies.commit(lanes); }
  Counters& counters() { return counters_; }

 private:
  void start_block(Dim index);
  bool step(Warp& warp);
  uint32_t live_lanes() const;
  uint64_t special(Special special, int lane) const;
  std::string where(int lane) const;
  void join_barrier(Barrier& barrier, uint32_t lanes, bool waits);
  void complete_barrier(Barrier& barrier);
  void complete_after_exit();
  void set_barrier_result(const Barrier& barrier, int lane);
  void check_warp_mask(uint32_t lanes);

  const Kernel& kernel_;
  const Launch& launch_;
  const GlobalMemory& memory_;
  Counters& counters_;
  SharedMemory shared_;
  std::vector<uint8_t> parameters_, local_;
  std::vector<Warp> warps_;
  std::vector<uint64_t> executed_;  // by instruction
  Barrier barriers_[16];
  Dim block_index_;
  uint64_t clock_ = 0;
  unsigned live_threads_ = 0;
  uint32_t seed_;

  // The instruction that is being executed, its warp, and the lanes that are at it.
  Warp* warp_ = nullptr;
  const Instruction* now_ = nullptr;
  uint32_t here_ = 0;
  bool advance_ = true;
};

}  // namespace emulator::ptx

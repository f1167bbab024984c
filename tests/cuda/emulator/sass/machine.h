// One block of a grid, executed warp by warp, as the hardware converges and diverges.
//
// The lanes of a warp form groups that share a program counter. A branch on which lanes disagree
// splits a group; groups merge where the machine code says so (BSYNC, WARPSYNC), and nowhere else.
// A group runs until it waits or ends, then the next one runs. So an instruction that several groups
// execute counts once for each, like its issue slots on a GPU.
#pragma once

#include <string>
#include <vector>

#include "async_copies.h"
#include "executor.h"
#include "memory.h"
#include "program.h"

namespace emulator::sass {

constexpr int kNumRegisters = 256, kNumUniforms = 64, kNumPredicates = 8, kNumConvergence = 16;
// The first bytes of a block's shared memory belong to the system on sm_90.
constexpr int kSystemShared = 1024;

enum class State : uint8_t { kReady, kAtConvergence, kAtWarpSync, kAtBarrier, kDone };

struct Warp {
  int index = 0, running = 0, groups = 1;
  uint32_t registers[kNumRegisters][kWarpLanes];
  uint32_t uniforms[kNumUniforms];
  bool predicates[kNumPredicates][kWarpLanes];
  bool uniform_predicates[kNumPredicates];
  // The convergence barriers B0 to B15, and the lanes that take part, as each lane knows them.
  uint32_t convergence[kNumConvergence][kWarpLanes];
  uint32_t sync_mask[kWarpLanes];  // of the WARPSYNC at which a lane waits
  int pc[kWarpLanes], group[kWarpLanes], saved_group[kWarpLanes], waits_for[kWarpLanes];
  State state[kWarpLanes];
  uint32_t barrier_result;  // of the last BAR.RED
  AsyncCopies copies;
};

class Machine {
 public:
  Machine(const Kernel& kernel, const Launch& launch, const GlobalMemory& memory,
          Counters& counters);
  void run();

  // ---- For handlers ----
  // Calls f(lane) for each lane of the mask.
  template <class F>
  void each(uint32_t lanes, F f) const {
    for (uint32_t rest = lanes; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
  // An operand's 32 bits; ~ is applied, - and | | are left to the caller.
  uint32_t bits(const Operand& operand, int lane) const;
  // Of a register, uniform register or constant: with the next one as the upper half. ~ is applied.
  uint64_t pair(const Operand& operand, int lane) const;
  uint32_t integer(const Operand& operand, int lane) const;  // with -
  double single(const Operand& operand, int lane, bool flush) const;
  uint32_t single_bits(const Operand& operand, int lane, bool flush) const;
  bool predicate(const Operand& operand, int lane) const;
  void set(const Operand& operand, int lane, uint32_t value);
  void set_pair(const Operand& operand, int lane, uint64_t value);
  void set_predicate(const Operand& operand, int lane, bool value);
  uint64_t special(const std::string& name, int lane) const;

  uint64_t address(const Operand& operand, int lane) const;
  uint8_t* global(uint64_t address, int bytes, bool write, int lane) const;
  uint8_t* shared(uint64_t address, int bytes, Access access, int lane);
  uint8_t* local(uint64_t address, int bytes, int lane);
  const uint8_t* constant(int bank, uint64_t offset, int bytes) const;
  void copy_async(int lane, uint64_t to, uint64_t from, int bytes, int read_bytes);
  void wait_async(uint32_t lanes, int allowed);

  void jump(uint32_t lanes, int target);
  void leave(uint32_t lanes);
  void converge(uint32_t lanes, int barrier);
  void drop_out(uint32_t lanes, int barrier);
  void sync_warp(uint32_t lanes, uint32_t mask, bool collective);
  void end_collective(uint32_t lanes);
  // reduction: 0, or 'p', 'a', 'o' to count, and, or the predicate for B2R.
  void barrier(uint32_t lanes, unsigned id, unsigned threads, bool waits, char reduction = 0,
               uint32_t predicate = 0);

  [[noreturn]] void fail(const std::string& message, int lane) const;
  void warn(const std::string& message, int lane);
  Warp& warp() { return *warp_; }
  uint32_t active() const { return active_; }
  uint32_t live_lanes() const;
  Counters& counters() { return counters_; }
  const Kernel& kernel() const { return kernel_; }

 private:
  struct Barrier {
    unsigned arrived = 0, expected = 0, true_count = 0;
    char reduction = 0;
    uint32_t waiting[kMaxWarps] = {};  // lanes by warp
    SharedMemory::Clock clock{};
  };

  void fill_constants();
  void start_block(Dim index);
  bool step(Warp& warp);
  void release(uint32_t lanes);
  void check_convergence();
  void check_warp_sync();
  void complete(Barrier& barrier);
  std::string where(int lane) const;

  const Kernel& kernel_;
  const Launch& launch_;
  const GlobalMemory& memory_;
  Counters& counters_;
  SharedMemory shared_;
  std::vector<uint8_t> constants_, local_;
  std::vector<Warp> warps_;
  std::vector<uint64_t> executed_;  // by instruction
  Barrier barriers_[16];
  Dim block_index_;
  uint64_t clock_ = 0;
  unsigned live_threads_ = 0;
  uint32_t seed_;

  // The instruction that is being executed, its warp, and the group of lanes.
  Warp* warp_ = nullptr;
  const Instruction* now_ = nullptr;
  uint32_t active_ = 0;
};

}  // namespace emulator::sass

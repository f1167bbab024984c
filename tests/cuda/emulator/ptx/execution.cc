// How lanes branch, meet and wait, and how a grid runs.
#include <algorithm>

#include "machine.h"
#include "schedule.h"
#include "text.h"

namespace emulator::ptx {

namespace {
std::map<std::string, Kernel> kernels;
}

// ---- Control ------------------------------------------------------------------------------------

uint32_t Machine::live_lanes() const {
  uint32_t live = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (warp_->state[lane] != State::kDone) live |= 1u << lane;
  return live;
}

void Machine::branch(uint32_t lanes) {
  advance_ = false;
  each(here_, [&](int lane) {
    warp_->pc[lane] = lanes >> lane & 1 ? now_->target : warp_->pc[lane] + 1;
  });
  if (lanes && lanes != here_) ++counters_.divergent_branches;
}

void Machine::leave(uint32_t lanes) {
  each(lanes, [&](int lane) {
    warp_->state[lane] = State::kDone;
    --live_threads_;
  });
  complete_after_exit();
}

// Threads that left count as arrived at a barrier of the whole block.
void Machine::complete_after_exit() {
  for (Barrier& barrier : barriers_) {
    if (barrier.expected || !barrier.arrived || barrier.arrived != live_threads_) continue;
    warn("some threads left the kernel before a barrier", 0);
    complete_barrier(barrier);
  }
}

void Machine::barrier(uint32_t lanes) {
  const auto& operands = now_->operands;
  const bool reduces = now_->has("red");
  const size_t first = reduces ? 1 : 0, count = operands.size() - reduces;
  if (!lanes) return;
  const int any = __builtin_ctz(lanes);
  const uint64_t id = count > first ? get(operands[first], any) : 0;
  if (id >= 16) fail("a barrier's number is below 16", any);
  Barrier& barrier = barriers_[id];
  const unsigned expected = count > first + 1 ? get(operands[first + 1], any) : 0;
  if (expected % kWarpLanes) fail("a barrier's thread count is a multiple of the warp's", any);
  if (barrier.arrived && barrier.expected != expected) fail("barrier with another count", any);
  barrier.expected = expected;
  if (here_ != live_lanes() || lanes != here_) warn("barrier in divergent code", any);
  if (reduces)
    each(lanes, [&](int lane) { barrier.true_count += get(operands.back(), lane) & 1; });
  join_barrier(barrier, lanes, !now_->has("arrive"));
}

void Machine::join_barrier(Barrier& barrier, uint32_t lanes, bool waits) {
  shared_.release(warp_->index, barrier.clock);
  if (waits) {
    advance_ = false;
    barrier.warps |= 1ull << warp_->index;
    const int pc = now_ - kernel_.code.data();
    if (barrier.pc >= 0 && barrier.pc != pc && !barrier.expected)
      fail("barrier reached at different instructions", __builtin_ctz(lanes));
    barrier.pc = pc;
    each(lanes, [&](int lane) { warp_->state[lane] = State::kAtBarrier; });
    each(here_ & ~lanes, [&](int lane) { ++warp_->pc[lane]; });
  }
  barrier.arrived += __builtin_popcount(lanes);
  if (barrier.arrived == (barrier.expected ? barrier.expected : live_threads_))
    complete_barrier(barrier);
}

void Machine::set_barrier_result(const Barrier& barrier, int lane) {
  const bool all = barrier.true_count == barrier.arrived;
  const uint64_t result = now_->has("popc")  ? barrier.true_count
                          : now_->has("and") ? all
                                             : barrier.true_count > 0;
  set(now_->operands[0], lane, result);
}

void Machine::complete_barrier(Barrier& barrier) {
  const size_t number = &barrier - barriers_;
  ++counters_.barriers;
  Warp* const caller = warp_;
  const Instruction* const instruction = now_;
  for (Warp& warp : warps_) {
    if (!(barrier.warps >> warp.index & 1)) continue;
    shared_.acquire(warp.index, barrier.clock);
    warp_ = &warp;
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      if (warp.state[lane] != State::kAtBarrier) continue;
      now_ = &kernel_.code[warp.pc[lane]];
      const size_t first = now_->has("red") ? 1 : 0;
      const bool named = now_->operands.size() > first;
      if ((named ? get(now_->operands[first], lane) : 0) != number) continue;
      if (first) set_barrier_result(barrier, lane);
      warp.state[lane] = State::kReady;
      ++warp.pc[lane];
    }
  }
  warp_ = caller;
  now_ = instruction;
  barrier = Barrier();
}

void Machine::check_warp_mask(uint32_t lanes) {
  const uint32_t live = live_lanes();
  each(lanes, [&](int lane) {
    const uint32_t mask = get(now_->operands.back(), lane);
    if (!(mask >> lane & 1)) fail("the calling lane is not in its own mask", lane);
    if (mask & ~live) warn("the mask names lanes that have left the kernel", lane);
  });
}

// An operation of several lanes happens once all lanes of the mask are at it.
bool Machine::warp_operation(uint32_t lanes) {
  if (!lanes) return false;
  check_warp_mask(lanes);
  const int any = __builtin_ctz(lanes);
  const uint32_t mask = get(now_->operands.back(), any) & live_lanes();
  if (!(mask & ~here_)) return true;
  bool others_run = false;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    others_run |= warp_->state[lane] == State::kReady && !(here_ >> lane & 1);
  if (!others_run) fail("lanes of the mask never arrive (divergent)", any);
  each(lanes, [&](int lane) { warp_->state[lane] = State::kAtWarpOperation; });
  advance_ = false;
  return false;
}

bool Machine::step(Warp& warp) {
  warp_ = &warp;
  int pc = 1 << 30;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (warp.state[lane] == State::kReady) pc = std::min(pc, warp.pc[lane]);
  if (pc == 1 << 30) return false;
  here_ = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (warp.state[lane] == State::kReady && warp.pc[lane] == pc) here_ |= 1u << lane;
  now_ = &kernel_.code[pc];
  uint32_t lanes = here_;
  if (now_->predicate >= 0)
    each(here_, [&](int lane) {
      const bool value = warp.registers[now_->predicate * kWarpLanes + lane];
      if (value == now_->predicate_negated) lanes &= ~(1u << lane);
    });
  ++counters_.warp_instructions;
  counters_.thread_instructions += __builtin_popcount(lanes);
  ++executed_[pc];
  ++clock_;
  advance_ = true;
  now_->handler(*this, *now_, lanes);
  if (advance_)
    each(here_, [&](int lane) {
      if (warp.state[lane] == State::kReady) warp.pc[lane] = pc + 1;
    });
  // Lanes that wait for others at a warp operation look again once something has moved.
  if (warp.state[__builtin_ctz(here_)] != State::kAtWarpOperation)
    for (State& state : warp.state)
      if (state == State::kAtWarpOperation) state = State::kReady;
  return true;
}

void Machine::start_block(Dim index) {
  block_index_ = index;
  live_threads_ = launch_.block.count();
  shared_.start_block(kernel_.shared_bytes + launch_.shared_bytes, warps_.size());
  local_.assign(live_threads_ * static_cast<size_t>(kernel_.local_bytes), 0xcd);
  for (Barrier& barrier : barriers_) barrier = Barrier();
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    warp.index = w;
    warp.registers.assign(kernel_.register_bits.size() * kWarpLanes, 0);
    warp.copies.start_block();
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      warp.pc[lane] = 0;
      warp.state[lane] = w * kWarpLanes + lane < live_threads_ ? State::kReady : State::kDone;
    }
  }
}

void Machine::run() {
  for_each_block(launch_.grid, [&](Dim index) {
    start_block(index);
    run_warps(
        warps_, seed_, live_threads_, [&](Warp& warp) { return step(warp); },
        [&] { fail("deadlock", 0); });
  });
  count_opcodes(kernel_.code, executed_, counters_);
}

}  // namespace emulator::ptx

namespace emulator {

void load_program(const std::string& file) {
  ptx::parse(read_text(file), ptx::kernels);
}

void run_kernel(const Launch& launch, const GlobalMemory& memory, Counters& counters) {
  const auto kernel = ptx::kernels.find(launch.kernel);
  if (kernel == ptx::kernels.end()) stop("there is no kernel " + launch.kernel);
  ptx::Machine(kernel->second, launch, memory, counters).run();
}

}  // namespace emulator

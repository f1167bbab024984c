// How lanes diverge, meet and wait, and how a grid runs.
#include <algorithm>

#include "machine.h"
#include "schedule.h"
#include "text.h"

namespace emulator::sass {

namespace {
std::map<std::string, Kernel> kernels;
}

// ---- Divergence ---------------------------------------------------------------------------------

uint32_t Machine::live_lanes() const {
  uint32_t live = 0;
  for (int lane = 0; lane < kWarpLanes; ++lane)
    if (warp_->state[lane] != State::kDone) live |= 1u << lane;
  return live;
}

// Those lanes of the group go to the target; the others, if any, have become a group of their own.
void Machine::jump(uint32_t lanes, int target) {
  each(lanes, [&](int lane) { warp_->pc[lane] = target; });
  if (!lanes || lanes == active_) return;
  ++counters_.divergent_branches;
  const int group = warp_->groups++;
  each(active_ & ~lanes, [&](int lane) { warp_->group[lane] = group; });
}

// Waiting lanes go on together, after the instruction at which they wait.
void Machine::release(uint32_t lanes) {
  const int group = warp_->groups++;
  each(lanes, [&](int lane) {
    warp_->state[lane] = State::kReady;
    warp_->group[lane] = group;
  });
}

void Machine::converge(uint32_t lanes, int barrier) {
  each(lanes, [&](int lane) {
    warp_->state[lane] = State::kAtConvergence;
    warp_->waits_for[lane] = barrier;
  });
  check_convergence();
}

// Lets go the lanes whose partners have all arrived, left the kernel or dropped out.
void Machine::check_convergence() {
  const uint32_t live = live_lanes();
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (warp_->state[lane] != State::kAtConvergence) continue;
    const int barrier = warp_->waits_for[lane];
    const uint32_t partners = warp_->convergence[barrier][lane] & live;
    bool complete = true;
    each(partners, [&](int other) {
      complete &= warp_->state[other] == State::kAtConvergence &&
                  warp_->waits_for[other] == barrier && warp_->pc[other] == warp_->pc[lane];
    });
    if (complete) release(partners | 1u << lane);
  }
}

void Machine::drop_out(uint32_t lanes, int barrier) {
  auto& masks = warp_->convergence[barrier];
  uint32_t partners = 0;
  each(lanes, [&](int lane) { partners |= masks[lane]; });
  each(partners, [&](int lane) { masks[lane] &= ~lanes; });
  check_convergence();
}

// A collective operation unites lanes of several groups, which part again after it.
void Machine::sync_warp(uint32_t lanes, uint32_t mask, bool collective) {
  each(lanes, [&](int lane) {
    if (!(mask >> lane & 1)) fail("the calling lane is not in its own mask", lane);
    warp_->state[lane] = State::kAtWarpSync;
    warp_->sync_mask[lane] = mask;
    if (collective) warp_->saved_group[lane] = warp_->group[lane];
  });
  check_warp_sync();
}

void Machine::check_warp_sync() {
  const uint32_t live = live_lanes();
  for (int lane = 0; lane < kWarpLanes; ++lane) {
    if (warp_->state[lane] != State::kAtWarpSync) continue;
    const uint32_t partners = warp_->sync_mask[lane] & live;
    bool complete = true;
    each(partners, [&](int other) {
      complete &= warp_->state[other] == State::kAtWarpSync && warp_->pc[other] == warp_->pc[lane];
    });
    if (complete) release(partners);
  }
}

void Machine::end_collective(uint32_t lanes) {
  each(lanes, [&](int lane) { warp_->group[lane] = warp_->saved_group[lane]; });
}

void Machine::leave(uint32_t lanes) {
  each(lanes, [&](int lane) {
    warp_->state[lane] = State::kDone;
    --live_threads_;
  });
  check_convergence();
  check_warp_sync();
  for (Barrier& barrier : barriers_) {
    if (barrier.expected || !barrier.arrived || barrier.arrived != live_threads_) continue;
    warn("some threads left the kernel before a barrier", 0);
    complete(barrier);
  }
}

// ---- Barriers of the block ----------------------------------------------------------------------

void Machine::barrier(uint32_t lanes, unsigned id, unsigned threads, bool waits, char reduction,
                      uint32_t predicate) {
  Barrier& barrier = barriers_[id];
  if (barrier.arrived && barrier.expected != threads) fail("barrier with another count", 0);
  barrier.expected = threads;
  barrier.reduction = reduction;
  barrier.true_count += __builtin_popcount(predicate);
  if (lanes != live_lanes()) warn("barrier in divergent code", __builtin_ctz(lanes));
  shared_.release(warp_->index, barrier.clock);
  if (waits) {
    barrier.waiting[warp_->index] |= lanes;
    each(lanes, [&](int lane) { warp_->state[lane] = State::kAtBarrier; });
  }
  barrier.arrived += __builtin_popcount(lanes);
  if (barrier.arrived == (threads ? threads : live_threads_)) complete(barrier);
}

void Machine::complete(Barrier& barrier) {
  ++counters_.barriers;
  const uint32_t result = barrier.reduction == 'p'   ? barrier.true_count
                          : barrier.reduction == 'a' ? barrier.true_count == barrier.arrived
                                                     : barrier.true_count > 0;
  for (Warp& warp : warps_) {
    if (!barrier.waiting[warp.index]) continue;
    shared_.acquire(warp.index, barrier.clock);
    if (barrier.reduction) warp.barrier_result = result;
    each(barrier.waiting[warp.index], [&](int lane) { warp.state[lane] = State::kReady; });
  }
  barrier = Barrier();
}

// ---- Execution ----------------------------------------------------------------------------------

bool Machine::step(Warp& warp) {
  warp_ = &warp;
  const auto group_lanes = [&](int group) {
    uint32_t lanes = 0;
    for (int lane = 0; lane < kWarpLanes; ++lane)
      if (warp.state[lane] == State::kReady && warp.group[lane] == group) lanes |= 1u << lane;
    return lanes;
  };
  active_ = group_lanes(warp.running);
  if (!active_) {
    const State* ready = std::find(warp.state, warp.state + kWarpLanes, State::kReady);
    if (ready == warp.state + kWarpLanes) return false;
    warp.running = warp.group[ready - warp.state];
    active_ = group_lanes(warp.running);
  }
  const int pc = warp.pc[__builtin_ctz(active_)];
  now_ = &kernel_.code[pc];
  uint32_t lanes = active_;
  if (now_->guarded)
    each(active_, [&](int lane) {
      if (!predicate(now_->guard, lane)) lanes &= ~(1u << lane);
    });
  ++counters_.warp_instructions;
  counters_.thread_instructions += __builtin_popcount(lanes);
  ++executed_[pc];
  ++clock_;
  each(active_, [&](int lane) { warp.pc[lane] = pc + 1; });
  if (now_->uniform && lanes) lanes &= -lanes;  // once for the warp
  if (lanes) now_->handler(*this, *now_, lanes);
  return true;
}

void Machine::start_block(Dim index) {
  block_index_ = index;
  live_threads_ = launch_.block.count();
  // ptxas reports the system's share with the kernel's own.
  shared_.start_block(std::max(kernel_.shared_bytes, kSystemShared) + launch_.shared_bytes,
                      warps_.size());
  for (Barrier& barrier : barriers_) barrier = Barrier();
  for (size_t w = 0; w < warps_.size(); ++w) {
    Warp& warp = warps_[w];
    memset(static_cast<void*>(warp.registers), 0xcd, sizeof warp.registers);
    memset(warp.uniforms, 0xcd, sizeof warp.uniforms);
    memset(warp.predicates, 0, sizeof warp.predicates);
    memset(warp.uniform_predicates, 0, sizeof warp.uniform_predicates);
    memset(warp.convergence, 0, sizeof warp.convergence);
    warp.index = static_cast<int>(w);
    warp.running = 0;
    warp.groups = 1;
    warp.copies.start_block();
    for (int lane = 0; lane < kWarpLanes; ++lane) {
      warp.pc[lane] = warp.group[lane] = warp.saved_group[lane] = 0;
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

}  // namespace emulator::sass

namespace emulator {

void load_program(const std::string& file) {
  sass::parse(read_text(file), sass::kernels);
}

void run_kernel(const Launch& launch, const GlobalMemory& memory, Counters& counters) {
  const auto kernel = sass::kernels.find(launch.kernel);
  if (kernel == sass::kernels.end()) stop("there is no kernel " + launch.kernel);
  sass::Machine(kernel->second, launch, memory, counters).run();
}

}  // namespace emulator

#include "machine.h"

#include <algorithm>
#include <fstream>
#include <sstream>

namespace emulator::sass {

namespace {

// Constant bank 0: the launch's sizes come first, then what the driver keeps there, then parameters.
constexpr int kBlockSizeAt = 0, kGridSizeAt = 12, kStackAt = 0x28;
// The first bytes of a block's shared memory belong to the system on sm_90.
constexpr int kSystemShared = 1024;
constexpr int kStackBytes = 1 << 12;

std::map<std::string, Kernel> kernels;

}  // namespace

Machine::Machine(const Kernel& kernel, const Launch& launch, const GlobalMemory& memory,
                 Counters& counters)
    : kernel_(kernel), launch_(launch), memory_(memory), counters_(counters), seed_(launch.seed) {
  fill_constants();
  warps_.resize((launch.block.count() + kWarpLanes - 1) / kWarpLanes);
  executed_.assign(kernel.code.size(), 0);
}

void Machine::fill_constants() {
  constants_.assign(4096, 0);
  const auto put = [&](int offset, const void* data, int bytes) {
    if (constants_.size() < static_cast<size_t>(offset + bytes)) constants_.resize(offset + bytes);
    memcpy(&constants_[offset], data, bytes);
  };
  const uint32_t stack = kStackBytes;
  put(kBlockSizeAt, &launch_.block, 12);
  put(kGridSizeAt, &launch_.grid, 12);
  put(kStackAt, &stack, 4);
  for (size_t i = 0; i < kernel_.parameters.size(); ++i)
    put(kernel_.parameters[i].first, launch_.arguments[i], kernel_.parameters[i].second);
}

// ---- Operands -----------------------------------------------------------------------------------

uint32_t Machine::bits(const Operand& o, int lane) const {
  uint32_t value = 0;
  switch (o.place) {
    case Place::kRegister: value = o.index == kZeroRegister ? 0 : warp_->registers[o.index][lane]; break;
    case Place::kUniform: value = o.index == kZeroUniform ? 0 : warp_->uniforms[o.index]; break;
    case Place::kInteger: value = static_cast<uint32_t>(o.value); break;
    case Place::kReal: value = static_cast<uint32_t>(encode(o.real[0], Float::kSingle)); break;
    case Place::kConstant: memcpy(&value, constant(o.index, address(o, lane), 4), 4); break;
    default: fail("operand cannot be read", lane);
  }
  return o.inverted ? ~value : value;
}

uint64_t Machine::pair(const Operand& o, int lane) const {
  uint64_t value = bits(o, lane);
  if (o.place == Place::kInteger) return sign_extend(o.value, 64);
  const bool zero = o.index == (o.place == Place::kRegister ? kZeroRegister : kZeroUniform);
  if (o.place == Place::kConstant) {
    memcpy(&value, constant(o.index, address(o, lane), 8), 8);
    return o.inverted ? ~value : value;
  }
  Operand upper = o;
  if (!zero) ++upper.index;
  return value | static_cast<uint64_t>(bits(upper, lane)) << 32;
}

uint32_t Machine::integer(const Operand& o, int lane) const {
  const uint32_t value = bits(o, lane);
  const uint32_t size = o.absolute && value >> 31 ? -value : value;
  return o.minus ? -size : size;
}

uint32_t Machine::single_bits(const Operand& o, int lane, bool flush) const {
  uint32_t value = bits(o, lane);
  if (flush) value = static_cast<uint32_t>(flush_subnormal(value, Float::kSingle));
  if (o.absolute) value &= 0x7fffffffu;
  return o.minus ? value ^ 0x80000000u : value;
}

double Machine::single(const Operand& o, int lane, bool flush) const {
  return decode(single_bits(o, lane, flush), Float::kSingle);
}

bool Machine::predicate(const Operand& o, int lane) const {
  bool value = true;
  if (o.place == Place::kPredicate) {
    value = o.index == kTrue || warp_->predicates[o.index][lane];
  } else if (o.place == Place::kUniformPredicate) {
    value = o.index == kTrue || warp_->uniform_predicates[o.index];
  } else {
    fail("operand is not a predicate", lane);
  }
  return value != o.inverted;
}

void Machine::set(const Operand& o, int lane, uint32_t value) {
  if (o.place == Place::kRegister) {
    if (o.index != kZeroRegister) warp_->registers[o.index][lane] = value;
  } else if (o.place == Place::kUniform) {
    if (o.index != kZeroUniform) warp_->uniforms[o.index] = value;
  } else {
    fail("operand cannot be written", lane);
  }
}

void Machine::set_pair(const Operand& o, int lane, uint64_t value) {
  set(o, lane, static_cast<uint32_t>(value));
  const bool zero = o.index == (o.place == Place::kRegister ? kZeroRegister : kZeroUniform);
  Operand upper = o;
  if (!zero) ++upper.index;
  set(upper, lane, static_cast<uint32_t>(value >> 32));
}

void Machine::set_predicate(const Operand& o, int lane, bool value) {
  if (o.index == kTrue) return;
  if (o.place == Place::kPredicate) {
    warp_->predicates[o.index][lane] = value;
  } else if (o.place == Place::kUniformPredicate) {
    warp_->uniform_predicates[o.index] = value;
  } else {
    fail("operand is not a predicate", lane);
  }
}

uint64_t Machine::special(const std::string& name, int lane) const {
  const unsigned thread = warp_->index * kWarpLanes + lane;
  const Dim& block = launch_.block;
  if (name == "SRZ" || name == "SR_CgaCtaId" || name == "SR_SMID" || name == "SR_VIRTUALSMID")
    return 0;
  if (name == "SR_TID.X") return thread % block.x;
  if (name == "SR_TID.Y") return thread / block.x % block.y;
  if (name == "SR_TID.Z") return thread / block.x / block.y;
  if (name == "SR_CTAID.X") return block_index_.x;
  if (name == "SR_CTAID.Y") return block_index_.y;
  if (name == "SR_CTAID.Z") return block_index_.z;
  if (name == "SR_LANEID") return lane;
  if (name == "SR_EQMASK") return 1u << lane;
  if (name == "SR_LTMASK") return (1u << lane) - 1;
  if (name == "SR_LEMASK") return (2u << lane) - 1;
  if (name == "SR_GTMASK") return ~((2u << lane) - 1);
  if (name == "SR_GEMASK") return ~((1u << lane) - 1);
  if (name == "SR_CLOCKLO" || name == "SR_CLOCKHI" || name == "SR_GLOBALTIMERLO") return clock_;
  fail("special register is not supported", lane);
}

// ---- Messages -----------------------------------------------------------------------------------

std::string Machine::where(int lane) const {
  std::ostringstream text;
  text << kernel_.name << ": block " << block_index_.x << " warp " << warp_->index << " lane "
       << lane << ": ";
  return text.str();
}

void Machine::fail(const std::string& message, int lane) const {
  std::ostringstream text;
  text << where(lane) << message << "\n    /*" << std::hex << now_->address << "*/ " << now_->text;
  stop(text.str());
}

void Machine::warn(const std::string& message, int lane) {
  std::ostringstream text;
  text << where(lane) << message << "\n    /*" << std::hex << now_->address << "*/ " << now_->text;
  counters_.warn(text.str());
}

// ---- Memory -------------------------------------------------------------------------------------

uint64_t Machine::address(const Operand& o, int lane) const {
  const Memory& m = o.memory;
  uint64_t address = 0;
  if (m.reg >= 0) {
    Operand reg;
    reg.place = Place::kRegister;
    reg.index = m.reg;
    address = m.wide ? pair(reg, lane) : static_cast<uint64_t>(bits(reg, lane)) * m.scale;
  }
  if (m.uniform >= 0) {
    Operand reg;
    reg.place = Place::kUniform;
    reg.index = m.uniform;
    address += m.wide_uniform ? pair(reg, lane) : bits(reg, lane);
  }
  address += m.offset;
  return m.wide || m.wide_uniform ? address : address & 0xffffffffu;
}

uint8_t* Machine::global(uint64_t address, int bytes, bool write, int lane) const {
  const char* fault = memory_.fault(address, bytes, write);
  if (fault) fail(fault, lane);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* Machine::shared(uint64_t address, int bytes, Access access, int lane) {
  if (address % bytes) fail("misaligned shared access", lane);
  if (address < kSystemShared || address + bytes > shared_.size())
    fail("shared address out of range", lane);
  const std::string wrong = shared_.touch(address, bytes, access, warp_->index);
  if (!wrong.empty()) warn(wrong, lane);
  return shared_.data() + address;
}

uint8_t* Machine::local(uint64_t address, int bytes, int lane) {
  if (address % bytes) fail("misaligned local access", lane);
  if (address + bytes > kStackBytes) fail("local address out of range", lane);
  if (local_.empty()) local_.assign(warps_.size() * kWarpLanes * kStackBytes, 0xcd);
  const size_t thread = warp_->index * kWarpLanes + lane;
  return &local_[thread * kStackBytes + address];
}

const uint8_t* Machine::constant(int bank, uint64_t offset, int bytes) const {
  if (bank != 0) fail("only constant bank 0 is supported", 0);
  if (offset + bytes > constants_.size()) fail("constant address out of range", 0);
  return &constants_[offset];
}

void Machine::copy_async(int lane, uint64_t to, uint64_t from, int bytes, int read_bytes) {
  if (read_bytes) global(from, bytes, false, lane);
  if (to % bytes || to < kSystemShared || to + bytes > shared_.size())
    fail("shared address misaligned or out of range", lane);
  const std::string wrong =
      warp_->copies.add(lane, to, from, bytes, read_bytes, shared_, warp_->index);
  if (!wrong.empty()) warn(wrong, lane);
}

void Machine::wait_async(uint32_t lanes, int allowed) {
  const std::string wrong = warp_->copies.wait(lanes, allowed, shared_, warp_->index);
  if (!wrong.empty()) warn(wrong, 0);
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

// Each warp runs as far as it goes, in a random order of warps.
void Machine::run_block() {
  std::vector<Warp*> order;
  for (Warp& warp : warps_) order.push_back(&warp);
  for (size_t i = order.size(); i-- > 1;) {
    seed_ = seed_ * 1664525u + 1013904223u;
    std::swap(order[i], order[(seed_ >> 8) % (i + 1)]);
  }
  while (live_threads_) {
    bool moved = false;
    for (Warp* warp : order)
      while (step(*warp)) moved = true;
    if (!moved && live_threads_) fail("deadlock", 0);
  }
}

void Machine::run() {
  Dim index;
  for (index.z = 0; index.z < launch_.grid.z; ++index.z)
    for (index.y = 0; index.y < launch_.grid.y; ++index.y)
      for (index.x = 0; index.x < launch_.grid.x; ++index.x) {
        start_block(index);
        run_block();
      }
  for (size_t pc = 0; pc < executed_.size(); ++pc)
    if (executed_[pc]) counters_.opcodes[kernel_.code[pc].name] += executed_[pc];
}

}  // namespace emulator::sass

namespace emulator {

void load_program(const std::string& file) {
  std::ifstream stream(file);
  if (!stream) stop("cannot open " + file);
  std::stringstream text;
  text << stream.rdbuf();
  sass::parse(text.str(), sass::kernels);
}

void run_kernel(const Launch& launch, const GlobalMemory& memory, Counters& counters) {
  const auto kernel = sass::kernels.find(launch.kernel);
  if (kernel == sass::kernels.end()) stop("there is no kernel " + launch.kernel);
  sass::Machine(kernel->second, launch, memory, counters).run();
}

}  // namespace emulator

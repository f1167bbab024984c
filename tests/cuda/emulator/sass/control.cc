// Control, barriers and operations of a whole warp.
#include <stdlib.h>

#include "handlers.h"

namespace emulator::sass {

namespace {

// ---- Control ------------------------------------------------------------------------------------

int number_of(const Operand& barrier) { return atoi(barrier.name.c_str() + 1); }

// BRA P0, target branches where the predicate holds, too. BRA.DIV branches if lanes are missing.
void branch(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("DIV")) {
    const uint32_t mask = m.bits(i.operands[0], __builtin_ctz(lanes)) & m.live_lanes();
    if (mask != m.active()) m.jump(lanes, i.target);
    return;
  }
  if (i.operands.size() > 1) {
    uint32_t taken = 0;
    m.each(lanes, [&](int lane) {
      if (m.predicate(i.operands[0], lane)) taken |= 1u << lane;
    });
    lanes = taken;
  }
  m.jump(lanes, i.target);
}

void call(Machine& m, const Instruction& i, uint32_t lanes) { m.jump(lanes, i.target); }

void return_from(Machine& m, const Instruction& i, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  const uint64_t address = m.pair(i.operands[0], first);
  m.each(lanes, [&](int lane) {
    if (m.pair(i.operands[0], lane) != address) m.fail("lanes return to different places", lane);
  });
  const auto target = m.kernel().index_of.find(address);
  if (target == m.kernel().index_of.end()) m.fail("return to an unknown address", first);
  m.jump(lanes, target->second);
}

void leave(Machine& m, const Instruction&, uint32_t lanes) { m.leave(lanes); }
void nothing(Machine&, const Instruction&, uint32_t) {}

void trap(Machine& m, const Instruction&, uint32_t lanes) { m.fail("trap", __builtin_ctz(lanes)); }

void start_convergence(Machine& m, const Instruction& i, uint32_t lanes) {
  const int barrier = number_of(i.operands[0]);
  m.each(lanes, [&](int lane) { m.warp().convergence[barrier][lane] = lanes; });
}

void converge(Machine& m, const Instruction& i, uint32_t lanes) {
  m.converge(lanes, number_of(i.operands[0]));
}

void drop_out(Machine& m, const Instruction& i, uint32_t lanes) {
  m.drop_out(lanes, number_of(i.operands.back()));
}

// BMOV saves a convergence barrier in a register, or restores it.
void move_convergence(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool saves = i.operands[0].place == Place::kRegister;
  const int barrier = number_of(i.operands[saves ? 1 : 0]);
  m.each(lanes, [&](int lane) {
    uint32_t& mask = m.warp().convergence[barrier][lane];
    if (!saves) {
      mask = m.bits(i.operands[1], lane);
      return;
    }
    m.set(i.operands[0], lane, mask);
    if (i.has("CLEAR")) mask = 0;
  });
}

void sync_warp(Machine& m, const Instruction& i, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  const uint32_t mask = i.has("ALL") ? ~0u : m.bits(i.operands[0], first);
  m.sync_warp(lanes, mask, i.has("COLLECTIVE"));
}

void end_collective(Machine& m, const Instruction&, uint32_t lanes) { m.end_collective(lanes); }

// BAR.SYNC number, threads; BAR.ARV number, threads; BAR.RED.POPC number, threads, predicate
void barrier(Machine& m, const Instruction& i, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  const uint32_t id = m.bits(i.operands[0], first);
  const bool counted = i.operands.size() > 1 && !i.operands[1].is_predicate();
  const uint32_t threads = counted ? m.bits(i.operands[1], first) : 0;
  if (id >= 16) m.fail("a barrier's number is below 16", first);
  if (!i.has("RED")) return m.barrier(lanes, id, threads, !i.has("ARV"));
  uint32_t predicate = 0;
  m.each(lanes, [&](int lane) {
    if (m.predicate(i.operands.back(), lane)) predicate |= 1u << lane;
  });
  m.barrier(lanes, id, threads, true, i.has("POPC") ? 'p' : i.has("AND") ? 'a' : 'o', predicate);
}

// B2R.RESULT R, P: what the last BAR.RED found.
void barrier_to_register(Machine& m, const Instruction& i, uint32_t lanes) {
  const uint32_t result = m.warp().barrier_result;
  m.each(lanes, [&](int lane) {
    m.set(i.operands[0], lane, result);
    if (i.operands.size() > 1) m.set_predicate(i.operands[1], lane, result != 0);
  });
}

// ---- Operations of a warp -----------------------------------------------------------------------

void shuffle(Machine& m, const Instruction& i, uint32_t lanes) {
  static const std::map<std::string, Shuffle> modes = {{"IDX", Shuffle::kIndex},
                                                       {"UP", Shuffle::kUp},
                                                       {"DOWN", Shuffle::kDown},
                                                       {"BFLY", Shuffle::kButterfly}};
  const Shuffle mode = modes.at(i.modifiers[0]);
  const auto& o = i.operands;
  uint32_t values[kWarpLanes], results[kWarpLanes];
  bool inside[kWarpLanes];
  m.each(lanes, [&](int lane) { values[lane] = m.bits(o[2], lane); });
  m.each(lanes, [&](int lane) {
    const int source =
        shuffle_source(mode, lane, m.bits(o[3], lane), m.bits(o[4], lane), &inside[lane]);
    const bool present = lanes >> source & 1;
    if (!present) m.warn("SHFL reads a lane that takes no part", lane);
    results[lane] = present ? values[source] : 0xdeadbeef;
  });
  m.each(lanes, [&](int lane) {
    m.set_predicate(o[0], lane, inside[lane]);
    m.set(o[1], lane, results[lane]);
  });
}

// VOTE.ANY R, P, Pin; VOTEU.ANY UR, UP, Pin; each destination may be missing.
void vote(Machine& m, const Instruction& i, uint32_t lanes) {
  uint32_t votes = 0;
  m.each(lanes, [&](int lane) {
    if (m.predicate(i.operands.back(), lane)) votes |= 1u << lane;
  });
  const bool all = votes == lanes, none = votes == 0;
  const bool result = i.has("ALL") ? all : i.has("EQ") ? all || none : !none;
  for (size_t n = 0; n + 1 < i.operands.size(); ++n)
    m.each(lanes, [&](int lane) {
      if (i.operands[n].is_predicate()) {
        m.set_predicate(i.operands[n], lane, result);
      } else {
        m.set(i.operands[n], lane, votes);
      }
    });
}

// ELECT P, UR, Pin: the first lane.
void elect(Machine& m, const Instruction& i, uint32_t lanes) {
  const int chosen = __builtin_ctz(lanes);
  m.each(lanes, [&](int lane) { m.set_predicate(i.operands[0], lane, lane == chosen); });
  m.set(i.operands[1], chosen, static_cast<uint32_t>(chosen));
}

// MATCH.ANY R, Rin; MATCH.ALL P, R, Rin
void match(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool all = i.has("ALL");
  const size_t n = i.operands[0].is_predicate() ? 1 : 0;
  uint64_t values[kWarpLanes];
  m.each(lanes, [&](int lane) {
    values[lane] = i.has("U64") ? m.pair(i.operands.back(), lane) : m.bits(i.operands.back(), lane);
  });
  m.each(lanes, [&](int lane) {
    uint32_t equal = 0;
    m.each(lanes, [&](int other) {
      if (values[other] == values[lane]) equal |= 1u << other;
    });
    if (n) m.set_predicate(i.operands[0], lane, equal == lanes);
    m.set(i.operands[n], lane, !all || equal == lanes ? equal : 0);
  });
}

void reduce(Machine& m, const Instruction& i, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  uint32_t result = m.bits(i.operands[1], first);
  m.each(lanes & (lanes - 1),
         [&](int lane) { result = combine(i, result, m.bits(i.operands[1], lane), 0); });
  m.set(i.operands[0], first, result);
}

}  // namespace

const Entries& control_entries() {
  static const Entries entries = {
      {"BRA", {branch, " U DIV CONV "}},
      {"CALL", {call, " REL ABS NOINC "}},
      {"RET", {return_from, " REL ABS NODEC "}},
      {"EXIT", {leave, " "}},
      {"BPT", {trap, " TRAP INT "}},
      {"NOP", {nothing, " "}},
      {"YIELD", {nothing, " "}},
      {"NANOSLEEP", {nothing, " "}},
      {"MEMBAR", {nothing, " ALL SC CTA GPU SYS VC "}},
      {"ERRBAR", {nothing, " "}},
      {"CCTL", {nothing, " IVALL PF1 PF2 E "}},
      {"BSSY", {start_convergence, " "}},
      {"BSYNC", {converge, " "}},
      {"BREAK", {drop_out, " "}},
      {"BMOV", {move_convergence, " 32 CLEAR "}},
      {"WARPSYNC", {sync_warp, " ALL COLLECTIVE "}},
      {"ENDCOLLECTIVE", {end_collective, " "}},
      {"BAR", {barrier, " SYNC ARV RED POPC AND OR DEFER_BLOCKING "}},
      {"B2R", {barrier_to_register, " RESULT "}},
      {"SHFL", {shuffle, " IDX UP DOWN BFLY "}},
      {"VOTE", {vote, " ANY ALL EQ "}},
      {"VOTEU", {vote, " ANY ALL EQ "}},
      {"ELECT", {elect, " "}},
      {"MATCH", {match, " ANY ALL U32 U64 "}},
      {"REDUX", {reduce, " SUM MIN MAX OR XOR S32 "}},
  };
  return entries;
}

}  // namespace emulator::sass

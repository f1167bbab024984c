// Memory, control and operations of a whole warp.
#include <algorithm>

#include "handlers.h"

namespace emulator::sass {

namespace {

// ---- Memory -------------------------------------------------------------------------------------

enum class Space { kGlobal, kShared, kLocal };

Space space_of(const Instruction& i) {
  const char last = i.opcode.back();
  return last == 'G' ? Space::kGlobal : last == 'S' ? Space::kShared : Space::kLocal;
}

int access_bytes(const Instruction& i) {
  if (i.has("128")) return 16;
  if (i.has("64")) return 8;
  if (i.has("U8") || i.has("S8")) return 1;
  return i.has("U16") || i.has("S16") ? 2 : 4;
}

uint8_t* place_of(Machine& m, const Instruction& i, uint64_t address, int bytes, Access access,
                  int lane) {
  switch (space_of(i)) {
    case Space::kGlobal: return m.global(address, bytes, access != Access::kRead, lane);
    case Space::kShared: return m.shared(address, bytes, access, lane);
    default: return m.local(address, bytes, lane);
  }
}

void count(Machine& m, const Instruction& i, uint32_t lanes, const uint64_t* addresses, int bytes,
           bool store) {
  if (space_of(i) == Space::kGlobal) m.counters().count_global(lanes, addresses, bytes, store);
  if (space_of(i) == Space::kShared) m.counters().count_shared(lanes, addresses, bytes);
}

Operand next_register(Operand reg, int by) {
  if (reg.index != kZeroRegister) reg.index += by;
  return reg;
}

void load(Machine& m, const Instruction& i, uint32_t lanes) {
  const int bytes = access_bytes(i);
  uint64_t addresses[kWarpLanes];
  m.each(lanes, [&](int lane) { addresses[lane] = m.address(i.operands[1], lane); });
  m.each(lanes, [&](int lane) {
    const uint8_t* from = place_of(m, i, addresses[lane], bytes, Access::kRead, lane);
    uint32_t words[4] = {};
    memcpy(words, from, bytes);
    if (i.has("S8")) words[0] = static_cast<uint32_t>(sign_extend(words[0], 8));
    if (i.has("S16")) words[0] = static_cast<uint32_t>(sign_extend(words[0], 16));
    for (int n = 0; 4 * n < bytes; ++n) m.set(next_register(i.operands[0], n), lane, words[n]);
  });
  count(m, i, lanes, addresses, bytes, false);
}

void store(Machine& m, const Instruction& i, uint32_t lanes) {
  const int bytes = access_bytes(i);
  uint64_t addresses[kWarpLanes];
  m.each(lanes, [&](int lane) {
    addresses[lane] = m.address(i.operands[0], lane);
    uint32_t words[4];
    for (int n = 0; n < 4; ++n)
      words[n] = 4 * n < bytes ? m.bits(next_register(i.operands[1], n), lane) : 0;
    memcpy(place_of(m, i, addresses[lane], bytes, Access::kWrite, lane), words, bytes);
  });
  count(m, i, lanes, addresses, bytes, true);
}

void load_constant(Machine& m, const Instruction& i, uint32_t lanes) {
  const int bytes = access_bytes(i);
  m.each(lanes, [&](int lane) {
    const Operand& from = i.operands[1];
    uint32_t words[4] = {};
    memcpy(words, m.constant(from.index, m.address(from, lane), bytes), bytes);
    if (i.has("S8")) words[0] = static_cast<uint32_t>(sign_extend(words[0], 8));
    if (i.has("S16")) words[0] = static_cast<uint32_t>(sign_extend(words[0], 16));
    Operand to = i.operands[0];
    for (int n = 0; 4 * n < bytes; ++n, ++to.index) m.set(to, lane, words[n]);
  });
}

uint32_t combine(const Instruction& i, uint32_t old, uint32_t b, uint32_t c) {
  const bool is_signed = i.has("S32");
  const bool smaller =
      is_signed ? static_cast<int32_t>(old) < static_cast<int32_t>(b) : old < b;
  if (i.has("ADD") || i.has("SUM")) return old + b;
  if (i.has("MIN")) return smaller ? old : b;
  if (i.has("MAX")) return smaller ? b : old;
  if (i.has("AND")) return old & b;
  if (i.has("OR")) return old | b;
  if (i.has("XOR")) return old ^ b;
  if (i.has("EXCH")) return b;
  if (i.has("CAS")) return old == b ? c : old;
  if (i.has("POPC")) return old + 1;
  if (i.has("INC")) return old >= b ? 0 : old + 1;
  if (i.has("DEC")) return old == 0 || old > b ? b : old - 1;
  if (i.opcode == "REDUX") return old & b;  // no name: AND
  stop("unsupported atomic operation: " + i.text);
}

// ATOMS Rd, [address], Rb; ATOMG P, Rd, [address], Rb; RED [address], Rb
void atomic(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("64") || i.has("F32") || i.has("F16x2")) m.fail("atomic type is not supported", 0);
  size_t n = 0;
  while (i.operands[n].is_predicate()) ++n;
  const bool returns = i.operands[n].place != Place::kMemory;
  const size_t at = n + returns;
  const bool global = i.opcode != "ATOMS";
  uint64_t addresses[kWarpLanes];
  m.each(lanes, [&](int lane) {
    addresses[lane] = m.address(i.operands[at], lane);
    uint8_t* place = global ? m.global(addresses[lane], 4, true, lane)
                            : m.shared(addresses[lane], 4, Access::kAtomic, lane);
    uint32_t old;
    memcpy(&old, place, 4);
    const uint32_t b = i.operands.size() > at + 1 ? m.bits(i.operands[at + 1], lane) : 1;
    const uint32_t c = i.operands.size() > at + 2 ? m.bits(i.operands[at + 2], lane) : 0;
    const uint32_t result = combine(i, old, b, c);
    memcpy(place, &result, 4);
    if (returns) m.set(i.operands[n], lane, old);
  });
  m.counters().count_atomic(lanes, addresses);
  if (global) {
    m.counters().count_global(lanes, addresses, 4, true);
  } else {
    m.counters().count_shared(lanes, addresses, 4);
  }
}

// LDGSTS [shared], desc[..][global]: cp.async. A predicate says whether it reads or writes zeros.
// With ZFILL, the address is misaligned by the number of bytes at the end that become zeros.
void copy_async(Machine& m, const Instruction& i, uint32_t lanes) {
  const int bytes = access_bytes(i);
  uint64_t from[kWarpLanes];
  m.each(lanes, [&](int lane) {
    from[lane] = m.address(i.operands[1], lane);
    const int skipped = i.has("ZFILL") ? static_cast<int>(from[lane] % bytes) : 0;
    from[lane] -= skipped;
    const bool reads = i.operands.size() < 3 || m.predicate(i.operands[2], lane);
    m.copy_async(lane, m.address(i.operands[0], lane), from[lane], bytes,
                 reads ? bytes - skipped : 0);
  });
  m.counters().count_global(lanes, from, bytes, false);
}

void commit_async(Machine& m, const Instruction&, uint32_t lanes) { m.warp().copies.commit(lanes); }

void wait_async(Machine& m, const Instruction& i, uint32_t lanes) {
  m.wait_async(lanes, static_cast<int>(i.operands[1].value));
}

// ---- Registers of other kinds -------------------------------------------------------------------

void read_special(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) {
    const uint64_t value = m.special(i.operands[1].name, lane);
    if (i.opcode == "CS2R" && !i.has("32")) {
      m.set_pair(i.operands[0], lane, value);
    } else {
      m.set(i.operands[0], lane, static_cast<uint32_t>(value));
    }
  });
}

// A uniform register takes the value of the first active lane.
void to_uniform(Machine& m, const Instruction& i, uint32_t lanes) {
  const int first = __builtin_ctz(lanes);
  if (i.opcode == "S2UR") {
    m.set(i.operands[0], first, static_cast<uint32_t>(m.special(i.operands[1].name, first)));
  } else {
    m.set(i.operands[0], first, m.bits(i.operands[1], first));
  }
}

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

const char* const kAccess =
    " E 128 64 32 U8 S8 U16 S16 CONSTANT EL EF LU EU NA STRONG WEAK GPU SM SYS CTA LTC64B LTC128B "
    "LTC256B BYPASS ACCESS ZFILL ";
const char* const kAtomic =
    " E ADD MIN MAX AND OR XOR EXCH CAS POPC INC DEC 32 S32 U32 STRONG GPU SYS SM CTA ";

}  // namespace

const Entries& movement_entries() {
  static const Entries entries = {
      {"LDG", {load, kAccess}},
      {"STG", {store, kAccess}},
      {"LDS", {load, kAccess}},
      {"STS", {store, kAccess}},
      {"LDL", {load, kAccess}},
      {"STL", {store, kAccess}},
      {"LDC", {load_constant, " 64 U8 S8 U16 S16 "}},
      {"ATOMS", {atomic, kAtomic}},
      {"ATOMG", {atomic, kAtomic}},
      {"RED", {atomic, kAtomic}},
      {"REDG", {atomic, kAtomic}},
      {"LDGSTS", {copy_async, kAccess}},
      {"LDGDEPBAR", {commit_async, " "}},
      {"DEPBAR", {wait_async, " LE "}},
      {"S2R", {read_special, " "}},
      {"CS2R", {read_special, " 32 "}},
      {"S2UR", {to_uniform, " "}},
      {"R2UR", {to_uniform, " "}},
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

// Memory, and registers of other kinds.
#include <algorithm>

#include "handlers.h"

namespace emulator::sass {

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

// REDG.ADD.64 [address], Rb
void add_64(Machine& m, const Instruction& i, uint32_t lanes) {
  uint64_t addresses[kWarpLanes];
  m.each(lanes, [&](int lane) {
    addresses[lane] = m.address(i.operands[0], lane);
    uint8_t* place = m.global(addresses[lane], 8, true, lane);
    uint64_t value;
    memcpy(&value, place, 8);
    value += m.pair(i.operands[1], lane);
    memcpy(place, &value, 8);
  });
  m.counters().count_atomic(lanes, addresses);
  m.counters().count_global(lanes, addresses, 8, true);
}

// ATOMS Rd, [address], Rb; ATOMG P, Rd, [address], Rb; RED [address], Rb
void atomic(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("64") && i.opcode == "REDG" && i.has("ADD")) return add_64(m, i, lanes);
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

const char* const kAccess =
    " E 128 64 32 U8 S8 U16 S16 CONSTANT EL EF LU EU NA STRONG WEAK GPU SM SYS CTA LTC64B LTC128B "
    "LTC256B BYPASS ACCESS ZFILL ";
const char* const kAtomic =
    " E ADD MIN MAX AND OR XOR EXCH CAS POPC INC DEC 32 S32 U32 64 STRONG GPU SYS SM CTA ";

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
  };
  return entries;
}

}  // namespace emulator::sass

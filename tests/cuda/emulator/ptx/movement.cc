// Memory, control and operations of a whole warp.
#include <algorithm>

#include "handlers.h"

namespace emulator::ptx {

namespace {

// ---- Memory -------------------------------------------------------------------------------------

// The space of the first lane's address decides how a generic access counts.
void count(Machine& m, const Instruction& i, uint32_t lanes, const uint64_t* addresses, int bytes,
           bool store) {
  const Space space = m.resolve(i.space, addresses[__builtin_ctz(lanes)]);
  if (space == Space::kGlobal) m.counters().count_global(lanes, addresses, bytes, store);
  if (space == Space::kShared) m.counters().count_shared(lanes, addresses, bytes);
}

const Operand& part(const Operand& operand, int index) {
  return operand.place == Place::kVector ? operand.parts[index] : operand;
}

void gather_addresses(Machine& m, const Instruction& i, uint32_t lanes, const Operand& operand,
                      uint64_t* addresses) {
  const bool symbol = operand.base == Place::kShared && i.space == Space::kGeneric;
  m.each(lanes, [&](int lane) {
    addresses[lane] = m.address(operand, lane) + (symbol ? kSharedWindow : 0);
  });
}

void load(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!lanes) return;
  const int bytes = i.type.bits / 8, total = bytes * i.vector;
  uint64_t addresses[kWarpLanes];
  gather_addresses(m, i, lanes, i.operands[1], addresses);
  m.each(lanes, [&](int lane) {
    const uint8_t* from = m.at(i.space, addresses[lane], total, Access::kRead, lane);
    for (int n = 0; n < i.vector; ++n) {
      uint64_t value = 0;
      memcpy(&value, from + n * bytes, bytes);
      if (i.type.is_signed()) value = sign_extend(value, i.type.bits);
      m.set(part(i.operands[0], n), lane, value);
    }
  });
  count(m, i, lanes, addresses, total, false);
}

void store(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!lanes) return;
  const int bytes = i.type.bits / 8, total = bytes * i.vector;
  uint64_t addresses[kWarpLanes];
  gather_addresses(m, i, lanes, i.operands[0], addresses);
  m.each(lanes, [&](int lane) {
    uint8_t* to = m.at(i.space, addresses[lane], total, Access::kWrite, lane);
    for (int n = 0; n < i.vector; ++n) {
      const uint64_t value = m.get(part(i.operands[1], n), lane);
      memcpy(to + n * bytes, &value, bytes);
    }
  });
  count(m, i, lanes, addresses, total, true);
}

uint64_t combine(const Instruction& i, uint64_t old, uint64_t b, uint64_t c) {
  static const char* const names[] = {"add", "min", "max", "and",  "or",
                                      "xor", "inc", "dec", "exch", "cas"};
  std::string name;
  for (const char* candidate : names)
    if (i.has(candidate)) name = candidate;
  const Type& t = i.type;
  b &= low_bits(t.bits);
  const int64_t signed_old = sign_extend(old, t.bits), signed_b = sign_extend(b, t.bits);
  if (name == "exch") return b;
  if (name == "cas") return old == b ? c : old;
  if (name == "and") return old & b;
  if (name == "or") return old | b;
  if (name == "xor") return old ^ b;
  if (name == "inc") return old >= b ? 0 : old + 1;
  if (name == "dec") return old == 0 || old > b ? b : old - 1;
  if (name == "add" && t.is_float())
    return encode(odd_sum(decode(old, t.format), decode(b, t.format)), t.format);
  if (name == "add") return old + b;
  if (t.is_float() || name.empty()) stop("unsupported atomic operation: " + i.text);
  const bool old_smaller = t.is_signed() ? signed_old < signed_b : old < b;
  return old_smaller == (name == "min") ? old : b;
}

void atomic(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!lanes) return;
  if (i.type.elements > 1) m.fail("packed atomics are not supported", 0);
  const size_t first = i.opcode == "atom" ? 1 : 0;
  const int bytes = i.type.bits / 8;
  uint64_t addresses[kWarpLanes];
  gather_addresses(m, i, lanes, i.operands[first], addresses);
  m.each(lanes, [&](int lane) {
    uint8_t* at = m.at(i.space, addresses[lane], bytes, Access::kAtomic, lane);
    uint64_t old = 0;
    memcpy(&old, at, bytes);
    const uint64_t b = m.get(i.operands[first + 1], lane);
    const uint64_t c = i.operands.size() > first + 2 ? m.get(i.operands[first + 2], lane) : 0;
    const uint64_t result = combine(i, old, b, c);
    memcpy(at, &result, bytes);
    if (first) m.set(i.operands[0], lane, old);
  });
  m.counters().count_atomic(lanes, addresses);
  count(m, i, lanes, addresses, bytes, true);
}

void copy(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("commit_group")) return m.commit_async(lanes);
  if (i.has("wait_all")) return m.wait_async(lanes, -1);
  if (i.has("wait_group")) return m.wait_async(lanes, static_cast<int>(i.operands[0].value));
  m.copy_async(lanes);
}

void move(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) { m.set(i.operands[0], lane, m.get(i.operands[1], lane)); });
}

void convert_address(Machine& m, const Instruction& i, uint32_t lanes) {
  const uint64_t window = i.space == Space::kShared  ? kSharedWindow
                          : i.space == Space::kLocal ? kLocalWindow
                                                     : 0;
  const bool strips = i.has("to") && i.space == Space::kShared;
  m.each(lanes, [&](int lane) {
    const uint64_t value = m.get(i.operands[1], lane);
    m.set(i.operands[0], lane, strips ? value & ~window : value | window);
  });
}

void is_space(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) {
    m.set(i.operands[0], lane, m.resolve(Space::kGeneric, m.get(i.operands[1], lane)) == i.space);
  });
}

// ---- Control ------------------------------------------------------------------------------------

void branch(Machine& m, const Instruction&, uint32_t lanes) { m.branch(lanes); }
void leave(Machine& m, const Instruction&, uint32_t lanes) { m.leave(lanes); }
void nothing(Machine&, const Instruction&, uint32_t) {}

void trap(Machine& m, const Instruction&, uint32_t lanes) {
  if (lanes) m.fail("trap", __builtin_ctz(lanes));
}

void barrier(Machine& m, const Instruction& i, uint32_t lanes) {
  i.has("warp") ? void(m.warp_operation(lanes)) : m.barrier(lanes);
}

// ---- Operations of a warp -----------------------------------------------------------------------

void shuffle(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!m.warp_operation(lanes)) return;
  static const std::map<std::string, Shuffle> modes = {{"idx", Shuffle::kIndex},
                                                       {"up", Shuffle::kUp},
                                                       {"down", Shuffle::kDown},
                                                       {"bfly", Shuffle::kButterfly}};
  const Shuffle mode = modes.at(i.modifiers[1]);
  uint64_t values[kWarpLanes], results[kWarpLanes];
  bool inside[kWarpLanes];
  m.each(lanes, [&](int lane) { values[lane] = m.get(i.operands[1], lane); });
  m.each(lanes, [&](int lane) {
    const uint32_t b = m.get(i.operands[2], lane), c = m.get(i.operands[3], lane);
    const int source = shuffle_source(mode, lane, b, c, &inside[lane]);
    const bool present = lanes >> source & 1;
    if (!present) m.warn("shfl reads a lane that takes no part", lane);
    results[lane] = present ? values[source] : 0xdeadbeef;
  });
  m.each(lanes, [&](int lane) {
    m.set(i.operands[0], lane, results[lane]);
    if (i.operands[0].second >= 0) m.set_register(i.operands[0].second, lane, inside[lane]);
  });
}

void vote(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!m.warp_operation(lanes)) return;
  uint32_t votes = 0;
  m.each(lanes, [&](int lane) {
    if (m.get(i.operands[1], lane) & 1) votes |= 1u << lane;
  });
  const uint64_t result = i.has("ballot") ? votes
                          : i.has("any")  ? votes != 0
                          : i.has("all")  ? votes == lanes
                                          : votes == 0 || votes == lanes;
  m.each(lanes, [&](int lane) { m.set(i.operands[0], lane, result); });
}

void match(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!m.warp_operation(lanes)) return;
  const bool all = i.has("all");
  uint64_t values[kWarpLanes];
  m.each(lanes, [&](int lane) { values[lane] = m.get(i.operands[1], lane); });
  m.each(lanes, [&](int lane) {
    uint32_t equal = 0;
    m.each(lanes, [&](int other) {
      if (values[other] == values[lane]) equal |= 1u << other;
    });
    m.set(i.operands[0], lane, !all || equal == lanes ? equal : 0);
    if (i.operands[0].second >= 0) m.set_register(i.operands[0].second, lane, equal == lanes);
  });
}

void reduce(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!m.warp_operation(lanes)) return;
  const int first = __builtin_ctz(lanes);
  uint64_t result = m.get(i.operands[1], first);
  m.each(lanes & (lanes - 1),
         [&](int lane) { result = combine(i, result, m.get(i.operands[1], lane), 0); });
  m.each(lanes, [&](int lane) { m.set(i.operands[0], lane, result); });
}

void elect(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!m.warp_operation(lanes)) return;
  const int chosen = __builtin_ctz(lanes);
  m.each(lanes, [&](int lane) {
    m.set(i.operands[0], lane, chosen);
    if (i.operands[0].second >= 0) m.set_register(i.operands[0].second, lane, lane == chosen);
  });
}

void active_mask(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) { m.set(i.operands[0], lane, lanes); });
}

}  // namespace

const Handlers& movement_handlers() {
  static const Handlers handlers = {
      {"ld", load},          {"ldu", load},          {"st", store},
      {"atom", atomic},      {"red", atomic},        {"cp", copy},
      {"mov", move},         {"cvta", convert_address}, {"isspacep", is_space},
      {"bra", branch},       {"ret", leave},         {"exit", leave},
      {"trap", trap},        {"bar", barrier},       {"barrier", barrier},
      {"shfl", shuffle},     {"vote", vote},         {"match", match},
      {"redux", reduce},     {"elect", elect},       {"activemask", active_mask},
      {"membar", nothing},   {"fence", nothing},     {"prefetch", nothing},
      {"prefetchu", nothing}, {"nanosleep", nothing}, {"discard", nothing},
      {"applypriority", nothing}, {"griddepcontrol", nothing},
  };
  return handlers;
}

Handler find_handler(const std::string& opcode) {
  for (const Handlers* handlers : {&arithmetic_handlers(), &comparison_handlers(), &bit_handlers(),
                                   &movement_handlers()}) {
    const auto found = handlers->find(opcode);
    if (found != handlers->end()) return found->second;
  }
  return nullptr;
}

}  // namespace emulator::ptx

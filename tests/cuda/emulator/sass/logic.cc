// Bits: logic, shifts, permutations, and predicates as bits.
#include <algorithm>

#include "handlers.h"

namespace emulator::sass {

namespace {

void logic(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const auto& s = parts.sources;
    const uint32_t result = logic3(m.bits(*s[0], lane), m.bits(*s[1], lane), m.bits(*s[2], lane),
                                   static_cast<unsigned>(s[3]->value));
    if (!parts.sets.empty())
      m.set_predicate(*parts.sets[0], lane, result != 0 || m.predicate(*parts.reads[0], lane));
    return result;
  });
}

void predicate_logic(Machine& m, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  m.each(lanes, [&](int lane) {
    const unsigned row = m.predicate(o[2], lane) << 2 | m.predicate(o[3], lane) << 1 |
                         static_cast<unsigned>(m.predicate(o[4], lane));
    m.set_predicate(o[0], lane, o[5].value >> row & 1);
    m.set_predicate(o[1], lane, o[6].value >> row & 1);
  });
}

// Shifts the 64 bits c:a; the result is their lower or upper word.
void shift(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool left = i.has("L"), high = i.has("HI"), wraps = i.has("W");
  const bool wide = i.has("U64") || i.has("S64"), is_signed = i.has("S32") || i.has("S64");
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const auto& s = parts.sources;
    const uint64_t value =
        static_cast<uint64_t>(m.bits(*s[2], lane)) << 32 | m.bits(*s[0], lane);
    const uint32_t most = wide ? 64 : 32, asked = m.bits(*s[1], lane);
    const uint32_t by = wraps ? asked & (most - 1) : std::min(asked, most);
    uint64_t shifted;
    if (left) {
      shifted = by > 63 ? 0 : value << by;
    } else if (is_signed) {
      shifted = static_cast<int64_t>(value) >> std::min(by, 63u);
    } else {
      shifted = by > 63 ? 0 : value >> by;
    }
    return static_cast<uint32_t>(high ? shifted >> 32 : shifted);
  });
}

void permute(Machine& m, const Instruction& i, uint32_t lanes) {
  std::string mode = i.modifiers.empty() ? "" : i.modifiers[0];
  for (char& c : mode) c = static_cast<char>(tolower(c));
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const auto& s = parts.sources;
    const uint32_t by = m.bits(*s[1], lane);
    const uint32_t selector = mode.empty() ? by : permute_selector(mode, by);
    return permute_bytes(m.bits(*s[0], lane), m.bits(*s[2], lane), selector);
  });
}

void extend_sign(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) -> uint32_t {
    const uint32_t value = m.bits(*parts.sources[0], lane);
    const uint32_t asked = m.bits(*parts.sources[1], lane);
    const int width = static_cast<int>(i.has("W") ? asked & 31 : std::min(asked, 32u));
    if (i.has("U32")) return value & low_bits(width);
    return width ? static_cast<uint32_t>(sign_extend(value, width)) : 0;
  });
}

void make_mask(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) -> uint32_t {
    const uint32_t start = m.bits(*parts.sources[0], lane), size = m.bits(*parts.sources[1], lane);
    if (i.has("W")) return low_bits(size & 31) << (start & 31);
    return start > 31 ? 0 : static_cast<uint32_t>(low_bits(std::min(size, 32u)) << start);
  });
}

void count_ones(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) -> uint32_t {
    return __builtin_popcount(m.bits(*parts.sources[0], lane));
  });
}

void find_leading_one(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) -> uint32_t {
    const int position = highest_bit(m.bits(*parts.sources[0], lane), 32, !i.has("U32"));
    return position < 0 ? ~0u : i.has("SH") ? 31 - position : position;
  });
}

void reverse(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) -> uint32_t {
    return reverse_bits(m.bits(*parts.sources[0], lane), 32);
  });
}

// ---- Predicates as bits of a register -----------------------------------------------------------

int byte_shift(const Instruction& i) {
  for (int byte = 0; byte < 4; ++byte)
    if (i.has(("B" + std::to_string(byte)).c_str())) return 8 * byte;
  return 0;
}

// P2R R0, PR, R1, mask: the predicates in the mask replace those bits of R1.
void predicates_to_register(Machine& m, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  const int shift = byte_shift(i);
  m.each(lanes, [&](int lane) {
    uint32_t all = 0;
    for (int p = 0; p < kTrue; ++p) all |= static_cast<uint32_t>(m.warp().predicates[p][lane]) << p;
    const uint32_t mask = m.bits(o[3], lane) & 0x7f;
    m.set(o[0], lane, (m.bits(o[2], lane) & ~(0xffu << shift)) | (all & mask) << shift |
                          (m.bits(o[2], lane) & (0xffu & ~mask) << shift));
  });
}

void register_to_predicates(Machine& m, const Instruction& i, uint32_t lanes) {
  const auto& o = i.operands;
  m.each(lanes, [&](int lane) {
    const uint32_t bits = m.bits(o[1], lane) >> byte_shift(i), mask = m.bits(o[2], lane);
    for (int p = 0; p < kTrue; ++p)
      if (mask >> p & 1) m.warp().predicates[p][lane] = bits >> p & 1;
  });
}

void move(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes,
          [&](int lane, const Parts& parts) { return m.integer(*parts.sources[0], lane); });
}

}  // namespace

const Entries& logic_entries() {
  static const Entries entries = {
      {"LOP3", {logic, " LUT "}},
      {"PLOP3", {predicate_logic, " LUT "}},
      {"SHF", {shift, " L R U32 S32 U64 S64 HI W "}},
      {"PRMT", {permute, " F4E B4E RC8 ECL ECR RC16 "}},
      {"SGXT", {extend_sign, " U32 W "}},
      {"BMSK", {make_mask, " W "}},
      {"POPC", {count_ones, " "}},
      {"FLO", {find_leading_one, " U32 SH "}},
      {"BREV", {reverse, " "}},
      {"P2R", {predicates_to_register, " B0 B1 B2 B3 "}},
      {"R2P", {register_to_predicates, " B0 B1 B2 B3 "}},
      {"MOV", {move, " "}},
  };
  return entries;
}

}  // namespace emulator::sass

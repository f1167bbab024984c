// Integers.
#include <algorithm>

#include "handlers.h"

namespace emulator::sass {

namespace {

// A term of a sum, as the adder sees it: -x is ~x + 1, whose carry counts.
uint64_t term(const Machine& m, const Operand& o, int lane) {
  const uint32_t value = m.bits(o, lane);
  return o.minus ? static_cast<uint64_t>(~value) + 1 : value;
}

void set_carries(Machine& m, const Parts& parts, int lane, uint64_t sum) {
  const uint64_t carry = sum >> 32;
  if (parts.sets.empty()) return;
  if (carry > parts.sets.size()) m.fail("a carry is lost", lane);
  for (size_t n = 0; n < parts.sets.size(); ++n) m.set_predicate(*parts.sets[n], lane, carry > n);
}

uint64_t carries_in(const Machine& m, const Parts& parts, int lane) {
  uint64_t sum = 0;
  for (const Operand* carry : parts.reads) sum += m.predicate(*carry, lane);
  return sum;
}

// VIADD.16x2: no carry from the lower half to the upper one.
void add_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const uint32_t a = m.bits(*parts.sources[0], lane), b = m.bits(*parts.sources[1], lane);
    if (parts.sources[0]->minus || parts.sources[1]->minus) m.fail("a minus of halves", lane);
    return ((a + b) & 0xffff) | ((a & 0xffff0000u) + (b & 0xffff0000u));
  });
}

void add3(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("16x2")) return add_halves(m, i, lanes);
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    uint64_t sum = carries_in(m, parts, lane);
    for (const Operand* source : parts.sources) sum += term(m, *source, lane);
    set_carries(m, parts, lane, sum);
    return static_cast<uint32_t>(sum);
  });
}

void multiply_add(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool wide = i.has("WIDE"), high = i.has("HI"), is_unsigned = i.has("U32");
  const Parts parts(i);
  m.each(lanes, [&](int lane) {
    const uint32_t a = m.integer(*parts.sources[0], lane), b = m.integer(*parts.sources[1], lane);
    const uint64_t carry = carries_in(m, parts, lane);
    const Operand& c = *parts.sources[2];
    if (!wide && !high) {
      const uint64_t sum = static_cast<uint64_t>(a * b) + term(m, c, lane) + carry;
      set_carries(m, parts, lane, sum);
      m.set(*parts.destination, lane, static_cast<uint32_t>(sum));
      return;
    }
    const uint64_t product = is_unsigned ? static_cast<uint64_t>(a) * b
                                         : static_cast<uint64_t>(sign_extend(a, 32) *
                                                                 sign_extend(b, 32));
    const uint64_t addend = c.minus ? -m.pair(c, lane) : m.pair(c, lane);
    const uint64_t sum = product + addend + carry;
    if (!parts.sets.empty()) m.set_predicate(*parts.sets[0], lane, sum < product);
    if (wide) {
      m.set_pair(*parts.destination, lane, sum);
    } else {
      m.set(*parts.destination, lane, static_cast<uint32_t>(sum >> 32));
    }
  });
}

void absolute(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const uint32_t value = m.integer(*parts.sources[0], lane);
    return value >> 31 ? -value : value;
  });
}

void absolute_difference(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const uint32_t a = m.integer(*parts.sources[0], lane), b = m.integer(*parts.sources[1], lane);
    const bool larger = i.has("U32") ? a > b : static_cast<int32_t>(a) > static_cast<int32_t>(b);
    return (larger ? a - b : b - a) + m.integer(*parts.sources[2], lane);
  });
}

uint32_t smaller_or_larger(uint32_t a, uint32_t b, bool is_signed, bool minimum) {
  const bool b_smaller = is_signed ? static_cast<int32_t>(b) < static_cast<int32_t>(a) : b < a;
  return b_smaller == minimum ? b : a;
}

// The extremum of each half: shifted to the top, they compare like words.
uint32_t extremum_of_halves(uint32_t a, uint32_t b, bool is_signed, bool minimum) {
  const uint32_t upper = smaller_or_larger(a & 0xffff0000u, b & 0xffff0000u, is_signed, minimum);
  return upper | smaller_or_larger(a << 16, b << 16, is_signed, minimum) >> 16;
}

// The last predicate asks for the minimum. VIADDMNMX first adds its first two sources.
void extremum_of(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool halves = i.has("U16x2") || i.has("S16x2");
  const bool is_signed = !i.has("U32") && !i.has("U16x2");
  if (halves && (i.has("RELU") || i.opcode == "VIADDMNMX")) m.fail("form is not supported", 0);
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const bool minimum = m.predicate(*parts.reads[0], lane);
    size_t n = 0;
    uint32_t best = m.integer(*parts.sources[n++], lane);
    if (i.opcode == "VIADDMNMX") best += m.integer(*parts.sources[n++], lane);
    for (; n < parts.sources.size(); ++n) {
      const uint32_t next = m.integer(*parts.sources[n], lane);
      best = halves ? extremum_of_halves(best, next, is_signed, minimum)
                    : smaller_or_larger(best, next, is_signed, minimum);
    }
    return i.has("RELU") && static_cast<int32_t>(best) < 0 ? 0 : best;
  });
}

bool holds(const Instruction& i, const Relation& relation, uint32_t a, uint32_t b) {
  return i.has("U32") ? compare_ordered(relation.compare, a, b)
                      : compare_ordered(relation.compare, static_cast<int32_t>(a),
                                        static_cast<int32_t>(b));
}

// The upper words of 64-bit numbers: where they are equal, the lower words' result counts.
bool holds_extended(const Instruction& i, const Relation& relation, uint32_t a, uint32_t b,
                    bool lower) {
  Relation strict = relation;
  if (relation.compare == Compare::kGe) strict.compare = Compare::kGt;
  if (relation.compare == Compare::kLe) strict.compare = Compare::kLt;
  if (relation.compare == Compare::kEq) return a == b && lower;
  return a == b ? lower : holds(i, strict, a, b);
}

void set_predicates(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const auto& o = i.operands;
  m.each(lanes, [&](int lane) {
    const uint32_t a = m.integer(o[2], lane), b = m.integer(o[3], lane);
    const bool joined = m.predicate(o[4], lane);
    const bool result = i.has("EX")
                            ? holds_extended(i, relation, a, b, m.predicate(o[5], lane))
                            : holds(i, relation, a, b);
    m.set_predicate(o[0], lane, relation.join(result, joined));
    m.set_predicate(o[1], lane, relation.join(!result, joined));
  });
}

void select(Machine& m, const Instruction& i, uint32_t lanes) {
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    return m.integer(*parts.sources[m.predicate(*parts.reads[0], lane) ? 0 : 1], lane);
  });
}

// (a << shift) + b, or the upper word of (c:a << shift) plus b.
void load_effective_address(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool high = i.has("HI"), extends = i.has("SX32");
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const auto& s = parts.sources;
    const uint32_t a = m.integer(*s[0], lane);
    uint64_t wide = a;
    if (high && extends) wide = sign_extend(a, 32);
    if (high && !extends) wide |= static_cast<uint64_t>(m.bits(*s[2], lane)) << 32;
    const uint64_t by = s[high && !extends ? 3 : 2]->value & 31;
    const uint32_t shifted = static_cast<uint32_t>(high ? wide << by >> 32 : wide << by);
    const uint64_t sum = shifted + term(m, *s[1], lane) + carries_in(m, parts, lane);
    set_carries(m, parts, lane, sum);
    return static_cast<uint32_t>(sum);
  });
}

void dot(Machine& m, const Instruction& i, uint32_t lanes) {
  const int parts_of_a = i.has("4A") ? 4 : 2;
  const bool a_signed = i.has("S8") || i.has("S16");
  const bool b_signed = i.modifiers.back() == "S8";
  const bool a_unsigned_8 = i.modifiers[i.modifiers.size() - 2] == "U8";
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const auto& s = parts.sources;
    const uint32_t b = m.bits(*s[1], lane) >> (parts_of_a == 2 && i.has("HI") ? 16 : 0);
    const bool signed_a = parts_of_a == 4 ? !a_unsigned_8 && a_signed : i.has("S16");
    return dot_product(m.bits(*s[0], lane), signed_a, b, b_signed, parts_of_a,
                       m.integer(*s[2], lane));
  });
}

// I2I.to.from.SAT: the nearest number of the narrower type.
void saturate_integer(Machine& m, const Instruction& i, uint32_t lanes) {
  const int bits = atoi(i.modifiers[0].c_str() + 1);
  const bool to_signed = i.modifiers[0][0] == 'S', from_signed = i.modifiers[1][0] == 'S';
  const int64_t most = static_cast<int64_t>(low_bits(to_signed ? bits - 1 : bits));
  const int64_t least = to_signed ? -most - 1 : 0;
  compute(m, i, lanes, [&](int lane, const Parts& parts) {
    const uint32_t value = m.integer(*parts.sources[0], lane);
    const int64_t exact = from_signed ? sign_extend(value, 32) : static_cast<int64_t>(value);
    return static_cast<uint32_t>(std::max(least, std::min(most, exact)));
  });
}

const char* const kRelations = " F LT EQ LE GT NE GE T AND OR XOR U32 EX ";

}  // namespace

const Entries& integer_entries() {
  static const Entries entries = {
      {"IADD3", {add3, " X "}},
      {"VIADD", {add3, " 16x2 "}},
      {"IMAD", {multiply_add, " MOV SHL IADD U32 S32 WIDE HI X "}},
      {"IABS", {absolute, " "}},
      {"VABSDIFF", {absolute_difference, " U32 "}},
      {"IMNMX", {extremum_of, " U32 S32 "}},
      {"VIMNMX", {extremum_of, " U32 S32 U16x2 S16x2 RELU "}},
      {"VIMNMX3", {extremum_of, " U32 S32 U16x2 S16x2 RELU "}},
      {"VIADDMNMX", {extremum_of, " U32 S32 RELU "}},
      {"ISETP", {set_predicates, kRelations}},
      {"SEL", {select, " "}},
      {"LEA", {load_effective_address, " HI X SX32 "}},
      {"IDP", {dot, " 4A 2A LO HI U8 S8 U16 S16 "}},
      {"I2I", {saturate_integer, " U8 S8 U16 S16 U32 S32 SAT "}},
  };
  return entries;
}

}  // namespace emulator::sass

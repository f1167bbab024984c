// Comparison and conversion, on scalars and on packed halves.
#include <algorithm>

#include "handlers.h"

namespace emulator::ptx {

namespace {

bool compare(const std::string& relation, uint64_t a, uint64_t b, const Type& type, bool flush) {
  static const std::map<std::string, Compare> relations = {
      {"eq", Compare::kEq},   {"ne", Compare::kNe},   {"lt", Compare::kLt},   {"le", Compare::kLe},
      {"gt", Compare::kGt},   {"ge", Compare::kGe},   {"equ", Compare::kEqu}, {"neu", Compare::kNeu},
      {"ltu", Compare::kLtu}, {"leu", Compare::kLeu}, {"gtu", Compare::kGtu}, {"geu", Compare::kGeu},
      {"num", Compare::kNum}, {"nan", Compare::kNan}, {"lo", Compare::kLt},   {"ls", Compare::kLe},
      {"hi", Compare::kGt},   {"hs", Compare::kGe}};
  const auto found = relations.find(relation);
  if (found == relations.end()) stop("unknown comparison " + relation);
  if (type.is_float())
    return compare_floats(found->second, read(a, type, flush), read(b, type, flush));
  const bool as_signed = type.is_signed() && relation != "lo" && relation != "ls" &&
                         relation != "hi" && relation != "hs";
  return as_signed ? compare_ordered(found->second, sign_extend(a, type.bits),
                                     sign_extend(b, type.bits))
                   : compare_ordered(found->second, a & low_bits(type.bits),
                                     b & low_bits(type.bits));
}

void set_predicate(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const Type& t = i.type;
  m.each(lanes, [&](int lane) {
    const uint64_t a = m.get(i.operands[1], lane), b = m.get(i.operands[2], lane);
    const bool other = i.operands.size() > 3 && m.get(i.operands[3], lane);
    const bool low = compare(relation.name, a, b, t, i.flush);
    // Packed halves: a predicate each. Otherwise the second predicate is the negated comparison.
    const bool second =
        t.elements > 1 ? compare(relation.name, a >> t.bits, b >> t.bits, t, i.flush) : !low;
    m.set(i.operands[0], lane, relation.join(low, other));
    if (i.operands[0].second >= 0)
      m.set_register(i.operands[0].second, lane, relation.join(second, other));
  });
}

// The result of a comparison is 1.0 as a float and all ones as an integer. An integer result of
// packed halves has the ones of each half in that half.
void set_value(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const Type &to = i.type, &from = i.source;
  m.each(lanes, [&](int lane) {
    const uint64_t a = m.get(i.operands[1], lane), b = m.get(i.operands[2], lane);
    const bool other = i.operands.size() > 3 && m.get(i.operands[3], lane);
    const int width = from.elements > 1 ? from.bits : to.bits;
    const uint64_t one = to.is_float() ? encode(1, to.format) : low_bits(width);
    uint64_t result = 0;
    for (int e = 0; e < from.elements; ++e) {
      const int shift = e * from.bits;
      const bool holds = compare(relation.name, a >> shift, b >> shift, from, i.flush);
      if (relation.join(holds, other)) result |= one << (e * width);
    }
    m.set(i.operands[0], lane, result);
  });
}

// ---- Conversion ---------------------------------------------------------------------------------

double round_to_integer(double x, const Instruction& i) {
  if (i.has("rni")) return nearbyint(x);
  if (i.has("rmi")) return floor(x);
  if (i.has("rpi")) return ceil(x);
  return i.has("rzi") ? trunc(x) : x;
}

uint64_t integer_to_integer(uint64_t value, const Instruction& i) {
  const Type &to = i.type, &from = i.source;
  const int64_t x = from.is_signed() ? sign_extend(value, from.bits)
                                     : static_cast<int64_t>(value & low_bits(from.bits));
  if (!i.saturate) return to.is_signed() ? sign_extend(x, to.bits) : x & low_bits(to.bits);
  const bool negative = from.is_signed() && x < 0;
  if (to.is_signed() && negative) return clamp_signed(x, to.bits);
  const uint64_t most = low_bits(to.is_signed() ? to.bits - 1 : to.bits);
  return negative ? 0 : std::min<uint64_t>(x, most);
}

uint64_t convert_one(uint64_t value, const Instruction& i) {
  const Type &to = i.type, &from = i.source;
  if (!from.is_float()) {
    if (!to.is_float()) return integer_to_integer(value, i);
    if (to.format == Float::kDouble) stop("conversion to float64 is not supported: " + i.text);
    const double exact = odd_integer(value, from.bits, from.is_signed());
    return encode(exact, to.format, i.rounding);
  }
  const double x = read(value, from, i.flush && from.format == Float::kSingle);
  if (!to.is_float())
    return to_integer(round_to_integer(x, i), to.bits, to.is_signed(),
                      to.bits == 64 ? 1ull << 63 : 0);
  double rounded = round_to_integer(x, i);
  uint64_t bits = write(rounded, to, i);
  const Format& format = format_of(to.format);
  if (i.has("satfinite") && (bits & ~(1ull << (format.bits - 1))) == format.infinity)
    bits = (bits & 1ull << (format.bits - 1)) | (format.infinity - 1);
  return bits;
}

void convert(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) {
    uint64_t result = convert_one(m.get(i.operands[1], lane), i);
    if (i.operands.size() == 3)  // two values to packed halves: the first is the upper one
      result = result << i.type.bits | convert_one(m.get(i.operands[2], lane), i);
    m.set(i.operands[0], lane, result);
  });
}

}  // namespace

Relation::Relation(const Instruction& instruction) : name(instruction.modifiers[0]) {
  for (size_t i = 1; i < instruction.modifiers.size(); ++i) {
    const std::string& m = instruction.modifiers[i];
    if (m == "and") combine = '&';
    if (m == "or") combine = '|';
    if (m == "xor") combine = '^';
  }
}

const Handlers& comparison_handlers() {
  static const Handlers handlers = {
      {"setp", set_predicate},
      {"set", set_value},
      {"cvt", convert},
  };
  return handlers;
}

}  // namespace emulator::ptx

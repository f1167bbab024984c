// Logic, shifts and selections.
#include <algorithm>

#include "handlers.h"

namespace emulator::ptx {

namespace {

// f(lane's operands 1, 2, ...) into operand 0. Missing operands are 0.
template <class F>
void lanewise(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  m.each(lanes, [&](int lane) {
    uint64_t in[4] = {};
    for (size_t n = 1; n < i.operands.size() && n <= 4; ++n) in[n - 1] = m.get(i.operands[n], lane);
    m.set(i.operands[0], lane, f(in[0], in[1], in[2], in[3]));
  });
}

#define TWO_OPERANDS(name, expression)                                           \
  void name(Machine& m, const Instruction& i, uint32_t lanes) {                  \
    lanewise(m, i, lanes,                                                        \
             [](uint64_t a, uint64_t b, uint64_t, uint64_t) { return expression; }); \
  }
TWO_OPERANDS(logic_and, a & b)
TWO_OPERANDS(logic_or, a | b)
TWO_OPERANDS(logic_xor, a ^ b)
#undef TWO_OPERANDS

void logic_not(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) {
    return i.type.kind == Kind::kPredicate ? !a : ~a;
  });
}

void is_zero(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) {
    return static_cast<uint64_t>((a & low_bits(i.type.bits)) == 0);
  });
}

void shift_left(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t, uint64_t) -> uint64_t {
    b &= low_bits(32);
    return b >= static_cast<uint64_t>(i.type.bits) ? 0 : a << b;
  });
}

void shift_right(Machine& m, const Instruction& i, uint32_t lanes) {
  const uint64_t bits = i.type.bits;
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t, uint64_t) -> uint64_t {
    b &= low_bits(32);
    if (i.type.is_signed()) return sign_extend(a, bits) >> std::min(b, bits - 1);
    return b >= bits ? 0 : (a & low_bits(bits)) >> b;
  });
}

void funnel_shift(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool wraps = i.has("wrap"), left = i.modifiers[0] == "l";
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
    const uint64_t both = b << 32 | (a & low_bits(32));
    const uint64_t by = wraps ? c & 31 : std::min<uint64_t>(c & low_bits(32), 32);
    return left ? both << by >> 32 : both >> by;
  });
}

void look_up_3(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.operands.size() > 5) m.fail("lop3 with a predicate is not supported", 0);
  lanewise(m, i, lanes,
           [](uint64_t a, uint64_t b, uint64_t c, uint64_t d) -> uint64_t { return logic3(a, b, c, d); });
}

void permute(Machine& m, const Instruction& i, uint32_t lanes) {
  const std::string mode = i.modifiers.size() > 1 ? i.modifiers[1] : "";
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c, uint64_t) -> uint64_t {
    return permute_bytes(a, b, mode.empty() ? c : permute_selector(mode, c));
  });
}

void extract_field(Machine& m, const Instruction& i, uint32_t lanes) {
  const unsigned bits = i.type.bits;
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c, uint64_t) -> uint64_t {
    const unsigned start = b & 255, length = c & 255;
    if (length == 0) return 0;
    if (!i.type.is_signed()) return start >= bits ? 0 : (a & low_bits(bits)) >> start & low_bits(length);
    // Bits beyond the end are copies of the sign.
    const int64_t shifted = sign_extend(a, bits) >> std::min(start, bits - 1);
    return sign_extend(shifted, std::min(length, bits));
  });
}

void insert_field(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    const unsigned start = c & 255, length = d & 255;
    const bool outside = start >= static_cast<unsigned>(i.type.bits);
    const uint64_t field = outside ? 0 : low_bits(length) << start;
    return (b & ~field) | ((outside ? 0 : a << start) & field);
  });
}

void find_highest(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool as_shift = i.has("shiftamt");
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) -> uint64_t {
    const int position = highest_bit(a, i.type.bits, i.type.is_signed());
    return position < 0 ? low_bits(32) : as_shift ? i.type.bits - 1 - position : position;
  });
}

void reverse(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) {
    return reverse_bits(a, i.type.bits);
  });
}

void count_leading_zeros(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) -> uint64_t {
    return i.type.bits - 1 - highest_bit(a, i.type.bits, false);
  });
}

void count_ones(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t, uint64_t) -> uint64_t {
    return __builtin_popcountll(a & low_bits(i.type.bits));
  });
}

void make_mask(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool wraps = i.has("wrap");
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t, uint64_t) -> uint64_t {
    const uint64_t start = wraps ? a & 31 : a & low_bits(32), length = wraps ? b & 31 : b & low_bits(32);
    return start > 31 ? 0 : low_bits(std::min<uint64_t>(length, 32)) << start;
  });
}

void select(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [](uint64_t a, uint64_t b, uint64_t c, uint64_t) { return c ? a : b; });
}

void select_by_sign(Machine& m, const Instruction& i, uint32_t lanes) {
  lanewise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c, uint64_t) {
    const bool first = i.source.is_float() ? decode(c, i.source.format) >= 0 : sign_extend(c, 32) >= 0;
    return first ? a : b;
  });
}

}  // namespace

const Handlers& bit_handlers() {
  static const Handlers handlers = {
      {"and", logic_and},      {"or", logic_or},          {"xor", logic_xor},
      {"not", logic_not},      {"cnot", is_zero},         {"shl", shift_left},
      {"shr", shift_right},    {"shf", funnel_shift},     {"lop3", look_up_3},
      {"prmt", permute},       {"bfe", extract_field},    {"bfi", insert_field},
      {"bfind", find_highest}, {"brev", reverse},         {"clz", count_leading_zeros},
      {"popc", count_ones},    {"bmsk", make_mask},       {"selp", select},
      {"slct", select_by_sign},
  };
  return handlers;
}

}  // namespace emulator::ptx

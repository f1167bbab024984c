// Arithmetic, comparison and conversion, on scalars and on packed halves.
//
// Approximations (rcp, sqrt, rsqrt, ex2, lg2, div.approx, sin, cos, tanh) are computed with libm and
// rounded once. The hardware's last bits differ: no result may depend on them.
#include <algorithm>

#include "handlers.h"

namespace emulator::ptx {

namespace {

double read(uint64_t bits, const Type& type, bool flush) {
  bits &= low_bits(type.bits);
  return decode(flush ? flush_subnormal(bits, type.format) : bits, type.format);
}

uint64_t write(double value, const Type& type, const Instruction& i) {
  if (i.saturate) value = saturate(value);
  if (i.relu && value < 0) value = 0;
  const uint64_t bits = encode(value, type.format, i.rounding);
  return i.flush ? flush_subnormal(bits, type.format) : bits;
}

// Applies f to each element of up to three packed operands: f(a, b, c), as patterns.
template <class F>
void elementwise(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  const size_t inputs = i.operands.size() - 1;
  m.each(lanes, [&](int lane) {
    uint64_t in[3] = {}, out = 0;
    for (size_t n = 0; n < inputs && n < 3; ++n) in[n] = m.get(i.operands[n + 1], lane);
    for (int e = 0; e < i.type.elements; ++e) {
      const int shift = e * i.type.bits;
      out |= (f(in[0] >> shift, in[1] >> shift, in[2] >> shift) & low_bits(i.type.bits)) << shift;
    }
    m.set(i.operands[0], lane, out);
  });
}

// f(a, b, c) on floats, correctly rounded, since f is exact or rounds to odd.
template <class F>
void on_floats(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  elementwise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c) {
    const Type& t = i.type;
    return write(f(read(a, t, i.flush), read(b, t, i.flush), read(c, t, i.flush)), t, i);
  });
}

// f(a, b, c) on integers, extended to 64 bits by their type.
template <class F>
void on_integers(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  const auto extend = [&](uint64_t value) {
    return i.type.is_signed() ? static_cast<uint64_t>(sign_extend(value, i.type.bits))
                              : value & low_bits(i.type.bits);
  };
  if (i.type.elements > 1) {
    elementwise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c) {
      return f(extend(a), extend(b), extend(c));
    });
    return;
  }
  const size_t inputs = i.operands.size() - 1;
  m.each(lanes, [&](int lane) {
    uint64_t in[3] = {};
    for (size_t n = 0; n < inputs && n < 3; ++n) in[n] = m.get(i.operands[n + 1], lane);
    m.set(i.operands[0], lane, f(extend(in[0]), extend(in[1]), in[2]));
  });
}

double sum(double a, double b, const Type& type) {
  return type.format == Float::kDouble ? a + b : odd_sum(a, b);
}

uint64_t clamp_signed(int64_t value, int bits) {
  const int64_t most = static_cast<int64_t>(low_bits(bits) >> 1);
  return std::max(-most - 1, std::min(most, value));
}

void add(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("cc")) m.fail("carry chains are not supported", 0);
  if (i.type.is_float()) {
    on_floats(m, i, lanes, [&](double a, double b, double) { return sum(a, b, i.type); });
  } else {
    on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t) {
      return i.saturate ? clamp_signed(a + b, i.type.bits) : a + b;
    });
  }
}

void subtract(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("cc")) m.fail("carry chains are not supported", 0);
  if (i.type.is_float()) {
    on_floats(m, i, lanes, [&](double a, double b, double) { return sum(a, -b, i.type); });
  } else {
    on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t) {
      return i.saturate ? clamp_signed(a - b, i.type.bits) : a - b;
    });
  }
}

uint64_t multiply_integers(const Instruction& i, uint64_t a, uint64_t b) {
  if (!i.high) return a * b;
  return i.type.is_signed()
             ? static_cast<uint64_t>(static_cast<__int128>(static_cast<int64_t>(a)) *
                                         static_cast<int64_t>(b) >>
                                     i.type.bits)
             : static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> i.type.bits);
}

void multiply(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.type.is_float()) {
    on_floats(m, i, lanes, [](double a, double b, double) { return a * b; });
  } else {
    on_integers(m, i, lanes,
                [&](uint64_t a, uint64_t b, uint64_t) { return multiply_integers(i, a, b); });
  }
}

void multiply_add(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.has("cc")) m.fail("carry chains are not supported", 0);
  if (i.type.is_float()) {
    on_floats(m, i, lanes,
              [&](double a, double b, double c) { return fused(a, b, c, i.type.format); });
  } else {
    on_integers(m, i, lanes,
                [&](uint64_t a, uint64_t b, uint64_t c) { return multiply_integers(i, a, b) + c; });
  }
}

void divide(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.type.is_float()) {
    on_floats(m, i, lanes, [](double a, double b, double) { return a / b; });
  } else {
    on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t) -> uint64_t {
      if (b == 0) return ~0ull;
      return i.type.is_signed() ? static_cast<int64_t>(a) / static_cast<int64_t>(b) : a / b;
    });
  }
}

void remainder(Machine& m, const Instruction& i, uint32_t lanes) {
  on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t) -> uint64_t {
    if (b == 0) return ~0ull;
    return i.type.is_signed() ? static_cast<int64_t>(a) % static_cast<int64_t>(b) : a % b;
  });
}

template <bool kMaximum>
void select_extremum(Machine& m, const Instruction& i, uint32_t lanes) {
  if (i.type.is_float()) {
    elementwise(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c) {
      const Type& t = i.type;
      const auto pattern = [&](uint64_t x) {
        return i.flush ? flush_subnormal(x & low_bits(t.bits), t.format) : x & low_bits(t.bits);
      };
      uint64_t best = extremum(pattern(a), pattern(b), t.format, kMaximum, i.nan);
      if (i.operands.size() > 3) best = extremum(best, pattern(c), t.format, kMaximum, i.nan);
      return best;
    });
    return;
  }
  on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t) {
    const bool a_smaller =
        i.type.is_signed() ? static_cast<int64_t>(a) < static_cast<int64_t>(b) : a < b;
    const uint64_t best = a_smaller == kMaximum ? b : a;
    return i.relu && static_cast<int64_t>(best) < 0 ? 0 : best;
  });
}

// abs and neg of floats change the sign bit only, as the hardware does; of a NaN, PTX leaves the
// result undefined.
void absolute(Machine& m, const Instruction& i, uint32_t lanes) {
  elementwise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t) -> uint64_t {
    if (!i.type.is_float()) return llabs(sign_extend(a, i.type.bits));
    a &= low_bits(i.type.bits - 1);
    return i.flush ? flush_subnormal(a, i.type.format) : a;
  });
}

void negate(Machine& m, const Instruction& i, uint32_t lanes) {
  elementwise(m, i, lanes, [&](uint64_t a, uint64_t, uint64_t) -> uint64_t {
    if (!i.type.is_float()) return -a;
    a = (a & low_bits(i.type.bits)) ^ 1ull << (i.type.bits - 1);
    return i.flush ? flush_subnormal(a, i.type.format) : a;
  });
}

double reciprocal(double x) { return 1 / x; }
double inverse_root(double x) { return 1 / sqrt(x); }

template <double (*kFunction)(double)>
void function(Machine& m, const Instruction& i, uint32_t lanes) {
  on_floats(m, i, lanes, [](double a, double, double) { return kFunction(a); });
}

void absolute_difference(Machine& m, const Instruction& i, uint32_t lanes) {
  on_integers(m, i, lanes, [&](uint64_t a, uint64_t b, uint64_t c) {
    const bool larger = i.type.is_signed() ? static_cast<int64_t>(a) > static_cast<int64_t>(b) : a > b;
    return (larger ? a - b : b - a) + c;
  });
}

template <int kParts>
void dot(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) {
    const uint32_t a = m.get(i.operands[1], lane), c = m.get(i.operands[3], lane);
    const uint32_t b = m.get(i.operands[2], lane) >> (kParts == 2 && i.high ? 16 : 0);
    m.set(i.operands[0], lane,
          dot_product(a, i.type.is_signed(), b, i.source.is_signed(), kParts, c));
  });
}

// ---- Comparison ---------------------------------------------------------------------------------

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

Relation::Relation(const Instruction& instruction) : name(instruction.modifiers[0]) {
  for (size_t i = 1; i < instruction.modifiers.size(); ++i) {
    const std::string& m = instruction.modifiers[i];
    if (m == "and") combine = '&';
    if (m == "or") combine = '|';
    if (m == "xor") combine = '^';
  }
}

bool Relation::join(bool result, bool predicate) const {
  switch (combine) {
    case '&': return result && predicate;
    case '|': return result || predicate;
    case '^': return result != predicate;
    default: return result;
  }
}

const Handlers& arithmetic_handlers() {
  static const Handlers handlers = {
      {"add", add},
      {"sub", subtract},
      {"mul", multiply},
      {"mad", multiply_add},
      {"fma", multiply_add},
      {"div", divide},
      {"rem", remainder},
      {"min", select_extremum<false>},
      {"max", select_extremum<true>},
      {"abs", absolute},
      {"neg", negate},
      {"sad", absolute_difference},
      {"dp4a", dot<4>},
      {"dp2a", dot<2>},
      {"rcp", function<reciprocal>},
      {"sqrt", function<sqrt>},
      {"rsqrt", function<inverse_root>},
      {"ex2", function<exp2>},
      {"lg2", function<log2>},
      {"sin", function<sin>},
      {"cos", function<cos>},
      {"tanh", function<tanh>},
      {"setp", set_predicate},
      {"set", set_value},
      {"cvt", convert},
  };
  return handlers;
}

}  // namespace emulator::ptx

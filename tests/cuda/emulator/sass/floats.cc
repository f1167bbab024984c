// Floating point: float32, and packed halves of either 16-bit format.
//
// MUFU computes approximations: here they come from libm, rounded once. The hardware's last bits
// differ: no result may depend on them.
#include <algorithm>

#include "handlers.h"

namespace emulator::sass {

namespace {

Rounding rounding_of(const Instruction& i) {
  return i.has("RZ")   ? Rounding::kZero
         : i.has("RM") ? Rounding::kDown
         : i.has("RP") ? Rounding::kUp
                       : Rounding::kNearest;
}

uint32_t finish(double value, Float format, const Instruction& i) {
  if (i.has("SAT")) value = saturate(value);
  if (i.has("RELU") && value < 0) value = 0;
  const uint64_t bits = encode(value, format, rounding_of(i));
  return static_cast<uint32_t>(i.has("FTZ") ? flush_subnormal(bits, format) : bits);
}

// ---- float32 ------------------------------------------------------------------------------------

// f(a, b, c) of the sources, exact or rounded to odd.
template <class F>
void on_singles(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  const Parts parts(i);
  const bool flush = i.has("FTZ");
  m.each(lanes, [&](int lane) {
    double in[3] = {};
    for (size_t n = 0; n < parts.sources.size() && n < 3; ++n)
      in[n] = m.single(*parts.sources[n], lane, flush);
    m.set(*parts.destination, lane, finish(f(in[0], in[1], in[2]), Float::kSingle, i));
  });
}

void add(Machine& m, const Instruction& i, uint32_t lanes) {
  on_singles(m, i, lanes, [](double a, double b, double) { return odd_sum(a, b); });
}
void multiply(Machine& m, const Instruction& i, uint32_t lanes) {
  on_singles(m, i, lanes, [](double a, double b, double) { return a * b; });
}
void multiply_add(Machine& m, const Instruction& i, uint32_t lanes) {
  on_singles(m, i, lanes, [](double a, double b, double c) { return odd_sum(a * b, c); });
}

void extremum_of(Machine& m, const Instruction& i, uint32_t lanes) {
  const Parts parts(i);
  m.each(lanes, [&](int lane) {
    const uint32_t a = m.single_bits(*parts.sources[0], lane, i.has("FTZ"));
    const uint32_t b = m.single_bits(*parts.sources[1], lane, i.has("FTZ"));
    const bool maximum = !m.predicate(*parts.reads[0], lane);
    m.set(*parts.destination, lane,
          static_cast<uint32_t>(extremum(a, b, Float::kSingle, maximum, i.has("NAN"))));
  });
}

void set_predicates(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const auto& o = i.operands;
  const bool flush = i.has("FTZ");
  m.each(lanes, [&](int lane) {
    const double a = m.single(o[2], lane, flush), b = m.single(o[3], lane, flush);
    const bool joined = m.predicate(o[4], lane), result = compare_floats(relation.compare, a, b);
    m.set_predicate(o[0], lane, relation.join(result, joined));
    m.set_predicate(o[1], lane, relation.join(!result, joined));
  });
}

void set_value(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const auto& o = i.operands;
  const uint32_t one = i.has("BF") ? 0x3f800000u : ~0u;
  m.each(lanes, [&](int lane) {
    const double a = m.single(o[1], lane, i.has("FTZ")), b = m.single(o[2], lane, i.has("FTZ"));
    const bool result = compare_floats(relation.compare, a, b);
    m.set(o[0], lane, relation.join(result, m.predicate(o[3], lane)) ? one : 0);
  });
}

void select(Machine& m, const Instruction& i, uint32_t lanes) {
  const Parts parts(i);
  m.each(lanes, [&](int lane) {
    const bool first = m.predicate(*parts.reads[0], lane);
    m.set(*parts.destination, lane,
          m.single_bits(*parts.sources[first ? 0 : 1], lane, i.has("FTZ")));
  });
}

// Whether a division needs its slow path. It always works, so it is always taken.
void check_division(Machine& m, const Instruction& i, uint32_t lanes) {
  m.each(lanes, [&](int lane) { m.set_predicate(i.operands[0], lane, true); });
}

double reciprocal(double x) { return 1 / x; }
double inverse_root(double x) { return 1 / sqrt(x); }

void approximate(Machine& m, const Instruction& i, uint32_t lanes) {
  static const std::map<std::string, double (*)(double)> functions = {
      {"RCP", reciprocal}, {"RSQ", inverse_root}, {"SQRT", sqrt}, {"EX2", exp2}, {"LG2", log2},
      {"SIN", sin},        {"COS", cos},          {"TANH", tanh}};
  const auto function = functions.find(i.modifiers[0]);
  on_singles(m, i, lanes, [&](double a, double, double) { return function->second(a); });
}

// ---- Packed halves ------------------------------------------------------------------------------

Float half_format(const Instruction& i) { return i.has("BF16_V2") ? Float::kBrain : Float::kHalf; }

// One half of an operand, with its sign operations.
uint32_t half_bits(const Machine& m, const Operand& o, int lane, int half, Float format) {
  uint32_t value;
  if (o.place == Place::kReal) {
    value = static_cast<uint32_t>(encode(o.real[half], format));
  } else {
    const int from = o.halves ? o.halves - '0' : half;
    value = m.bits(o, lane) >> (16 * from) & 0xffff;
  }
  if (o.absolute) value &= 0x7fff;
  return o.minus ? value ^ 0x8000 : value;
}

template <class F>
void on_halves(Machine& m, const Instruction& i, uint32_t lanes, F f) {
  const Parts parts(i);
  const Float format = half_format(i);
  m.each(lanes, [&](int lane) {
    uint32_t result = 0;
    for (int half = 0; half < 2; ++half) {
      double in[3] = {};
      for (size_t n = 0; n < parts.sources.size() && n < 3; ++n)
        in[n] = decode(half_bits(m, *parts.sources[n], lane, half, format), format);
      result |= finish(f(in[0], in[1], in[2]), format, i) << (16 * half);
    }
    m.set(*parts.destination, lane, result);
  });
}

// HADD2.F32 widens: its result is the float32 sum of the lower halves.
void add_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  if (!i.has("F32"))
    return on_halves(m, i, lanes, [](double a, double b, double) { return odd_sum(a, b); });
  const Float format = half_format(i);
  m.each(lanes, [&](int lane) {
    const double a = decode(half_bits(m, i.operands[1], lane, 0, format), format);
    const double b = decode(half_bits(m, i.operands[2], lane, 0, format), format);
    m.set(i.operands[0], lane, finish(odd_sum(a, b), Float::kSingle, i));
  });
}

void multiply_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  on_halves(m, i, lanes, [](double a, double b, double) { return a * b; });
}
void multiply_add_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  on_halves(m, i, lanes, [](double a, double b, double c) { return odd_sum(a * b, c); });
}

void extremum_of_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  const Parts parts(i);
  const Float format = half_format(i);
  m.each(lanes, [&](int lane) {
    uint32_t result = 0;
    const bool maximum = !m.predicate(*parts.reads[0], lane);
    for (int half = 0; half < 2; ++half) {
      uint32_t best = half_bits(m, *parts.sources[0], lane, half, format);
      for (size_t n = 1; n < parts.sources.size(); ++n)  // HMNMX2 has two, VHMNMX three
        best = extremum(best, half_bits(m, *parts.sources[n], lane, half, format), format, maximum,
                        i.has("NAN"));
      result |= best << (16 * half);
    }
    m.set(*parts.destination, lane, result);
  });
}

bool half_holds(const Machine& m, const Relation& relation, const Operand& a, const Operand& b,
                int lane, int half, Float format) {
  return compare_floats(relation.compare, decode(half_bits(m, a, lane, half, format), format),
                        decode(half_bits(m, b, lane, half, format), format));
}

// 1.0 (.BF) or all ones in each half that holds.
void set_halves(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const Float format = half_format(i);
  const auto& o = i.operands;
  const uint32_t one = i.has("BF") ? static_cast<uint32_t>(encode(1, format)) : 0xffff;
  m.each(lanes, [&](int lane) {
    uint32_t result = 0;
    for (int half = 0; half < 2; ++half) {
      const bool holds = half_holds(m, relation, o[1], o[2], lane, half, format);
      if (relation.join(holds, m.predicate(o[3], lane))) result |= one << (16 * half);
    }
    m.set(o[0], lane, result);
  });
}

// A predicate for each half.
void set_half_predicates(Machine& m, const Instruction& i, uint32_t lanes) {
  const Relation relation(i);
  const auto& o = i.operands;
  m.each(lanes, [&](int lane) {
    const bool joined = m.predicate(o[4], lane);
    bool results[2];
    for (int half = 0; half < 2; ++half)
      results[half] = half_holds(m, relation, o[2], o[3], lane, half, half_format(i));
    for (int half = 0; half < 2; ++half)
      m.set_predicate(o[half], lane, relation.join(results[half], joined));
  });
}

// ---- Conversion ---------------------------------------------------------------------------------

void from_integer(Machine& m, const Instruction& i, uint32_t lanes) {
  const Operand &to = i.operands[0], &from = i.operands[1];
  const bool wide = i.has("S64") || i.has("U64"), is_signed = !i.has("U32") && !i.has("U64");
  const Float format = i.has("F16") ? Float::kHalf : i.has("BF16") ? Float::kBrain : Float::kSingle;
  m.each(lanes, [&](int lane) {
    const uint64_t value = wide ? m.pair(from, lane) : m.integer(from, lane);
    m.set(to, lane, finish(odd_integer(value, wide ? 64 : 32, is_signed), format, i));
  });
}

void to_integer(Machine& m, const Instruction& i, uint32_t lanes) {
  const bool wide = i.has("S64") || i.has("U64"), is_signed = !i.has("U32") && !i.has("U64");
  m.each(lanes, [&](int lane) {
    const Operand& from = i.operands[1];
    const double x = i.has("F16") ? decode(half_bits(m, from, lane, 0, Float::kHalf), Float::kHalf)
                                  : m.single(from, lane, i.has("FTZ"));
    const double whole = i.has("TRUNC")   ? trunc(x)
                         : i.has("FLOOR") ? floor(x)
                         : i.has("CEIL")  ? ceil(x)
                                          : nearbyint(x);
    const uint64_t of_nan = wide ? 1ull << 63 : 0;
    const uint64_t result = emulator::to_integer(whole, wide ? 64 : 32, is_signed, of_nan);
    if (wide) {
      m.set_pair(i.operands[0], lane, result);
    } else {
      m.set(i.operands[0], lane, static_cast<uint32_t>(result));
    }
  });
}

Float format_named(const Instruction& i, const std::string& name) {
  if (name == "BF16") return Float::kBrain;
  if (name == "F16") return Float::kHalf;
  if (name == "F32") return Float::kSingle;
  stop("unknown format: " + i.text);
}

// F2F.to.from
void convert(Machine& m, const Instruction& i, uint32_t lanes) {
  const Float to = format_named(i, i.modifiers[0]), from = format_named(i, i.modifiers[1]);
  m.each(lanes, [&](int lane) {
    const Operand& source = i.operands[1];
    const double x = from == Float::kSingle
                         ? m.single(source, lane, i.has("FTZ"))
                         : decode(half_bits(m, source, lane, 0, from), from);
    m.set(i.operands[0], lane, finish(x, to, i));
  });
}

// F2FP: two float32 to packed halves, the first is the upper one.
void pack(Machine& m, const Instruction& i, uint32_t lanes) {
  const Float format = i.has("BF16") ? Float::kBrain : Float::kHalf;
  m.each(lanes, [&](int lane) {
    const double upper = m.single(i.operands[1], lane, false);
    const double lower = m.single(i.operands[2], lane, false);
    m.set(i.operands[0], lane, finish(upper, format, i) << 16 | finish(lower, format, i));
  });
}

const char* const kArithmetic = " FTZ SAT RN RZ RM RP ";
const char* const kHalves = " MMA BF16_V2 RELU SAT FTZ F32 NAN ";
const char* const kRelations =
    " LT EQ LE GT NE GE NUM NAN LTU EQU LEU GTU NEU GEU AND OR XOR FTZ BF BF16_V2 ";

}  // namespace

const Entries& float_entries() {
  static const Entries entries = {
      {"FADD", {add, kArithmetic}},
      {"FMUL", {multiply, kArithmetic}},
      {"FFMA", {multiply_add, kArithmetic}},
      {"FMNMX", {extremum_of, " FTZ NAN "}},
      {"FSETP", {set_predicates, kRelations}},
      {"FSET", {set_value, kRelations}},
      {"FSEL", {select, " FTZ "}},
      {"FCHK", {check_division, " "}},
      {"MUFU", {approximate, " RCP RSQ SQRT EX2 LG2 SIN COS TANH "}},
      {"HADD2", {add_halves, kHalves}},
      {"HMUL2", {multiply_halves, kHalves}},
      {"HFMA2", {multiply_add_halves, kHalves}},
      {"HMNMX2", {extremum_of_halves, kHalves}},
      {"VHMNMX", {extremum_of_halves, kHalves}},
      {"HSET2", {set_halves, kRelations}},
      {"HSETP2", {set_half_predicates, kRelations}},
      {"I2F", {from_integer, " F16 BF16 U32 S32 U64 S64 RP RM RZ RN "}},
      {"I2FP", {from_integer, " F32 F16 BF16 U32 S32 RP RM RZ RN "}},
      {"F2I", {to_integer, " F16 FTZ U32 S32 U64 S64 TRUNC FLOOR CEIL NTZ "}},
      {"F2F", {convert, " F16 BF16 F32 FTZ RN RZ RM RP SAT "}},
      {"F2FP", {pack, " F16 BF16 F32 PACK_AB RELU RZ RN "}},
  };
  return entries;
}

}  // namespace emulator::sass

// Arithmetic, on scalars and on packed halves.
//
// Approximations (rcp, sqrt, rsqrt, ex2, lg2, div.approx, sin, cos, tanh) are computed with libm and
// rounded once. The hardware's last bits differ: no result may depend on them.
#include <algorithm>

#include "handlers.h"

namespace emulator::ptx {

namespace {

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

}  // namespace

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
  };
  return handlers;
}

}  // namespace emulator::ptx

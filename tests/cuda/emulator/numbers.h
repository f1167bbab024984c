// Arithmetic of the GPU's number formats on a CPU, bit by bit. Values are decoded to double, in which
// every sum, product and fma of float16, bfloat16 and float32 is either exact or rounded to odd; one
// rounding to the format then gives the correctly rounded result in every mode.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <array>
#include <map>
#include <string>

namespace emulator {

constexpr int kWarpLanes = 32;

enum class Float { kHalf, kBrain, kSingle, kDouble };  // float16, bfloat16, float32, float64
enum class Rounding { kNearest, kZero, kDown, kUp };
enum class Compare { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

struct Format {
  int bits, mantissa, bias;
  uint64_t infinity, canonical_nan;  // the NaN that instructions produce
};

inline const Format& format_of(Float f) {
  static const Format formats[] = {
      {16, 10, 15, 0x7c00, 0x7fff},
      {16, 7, 127, 0x7f80, 0x7fff},
      {32, 23, 127, 0x7f800000, 0x7fffffff},
      {64, 52, 1023, 0x7ff0000000000000ull, 0x7fffffffffffffffull},
  };
  return formats[static_cast<int>(f)];
}

inline uint64_t low_bits(int count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

inline int64_t sign_extend(uint64_t value, int bits) {
  return bits >= 64 ? static_cast<int64_t>(value)
                    : static_cast<int64_t>(value << (64 - bits)) >> (64 - bits);
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline double decode(uint64_t bits, Float f) {
  if (f == Float::kSingle) return bit_cast<float>(static_cast<uint32_t>(bits));
  if (f == Float::kBrain) return bit_cast<float>(static_cast<uint32_t>(bits << 16));
  if (f == Float::kDouble) return bit_cast<double>(bits);
  const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  const double size = exponent == 31  ? (fraction ? NAN : INFINITY)
                      : exponent == 0 ? ldexp(fraction, -24)
                                      : ldexp(fraction + 1024, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

inline bool rounds_away(double rest, bool odd, bool negative, Rounding rounding) {
  switch (rounding) {
    case Rounding::kNearest: return rest > 0.5 || (rest == 0.5 && odd);
    case Rounding::kZero: return false;
    case Rounding::kDown: return negative && rest > 0;
    case Rounding::kUp: return !negative && rest > 0;
  }
  return false;
}

inline uint64_t encode(double value, Float f, Rounding rounding = Rounding::kNearest) {
  const Format& format = format_of(f);
  if (value != value) return format.canonical_nan;
  if (f == Float::kDouble) return bit_cast<uint64_t>(value);
  const bool negative = signbit(value);
  const uint64_t sign = static_cast<uint64_t>(negative) << (format.bits - 1);
  const double size = fabs(value);
  if (size == 0) return sign;
  if (isinf(size)) return sign | format.infinity;
  int exponent;
  frexp(size, &exponent);
  exponent = exponent - 1 < 1 - format.bias ? 1 - format.bias : exponent - 1;
  const double scaled = ldexp(size, format.mantissa - exponent), whole = floor(scaled);
  uint64_t units = static_cast<uint64_t>(whole);
  if (rounds_away(scaled - whole, units & 1, negative, rounding)) ++units;
  // A subnormal has no implicit bit, and its exponent field is one lower: both cases add up.
  const int64_t field = exponent + format.bias - 1;
  const uint64_t result = (static_cast<uint64_t>(field) << format.mantissa) + units;
  if (result < format.infinity) return sign | result;
  const bool to_infinity = rounding == Rounding::kNearest ||
                           rounding == (negative ? Rounding::kDown : Rounding::kUp);
  return sign | (to_infinity ? format.infinity : format.infinity - 1);
}

inline uint64_t flush_subnormal(uint64_t bits, Float f) {
  const Format& format = format_of(f);
  return bits & format.infinity ? bits : bits & (1ull << (format.bits - 1));
}

// a + b, rounded to odd if it is not exact, so that rounding it again is like rounding it once.
inline double odd_sum(double a, double b) {
  const double sum = a + b;
  if (!isfinite(sum)) return sum;
  const double of_b = sum - a, error = (a - (sum - of_b)) + (b - of_b);
  const int64_t bits = bit_cast<int64_t>(sum);
  if (error == 0 || bits & 1) return sum;
  return bit_cast<double>(bits + ((error > 0) == (sum > 0) ? 1 : -1));
}

inline double fused(double a, double b, double c, Float f) {
  return f == Float::kDouble ? fma(a, b, c) : odd_sum(a * b, c);  // a * b is exact in double
}

inline double saturate(double value) { return value > 0 ? (value < 1 ? value : 1) : 0; }  // NaN: 0

// The smaller or larger of two patterns; -0 is smaller than +0. A NaN loses unless it propagates.
inline uint64_t extremum(uint64_t a, uint64_t b, Float f, bool maximum, bool propagate_nan) {
  const double x = decode(a, f), y = decode(b, f);
  const bool x_nan = x != x, y_nan = y != y;
  if ((x_nan && y_nan) || (propagate_nan && (x_nan || y_nan))) return format_of(f).canonical_nan;
  if (x_nan || y_nan) return x_nan ? b : a;
  const bool a_smaller = x < y || (x == y && signbit(x) && !signbit(y));
  return a_smaller == maximum ? b : a;
}

template <class T>
bool compare_ordered(Compare relation, T a, T b) {
  switch (relation) {
    case Compare::kEq: case Compare::kEqu: return a == b;
    case Compare::kNe: case Compare::kNeu: return a != b;
    case Compare::kLt: case Compare::kLtu: return a < b;
    case Compare::kLe: case Compare::kLeu: return a <= b;
    case Compare::kGt: case Compare::kGtu: return a > b;
    case Compare::kGe: case Compare::kGeu: return a >= b;
    case Compare::kNum: return true;
    case Compare::kNan: return false;
  }
  return false;
}

inline bool compare_floats(Compare relation, double a, double b) {
  const bool unordered = a != a || b != b;
  return unordered ? relation >= Compare::kEqu && relation != Compare::kNum
                   : compare_ordered(relation, a, b);
}

// ---- Integer operations that PTX and SASS share -------------------------------------------------

inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, unsigned table) {
  uint32_t result = 0;
  for (unsigned i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

// Picks four bytes of b:a by the nibbles of the selector; a nibble's top bit asks for the sign.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = bytes >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

// The selector that a mode of prmt such as "f4e" stands for, with the lowest two bits of its operand.
inline uint32_t permute_selector(const std::string& mode, uint32_t by) {
  static const std::map<std::string, std::array<uint16_t, 4>> selectors = {
      {"f4e", {0x3210, 0x4321, 0x5432, 0x6543}}, {"b4e", {0x5670, 0x6701, 0x7012, 0x0123}},
      {"rc8", {0x0000, 0x1111, 0x2222, 0x3333}}, {"ecl", {0x3210, 0x3211, 0x3222, 0x3333}},
      {"ecr", {0x0000, 0x1110, 0x2210, 0x3210}}, {"rc16", {0x1010, 0x3232, 0x1010, 0x3232}}};
  return selectors.at(mode)[by & 3];
}

// The sum of products of `count` parts of a (of 32 / count bits) with the bytes of b.
inline uint32_t dot_product(uint32_t a, bool a_signed, uint32_t b, bool b_signed, int count,
                            uint32_t addend) {
  const int width = 32 / count;
  for (int i = 0; i < count; ++i) {
    const uint64_t part = a >> (width * i) & low_bits(width), byte = b >> (8 * i) & 255;
    const int64_t x = a_signed ? sign_extend(part, width) : static_cast<int64_t>(part);
    const int64_t y = b_signed ? sign_extend(byte, 8) : static_cast<int64_t>(byte);
    addend += static_cast<uint32_t>(x * y);
  }
  return addend;
}

inline uint64_t reverse_bits(uint64_t value, int bits) {
  uint64_t result = 0;
  for (int i = 0; i < bits; ++i) result |= (value >> i & 1) << (bits - 1 - i);
  return result;
}

// The position of the highest bit that is set (signed: that differs from the sign), or -1.
inline int highest_bit(uint64_t value, int bits, bool is_signed) {
  value &= low_bits(bits);
  if (is_signed && value >> (bits - 1)) value = ~value & low_bits(bits);
  return value ? 63 - __builtin_clzll(value) : -1;
}

// An integer as a double, rounded to odd: it is split, since 64 bits do not fit.
inline double odd_integer(uint64_t value, int bits, bool is_signed) {
  if (is_signed) value = static_cast<uint64_t>(sign_extend(value, bits));
  if (!is_signed) value &= low_bits(bits);
  const double upper = is_signed ? static_cast<double>(static_cast<int64_t>(value) >> 32)
                                 : static_cast<double>(value >> 32);
  return odd_sum(upper * 4294967296.0, static_cast<uint32_t>(value));
}

// Rounded towards zero; out of range, the nearest integer; NaN becomes `of_nan`.
inline uint64_t to_integer(double x, int bits, bool is_signed, uint64_t of_nan) {
  if (x != x) return of_nan;
  x = trunc(x);
  const double end = ldexp(1, is_signed ? bits - 1 : bits);
  if (x >= end) return low_bits(is_signed ? bits - 1 : bits);
  if (!is_signed) return x < 0 ? 0 : static_cast<uint64_t>(x);
  return x < -end ? 1ull << (bits - 1) : static_cast<uint64_t>(static_cast<int64_t>(x));
}

enum class Shuffle { kIndex, kUp, kDown, kButterfly };

// The lane that `lane` reads; *inside says whether it lies within the segment that c describes.
inline int shuffle_source(Shuffle mode, int lane, uint32_t b, uint32_t c, bool* inside) {
  const int offset = b & 31, clamp = c & 31, segment = c >> 8 & 31;
  const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
  int source = first | (offset & ~segment);
  if (mode == Shuffle::kUp) source = lane - offset;
  if (mode == Shuffle::kDown) source = lane + offset;
  if (mode == Shuffle::kButterfly) source = lane ^ offset;
  *inside = mode == Shuffle::kUp ? source >= last : source <= last;
  return *inside ? source : lane;
}

// How a comparison's result joins another predicate: '&', '|', '^', or 0 for not at all.
inline bool combine_bools(char how, bool result, bool predicate) {
  switch (how) {
    case '&': return result && predicate;
    case '|': return result || predicate;
    case '^': return result != predicate;
    default: return result;
  }
}

}  // namespace emulator

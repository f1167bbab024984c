// How values compare, by instructions that treat both halves of a word at once. Legend:
// topk_mask.cuh.
#pragma once

#include "topk_mask_words.cuh"

namespace topk_mask {

// The hardware compares as the operator does: -0 equals +0, and "greater or unordered" is true for
// a NaN. So no key has to be computed for an element. Only thresholds, one per row, are numbered:
// the *order* of a value is its bit pattern made monotonic, with -0 next to +0. An order that is
// no number, below -infinity, is a bound that everything is above.
struct OrderLimits {
  int bottom;  // everything is above it
  int top;     // the class of all NaNs; not a bound
  int one;     // the order of 1, where a search without a forecast starts
  int binade;  // orders between 1 and 2
};

template <int kDtype, bool kAbsolute>
struct Format;

#if defined(__CUDA_ARCH__)
// mask = both halves of (kAbs ? |a| : a) compared with those of b, in the class HalfFormat below.
#define TOPK_COMPARE_PACKED(type, how, mask, a, b)                                             \
  if (kAbs) {                                                                                  \
    asm("{.reg .b32 m; abs." type " m, %1; set." how ".u32." type " %0, m, %2;}"               \
        : "=r"(mask) : "r"(a), "r"(b));                                                        \
  } else {                                                                                     \
    asm("set." how ".u32." type " %0, %1, %2;" : "=r"(mask) : "r"(a), "r"(b));                 \
  }
#if __CUDA_ARCH__ >= 900
#define TOPK_COMPARE_BFLOAT16(how, mask, a, b) TOPK_COMPARE_PACKED("bf16x2", how, mask, a, b)
#else
// No such instruction: as two floats, of which a bfloat16 is the upper half. z is 0, because both
// halves of b are equal; a literal 0 would make the widened values invariant, and ptxas would move
// them out of the loop that counts, into registers that there are not.
#define TOPK_COMPARE_BFLOAT16(how, mask, a, b)                                                 \
  asm("{.reg .b32 z, s, t, u, v; .reg .pred p, q;\n\t"                                         \
      "shr.u32 z, %2, 16; and.b32 t, %2, 0xffff; xor.b32 z, z, t;\n\t"                      \
      "xor.b32 v, z, %3; and.b32 u, %1, v;\n\t"                                                 \
      "prmt.b32 s, u, z, 0x1044; shl.b32 t, %2, 16; setp." how ".f32 p, s, t;\n\t"             \
      "prmt.b32 s, u, z, 0x3244; setp." how ".f32 q, s, t;\n\t"                                \
      "selp.b32 u, 0xffff, 0, p; selp.b32 v, 0xffff0000, 0, q; or.b32 %0, u, v;}"              \
      : "=r"(mask) : "r"(a), "r"(b), "n"(kAbs ? 0x7fff7fff : -1))
#endif
#define TOPK_COMPARE_HALVES(how, mask, a, b)              \
  if (kDtype == 2) {                                      \
    TOPK_COMPARE_PACKED("f16x2", how, mask, a, b)         \
  } else {                                                \
    TOPK_COMPARE_BFLOAT16(how, mask, a, b);               \
  }
#endif

// Two 16-bit values in a word. The comparisons give a mask: each half is 0xffff or 0.
template <int kDtype, bool kAbsolute>
struct HalfFormat {
  static constexpr bool kWide = false, kAbs = kAbsolute;
  static constexpr int kElements = 8;  // of a slot
  static constexpr int kInfinity = kDtype == 1 ? 0x7f80 : 0x7c00;
  static constexpr int kMantissaBits = kDtype == 1 ? 7 : 10;
  static constexpr OrderLimits kOrders = {kAbs ? -2 : -kInfinity - 2, kInfinity + 1,
                                          kDtype == 1 ? 0x3f80 : 0x3c00, 1 << kMantissaBits};
  // Fills slots past the row's end: never above a bound, and the last to be tied.
  static constexpr uint32_t kPad = kAbs ? 0 : (0x8000u | kInfinity) * 0x10001u;
  static constexpr uint32_t kPositiveInfinity = kInfinity * 0x10001u;

  TOPK_INLINE static uint32_t bound_of(int order) {  // in both halves
    return ((order ^ (order >> 31 & 0x7fff)) & 0xffffu) * 0x10001u;
  }

  // The masks are made in one piece of assembly each. Otherwise the compiler would hold absolute or
  // widened values in registers from one comparison to the next.
  TOPK_INLINE static uint32_t above(uint32_t word, uint32_t bound) {
#if defined(__CUDA_ARCH__)
    uint32_t mask;
    TOPK_COMPARE_HALVES("gtu", mask, word, bound);
    return mask;
#else
    return by_halves(word, bound, [](float x, float y) { return !(x <= y); });
#endif
  }

  TOPK_INLINE static uint32_t equal(uint32_t word, uint32_t value) {
#if defined(__CUDA_ARCH__)
    uint32_t mask;
    TOPK_COMPARE_HALVES("eq", mask, word, value);
    return mask;
#else
    return by_halves(word, value, [](float x, float y) { return x == y; });
#endif
  }

  // The smaller and the larger of two, in each half. A NaN loses.
  TOPK_INLINE static uint32_t smaller(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t out;
    if (kDtype == 1) {
      asm("min.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    } else {
      asm("min.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    }
    return out;
#else
    return select(by_halves(a, b, [](float x, float y) { return y != y || x < y; }), a, b);
#endif
  }
  TOPK_INLINE static uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t out;
    if (kDtype == 1) {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    }
    return out;
#else
    return select(by_halves(a, b, [](float x, float y) { return y != y || x > y; }), a, b);
#endif
  }
  // The order of a number. For both zeros it is that of -0, below which there is no zero.
  TOPK_INLINE static int order_of(uint32_t half) {
    return half == 0 ? -1 : static_cast<int>(half & 0x8000u ? half ^ 0xffff7fffu : half);
  }
  TOPK_INLINE static int smallest_order(uint32_t word) {
    const int low = order_of(word & 0xffffu), high = order_of(word >> 16);
    return low < high ? low : high;
  }
  TOPK_INLINE static int largest_order(uint32_t word) {
    const int low = order_of(word & 0xffffu), high = order_of(word >> 16);
    return low > high ? low : high;
  }
  TOPK_INLINE static uint32_t compared(uint32_t word) { return kAbs ? word & 0x7fff7fffu : word; }

  TOPK_INLINE static uint32_t not_a_number(uint32_t word) {
    const uint32_t magnitude = word & 0x7fff7fffu;
    return ((magnitude & 0xffffu) > kInfinity ? 0xffffu : 0) |
           ((magnitude >> 16) > kInfinity ? 0xffff0000u : 0);
  }

  // Masks add up as two counters. The sums add up, too: over words, slots, lanes.
  using Count = uint32_t;
  TOPK_INLINE static Count above_in(const uint32_t (&words)[4], uint32_t bound) {
    return above(words[0], bound) + above(words[1], bound) +
           above(words[2], bound) + above(words[3], bound);
  }
  TOPK_INLINE static Count equal_in(const uint32_t (&words)[4], uint32_t value) {
    return equal(words[0], value) + equal(words[1], value) +
           equal(words[2], value) + equal(words[3], value);
  }
  TOPK_INLINE static Count count_of(uint32_t mask) { return mask; }
  TOPK_INLINE static uint32_t summand(Count count) { return count; }
  // A mask adds 65535 for its low half and -65536 for its high one, modulo 2^32.
  // The count behind a sum of at most 65535 elements. `summands`: how many were added up.
  TOPK_INLINE static uint32_t decode(uint32_t sum, uint32_t /* summands */) {
    const uint32_t counts = 0 - sum, low = counts & 0xffffu;
    return (low + low + (counts >> 16)) & 0xffffu;
  }

 private:
  // For the tests' build. A float16's exponent is moved by a product, which is exact.
  TOPK_INLINE static float widen(uint32_t half) {
    const uint32_t magnitude = half & 0x7fffu;
    float x = as_float(magnitude << 16);
    if (kDtype == 2)
      x = magnitude >= 0x7c00u ? as_float(0x7f800000u | magnitude << 13)
                               : as_float(magnitude << 13) * 5.192296858534828e33f;
    return half & 0x8000u ? -x : x;
  }

  template <class Compare>
  TOPK_INLINE static uint32_t by_halves(uint32_t word, uint32_t other, Compare compare) {
    if (kAbs) word &= 0x7fff7fffu;
    return (compare(widen(word & 0xffffu), widen(other & 0xffffu)) ? 0xffffu : 0) |
           (compare(widen(word >> 16), widen(other >> 16)) ? 0xffff0000u : 0);
  }
};

template <bool kAbsolute>
struct Format<1, kAbsolute> : HalfFormat<1, kAbsolute> {};
template <bool kAbsolute>
struct Format<2, kAbsolute> : HalfFormat<2, kAbsolute> {};

// One float32 in a word. A comparison gives 1 or 0, which are counted in the FMA pipe.
template <bool kAbsolute>
struct Format<0, kAbsolute> {
  static constexpr bool kWide = true, kAbs = kAbsolute;
  static constexpr int kElements = 4;
  static constexpr int kInfinity = 0x7f800000;
  static constexpr OrderLimits kOrders = {kAbs ? -2 : -kInfinity - 2, kInfinity + 1, 0x3f800000,
                                          1 << 23};
  static constexpr uint32_t kPad = kAbs ? 0 : 0xff800000u;
  static constexpr uint32_t kPositiveInfinity = kInfinity;

  TOPK_INLINE static uint32_t bound_of(int order) {
    return static_cast<uint32_t>(order ^ (order >> 31 & 0x7fffffff));
  }
  // The order of a number. For both zeros it is that of -0, below which there is no zero.
  TOPK_INLINE static int order_of(uint32_t word) {
    const int bits = static_cast<int>(word);
    return bits == 0 ? -1 : bits ^ (bits >> 31 & 0x7fffffff);
  }
  TOPK_INLINE static int smallest_order(uint32_t word) { return order_of(word); }
  TOPK_INLINE static int largest_order(uint32_t word) { return order_of(word); }
  TOPK_INLINE static uint32_t smaller(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return as_word(fminf(as_float(a), as_float(b)));
#else  // of a signalling NaN, a C library's fminf makes a NaN
    return as_float(b) != as_float(b) || as_float(a) < as_float(b) ? a : b;
#endif
  }
  TOPK_INLINE static uint32_t larger(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    return as_word(fmaxf(as_float(a), as_float(b)));
#else
    return as_float(b) != as_float(b) || as_float(a) > as_float(b) ? a : b;
#endif
  }

  TOPK_INLINE static uint32_t compared(uint32_t word) { return kAbs ? word & 0x7fffffffu : word; }
  TOPK_INLINE static uint32_t above(uint32_t word, uint32_t bound) {  // masks, as for halves
    return !(as_float(compared(word)) <= as_float(bound)) ? 0xffffffffu : 0;
  }
  TOPK_INLINE static uint32_t equal(uint32_t word, uint32_t value) {
    return as_float(compared(word)) == as_float(value) ? 0xffffffffu : 0;
  }
  TOPK_INLINE static uint32_t not_a_number(uint32_t word) {
    return (word & 0x7fffffffu) > kInfinity ? 0xffffffffu : 0;
  }

  using Count = float;
  TOPK_INLINE static Count above_in(const uint32_t (&words)[4], uint32_t bound) {
    return (one_if_above(words[0], bound) + one_if_above(words[1], bound)) +
           (one_if_above(words[2], bound) + one_if_above(words[3], bound));
  }
  TOPK_INLINE static Count equal_in(const uint32_t (&words)[4], uint32_t value) {
    return (one_if_equal(words[0], value) + one_if_equal(words[1], value)) +
           (one_if_equal(words[2], value) + one_if_equal(words[3], value));
  }
  TOPK_INLINE static Count count_of(uint32_t mask) { return mask != 0 ? 1.0f : 0.0f; }
  TOPK_INLINE static uint32_t summand(Count count) { return as_word(count + kCounter); }
  TOPK_INLINE static uint32_t decode(uint32_t sum, uint32_t summands) {
    return sum - summands * kCounterWord;
  }

 private:
  TOPK_INLINE static float one_if_above(uint32_t word, uint32_t bound) {
#if defined(__CUDA_ARCH__)
    float one;
    if (kAbs) {  // in one piece: the compiler would hold the absolute values in registers
      asm("{.reg .f32 a; abs.f32 a, %1; set.gtu.f32.f32 %0, a, %2;}"
          : "=f"(one) : "f"(as_float(word)), "f"(as_float(bound)));
    } else {
      asm("set.gtu.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(as_float(word)), "f"(as_float(bound)));
    }
    return one;
#else
    return !(as_float(compared(word)) <= as_float(bound));
#endif
  }
  TOPK_INLINE static float one_if_equal(uint32_t word, uint32_t value) {
#if defined(__CUDA_ARCH__)
    float one;
    if (kAbs) {
      asm("{.reg .f32 a; abs.f32 a, %1; set.eq.f32.f32 %0, a, %2;}"
          : "=f"(one) : "f"(as_float(word)), "f"(as_float(value)));
    } else {
      asm("set.eq.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(as_float(word)), "f"(as_float(value)));
    }
    return one;
#else
    return as_float(compared(word)) == as_float(value);
#endif
  }
};

// y = raw where the slot's bit is set.
template <class Fmt>
TOPK_INLINE void keep_selected(const uint32_t (&raw)[4], uint32_t bits, uint32_t (&kept)[4]) {
  // The product moves bit i of a nibble to the top of byte i.
  const uint32_t low = (bits & 0xfu) * 0x10204080u;
  if (Fmt::kWide) {
#pragma unroll
    for (int i = 0; i < 4; ++i) kept[i] = raw[i] & spread_signs(low, 0x1111u * i);
  } else {
    const uint32_t high = (bits >> 4) * 0x10204080u;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      kept[i] = raw[i] & spread_signs(i < 2 ? low : high, i % 2 ? 0x3322u : 0x1100u);
  }
}

}  // namespace topk_mask

// AVX-512 with VBMI2 (16-bit compress): Ice Lake, Zen 4 and later.

#include "topk_mask_cpu_internal.h"

#if TOPK_MASK_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,bmi,bmi2,lzcnt,popcnt")
#endif

namespace topk_megatron {
namespace avx512 {

template <typename F, bool Abs, int kBytes = sizeof(typename F::Raw)>
struct Ops;

// float32: "key >= t" is "not (x <= the value with key t - 1)", which a NaN of either sign passes.
template <typename F, bool Abs>
struct Ops<F, Abs, 4> {
  using Raw = uint32_t;
  using Key = typename F::Key;
  using Threshold = __m512;
  static constexpr bool kNanTies = false;

  struct NanWatch {
    void see(const Raw*) {}
    bool tripped() const { return false; }
  };

  static Threshold threshold(Key t) {
    const Key below = t - 1;
    const uint32_t raw = below < 0 ? static_cast<uint32_t>(-below) | 0x80000000u : below;
    // The pattern below the smallest key is a NaN's, and everything passes the compare with a NaN.
    return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(raw)));
  }

  static __m512 load(const Raw* p) { return _mm512_loadu_ps(reinterpret_cast<const float*>(p)); }

  static __mmask16 compare(__m512 x, Threshold t) {
    if (Abs) x = _mm512_abs_ps(x);
    return _mm512_cmp_ps_mask(x, t, _CMP_NLE_UQ);
  }

  static uint32_t ge(const Raw* p, Threshold t) {
    return _mm512_kunpackw(compare(load(p + 16), t), compare(load(p), t));
  }

  static int count(const Raw* p, Threshold t) {  // cheaper than joining the masks
    return __builtin_popcount(_cvtmask16_u32(compare(load(p), t))) +
           __builtin_popcount(_cvtmask16_u32(compare(load(p + 16), t)));
  }

  static Raw* put(__m512 x, uint32_t mask, Raw* out) {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), x));
    return out + __builtin_popcount(mask);
  }

  static Raw* compress(const Raw* p, uint32_t mask, Raw* out) {
    return put(load(p + 16), mask >> 16, put(load(p), mask & 0xffff, out));
  }

  static Raw* collect(const Raw* p, Threshold t, Raw* out, NanWatch&) {
    const __m512 x0 = load(p), x1 = load(p + 16);
    const uint32_t m0 = _cvtmask16_u32(compare(x0, t)), m1 = _cvtmask16_u32(compare(x1, t));
    return put(x1, m1, put(x0, m0, out));
  }

  struct Window {
    Threshold low, high;
  };

  static Window window(Key low, Key high) { return {threshold(low), threshold(high)}; }

  static Raw* collect_between(const Raw* p, const Window& w, Raw* out, int64_t& num_from,
                              NanWatch&) {
    for (int i = 0; i < kBlock; i += 16) {
      const __m512 x = load(p + i);
      const __mmask16 reached = compare(x, w.low);
      const __mmask16 between =
          _mm512_mask_cmp_ps_mask(reached, Abs ? _mm512_abs_ps(x) : x, w.high, _CMP_LE_OQ);
      num_from += __builtin_popcount(_cvtmask16_u32(reached));
      out = put(x, _cvtmask16_u32(between), out);
    }
    return out;
  }

  template <bool Stream>
  static void store(Raw* y, __m512 x) {
    if (Stream)
      _mm512_stream_ps(reinterpret_cast<float*>(y), x);
    else
      _mm512_storeu_ps(y, x);
  }

  template <bool Stream>
  static void mask_store(const Raw* x, Raw* y, uint32_t mask) {
    store<Stream>(y, _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), load(x)));
    store<Stream>(y + 16, _mm512_maskz_mov_ps(static_cast<__mmask16>(mask >> 16), load(x + 16)));
  }

  template <bool Stream>
  static uint32_t ge_store(const Raw* x, Raw* y, Threshold t) {
    const __m512 x0 = load(x), x1 = load(x + 16);
    const __mmask16 m0 = compare(x0, t), m1 = compare(x1, t);
    store<Stream>(y, _mm512_maskz_mov_ps(m0, x0));
    store<Stream>(y + 16, _mm512_maskz_mov_ps(m1, x1));
    return _mm512_kunpackw(m1, m0);
  }

  static Key max_key_hint(const Raw* p, int64_t num_blocks) {
    __m512 best = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_blocks * kBlock; i += 16) {
      const __m512 x = load(p + i);
      best = _mm512_max_ps(Abs ? _mm512_abs_ps(x) : x, best);
    }
    const float most = _mm512_reduce_max_ps(best);
    uint32_t raw;
    std::memcpy(&raw, &most, sizeof raw);
    return F::template key<Abs>(raw);
  }
};

// 16-bit formats: the patterns with key >= t are one range of unsigned integers modulo 2^16, except
// for negative NaN above a positive t, which NanWatch detects.
template <typename F, bool Abs>
struct Ops<F, Abs, 2> {
  using Raw = uint16_t;
  using Key = typename F::Key;
  struct Threshold {
    __m512i base, span;
  };
  static constexpr bool kNanTies = false;
  static constexpr int kFirstNegativeNan = F::kInf + 0x8001;

  struct NanWatch {
    __m512i most;
    NanWatch() : most(_mm512_setzero_si512()) {}  // an implicit one would lack the target
    void see(const Raw* p) { see(_mm512_loadu_si512(p)); }
    void see(__m512i x) {
      if (!Abs) most = _mm512_max_epu16(most, x);
    }
    bool tripped() const {
      const __m512i first = _mm512_set1_epi16(static_cast<short>(kFirstNegativeNan));
      return !Abs && _mm512_cmpge_epu16_mask(most, first) != 0;
    }
  };

  static Threshold threshold(Key t) {
    const int base = (Abs || t > 0) ? t : kFirstNegativeNan;
    const int last = (Abs || t > 0) ? 0x7fff : 0x8000 - t;
    return {_mm512_set1_epi16(static_cast<short>(base)),
            _mm512_set1_epi16(static_cast<short>(last - base))};
  }

  static __mmask32 compare(__m512i x, const Threshold& t) {
    if (Abs) x = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    return _mm512_cmple_epu16_mask(_mm512_sub_epi16(x, t.base), t.span);
  }

  static uint32_t ge(const Raw* p, const Threshold& t) {
    return _cvtmask32_u32(compare(_mm512_loadu_si512(p), t));
  }

  static int count(const Raw* p, const Threshold& t) { return __builtin_popcount(ge(p, t)); }

  static Raw* put(__m512i x, __mmask32 mask, Raw* out) {
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi16(mask, x));
    return out + __builtin_popcount(_cvtmask32_u32(mask));
  }

  static Raw* compress(const Raw* p, uint32_t mask, Raw* out) {
    return put(_mm512_loadu_si512(p), mask, out);
  }

  static Raw* collect(const Raw* p, const Threshold& t, Raw* out, NanWatch& watch) {
    const __m512i x = _mm512_loadu_si512(p);
    watch.see(x);
    return put(x, compare(x, t), out);
  }

  // Above zero one subtraction serves both ends. That matters because the vector ports limit this
  // pass.
  struct Window {
    Threshold low, high;
    __m512i width;
    bool above_zero;
  };

  static Window window(Key low, Key high) {
    return {threshold(low), threshold(high), _mm512_set1_epi16(static_cast<short>(high - low)),
            Abs || low > 0};
  }

  static Raw* collect_between(const Raw* p, const Window& w, Raw* out, int64_t& num_from,
                              NanWatch& watch) {
    const __m512i x = _mm512_loadu_si512(p);
    watch.see(x);
    __mmask32 reached, between;
    if (w.above_zero) {
      const __m512i magnitude = Abs ? _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)) : x;
      const __m512i over = _mm512_sub_epi16(magnitude, w.low.base);
      reached = _mm512_cmple_epu16_mask(over, w.low.span);
      between = _mm512_mask_cmplt_epu16_mask(reached, over, w.width);
    } else {
      reached = compare(x, w.low);
      between = _kandn_mask32(compare(x, w.high), reached);
    }
    num_from += __builtin_popcount(_cvtmask32_u32(reached));
    return put(x, between, out);
  }

  template <bool Stream>
  static void store(Raw* y, __m512i x) {
    if (Stream)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(y), x);
    else
      _mm512_storeu_si512(y, x);
  }

  template <bool Stream>
  static void mask_store(const Raw* x, Raw* y, uint32_t mask) {
    store<Stream>(y, _mm512_maskz_mov_epi16(mask, _mm512_loadu_si512(x)));
  }

  template <bool Stream>
  static uint32_t ge_store(const Raw* p, Raw* y, const Threshold& t) {
    const __m512i x = _mm512_loadu_si512(p);
    const __mmask32 mask = compare(x, t);
    store<Stream>(y, _mm512_maskz_mov_epi16(mask, x));
    return _cvtmask32_u32(mask);
  }

  static Key max_key_hint(const Raw* p, int64_t num_blocks) {
    __m512i best = _mm512_setzero_si512();
    for (int64_t b = 0; b < num_blocks; ++b) {
      __m512i x = _mm512_loadu_si512(p + b * kBlock);
      if (Abs) x = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
      best = _mm512_max_epi16(best, x);
    }
    alignas(64) int16_t lanes[kBlock];
    _mm512_store_si512(lanes, best);
    return *std::max_element(lanes, lanes + kBlock);
  }
};

struct Traits {
  static constexpr bool kFloat64 = false;
  static constexpr int kStreamBytes = 64;
  static void stream(const char* from, char* to) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace avx512
}  // namespace topk_megatron

#define TOPK_ISA avx512
#include "topk_mask_cpu_entry.h"
#undef TOPK_ISA

namespace topk_megatron {

constexpr Unit kAvx512 = avx512::kUnit;

}  // namespace topk_megatron

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // TOPK_MASK_X86

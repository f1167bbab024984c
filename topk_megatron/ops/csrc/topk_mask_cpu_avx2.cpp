// AVX2: every x86-64 server of the last ten years. Compress is a shuffle by a table for 256 masks.

#include "topk_mask_cpu_internal.h"

#if TOPK_MASK_X86

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#endif

namespace topk_megatron {
namespace avx2 {

// For each 8-bit mask: the positions of its set bits in ascending order, one per byte.
struct CompressTable {
  alignas(64) uint64_t lanes[256] = {};  // lane numbers, for 8 x 32 bit
  alignas(64) uint8_t bytes[256][16] = {};  // byte numbers, for 8 x 16 bit

  constexpr CompressTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int num = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (!((mask >> lane) & 1)) continue;
        lanes[mask] |= static_cast<uint64_t>(lane) << (8 * num);
        bytes[mask][2 * num] = static_cast<uint8_t>(2 * lane);
        bytes[mask][2 * num + 1] = static_cast<uint8_t>(2 * lane + 1);
        ++num;
      }
    }
  }
};
static constexpr CompressTable kCompress;

template <typename F, bool Abs, int kBytes = sizeof(typename F::Raw)>
struct Ops;

// float32: "key >= t" is "not (x <= the value with key t - 1)", which a NaN of either sign passes.
template <typename F, bool Abs>
struct Ops<F, Abs, 4> {
  using Raw = uint32_t;
  using Key = typename F::Key;
  using Threshold = __m256;
  static constexpr bool kNanTies = false;

  struct NanWatch {
    void see(const Raw*) {}
    bool tripped() const { return false; }
  };

  static Threshold threshold(Key t) {
    const Key below = t - 1;
    const uint32_t raw = below < 0 ? static_cast<uint32_t>(-below) | 0x80000000u : below;
    // The pattern below the smallest key is a NaN's, and everything passes the compare with a NaN.
    return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(raw)));
  }

  static __m256 load(const Raw* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }

  static __m256 magnitude(__m256 x) {
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
  }

  static __m256 compare(__m256 x, Threshold t) {
    return _mm256_cmp_ps(Abs ? magnitude(x) : x, t, _CMP_NLE_UQ);
  }

  static uint32_t ge(const Raw* p, Threshold t) {
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i)
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(compare(load(p + 8 * i), t))) << (8 * i);
    return mask;
  }

  static int count(const Raw* p, const Threshold& t) { return __builtin_popcount(ge(p, t)); }

  static Raw* compress(const Raw* p, uint32_t mask, Raw* out) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t part = (mask >> (8 * i)) & 0xff;
      const __m256i order = _mm256_cvtepu8_epi32(
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kCompress.lanes[part])));
      _mm256_storeu_ps(reinterpret_cast<float*>(out),
                       _mm256_permutevar8x32_ps(load(p + 8 * i), order));
      out += __builtin_popcount(part);
    }
    return out;
  }

  static Raw* collect(const Raw* p, Threshold t, Raw* out, NanWatch&) {
    return compress(p, ge(p, t), out);
  }

  struct Window {
    Threshold low, high;
  };

  static Window window(Key low, Key high) { return {threshold(low), threshold(high)}; }

  static Raw* collect_between(const Raw* p, const Window& w, Raw* out, int64_t& num_from,
                              NanWatch&) {
    const uint32_t reached = ge(p, w.low);
    num_from += __builtin_popcount(reached);
    return compress(p, reached & ~ge(p, w.high), out);
  }

  template <bool Stream>
  static void store(Raw* y, __m256 x) {
    if (Stream)
      _mm256_stream_ps(reinterpret_cast<float*>(y), x);
    else
      _mm256_storeu_ps(reinterpret_cast<float*>(y), x);
  }

  template <bool Stream>
  static void mask_store(const Raw* x, Raw* y, uint32_t mask) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    for (int i = 0; i < 4; ++i) {
      const __m256i part = _mm256_set1_epi32(static_cast<int>(mask >> (8 * i)));
      const __m256i keep = _mm256_cmpeq_epi32(_mm256_and_si256(part, lane_bit), lane_bit);
      store<Stream>(y + 8 * i, _mm256_and_ps(load(x + 8 * i), _mm256_castsi256_ps(keep)));
    }
  }

  template <bool Stream>
  static uint32_t ge_store(const Raw* p, Raw* y, Threshold t) {
    uint32_t mask = 0;
    for (int i = 0; i < 4; ++i) {
      const __m256 x = load(p + 8 * i), keep = compare(x, t);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(keep)) << (8 * i);
      store<Stream>(y + 8 * i, _mm256_and_ps(x, keep));
    }
    return mask;
  }

  static Key max_key_hint(const Raw* p, int64_t num_blocks) {
    __m256 best = _mm256_setzero_ps();
    for (int64_t i = 0; i < num_blocks * kBlock; i += 8)
      best = _mm256_max_ps(Abs ? magnitude(load(p + i)) : load(p + i), best);
    alignas(32) uint32_t lanes[8];
    _mm256_store_ps(reinterpret_cast<float*>(lanes), best);
    return F::template key<Abs>(*std::max_element(lanes, lanes + 8));  // all are >= +0
  }
};

// 16-bit formats: the patterns with key >= t are one range of unsigned integers modulo 2^16, except
// for negative NaN above a positive t, which NanWatch detects. AVX2 compares only signed integers,
// so both sides carry an offset of 2^15.
template <typename F, bool Abs>
struct Ops<F, Abs, 2> {
  using Raw = uint16_t;
  using Key = typename F::Key;
  struct Threshold {
    __m256i base, span;
  };
  static constexpr bool kNanTies = false;
  static constexpr int kFirstNegativeNan = F::kInf + 0x8001;

  static __m256i load(const Raw* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  struct NanWatch {
    __m256i most;
    NanWatch() : most(_mm256_setzero_si256()) {}  // an implicit one would lack the target
    void see(const Raw* p) {
      if (!Abs) most = _mm256_max_epu16(most, _mm256_max_epu16(load(p), load(p + 16)));
    }
    bool tripped() const {
      alignas(32) uint16_t lanes[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), most);
      return !Abs && *std::max_element(lanes, lanes + 16) >= kFirstNegativeNan;
    }
  };

  static Threshold threshold(Key t) {
    const int base = (Abs || t > 0) ? t : kFirstNegativeNan;
    const int last = (Abs || t > 0) ? 0x7fff : 0x8000 - t;
    return {_mm256_set1_epi16(static_cast<short>(base + 0x8000)),
            _mm256_set1_epi16(static_cast<short>(last - base + 0x8000))};
  }

  static __m256i outside(__m256i x, const Threshold& t) {
    if (Abs) x = _mm256_and_si256(x, _mm256_set1_epi16(0x7fff));
    return _mm256_cmpgt_epi16(_mm256_sub_epi16(x, t.base), t.span);
  }

  static uint32_t inside_bits(__m256i outside0, __m256i outside1) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(outside0, outside1), 0xd8);
    return ~static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
  }

  static uint32_t ge(const Raw* p, const Threshold& t) {
    return inside_bits(outside(load(p), t), outside(load(p + 16), t));
  }

  static int count(const Raw* p, const Threshold& t) { return __builtin_popcount(ge(p, t)); }

  static Raw* compress(const Raw* p, uint32_t mask, Raw* out) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t part = (mask >> (8 * i)) & 0xff;
      const __m128i order =
          _mm_load_si128(reinterpret_cast<const __m128i*>(kCompress.bytes[part]));
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * i));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(x, order));
      out += __builtin_popcount(part);
    }
    return out;
  }

  static Raw* collect(const Raw* p, const Threshold& t, Raw* out, NanWatch& watch) {
    watch.see(p);
    return compress(p, ge(p, t), out);
  }

  struct Window {
    Threshold low, high;
  };

  static Window window(Key low, Key high) { return {threshold(low), threshold(high)}; }

  static Raw* collect_between(const Raw* p, const Window& w, Raw* out, int64_t& num_from,
                              NanWatch& watch) {
    watch.see(p);
    const uint32_t reached = ge(p, w.low);
    num_from += __builtin_popcount(reached);
    return compress(p, reached & ~ge(p, w.high), out);
  }

  template <bool Stream>
  static void store(Raw* y, __m256i x) {
    if (Stream)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(y), x);
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), x);
  }

  template <bool Stream>
  static void mask_store(const Raw* x, Raw* y, uint32_t mask) {
    const __m256i lane_bit =
        _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                          static_cast<short>(32768));
    for (int i = 0; i < 2; ++i) {
      const __m256i part = _mm256_set1_epi16(static_cast<short>(mask >> (16 * i)));
      const __m256i keep = _mm256_cmpeq_epi16(_mm256_and_si256(part, lane_bit), lane_bit);
      store<Stream>(y + 16 * i, _mm256_and_si256(load(x + 16 * i), keep));
    }
  }

  template <bool Stream>
  static uint32_t ge_store(const Raw* x, Raw* y, const Threshold& t) {
    const __m256i x0 = load(x), x1 = load(x + 16);
    const __m256i drop0 = outside(x0, t), drop1 = outside(x1, t);
    store<Stream>(y, _mm256_andnot_si256(drop0, x0));
    store<Stream>(y + 16, _mm256_andnot_si256(drop1, x1));
    return inside_bits(drop0, drop1);
  }

  static Key max_key_hint(const Raw* p, int64_t num_blocks) {
    __m256i best = _mm256_setzero_si256();
    for (int64_t i = 0; i < num_blocks * kBlock; i += 16) {
      __m256i x = load(p + i);
      if (Abs) x = _mm256_and_si256(x, _mm256_set1_epi16(0x7fff));
      best = _mm256_max_epi16(best, x);
    }
    alignas(32) int16_t lanes[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), best);
    return *std::max_element(lanes, lanes + 16);
  }
};

struct Traits {
  static constexpr bool kFloat64 = false;
  static constexpr int kStreamBytes = 32;
  static void stream(const char* from, char* to) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static void fence() { _mm_sfence(); }
};

}  // namespace avx2
}  // namespace topk_megatron

#define TOPK_ISA avx2
#include "topk_mask_cpu_entry.h"
#undef TOPK_ISA

namespace topk_megatron {

constexpr Unit kAvx2 = avx2::kUnit;

}  // namespace topk_megatron

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // TOPK_MASK_X86

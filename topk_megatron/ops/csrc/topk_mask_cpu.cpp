// The portable unit, the choice of instruction set, and the code that needs no SIMD.

#include "topk_mask_cpu_internal.h"

#if TOPK_MASK_X86
#include <immintrin.h>
#endif

namespace topk_megatron {
namespace portable {

template <typename F, bool Abs>
struct Ops {
  using Raw = typename F::Raw;
  using Key = typename F::Key;
  using Threshold = Key;
  static constexpr bool kNanTies = true;

  struct NanWatch {
    void see(const Raw*) {}
    bool tripped() const { return false; }
  };

  static Threshold threshold(Key t) { return t; }

  static uint32_t ge(const Raw* p, Threshold t) {
    uint32_t mask = 0;
    for (int i = 0; i < kBlock; ++i)
      mask |= static_cast<uint32_t>(F::template key<Abs>(p[i]) >= t) << i;
    return mask;
  }

  static int count(const Raw* p, Threshold t) {
    int num = 0;
    for (int i = 0; i < kBlock; ++i) num += F::template key<Abs>(p[i]) >= t;
    return num;
  }

  static Raw* compress(const Raw* p, uint32_t mask, Raw* out) {
    for (int i = 0; i < kBlock; ++i) {
      *out = p[i];
      out += (mask >> i) & 1;
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
  static void mask_store(const Raw* x, Raw* y, uint32_t mask) {
    for (int i = 0; i < kBlock; ++i) y[i] = (mask >> i) & 1 ? x[i] : Raw{0};
  }

  template <bool Stream>
  static uint32_t ge_store(const Raw* x, Raw* y, Threshold t) {
    const uint32_t mask = ge(x, t);
    mask_store<Stream>(x, y, mask);
    return mask;
  }

  static Key max_key_hint(const Raw* p, int64_t num_blocks) {
    Key best = F::template min_key<Abs>();
    for (int64_t i = 0; i < num_blocks * kBlock; ++i)
      best = std::max(best, F::template key<Abs>(p[i]));
    return best;
  }
};

struct Traits {
  static constexpr bool kFloat64 = true;
  static constexpr int kStreamBytes = 0;
  static void fence() {}
};

}  // namespace portable
}  // namespace topk_megatron

#define TOPK_ISA portable
#include "topk_mask_cpu_entry.h"
#undef TOPK_ISA

namespace topk_megatron {

void portable_rows(const ForwardArgs& args, int64_t begin, int64_t end) {
  portable::kUnit.forward(args, begin, end);
}

void* scratch(size_t num_bytes) {
  // Aligned to a page: with few candidates many overlapping stores go to nearly the same address,
  // and a store across two pages takes several times as long.
  constexpr size_t kPage = 4096;
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < num_bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t size = (num_bytes + kPage - 1) / kPage * kPage;
    buffer.data = std::aligned_alloc(kPage, size);
    if (buffer.data == nullptr) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data;
}

#if TOPK_MASK_X86

// A float compare that flushes denormals finds them all equal; the contract does not.
struct KeepDenormals {
  unsigned saved = _mm_getcsr();
  KeepDenormals() { _mm_setcsr(saved & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(saved); }
};

Isa cpu_best_isa() {
  static const Isa best = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      return Isa::kAvx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return Isa::kAvx2;
    return Isa::kPortable;
  }();
  return best;
}

static const Unit& unit(Isa isa) {
  return isa == Isa::kAvx512 ? kAvx512 : isa == Isa::kAvx2 ? kAvx2 : portable::kUnit;
}

#else

struct KeepDenormals {
  KeepDenormals() {}  // without a constructor the compiler would warn of an unused variable
};

Isa cpu_best_isa() { return Isa::kPortable; }

static const Unit& unit(Isa) { return portable::kUnit; }

#endif

void cpu_forward(const ForwardArgs& args, Isa isa, int64_t begin, int64_t end) {
  const KeepDenormals guard;
  unit(args.dtype == Dtype::kFloat64 ? Isa::kPortable : isa).forward(args, begin, end);
}

void cpu_backward(const BackwardArgs& args, Isa isa, int64_t begin, int64_t end) {
  unit(args.dtype == Dtype::kFloat64 ? Isa::kPortable : isa).backward(args, begin, end);
}

void cpu_stream_copy(const void* src, void* dst, int64_t num_bytes, Isa isa) {
  unit(isa).stream_copy(src, dst, num_bytes);
}

template <typename Index>
static int64_t bits_to_indices(const uint32_t* bits, Index* indices, int64_t hidden, int64_t k,
                               int64_t begin, int64_t end) {
  const int64_t words = (hidden + kBlock - 1) / kBlock;
  for (int64_t r = begin; r < end; ++r) {
    Index* out = indices + r * k;
    int64_t num = 0;
    for (int64_t w = 0; w < words; ++w) {
      for (uint32_t mask = bits[r * words + w]; mask != 0; mask &= mask - 1) {
        const int64_t at = w * kBlock + __builtin_ctz(mask);
        if (num == k || at >= hidden) return r;
        out[num++] = static_cast<Index>(at);
      }
    }
    if (num != k) return r;
  }
  return -1;
}

int64_t cpu_bits_to_indices(const uint32_t* bits, void* indices, int64_t hidden, int64_t k,
                            int index_bytes, int64_t begin, int64_t end) {
  if (index_bytes == 1)
    return bits_to_indices(bits, static_cast<uint8_t*>(indices), hidden, k, begin, end);
  if (index_bytes == 2)
    return bits_to_indices(bits, static_cast<int16_t*>(indices), hidden, k, begin, end);
  return bits_to_indices(bits, static_cast<int32_t*>(indices), hidden, k, begin, end);
}

void cpu_count_bits(const uint32_t* bits, int64_t* counts, int64_t rows, int64_t hidden,
                    int64_t begin, int64_t end) {
  const int64_t words = (hidden + kBlock - 1) / kBlock;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t w = begin; w < end; ++w) {
      for (uint32_t mask = bits[r * words + w]; mask != 0; mask &= mask - 1) {
        const int64_t at = w * kBlock + __builtin_ctz(mask);
        if (at < hidden) ++counts[at];
      }
    }
  }
}

}  // namespace topk_megatron

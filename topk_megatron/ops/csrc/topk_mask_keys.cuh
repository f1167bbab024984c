// The kernel's lowest layer: instructions that the compiler does not generate by itself, and the
// order of values as unsigned keys. Legend: topk_mask.cuh.
#pragma once

#include <stdint.h>

#include "topk_mask_plan.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define TOPK_SHARED_WORDS(name) extern __shared__ __align__(16) uint32_t name[]
#else  // the tests include their emulation header before this one
#define TOPK_SHARED_WORDS(name) uint32_t* name = cuda_emulation::shared_words()
#endif

namespace topk_mask {

// ---- Instructions that the compiler does not generate by itself -------------------------------
// Each has a portable twin with the same meaning, which the tests' g++ build executes.

#define TOPK_INLINE __device__ __forceinline__

// Every byte becomes 0xff or 0x00 by the top bit of the byte that its nibble of the selector names.
TOPK_INLINE uint32_t spread_signs(uint32_t word, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(word), "r"(selector | 0x8888u));
  return out;
#else
  uint32_t out = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t source = (selector >> (4 * byte)) & 3u;
    if (word >> (8 * source + 7) & 1u) out |= 0xffu << (8 * byte);
  }
  return out;
#endif
}

TOPK_INLINE void count_if_at_least(uint32_t& count, uint32_t container, uint32_t bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.ge.u32 p, %1, %2; @p add.u32 %0, %0, 1;}"
      : "+r"(count)
      : "r"(container), "r"(bound));
#else
  if (container >= bound) ++count;
#endif
}

TOPK_INLINE void count_if_at_most(uint32_t& count, uint32_t value, uint32_t bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.le.u32 p, %1, %2; @p add.u32 %0, %0, 1;}"
      : "+r"(count)
      : "r"(value), "r"(bound));
#else
  if (value <= bound) ++count;
#endif
}

TOPK_INLINE void lower_to_if_at_least(uint32_t& smallest, uint32_t container, uint32_t bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.ge.u32 p, %1, %2; @p min.u32 %0, %0, %1;}"
      : "+r"(smallest)
      : "r"(container), "r"(bound));
#else
  if (container >= bound && container < smallest) smallest = container;
#endif
}

// word & mask, computed on the spot each time: the compiler must not keep the result for later.
TOPK_INLINE uint32_t and_again(uint32_t word, uint32_t mask) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm volatile("and.b32 %0, %1, %2;" : "=r"(out) : "r"(word), "r"(mask));
  return out;
#else
  return word & mask;
#endif
}

// bits |= bit and kept = raw where container > bound, else kept = 0.
TOPK_INLINE void keep_if_above(uint32_t& bits, uint32_t bit, uint32_t& kept, uint32_t raw,
                               uint32_t container, uint32_t bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.gt.u32 p, %2, %3; @p or.b32 %0, %0, %4; selp.b32 %1, %5, 0, p;}"
      : "+r"(bits), "=r"(kept)
      : "r"(container), "r"(bound), "r"(bit), "r"(raw));
#else
  kept = container > bound ? raw : 0;
  if (container > bound) bits |= bit;
#endif
}

// Any bitwise function of three words, by its truth table. kA, kB, kC are the operands' tables.
constexpr int kA = 0xf0, kB = 0xcc, kC = 0xaa;
template <int kTable>
TOPK_INLINE uint32_t logic3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(out) : "r"(a), "r"(b), "r"(c), "n"(kTable & 0xff));
  return out;
#else
  uint32_t out = 0;
  for (int row = 0; row < 8; ++row)
    if (kTable >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return out;
#endif
}

// A lane's column in shared memory: entry i is at word 32 i + lane.
class Column {
 public:
  TOPK_INLINE explicit Column(uint32_t* first) : first_(first) {
#if defined(__CUDA_ARCH__)
    cursor_ = start_ = static_cast<uint32_t>(__cvta_generic_to_shared(first));
#endif
  }

  TOPK_INLINE void append_if_above(uint32_t container, uint32_t bound) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{.reg .pred p; setp.gt.u32 p, %1, %2; @p st.shared.u32 [%0], %1; @p add.u32 %0, %0, 128;}"
        : "+r"(cursor_)
        : "r"(container), "r"(bound)
        : "memory");
#else
    if (container > bound) first_[kLanes * size_++] = container;
#endif
  }

  TOPK_INLINE void append_if_within(uint32_t container, uint32_t first, uint32_t span) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "{.reg .pred p; setp.le.u32 p, %2, %3; @p st.shared.u32 [%0], %1; @p add.u32 %0, %0, 128;}"
        : "+r"(cursor_)
        : "r"(container), "r"(container - first), "r"(span)
        : "memory");
#else
    if (container - first <= span) first_[kLanes * size_++] = container;
#endif
  }

  // Counts as append_if_above does, but stores only the first `capacity` entries.
  TOPK_INLINE void append_if_room(uint32_t container, uint32_t bound, uint32_t capacity) {
    if (container <= bound) return;
    if (size() < capacity) first_[kLanes * size()] = container;
    cursor_ += 4 * kLanes;
    ++size_;
  }

  TOPK_INLINE uint32_t size() const {
#if defined(__CUDA_ARCH__)
    return (cursor_ - start_) / (4 * kLanes);
#else
    return size_;
#endif
  }

  TOPK_INLINE uint32_t entry(uint32_t i) const { return first_[kLanes * i]; }

 private:
  uint32_t* first_;
  uint32_t cursor_ = 0, start_ = 0;
  uint32_t size_ = 0;
};

// ---- Keys -------------------------------------------------------------------------------------

// How values compare. A key is the sign-magnitude value made monotonic, then rotated so that -inf
// is 0 in mode value: negative NaNs wrap around to the top, next to the positive ones. Every bit
// pattern keeps its own key. Classes make all NaNs equal and -0 == +0: ranges of keys that count as
// one value (class_first, class_last).
template <int kDtype, bool kAbs>
struct Format {
  static constexpr bool kWide = kDtype == 0;
  static constexpr bool kCheapKeys = kAbs;  // one instruction per word: not worth a register
  static constexpr int kElements = kWide ? 4 : 8;      // of a slot
  static constexpr int kShift = kWide ? 0 : 16;        // from key to container
  static constexpr uint32_t kBelow = kWide ? 0 : 0xffffu;  // bits of a container under its key
  static constexpr uint32_t kTops = 0x80008000u;           // of the two halves of a word
  static constexpr uint32_t kSign = kWide ? 0x80000000u : 0x8000u;
  static constexpr uint32_t kInfinity = kWide ? 0x7f800000u : kDtype == 1 ? 0x7f80u : 0x7c00u;
  static constexpr uint32_t kRotation = kAbs ? 0 : kSign - 1 - kInfinity;  // -inf before rotation
  static constexpr uint32_t kFirstNan = (kAbs ? 0 : kSign) + kInfinity - kRotation + 1;
  static constexpr uint32_t kZero = (kAbs ? 0 : kSign) - kRotation;
  static constexpr uint32_t kMinusZero = kAbs ? kZero : kZero - 1;
  // Fills slots past the row's end. Its key is 0, so it loses every tie by its index.
  static constexpr uint32_t kPadElement = kAbs ? 0 : kSign | kInfinity;
  static constexpr uint32_t kPad = kWide ? kPadElement : kPadElement * 0x10001u;

  // Turns a word of one or two elements into as many keys, each in its element's place.
  TOPK_INLINE static uint32_t keys(uint32_t word) {
    if (kAbs) return and_again(word, kWide ? 0x7fffffffu : 0x7fff7fffu);
    if (kWide) {
      const uint32_t negative = static_cast<uint32_t>(static_cast<int32_t>(word) >> 31);
      return logic3<kA ^ (kB | kC)>(word, negative, kSign) - kRotation;
    }
    // Both halves at once. A top bit lent to each half stops it from borrowing from the other one.
    const uint32_t negative = spread_signs(word, 0x3311u);
    const uint32_t lent = logic3<(kA ^ kB) | kC>(word, negative, kTops) - kRotation * 0x10001u;
    return logic3<kA ^ (kB & kC)>(lent, word, kTops);
  }

  TOPK_INLINE static uint32_t key_of(uint32_t container) { return container >> kShift; }
  TOPK_INLINE static uint32_t container_of(uint32_t key) { return key << kShift; }

  TOPK_INLINE static uint32_t class_first(uint32_t key) {  // as a container
    return container_of(key >= kFirstNan ? kFirstNan : key == kZero ? kMinusZero : key);
  }
  TOPK_INLINE static uint32_t class_last(uint32_t key) {  // as a container, its lower bits set
    return key >= kFirstNan ? 0xffffffffu
                            : container_of(key == kMinusZero ? kZero : key) | kBelow;
  }
};

// Calls f(element of the slot, container) for every element of a slot's four key words.
template <class Fmt, class F>
TOPK_INLINE void for_each_container(const uint32_t (&keys)[4], F f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (Fmt::kWide) {
      f(i, keys[i]);
    } else {
      f(2 * i, keys[i] << 16);
      f(2 * i + 1, keys[i]);
    }
  }
}

template <class Fmt>
TOPK_INLINE void to_keys(const uint32_t (&raw)[4], uint32_t (&keys)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) keys[i] = Fmt::keys(raw[i]);
}

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

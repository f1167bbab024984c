// Top-k plus mask over rows: y = x on the k coordinates with the largest key, +0 elsewhere, and the
// selection as packed bits. One pass over memory: a row is read once into registers and written once.
//
// A row goes through these steps; all but the last two touch registers and a few hundred words only.
//   1. keys      x becomes an unsigned key in the operator's order (class Format).
//   2. floor     every lane reduces its slots to a few group maxima; the quota-th largest maximum of
//                a warp is, over all warps, a key that at least k elements reach. No sampling luck is
//                involved: it holds for every row, and is tight (1.3 k elements) for unordered ones.
//   3. filter    elements above the floor's class are appended to a column of shared memory per lane
//                (bank = lane, so without conflicts whatever the data), then packed into one list.
//   4. threshold c of them were found. c <= k: the floor is the threshold. c fits the list: one
//                warp bisects the list. Otherwise, the exact fallback: all warps bisect the registers.
//   5. ties      equal keys at the threshold are taken in index order up to a cut slot, found by
//                counting them per chunk. The cost does not depend on how many there are.
//   6. write     bits by one comparison an element, y by widening the bits to byte masks.
//
// Legend. lane: thread of a warp. slot: 16 bytes of a row, what a lane loads at once (8 elements of 16
// bits or 4 of 32). chunk: the 32 neighbouring slots of a warp, one a lane. A warp owns consecutive
// chunks, lane l holds slot l of each, so that (warp, chunk, lane, element) is index order. team: the
// warps of one row. container: a key in the top bits of a 32-bit word, whatever the bits under it.
#pragma once

#include <stdint.h>

#include "topk_mask_plan.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define TOPK_SHARED_WORDS(name) extern __shared__ __align__(16) uint32_t name[]
#else  // the tests' emulation header was included before this one
#define TOPK_SHARED_WORDS(name) uint32_t* name = cuda_emulation::shared_words()
#endif

namespace topk_mask {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr uint32_t kAllTies = 0xffffffffu;
constexpr int kEverySlot = 0x7fffffff;
constexpr int kNoSlot = -1;

// ---- Instructions that the compiler does not find by itself ------------------------------------
// Each has a portable twin with the same meaning, which the tests' g++ build executes.

#define TOPK_INLINE __device__ __forceinline__

// Every byte becomes 0xff or 0x00 after the top bit of the byte that the selector's nibble names.
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

TOPK_INLINE void set_bit_if_above(uint32_t& bits, uint32_t bit, uint32_t container, uint32_t bound) {
#if defined(__CUDA_ARCH__)
  asm("{.reg .pred p; setp.gt.u32 p, %1, %2; @p or.b32 %0, %0, %3;}"
      : "+r"(bits)
      : "r"(container), "r"(bound), "r"(bit));
#else
  if (container > bound) bits |= bit;
#endif
}

// A lane's column in shared memory: entry i lies at word 32 i + lane.
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

  // Counts like append_if_above, but keeps only the first `capacity` entries.
  TOPK_INLINE void append_if_above_bounded(uint32_t container, uint32_t bound, uint32_t capacity) {
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

// ---- Keys ----------------------------------------------------------------------------------------

// How values compare. A key is the sign-magnitude value made monotonic, then rotated so that -inf is
// 0 in mode value: negative NaNs wrap around to the top, next to the positive ones. Every bit pattern
// keeps its own key; that all NaNs are equal, and -0 == +0, is said by classes: ranges of keys that
// count as one value (class_first, class_last).
template <int kDtype, bool kAbs>
struct Format {
  static constexpr bool kWide = kDtype == 0;
  static constexpr int kElements = kWide ? 4 : 8;      // of a slot
  static constexpr int kShift = kWide ? 0 : 16;        // from key to container
  static constexpr uint32_t kBelow = kWide ? 0 : 0xffffu;  // bits of a container under its key
  static constexpr uint32_t kSign = kWide ? 0x80000000u : 0x8000u;
  static constexpr uint32_t kInfinity = kWide ? 0x7f800000u : kDtype == 1 ? 0x7f80u : 0x7c00u;
  static constexpr uint32_t kRotation = kAbs ? 0 : kSign - 1 - kInfinity;  // of -inf, unrotated
  static constexpr uint32_t kFirstNan = (kAbs ? 0 : kSign) + kInfinity - kRotation + 1;
  static constexpr uint32_t kZero = (kAbs ? 0 : kSign) - kRotation;
  static constexpr uint32_t kMinusZero = kAbs ? kZero : kZero - 1;
  // Fills up slots past the row's end: key 0, so that it loses every tie by its index.
  static constexpr uint32_t kPadElement = kAbs ? 0 : kSign | kInfinity;
  static constexpr uint32_t kPad = kWide ? kPadElement : kPadElement * 0x10001u;

  // A word of one or two elements to as many keys, in place.
  TOPK_INLINE static uint32_t keys(uint32_t word) {
    if (kAbs) return word & (kWide ? 0x7fffffffu : 0x7fff7fffu);
    if (kWide) {
      const uint32_t negative = static_cast<uint32_t>(static_cast<int32_t>(word) >> 31);
      return (word ^ (negative | kSign)) - kRotation;
    }
    // Both halves at once. A top bit lent to each half keeps its borrow from the other one.
    constexpr uint32_t kTops = 0x80008000u;
    const uint32_t negative = spread_signs(word, 0x3311u);
    const uint32_t lent = ((word ^ negative) | kTops) - kRotation * 0x10001u;
    return lent ^ (word & kTops);
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

// f(element of the slot, container) for the elements of a slot's four key words.
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
  // The product puts bit i of a nibble on top of byte i.
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

// ---- Warp and team ---------------------------------------------------------------------------------

TOPK_INLINE uint32_t inclusive_scan(uint32_t value, int lane) {
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const uint32_t left = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += left;
  }
  return value;
}

// The warps of one row and what they share. Every method is called by all of them together.
template <bool kOneWarp>
class Team {
 public:
  TOPK_INLINE Team(int warps, int warp, int lane, uint32_t* control)
      : warps(warps), warp(warp), lane(lane), control_(control) {}

  TOPK_INLINE void sync() const {
    if (kOneWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  TOPK_INLINE uint32_t sum(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_add_sync(kFullWarp, exchange(of_warp, 0));
  }
  TOPK_INLINE uint32_t min(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_min_sync(kFullWarp, exchange(of_warp, 0xffffffffu));
  }
  TOPK_INLINE uint32_t max(uint32_t of_warp) {
    return kOneWarp ? of_warp : __reduce_max_sync(kFullWarp, exchange(of_warp, 0));
  }
  TOPK_INLINE uint32_t sum_of_warps_before(uint32_t of_warp) {
    if (kOneWarp) return 0;
    const uint32_t value = exchange(of_warp, 0);
    return __reduce_add_sync(kFullWarp, lane < warp ? value : 0);
  }

  TOPK_INLINE uint32_t& scalar(int i) const { return control_[i]; }

  const int warps, warp, lane;

 private:
  // Lane i gets the value of warp i, or `neutral` past the last warp. Two buffers take turns, so
  // that one barrier is enough: who writes one again has seen all leave the reads before last.
  TOPK_INLINE uint32_t exchange(uint32_t of_warp, uint32_t neutral) {
    uint32_t* buffer = control_ + 32 + turn_ * kLanes;
    turn_ ^= 1;
    if (lane == 0) buffer[warp] = of_warp;
    __syncthreads();
    return lane < warps ? buffer[lane] : neutral;
  }

  uint32_t* control_;
  int turn_ = 0;
};

enum Scalar { kListSize, kOverflows, kFirst, kLast, kTies };  // Team::scalar

// ---- Threshold -------------------------------------------------------------------------------------

// Selected: containers above `last`, and of those in [first, last] the lowest `ties` by index.
struct Threshold {
  uint32_t first, last, ties;
};

// The k-th largest key by bisection, from a count of elements at or above a container.
// Needs: at least k elements have keys >= low, none has a key above high.
template <class Fmt, class Count>
TOPK_INLINE Threshold bisect(uint32_t low, uint32_t high, uint32_t k, Count count_at_least) {
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    const uint32_t bound = Fmt::container_of(middle);
    const uint32_t count = count_at_least(bound);
    // Exactly k, unless the bound parts -0 from +0 or NaN from NaN: nothing is left to decide.
    if (count == k && bound == Fmt::class_first(middle)) return {bound, 0xffffffffu, kAllTies};
    if (count >= k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const uint32_t first = Fmt::class_first(low), last = Fmt::class_last(low);
  const uint32_t above = last == 0xffffffffu ? 0 : count_at_least(last + 1);
  const bool all = count_at_least(first) == k;
  return {first, last, all ? kAllTies : k - above};
}

// A key that at least `quota` of the warp's group maxima reach, and usually few more than that.
template <class Fmt, int kGroups>
TOPK_INLINE uint32_t warp_floor(const uint32_t (&maxima)[kGroups], uint32_t quota) {
  uint32_t smallest = maxima[0], largest = maxima[0];
#pragma unroll
  for (int g = 1; g < kGroups; ++g) {
    smallest = maxima[g] < smallest ? maxima[g] : smallest;
    largest = maxima[g] > largest ? maxima[g] : largest;
  }
  uint32_t low = Fmt::key_of(__reduce_min_sync(kFullWarp, smallest));
  uint32_t high = Fmt::key_of(__reduce_max_sync(kFullWarp, largest));
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    uint32_t count = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      count_if_at_least(count, maxima[g], Fmt::container_of(middle));
    count = __reduce_add_sync(kFullWarp, count);
    if (count >= quota) {
      low = middle;
      if (count <= quota + quota / 8) break;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The threshold among `size` listed containers, all greater than the floor's class; one warp.
template <class Fmt>
TOPK_INLINE Threshold list_threshold(const uint32_t* list, uint32_t size, uint32_t low, uint32_t k,
                                     int lane) {
  constexpr int kHeld = 8;  // 256 candidates in registers; a longer list is read again and again
  uint32_t held[kHeld], largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const uint32_t at = i * kLanes + lane;
    held[i] = at < size ? list[at] : 0;
    largest = held[i] > largest ? held[i] : largest;
  }
  for (uint32_t at = kHeld * kLanes + lane; at < size; at += kLanes)
    largest = list[at] > largest ? list[at] : largest;
  const uint32_t high = Fmt::key_of(__reduce_max_sync(kFullWarp, largest));
  return bisect<Fmt>(low, high, k, [&](uint32_t bound) {
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) count_if_at_least(count, held[i], bound);
    for (uint32_t at = kHeld * kLanes + lane; at < size; at += kLanes)
      count_if_at_least(count, list[at], bound);
    return __reduce_add_sync(kFullWarp, count);
  });
}

// ---- The row as a warp sees it -------------------------------------------------------------------

// Loads and stores of one slot. Rows of any length are allowed: where they do not start on 16 bytes,
// elements move one by one.
template <class Fmt>
struct SlotAccess {
  uint32_t hidden;  // elements of the row
  uint32_t slots;   // 16-byte slots of the row, the last one maybe partial
  bool aligned;

  TOPK_INLINE void load(const void* row, uint32_t slot, uint32_t (&raw)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw[i] = Fmt::kPad;
    if (slot >= slots) return;
    if (aligned) {
      const uint4 vector = static_cast<const uint4*>(row)[slot];
      raw[0] = vector.x, raw[1] = vector.y, raw[2] = vector.z, raw[3] = vector.w;
      return;
    }
#pragma unroll
    for (int i = 0; i < Fmt::kElements; ++i) {
      const uint32_t at = slot * Fmt::kElements + i;
      if (at >= hidden) continue;
      if (Fmt::kWide) {
        raw[i % 4] = static_cast<const uint32_t*>(row)[at];
      } else {
        const uint32_t element = static_cast<const uint16_t*>(row)[at];
        const int shift = i % 2 * 16;
        raw[i / 2] = (raw[i / 2] & ~(0xffffu << shift)) | element << shift;
      }
    }
  }

  TOPK_INLINE void store(void* row, uint32_t slot, const uint32_t (&kept)[4]) const {
    if (slot >= slots) return;
    if (aligned) {
      static_cast<uint4*>(row)[slot] = make_uint4(kept[0], kept[1], kept[2], kept[3]);
      return;
    }
#pragma unroll
    for (int i = 0; i < Fmt::kElements; ++i) {
      const uint32_t at = slot * Fmt::kElements + i;
      if (at >= hidden) continue;
      if (Fmt::kWide) {
        static_cast<uint32_t*>(row)[at] = kept[i % 4];
      } else {
        static_cast<uint16_t*>(row)[at] = static_cast<uint16_t>(kept[i / 2] >> (i % 2 * 16));
      }
    }
  }
};

// The chunks of one warp. kHeld > 0: that many, in registers. kHeld == 0: any number, read again by
// every pass over them (from L2, after the first one).
template <class Fmt, int kHeld>
class WarpChunks {
 public:
  static constexpr int kUnroll = kHeld > 0 ? kHeld : 4;

  TOPK_INLINE WarpChunks(const void* row, SlotAccess<Fmt> access, uint32_t warps, uint32_t warp,
                         uint32_t lane)
      : row_(row), access_(access) {
    const uint32_t chunks = (access.slots + kLanes - 1) / kLanes;
    count_ = (chunks + warps - 1) / warps;
    first_slot_ = warp * count_ * kLanes + lane;
    if (kHeld > 0) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) access_.load(row_, slot(v), held_[v]);
    }
  }

  // Whether chunk v is this warp's; one that is not holds pads.
  TOPK_INLINE bool owns(uint32_t v) const { return v < count_; }

  // Position in the row of this lane's slot of chunk v; past any row's end if v is another warp's.
  TOPK_INLINE uint32_t slot(uint32_t v) const {
    return owns(v) ? first_slot_ + v * kLanes : 0x40000000u;
  }

  // f(chunk, chunk modulo kUnroll as a constant, raw words of this lane's slot)
  template <class F>
  TOPK_INLINE void for_each(F f) const {
    if (kHeld > 0) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) f(v, v, held_[v]);
    } else {
      for (uint32_t v = 0; v < count_; v += kUnroll) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          uint32_t raw[4];
          access_.load(row_, slot(v + u), raw);
          f(v + u, u, raw);
        }
      }
    }
  }

  // f(container) for all elements, pads included
  template <class F>
  TOPK_INLINE void for_each_container(F f) const {
    for_each([&](uint32_t, int, const uint32_t(&raw)[4]) {
      uint32_t keys[4];
      to_keys<Fmt>(raw, keys);
      topk_mask::for_each_container<Fmt>(keys, [&](int, uint32_t container) { f(container); });
    });
  }

  TOPK_INLINE uint32_t count_at_least(uint32_t bound) const {
    uint32_t count = 0;
    for_each_container([&](uint32_t container) { count_if_at_least(count, container, bound); });
    return __reduce_add_sync(kFullWarp, count);
  }

 private:
  const void* row_;
  SlotAccess<Fmt> access_;
  uint32_t count_, first_slot_;
  uint32_t held_[kHeld > 0 ? kHeld : 1][4];
};

// ---- Ties ------------------------------------------------------------------------------------------

// Which of a warp's ties are selected. Slots are local: chunk of the warp * 32 + lane.
struct Cut {
  int slot;       // ties of slots before this one are all taken, of later ones none
  uint32_t bits;  // selection of that slot itself
};

template <class Fmt>
TOPK_INLINE uint32_t count_ties(const uint32_t (&keys)[4], Threshold threshold) {
  uint32_t count = 0;
  for_each_container<Fmt>(keys, [&](int, uint32_t container) {
    count_if_at_most(count, container - threshold.first, threshold.last - threshold.first);
  });
  return count;
}

// Selection of a slot whose first `ties` ties are taken.
template <class Fmt>
TOPK_INLINE uint32_t cut_bits(const uint32_t (&keys)[4], Threshold threshold, uint32_t ties) {
  uint32_t bits = 0;
  for_each_container<Fmt>(keys, [&](int i, uint32_t container) {
    const bool tie = container >= threshold.first && container <= threshold.last;
    if (container > threshold.last || (tie && ties > 0)) bits |= 1u << i;
    if (tie && ties > 0) --ties;
  });
  return bits;
}

// Finds where this warp's `ties` lowest ties end; it has more of them than that.
template <class Fmt, class Chunks>
TOPK_INLINE Cut locate_cut(const Chunks& chunks, Threshold threshold, uint32_t ties, int lane) {
  uint32_t passed = 0, wanted = 0, lane_ties = 0, crossing = 0;
  uint32_t crossing_keys[4] = {};
  chunks.for_each([&](uint32_t v, int, const uint32_t(&raw)[4]) {
    uint32_t keys[4];
    to_keys<Fmt>(raw, keys);
    const uint32_t of_lane = count_ties<Fmt>(keys, threshold);
    const uint32_t of_chunk = __reduce_add_sync(kFullWarp, of_lane);
    if (passed < ties && passed + of_chunk >= ties) {
      wanted = ties - passed;
      lane_ties = of_lane;
      crossing = v;
#pragma unroll
      for (int i = 0; i < 4; ++i) crossing_keys[i] = keys[i];
    }
    passed += of_chunk;
  });
  const uint32_t up_to_here = inclusive_scan(lane_ties, lane);
  const uint32_t enough = __ballot_sync(kFullWarp, up_to_here >= wanted);
  const int cut_lane = __ffs(enough) - 1;
  const uint32_t before = up_to_here - lane_ties;
  return {static_cast<int>(crossing * kLanes) + cut_lane,
          cut_bits<Fmt>(crossing_keys, threshold, wanted - before)};
}

template <class Fmt, bool kOneWarp, class Chunks>
TOPK_INLINE Cut find_cut(Team<kOneWarp>& team, const Chunks& chunks, Threshold threshold) {
  if (threshold.ties == kAllTies) return {kEverySlot, 0};
  if (threshold.ties == 0) return {kNoSlot, 0};
  uint32_t ties = threshold.ties;
  if (!kOneWarp) {
    uint32_t of_lane = 0;
    chunks.for_each([&](uint32_t v, int, const uint32_t(&raw)[4]) {
      uint32_t keys[4];
      to_keys<Fmt>(raw, keys);
      // Pads of the row's end come after all elements, those of other warps' chunks do not.
      if (chunks.owns(v)) of_lane += count_ties<Fmt>(keys, threshold);
    });
    const uint32_t of_warp = __reduce_add_sync(kFullWarp, of_lane);
    const uint32_t before = team.sum_of_warps_before(of_warp);
    if (before >= ties) return {kNoSlot, 0};
    ties -= before;
    if (of_warp <= ties) return {kEverySlot, 0};
  }
  return locate_cut<Fmt>(chunks, threshold, ties, team.lane);
}

// ---- Write ---------------------------------------------------------------------------------------

template <class Fmt>
TOPK_INLINE uint32_t select_bits(const uint32_t (&raw)[4], Threshold threshold, Cut cut,
                                 int local_slot) {
  uint32_t keys[4], bits = 0;
  to_keys<Fmt>(raw, keys);
  const bool with_ties = local_slot < cut.slot;
  const uint32_t bound = with_ties ? threshold.first - 1 : threshold.last;
  for_each_container<Fmt>(keys, [&](int i, uint32_t container) {
    set_bit_if_above(bits, 1u << i, container, bound);
  });
  // No bound lies under key 0: with it as a tie, the whole slot is selected.
  if (with_ties && threshold.first == 0) bits = (1u << Fmt::kElements) - 1;
  return local_slot == cut.slot ? cut.bits : bits;
}

template <class Fmt, class Chunks>
TOPK_INLINE void write_row(const Chunks& chunks, SlotAccess<Fmt> access, Threshold threshold,
                           Cut cut, void* y_row, uint8_t* bits_row, int lane) {
  const uint32_t bits_bytes = (access.hidden + 31) / 32 * 4;
  uint32_t even_bits = 0;
  chunks.for_each([&](uint32_t v, int unrolled, const uint32_t(&raw)[4]) {
    const uint32_t bits =
        select_bits<Fmt>(raw, threshold, cut, static_cast<int>(v * kLanes) + lane);
    uint32_t kept[4];
    keep_selected<Fmt>(raw, bits, kept);
    access.store(y_row, chunks.slot(v), kept);
    if (!Fmt::kWide) {
      if (chunks.slot(v) < bits_bytes) bits_row[chunks.slot(v)] = static_cast<uint8_t>(bits);
    } else if (unrolled % 2 == 0) {
      even_bits = bits;
    } else {
      // Two chunks of nibbles make 32 bytes: even lanes write those of the even chunk.
      const uint32_t own = even_bits | bits << 4;
      const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
      const bool odd = lane % 2 == 1;
      const uint32_t byte = odd ? (other >> 4) | (own & 0xf0u) : (own & 0xfu) | other << 4;
      const uint32_t at = chunks.slot(odd ? v : v - 1) / 2;
      if (at < bits_bytes) bits_row[at] = static_cast<uint8_t>(byte);
    }
  });
}

// ---- One row --------------------------------------------------------------------------------------

template <class Fmt, int kHeld, bool kOneWarp>
TOPK_INLINE void topk_mask_row(const void* x_row, void* y_row, uint8_t* bits_row,
                               SlotAccess<Fmt> access, uint32_t k, Team<kOneWarp> team,
                               uint32_t* columns, uint32_t* list) {
  constexpr bool kStreaming = kHeld == 0;
  constexpr int kColumn = kStreaming ? kStreamColumn : kHeld * Fmt::kElements;
  constexpr int kGroups = kOneWarp ? WarpChunks<Fmt, kHeld>::kUnroll : 4;
  const WarpChunks<Fmt, kHeld> chunks(x_row, access, team.warps, team.warp, team.lane);

  uint32_t maxima[kGroups] = {};
  chunks.for_each([&](uint32_t, int unrolled, const uint32_t(&raw)[4]) {
    uint32_t keys[4], &largest = maxima[unrolled % kGroups];
    to_keys<Fmt>(raw, keys);
    for_each_container<Fmt>(keys, [&](int, uint32_t container) {
      largest = container > largest ? container : largest;
    });
  });
  if (!kOneWarp && team.warp == 0 && team.lane == 0) {
    team.scalar(kListSize) = 0;
    team.scalar(kOverflows) = 0;
  }

  Threshold threshold;
  uint32_t found = 0xffffffffu, floor_key = 0;
  const uint32_t quota = (k + team.warps - 1) / team.warps;
  if (quota <= kGroups * kLanes * 3 / 4) {  // else most of the row would pass the filter
    floor_key = team.min(warp_floor<Fmt, kGroups>(maxima, quota));
    const uint32_t bound = Fmt::class_last(floor_key);
    Column column(columns + team.warp * (kColumn * kLanes) + team.lane);
    chunks.for_each_container([&](uint32_t container) {
      if (kStreaming) {
        column.append_if_above_bounded(container, bound, kColumn);
      } else {
        column.append_if_above(container, bound);
      }
    });
    const uint32_t mine = column.size();
    const uint32_t up_to_here = inclusive_scan(mine, team.lane);
    const uint32_t of_warp = __shfl_sync(kFullWarp, up_to_here, kLanes - 1);
    const uint32_t lost =
        kStreaming ? __ballot_sync(kFullWarp, mine > static_cast<uint32_t>(kColumn)) : 0;
    uint32_t base = 0;
    if (!kOneWarp) {  // any order of the warps: only counts are taken of the list
      if (team.lane == 0) {
        base = atomicAdd(&team.scalar(kListSize), of_warp);
        if (lost) atomicAdd(&team.scalar(kOverflows), 1u);
      }
      base = __shfl_sync(kFullWarp, base, 0);
    }
    if (lost == 0 && base + of_warp <= kListCapacity) {
      const uint32_t to = base + up_to_here - mine;
      for (uint32_t i = 0; i < mine; ++i) list[to + i] = column.entry(i);
    }
    team.sync();
    found = kOneWarp ? of_warp : team.scalar(kListSize);
    if (found > k && (!kOneWarp && kStreaming ? team.scalar(kOverflows) != 0 : lost != 0))
      found = 0xffffffffu;
  }

  if (found <= k) {
    threshold = {Fmt::class_first(floor_key), Fmt::class_last(floor_key), k - found};
  } else if (found <= kListCapacity) {
    const uint32_t low = Fmt::key_of(Fmt::class_last(floor_key)) + 1;
    if (kOneWarp || team.warp == 0) threshold = list_threshold<Fmt>(list, found, low, k, team.lane);
    if (!kOneWarp) {
      if (team.warp == 0 && team.lane == 0) {
        team.scalar(kFirst) = threshold.first;
        team.scalar(kLast) = threshold.last;
        team.scalar(kTies) = threshold.ties;
      }
      team.sync();
      threshold = {team.scalar(kFirst), team.scalar(kLast), team.scalar(kTies)};
    }
  } else {
    uint32_t largest = maxima[0];
#pragma unroll
    for (int g = 1; g < kGroups; ++g) largest = maxima[g] > largest ? maxima[g] : largest;
    const uint32_t high = Fmt::key_of(team.max(__reduce_max_sync(kFullWarp, largest)));
    threshold = bisect<Fmt>(floor_key, high, k, [&](uint32_t bound) {
      return team.sum(chunks.count_at_least(bound));
    });
  }
  const Cut cut = find_cut<Fmt, kOneWarp>(team, chunks, threshold);
  write_row<Fmt>(chunks, access, threshold, cut, y_row, bits_row, team.lane);
}

template <class Fmt, int kHeld, bool kOneWarp>
TOPK_INLINE void forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k) {
  TOPK_SHARED_WORDS(shared);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int row_in_block = kOneWarp ? warp : 0;
  const int warps = kOneWarp ? 1 : blockDim.x / kLanes;
  const int64_t row = kOneWarp ? static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + warp
                               : static_cast<int64_t>(blockIdx.x);
  if (row >= rows) return;
  constexpr int kColumn = kHeld > 0 ? kHeld * Fmt::kElements : kStreamColumn;
  uint32_t* columns = shared + row_in_block * shared_words(warps, kColumn);
  uint32_t* list = columns + warps * (kLanes * kColumn);
  const uint32_t size = hidden;
  const SlotAccess<Fmt> access{size, (size + Fmt::kElements - 1) / Fmt::kElements,
                               kHeld > 0 || rows_aligned(x, y, hidden, kSlotBytes / Fmt::kElements)};
  const int64_t offset = row * hidden * (kSlotBytes / Fmt::kElements);
  const int64_t bits_offset = row * ((hidden + 31) / 32) * 4;
  topk_mask_row<Fmt, kHeld, kOneWarp>(
      static_cast<const uint8_t*>(x) + offset, static_cast<uint8_t*>(y) + offset,
      reinterpret_cast<uint8_t*>(bits) + bits_offset, access, k,
      Team<kOneWarp>(warps, kOneWarp ? 0 : warp, lane, list + kListCapacity), columns, list);
}

// ---- Backward ------------------------------------------------------------------------------------

// dx = dy on the selected coordinates. `warps_per_row` warps walk along a row, 32 slots at a time.
template <class Fmt>
TOPK_INLINE void backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows, int hidden,
                          int warps_per_row) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int rows_per_block = blockDim.x / kLanes / warps_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + warp / warps_per_row;
  if (row >= rows) return;
  const uint32_t size = hidden;
  const SlotAccess<Fmt> access{size, (size + Fmt::kElements - 1) / Fmt::kElements,
                               rows_aligned(dy, dx, hidden, kSlotBytes / Fmt::kElements)};
  const int64_t offset = row * hidden * (kSlotBytes / Fmt::kElements);
  const void* dy_row = static_cast<const uint8_t*>(dy) + offset;
  void* dx_row = static_cast<uint8_t*>(dx) + offset;
  const uint8_t* bits_row = reinterpret_cast<const uint8_t*>(bits) + row * ((hidden + 31) / 32) * 4;
  for (uint32_t slot = warp % warps_per_row * kLanes + lane; slot < access.slots;
       slot += warps_per_row * kLanes) {
    uint32_t raw[4], kept[4];
    access.load(dy_row, slot, raw);
    const uint32_t of_slot =
        Fmt::kWide ? bits_row[slot / 2] >> (slot % 2 * 4) : static_cast<uint32_t>(bits_row[slot]);
    keep_selected<Fmt>(raw, of_slot, kept);
    access.store(dx_row, slot, kept);
  }
}

// ---- Kernels ---------------------------------------------------------------------------------------
// C names, so that profilers and the PTX tests can tell them apart.

// X(name, dtype, abs, slots in registers or 0, one warp a row, most threads, least blocks a processor)
#define TOPK_VARIANTS(X, dtype_name, dtype, mode_name, abs)                  \
  X(topk_mask_##dtype_name##_##mode_name##_warp2, dtype, abs, 2, true, 128)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp4, dtype, abs, 4, true, 128)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp8, dtype, abs, 8, true, 128)  \
  X(topk_mask_##dtype_name##_##mode_name##_block8, dtype, abs, 8, false, 512) \
  X(topk_mask_##dtype_name##_##mode_name##_stream, dtype, abs, 0, false, 1024)

// In the order of ((dtype * 2) + mode) * kNumVariants + variant.
#define TOPK_FORWARD_KERNELS(X)                    \
  TOPK_VARIANTS(X, float32, 0, value, false)       \
  TOPK_VARIANTS(X, float32, 0, abs, true)          \
  TOPK_VARIANTS(X, bfloat16, 1, value, false)      \
  TOPK_VARIANTS(X, bfloat16, 1, abs, true)         \
  TOPK_VARIANTS(X, float16, 2, value, false)       \
  TOPK_VARIANTS(X, float16, 2, abs, true)

#define TOPK_DEFINE_FORWARD(name, dtype, abs, held, one_warp, threads)                           \
  extern "C" __global__ void __launch_bounds__(threads)                                          \
      name(const void* __restrict__ x, void* __restrict__ y, uint32_t* __restrict__ bits,        \
           int64_t rows, int hidden, int k) {                                                    \
    forward<Format<dtype, abs>, held, one_warp>(x, y, bits, rows, hidden, k);                    \
  }
TOPK_FORWARD_KERNELS(TOPK_DEFINE_FORWARD)
#undef TOPK_DEFINE_FORWARD

// Backward moves bits and no keys: one kernel for each width.
#define TOPK_DEFINE_BACKWARD(name, dtype)                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                              \
      name(const void* __restrict__ dy, const uint32_t* __restrict__ bits, void* __restrict__ dx, \
           int64_t rows, int hidden, int warps_per_row) {                                        \
    backward<Format<dtype, true>>(dy, bits, dx, rows, hidden, warps_per_row);                    \
  }
TOPK_DEFINE_BACKWARD(topk_mask_backward_32bit, 0)
TOPK_DEFINE_BACKWARD(topk_mask_backward_16bit, 1)
#undef TOPK_DEFINE_BACKWARD

}  // namespace topk_mask

// Steps 5 and 6 of a row: which of the equal keys at the threshold are selected, and what is
// written. Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_threshold.cuh"

namespace topk_mask {

constexpr int kEverySlot = 0x7fffffff;
constexpr int kNoSlot = -1;

// ---- Ties -------------------------------------------------------------------------------------

// Which of a warp's ties are selected. Slots are local: chunk of the warp * 32 + lane.
struct Cut {
  int slot;       // all ties before this slot are taken, and none after it
  uint32_t ties;  // how many of this slot's own ties are taken
};

template <class Fmt>
TOPK_INLINE uint32_t count_ties(const uint32_t (&keys)[4], Threshold threshold) {
  uint32_t count = 0;
  for_each_container<Fmt>(keys, [&](int, uint32_t container) {
    count_if_at_most(count, container - threshold.first, threshold.last - threshold.first);
  });
  return count;
}

// The number of ties that this lane has in each chunk: a nibble per held chunk (a slot has at most
// 8 ties), while streamed chunks are counted again.
template <class Fmt, int kHeld>
class TieCounts {
 public:
  TOPK_INLINE TieCounts(const WarpChunks<Fmt, kHeld>& chunks, Threshold threshold)
      : chunks_(chunks), threshold_(threshold) {
    chunks_.for_each([&](uint32_t v, int u, const uint32_t(&)[4], const uint32_t(&keys)[4]) {
      // Pads at the row's end come after all elements; those of other warps' chunks do not.
      const uint32_t count = chunks_.owns(v) ? count_ties<Fmt>(keys, threshold_) : 0;
      of_lane_ += count;
      nibbles_ |= count << (4 * (u % 8));
    });
  }

  TOPK_INLINE uint32_t of_lane() const { return of_lane_; }

  // Calls f(chunk, number of this lane's ties in it).
  template <class F>
  TOPK_INLINE void for_each(F f) const {
    if (kHeld > 0) {
#pragma unroll
      for (int v = 0; v < kHeld; ++v) f(v, nibbles_ >> (4 * v) & 0xfu);
    } else {
      chunks_.for_each([&](uint32_t v, int, const uint32_t(&)[4], const uint32_t(&keys)[4]) {
        f(v, count_ties<Fmt>(keys, threshold_));
      });
    }
  }

 private:
  const WarpChunks<Fmt, kHeld>& chunks_;
  Threshold threshold_;
  uint32_t of_lane_ = 0, nibbles_ = 0;
};

// Where this warp's `ties` lowest ties end. It has at least that many.
template <class Counts>
TOPK_INLINE Cut locate_cut(const Counts& counts, uint32_t ties, int lane) {
  uint32_t passed = 0, wanted = 0, of_lane = 0, crossing = 0;
  counts.for_each([&](uint32_t v, uint32_t count) {
    const uint32_t of_chunk = __reduce_add_sync(kFullWarp, count);
    if (passed < ties) {
      wanted = ties - passed;
      of_lane = count;
      crossing = v;
    }
    passed += of_chunk;
  });
  const uint32_t up_to_here = inclusive_scan(of_lane, lane);
  const int cut_lane = __ffs(__ballot_sync(kFullWarp, up_to_here >= wanted)) - 1;
  const uint32_t before = __shfl_sync(kFullWarp, up_to_here - of_lane, cut_lane);
  return {static_cast<int>(crossing * kLanes) + cut_lane, wanted - before};
}

template <class Fmt, int kHeld, bool kOneWarp>
TOPK_INLINE Cut find_cut(Team<kOneWarp>& team, const WarpChunks<Fmt, kHeld>& chunks,
                         Threshold threshold) {
  if (threshold.ties == kAllTies) return {kEverySlot, 0};
  if (threshold.ties == 0) return {kNoSlot, 0};
  const TieCounts<Fmt, kHeld> counts(chunks, threshold);
  if (kOneWarp) return locate_cut(counts, threshold.ties, team.lane);
  const uint32_t of_warp = __reduce_add_sync(kFullWarp, counts.of_lane());
  const uint32_t before = team.sum_of_warps_before(of_warp);
  if (before >= threshold.ties) return {kNoSlot, 0};
  if (before + of_warp <= threshold.ties) return {kEverySlot, 0};
  return locate_cut(counts, threshold.ties - before, team.lane);
}

// ---- Write ------------------------------------------------------------------------------------

// kept = raw where the container is above the bound, else 0. Returns the slot's bits; any bits
// above them are undefined.
template <class Fmt>
TOPK_INLINE uint32_t keep_above(const uint32_t (&raw)[4], const uint32_t (&keys)[4], uint32_t bound,
                                uint32_t (&kept)[4]) {
  uint32_t bits = 0;
  if (Fmt::kWide) {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep_if_above(bits, 1u << i, kept[i], raw[i], keys[i], bound);
    return bits;
  }
  // Two comparisons by one subtraction: each half of the bound is lent a top bit, and the bit that
  // remains says whether the key's lower 15 bits are no larger. The top bits take precedence.
  const uint32_t bounds = logic3<kA | kB>(bound & 0xffff0000u, bound >> 16, 0);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t rest = (bounds | Fmt::kTops) - (keys[i] & ~Fmt::kTops);
    constexpr int kAbove = (kA & ~kB) | (kA & ~kC) | (~kB & ~kC);
    const uint32_t mask = spread_signs(logic3<kAbove>(keys[i], rest, bounds), 0x3311u);
    kept[i] = raw[i] & mask;
    bits = logic3<(kA & kB) | kC>(mask, 0x20001u << (2 * i), bits);
  }
  return bits | bits >> 16;
}

// The bits of a slot where only some ties are taken, or where a bound would be below key 0.
template <class Fmt>
TOPK_INLINE uint32_t special_bits(const uint32_t (&keys)[4], Threshold threshold, uint32_t ties) {
  uint32_t bits = 0;
  for_each_container<Fmt>(keys, [&](int i, uint32_t container) {
    const bool tie = container >= threshold.first && container <= threshold.last;
    if (container > threshold.last || (tie && ties > 0)) bits |= 1u << i;
    if (tie && ties > 0) --ties;
  });
  return bits;
}

template <class Fmt, class Chunks>
TOPK_INLINE void write_row(const Chunks& chunks, Threshold threshold, Cut cut, int lane) {
  // Slots [special, cut.slot] are selected element by element.
  const int special = threshold.first == 0 ? 0 : cut.slot;
  const uint32_t specials = cut.slot - special;
  uint32_t even_bits = 0;
  chunks.for_each([&](uint32_t v, int unrolled, const uint32_t(&raw)[4], const uint32_t(&keys)[4]) {
    const int slot = static_cast<int>(v * kLanes) + lane;
    uint32_t kept[4], bits;
    if (static_cast<uint32_t>(slot - special) <= specials) {
      bits = special_bits<Fmt>(keys, threshold, slot < cut.slot ? Fmt::kElements : cut.ties);
      keep_selected<Fmt>(raw, bits, kept);
    } else {
      const uint32_t bound = slot < cut.slot ? threshold.first - 1 : threshold.last;
      bits = keep_above<Fmt>(raw, keys, bound, kept);
    }
    chunks.store(v, kept);
    if (!Fmt::kWide) {
      chunks.store_bits(v, bits);
    } else if (unrolled % 2 == 0) {
      even_bits = bits;
    } else {
      const uint32_t own = even_bits | bits << 4;
      const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
      chunks.store_bits(v - 1, lane % 2 == 1 ? (other >> 4) | (own & 0xf0u)
                                             : (own & 0xfu) | other << 4);
    }
  });
}

}  // namespace topk_mask

// Steps 3 and 4 of a row: which of the values equal to the threshold are selected, and what is
// written. Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_search.cuh"

namespace topk_mask {

// ---- Ties -------------------------------------------------------------------------------------

// Which of a warp's ties are selected. Slots are local: chunk of the warp * 32 + lane.
struct Cut {
  int slot;       // all ties before this slot are taken, and none after it
  uint32_t ties;  // how many of this slot's own ties are taken
};

constexpr Cut kEveryTie = {0x7fffffff, 0};
constexpr Cut kNoTie = {-1, 0};

// The elements that equal the threshold. They are looked for in registers.
template <class Fmt>
struct EqualElements {
  uint32_t value;

  TOPK_INLINE typename Fmt::Count count_in(const uint32_t (&raw)[4]) const {
    return Fmt::equal_in(raw, value);
  }
  TOPK_INLINE uint32_t mask_of(uint32_t word) const { return Fmt::equal(word, value); }
  template <class Chunks, class F>
  TOPK_INLINE static void for_each(const Chunks& chunks, F f) {
    chunks.for_each(f);
  }
};

// The NaNs of a row that has k or more of them. Training such a row is pointless, so the code is
// short rather than fast.
template <class Fmt>
struct NotNumbers {
  TOPK_INLINE typename Fmt::Count count_in(const uint32_t (&raw)[4]) const {
    typename Fmt::Count count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) count += Fmt::count_of(mask_of(raw[i]));
    return count;
  }
  TOPK_INLINE uint32_t mask_of(uint32_t word) const { return Fmt::not_a_number(word); }
  template <class Chunks, class F>
  TOPK_INLINE static void for_each(const Chunks& chunks, F f) {
    chunks.for_each_read(f);
  }
};

// Bit i of the result: element i of the slot is one of the ties.
template <class Fmt, class Ties>
TOPK_INLINE uint32_t tie_bits(const Ties& ties, const uint32_t (&raw)[4]) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    bits = and_or(ties.mask_of(raw[i]), Fmt::kWide ? 1u << i : 0x20001u << (2 * i), bits);
  return Fmt::kWide ? bits : (bits | bits >> 16) & 0xffu;
}

TOPK_INLINE uint32_t lowest_bits(uint32_t bits, uint32_t count) {
  uint32_t rest = bits;
  for (uint32_t i = 0; i < count; ++i) rest &= rest - 1;
  return bits ^ rest;
}

// Where this warp's `wanted` lowest ties end. It has at least that many.
template <class Fmt, class Chunks, class Ties>
TOPK_INLINE Cut locate_cut(const Chunks& chunks, const Ties& ties, uint32_t wanted, int lane) {
  uint32_t passed = 0, before_chunk = 0, crossing = 0;
  typename Fmt::Count of_slot = 0;
  ties.for_each(chunks, [&](uint32_t v, int, const uint32_t(&raw)[4]) {
    if (passed >= wanted) return;
    before_chunk = passed;
    crossing = v;
    of_slot = ties.count_in(raw);
    passed += Fmt::decode(__reduce_add_sync(kFullWarp, Fmt::summand(of_slot)), kLanes);
  });
  const uint32_t of_lane = Fmt::decode(Fmt::summand(of_slot), 1);
  const uint32_t up_to_here = before_chunk + inclusive_scan(of_lane, lane);
  const int cut_lane = __ffs(__ballot_sync(kFullWarp, up_to_here >= wanted)) - 1;
  const uint32_t before = __shfl_sync(kFullWarp, up_to_here - of_lane, cut_lane);
  return {static_cast<int>(crossing * kLanes) + cut_lane, wanted - before};
}

template <class Fmt, class Chunks, bool kOneWarp, class Ties>
TOPK_INLINE Cut find_cut(Team<kOneWarp>& team, const Chunks& chunks, const Ties& ties,
                         uint32_t wanted) {
  if (kOneWarp) return locate_cut<Fmt>(chunks, ties, wanted, team.lane);
  typename Fmt::Count count = 0;
  ties.for_each(chunks, [&](uint32_t v, int, const uint32_t(&raw)[4]) {
    // Pads at the row's end come after all elements; those of other warps' chunks do not.
    if (chunks.owns(v)) count += ties.count_in(raw);
  });
  const uint32_t of_warp =
      Fmt::decode(__reduce_add_sync(kFullWarp, Fmt::summand(count)), kLanes);
  const uint32_t before = team.sum_of_warps_before(of_warp);
  if (before >= wanted) return kNoTie;
  if (before + of_warp <= wanted) return kEveryTie;
  return locate_cut<Fmt>(chunks, ties, wanted - before, team.lane);
}

// ---- Write ------------------------------------------------------------------------------------

// kept = raw where it is above the bound, else 0. Returns the slot's bits in the lowest byte; other
// bits are undefined.
template <class Fmt>
TOPK_INLINE uint32_t keep_above(const uint32_t (&raw)[4], uint32_t bound, uint32_t (&kept)[4]) {
  if constexpr (Fmt::kWide) {
    float bits = kCounter;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      keep_if_above(bits, static_cast<float>(1 << i), kept[i], raw[i],
                    as_float(Fmt::compared(raw[i])), as_float(bound));
    return as_word(bits);
  } else {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t mask = Fmt::above(raw[i], bound);
      kept[i] = raw[i] & mask;
      bits = and_or(mask, 0x20001u << (2 * i), bits);
    }
    return bits | bits >> 16;
  }
}

// Calls selected(chunk, words, kept) for every slot and stores what it keeps and returns as bits.
template <class Fmt, class Chunks, class ForEach, class Selected>
TOPK_INLINE void write_slots(const Chunks& chunks, int lane, ForEach for_each, Selected selected) {
  uint32_t even_bits = 0;
  for_each([&](uint32_t v, int unrolled, const uint32_t(&raw)[4]) {
    uint32_t kept[4];
    const uint32_t bits = selected(v, raw, kept);
    chunks.store(v, kept);
    if (!Fmt::kWide) {
      chunks.store_bits(v, bits);
    } else if (unrolled % 2 == 0) {
      even_bits = bits & 0xfu;
    } else {
      const uint32_t own = even_bits | (bits & 0xfu) << 4;
      const uint32_t other = __shfl_xor_sync(kFullWarp, own, 1);
      chunks.store_bits(v - 1, lane % 2 == 1 ? (other >> 4) | (own & 0xf0u)
                                             : (own & 0xfu) | other << 4);
    }
  });
}

template <class Fmt, class Chunks>
TOPK_INLINE void write_row(const Chunks& chunks, Threshold threshold, Cut cut, int lane) {
  const EqualElements<Fmt> ties = {Fmt::bound_of(threshold.order)};
  const uint32_t with_ties = Fmt::bound_of(threshold.order - 1);
  const int cut_chunk = cut.slot >> 5, cut_lane = cut.slot % kLanes;
  write_slots<Fmt>(
      chunks, lane, [&](auto f) { chunks.for_each(f); },
      [&](uint32_t v, const uint32_t(&raw)[4], uint32_t(&kept)[4]) {
        const int slot = static_cast<int>(v * kLanes) + lane;
        uint32_t bits = keep_above<Fmt>(raw, slot < cut.slot ? with_ties : ties.value, kept);
        if (static_cast<int>(v) == cut_chunk && lane == cut_lane) {
          bits |= lowest_bits(tie_bits<Fmt>(ties, raw), cut.ties);
          keep_selected<Fmt>(raw, bits & (Fmt::kWide ? 0xfu : 0xffu), kept);
        }
        return bits;
      });
}

template <class Fmt, class Chunks>
TOPK_INLINE void write_nans(const Chunks& chunks, Cut cut, int lane) {
  const NotNumbers<Fmt> nans;
  write_slots<Fmt>(
      chunks, lane, [&](auto f) { chunks.for_each_read(f); },
      [&](uint32_t v, const uint32_t(&raw)[4], uint32_t(&kept)[4]) {
        const int slot = static_cast<int>(v * kLanes) + lane;
        const uint32_t taken = slot < cut.slot ? Fmt::kElements : slot == cut.slot ? cut.ties : 0;
        const uint32_t bits = lowest_bits(tie_bits<Fmt>(nans, raw), taken);
        keep_selected<Fmt>(raw, bits, kept);
        return bits;
      });
}

template <class Fmt, class Chunks, bool kOneWarp>
TOPK_INLINE void select_and_write(Team<kOneWarp>& team, const Chunks& chunks,
                                  Threshold threshold) {
  if (threshold.order == Fmt::kOrders.top) {
    const Cut cut = find_cut<Fmt>(team, chunks, NotNumbers<Fmt>(), threshold.ties);
    write_nans<Fmt>(chunks, cut, team.lane);
    return;
  }
  Cut cut = kNoTie;
  if (threshold.ties > 0) {
    const EqualElements<Fmt> ties = {Fmt::bound_of(threshold.order)};
    cut = find_cut<Fmt>(team, chunks, ties, threshold.ties);
  }
  write_row<Fmt>(chunks, threshold, cut, team.lane);
}

}  // namespace topk_mask

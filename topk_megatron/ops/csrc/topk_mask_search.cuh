// Step 2 of a row: the threshold of the selection, from counts of the elements above a bound.
// Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_row.cuh"

namespace topk_mask {

// Selects the elements above the value of this order, and the `ties` equal to it with the lowest
// indices. With the order kOrders.top, the ties are the NaNs, and nothing is above them.
struct Threshold {
  int order;
  uint32_t ties;
};

constexpr uint32_t kLongReach = 1u << 28;

// What a row says about the next one. The result does not depend on it, only the number of counts.
struct Forecast {
  int order;
  float orders_per_element;  // around the threshold
};

// A row whose threshold is near 1 is bracketed by the next count or two.
template <class Fmt>
TOPK_INLINE Forecast cold_forecast(uint32_t hidden) {
  return {Fmt::kOrders.one, quotient(8.0f * Fmt::kOrders.binade, static_cast<float>(hidden))};
}

// After this many counts, halving takes turns with interpolation, which then bounds their number.
constexpr int kInterpolations = 6;

// The orders between which the k-th largest value lies: at least k elements are above `low`, and
// fewer than k are above `high`. So it is `high` itself where the two are neighbours.
struct Bracket {
  int low, high;
  uint32_t above_low, above_high;

  TOPK_INLINE uint32_t width() const {
    return static_cast<uint32_t>(high) - static_cast<uint32_t>(low);
  }
  TOPK_INLINE float orders_per_element() const {
    return quotient(static_cast<float>(width()), static_cast<float>(above_low - above_high));
  }
};

template <class Fmt>
TOPK_INLINE bool is_closed(const Bracket& bracket) {
  return bracket.low != Fmt::kOrders.bottom && bracket.high != Fmt::kOrders.top;
}

// The next bound inside the bracket, given the last one, at one of its ends.
template <class Fmt>
TOPK_INLINE int next_order(const Bracket& bracket, uint32_t k, int counts, bool at_low,
                           uint32_t& reach) {
  uint32_t step = bracket.width() / 2;
  if (!is_closed<Fmt>(bracket)) {  // in growing steps away from the last bound
    const uint32_t most = bracket.width() - 1;
    step = reach < most ? reach : most;
    if (reach < kLongReach) reach *= 4;
    if (!at_low) step = bracket.width() - step;
  } else if (counts < kInterpolations || counts % 2 == 0) {
    const float surplus = static_cast<float>(bracket.above_low - k) + 0.5f;
    step = floor_to_word(surplus * bracket.orders_per_element());
    const uint32_t most = bracket.width() - 1;
    step = step < 1 ? 1 : step > most ? most : step;
  }
  return static_cast<int>(static_cast<uint32_t>(bracket.low) + step);  // as words: it may not fit
}

// A bound that finds nothing new far from the threshold is in a wide gap. Near the threshold, where
// few elements are left, that is usual, and interpolation is cheaper than a jump for a while.
constexpr int kCountsBeforeJump = 12;

// Moves the end of the bracket at which the last bound was to the next value that occurs. Rows with
// few distinct values have wide gaps, in which interpolation and halving would find nothing.
template <class Fmt, bool kOneWarp, class Chunks>
TOPK_INLINE void jump_over_gap(Team<kOneWarp>& team, const Chunks& chunks, bool at_low,
                               Bracket& bracket) {
  constexpr uint32_t kSign = 0x80000000u;  // turns orders into unsigned words in the same order
  const uint32_t bound = Fmt::bound_of(at_low ? bracket.low : bracket.high);
  uint32_t nearest = at_low ? Fmt::kPositiveInfinity : Fmt::kPad;
  if (at_low) {
    chunks.for_each_read([&](uint32_t, int, const uint32_t(&raw)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        nearest = Fmt::smaller(nearest, select(Fmt::above(raw[i], bound), Fmt::compared(raw[i]),
                                               Fmt::kPositiveInfinity));
    });
    const uint32_t of_lane = static_cast<uint32_t>(Fmt::smallest_order(nearest)) ^ kSign;
    const uint32_t of_row = team.min(__reduce_min_sync(kFullWarp, of_lane));
    bracket.low = static_cast<int>(of_row ^ kSign) - 1;
  } else {
    chunks.for_each_read([&](uint32_t, int, const uint32_t(&raw)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        nearest = Fmt::larger(nearest, select(Fmt::above(raw[i], bound), Fmt::kPad,
                                              Fmt::compared(raw[i])));
    });
    const uint32_t of_lane = static_cast<uint32_t>(Fmt::largest_order(nearest)) ^ kSign;
    const uint32_t of_row = team.max(__reduce_max_sync(kFullWarp, of_lane));
    bracket.high = static_cast<int>(of_row ^ kSign);
  }
}

// The threshold for exactly k of the row's elements.
template <class Fmt, bool kOneWarp, class Chunks>
TOPK_INLINE Threshold find_threshold(Team<kOneWarp>& team, const Chunks& chunks, uint32_t hidden,
                                     uint32_t k, Forecast& forecast) {
  Bracket bracket = {Fmt::kOrders.bottom, Fmt::kOrders.top, hidden, 0};
  Threshold found = {forecast.order, 0};
  uint32_t reach = 0;
  for (int counts = 1;; ++counts) {
    const uint32_t above = team.sum(chunks.count_above(Fmt::bound_of(found.order)));
    if (above == k) break;  // no ties
    const bool at_low = above > k;
    const bool in_gap = above == (at_low ? bracket.above_low : bracket.above_high);
    if (at_low) {
      bracket.low = found.order;
      bracket.above_low = above;
    } else {
      bracket.high = found.order;
      bracket.above_high = above;
    }
    const uint32_t missed = at_low ? above - k : k - above;
    if (counts == 1) {
      reach = floor_to_word(forecast.orders_per_element * static_cast<float>(missed) * 1.25f);
      reach = reach < kLongReach ? reach + 1 : kLongReach;  // never 0: the bound must move
    }
    const bool jumps = in_gap && bracket.width() > 1 &&
                       (2 * missed >= k || counts > kCountsBeforeJump);
    if (jumps) jump_over_gap<Fmt>(team, chunks, at_low, bracket);
    if (bracket.width() == 1) {
      found = {bracket.high, k - bracket.above_high};
      break;
    }
    found.order = !jumps   ? next_order<Fmt>(bracket, k, counts, at_low, reach)
                  : at_low ? bracket.low + 1
                           : bracket.high - 1;
  }
  if (is_closed<Fmt>(bracket)) forecast.orders_per_element = bracket.orders_per_element();
  forecast.order = found.order < Fmt::kOrders.top ? found.order : found.order - 1;
  return found;
}

}  // namespace topk_mask

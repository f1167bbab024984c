// Steps 2 to 4 of a row: the floor, the candidates above it, and the threshold of the selection.
// Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_row.cuh"

namespace topk_mask {

constexpr uint32_t kAllTies = 0xffffffffu;

// ---- Threshold --------------------------------------------------------------------------------

// The k-th largest key by bisection, from a count of elements at or above a container.
// Requires that at least k elements have keys >= low and none has a key above high. tighten(low,
// high) may move both to keys that occur, because otherwise few distinct values would cost a step
// for every bit of a key.
constexpr int kStepsToTighten = 12;

template <class Fmt, class Count, class Tighten>
TOPK_INLINE Threshold bisect(uint32_t low, uint32_t high, uint32_t k, Count count_at_least,
                             Tighten tighten) {
  for (int step = 1; low < high; ++step) {
    if (step % kStepsToTighten == 0) {
      tighten(low, high);
      if (low >= high) break;
    }
    const uint32_t middle = high - (high - low) / 2;
    const uint32_t bound = Fmt::container_of(middle);
    const uint32_t count = count_at_least(bound);
    // Exactly k, and the bound splits neither -0 from +0 nor NaN from NaN: the bound decides.
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

// A key that at least `quota` of the warp's group maxima reach, and usually only a few more.
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
  for (int step = 0; low < high && step < kStepsToTighten; ++step) {
    const uint32_t middle = high - (high - low) / 2;
    uint32_t count = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g)
      count_if_at_least(count, maxima[g], Fmt::container_of(middle));
    count = __reduce_add_sync(kFullWarp, count);
    if (count >= quota) {
      low = middle;
      if (count <= quota + quota / 4) break;
    } else {
      high = middle - 1;
    }
  }
  // Raise it to a key that occurs, so that with few distinct values the floor is the quota-th key.
  uint32_t next = 0xffffffffu;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) lower_to_if_at_least(next, maxima[g], Fmt::container_of(low));
  return Fmt::key_of(__reduce_min_sync(kFullWarp, next));
}

template <class Fmt, int kHeld>
TOPK_INLINE Threshold held_list_threshold(const uint32_t* list, uint32_t size, uint32_t low,
                                          uint32_t k, int lane) {
  uint32_t held[kHeld], largest = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const uint32_t at = i * kLanes + lane;
    held[i] = at < size ? list[at] : 0;
    largest = held[i] > largest ? held[i] : largest;
  }
  const auto for_each = [&](auto f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) f(held[i]);
  };
  const uint32_t high = Fmt::key_of(__reduce_max_sync(kFullWarp, largest));
  return bisect<Fmt>(
      low, high, k,
      [&](uint32_t bound) {
        uint32_t count = 0;
        for_each([&](uint32_t container) { count_if_at_least(count, container, bound); });
        return __reduce_add_sync(kFullWarp, count);
      },
      [&](uint32_t& low, uint32_t& high) {
        uint32_t smallest = 0xffffffffu, below_high = ~(Fmt::container_of(high) | Fmt::kBelow);
        uint32_t greatest = 0xffffffffu;  // complement of the largest container not above `high`
        for_each([&](uint32_t container) {
          lower_to_if_at_least(smallest, container, Fmt::container_of(low));
          lower_to_if_at_least(greatest, ~container, below_high);
        });
        low = Fmt::key_of(__reduce_min_sync(kFullWarp, smallest));
        high = Fmt::key_of(~__reduce_min_sync(kFullWarp, greatest));
      });
}

// The threshold among `size` listed containers with keys >= low, by one warp that holds the list in
// registers.
template <class Fmt>
TOPK_INLINE Threshold list_threshold(const uint32_t* list, uint32_t size, uint32_t low, uint32_t k,
                                     int lane) {
  constexpr int kMost = kListCapacity / kLanes;
  if (size <= kListCapacity / 2) {
    return held_list_threshold<Fmt, kMost / 2>(list, size, low, k, lane);
  }
  return held_list_threshold<Fmt, kMost>(list, size, low, k, lane);
}

// Keys [low, high], both at the border of a class, that include the k-th largest. `above` elements
// are greater and `inside` elements are in the window.
struct Window {
  uint32_t low, high, above, inside;
};

// Bisects the registers until the window's elements fit the list or the window is a single class.
template <class Fmt, bool kOneWarp, class Chunks>
TOPK_INLINE Window narrow(Team<kOneWarp>& team, const Chunks& chunks, uint32_t low, uint32_t high,
                          uint32_t k) {
  uint32_t above = 0, reached = 0xffffffffu;  // reached: elements with keys >= low
  while (reached - above > kListCapacity) {
    uint32_t middle = Fmt::key_of(Fmt::class_first(high - (high - low) / 2));
    if (middle <= low) middle = Fmt::key_of(Fmt::class_last(low)) + 1;
    if (Fmt::key_of(Fmt::class_last(low)) >= high) break;
    const uint32_t count = team.sum(chunks.count_at_least(Fmt::container_of(middle)));
    if (count >= k) {
      low = middle;
      reached = count;
    } else {
      high = middle - 1;
      above = count;
    }
  }
  return {low, high, above, reached - above};
}

// ---- Candidates -------------------------------------------------------------------------------

constexpr uint32_t kTooMany = 0xffffffffu;
constexpr uint32_t kLost = 1u << 24;  // the size reported for a column that overflowed

// Packs the lanes' columns into the team's list. Returns the number of candidates in the row, or
// kTooMany if a column overflowed. The candidates are in the list if they fit.
template <bool kOneWarp>
TOPK_INLINE uint32_t pack_list(Team<kOneWarp>& team, const Column& column, uint32_t capacity,
                               uint32_t* list, uint32_t& shared_size) {
  const uint32_t mine = column.size();
  const uint32_t up_to_here = inclusive_scan(mine, team.lane);
  uint32_t of_warp = __shfl_sync(kFullWarp, up_to_here, kLanes - 1);
  const bool lost = __ballot_sync(kFullWarp, mine > capacity) != 0;
  if (lost) of_warp = kLost;  // 32 warps add this without overflow
  uint32_t base = 0;
  if (!kOneWarp) {  // in any order of the warps, because the list is only counted
    if (team.lane == 0) base = atomicAdd(&shared_size, of_warp);
    base = __shfl_sync(kFullWarp, base, 0);
  }
  if (base + of_warp <= kListCapacity) {
    const uint32_t to = base + up_to_here - mine;
    for (uint32_t i = 0; i < mine; ++i) list[to + i] = column.entry(i);
  }
  team.sync();
  const uint32_t size = kOneWarp ? of_warp : shared_size;
  return size >= kLost ? kTooMany : size;
}

// The threshold of a row about which too little is known, by two rounds of bisection: in registers,
// then in the list. Correct for every row; large k (more than about H / 11) always needs it.
template <class Fmt, int kColumn, bool kBounded, bool kOneWarp, class Chunks>
TOPK_INLINE Threshold threshold_by_narrowing(Team<kOneWarp>& team, const Chunks& chunks,
                                             uint32_t low, uint32_t largest, uint32_t k,
                                             uint32_t* lane_column, uint32_t* list) {
  const uint32_t high = Fmt::key_of(Fmt::class_last(Fmt::key_of(
      team.max(__reduce_max_sync(kFullWarp, largest)))));
  const Window window = narrow<Fmt>(team, chunks, low, high, k);
  const uint32_t first = Fmt::container_of(window.low);
  if (Fmt::key_of(Fmt::class_last(window.low)) >= window.high) {
    const bool all = window.inside == k - window.above;
    return {first, Fmt::class_last(window.low), all ? kAllTies : k - window.above};
  }
  const uint32_t span = Fmt::container_of(window.high - window.low) | Fmt::kBelow;
  Column column(lane_column);
  chunks.for_each_container([&](uint32_t container) {
    if (kBounded) {
      if (container - first <= span) column.append_if_room(container, 0, kColumn);
    } else {
      column.append_if_within(container, first, span);
    }
  });
  const uint32_t found = pack_list(team, column, kColumn, list, team.scalar(kSecondList));
  if (found == kTooMany) {  // the window fits the list, but not the column of one lane
    return bisect<Fmt>(
        window.low, window.high, k,
        [&](uint32_t bound) { return team.sum(chunks.count_at_least(bound)); },
        [](uint32_t&, uint32_t&) {});
  }
  return team.by_first_warp([&] {
    return list_threshold<Fmt>(list, found, window.low, k - window.above, team.lane);
  });
}

// The maxima of a lane's groups. A group is half a slot of every kUnroll-th chunk.
template <class Fmt, int kGroups, class Chunks>
TOPK_INLINE void group_maxima(const Chunks& chunks, uint32_t (&maxima)[kGroups]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) maxima[g] = 0;
  chunks.for_each([&](uint32_t, int unrolled, const uint32_t(&)[4], const uint32_t(&keys)[4]) {
    for_each_container<Fmt>(keys, [&](int i, uint32_t container) {
      uint32_t& largest = maxima[2 * unrolled + (2 * i >= Fmt::kElements ? 1 : 0)];
      largest = container > largest ? container : largest;
    });
  });
}

template <int kGroups, int kMerged>
TOPK_INLINE void merge_groups(const uint32_t (&maxima)[kGroups], uint32_t (&merged)[kMerged]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint32_t& largest = merged[g / (kGroups / kMerged)];
    const bool first = g % (kGroups / kMerged) == 0;
    largest = first || maxima[g] > largest ? maxima[g] : largest;
  }
}

// With `groups` per lane, at most this many maxima may have to reach the floor. With more, most of
// the row would pass the filter.
TOPK_INLINE constexpr uint32_t most_quota(int groups) { return groups * kLanes * 3 / 4; }

// Elements above the floor's class are candidates. They fit the list, or none is needed, in all but
// unusual rows, such as sorted ones, whose large elements share few groups.
template <class Fmt, int kColumn, bool kBounded, int kGroups, int kMerged, bool kOneWarp,
          class Chunks>
TOPK_INLINE Threshold find_threshold(Team<kOneWarp>& team, const Chunks& chunks, uint32_t k,
                                     uint32_t* lane_column, uint32_t* list) {
  uint32_t maxima[kGroups], merged[kMerged];
  group_maxima<Fmt>(chunks, maxima);
  merge_groups(maxima, merged);
  team.clear_scalars();
  uint32_t low = 0;
  const uint32_t quota = (k + team.warps - 1) / team.warps;
  if (quota <= most_quota(kGroups)) {
    const uint32_t floor =
        team.min(quota <= most_quota(kMerged) ? warp_floor<Fmt, kMerged>(merged, quota)
                                              : warp_floor<Fmt, kGroups>(maxima, quota));
    const uint32_t floor_last = Fmt::class_last(floor);
    Column column(lane_column);
    chunks.for_each_container([&](uint32_t container) {
      if (kBounded) {
        column.append_if_room(container, floor_last, kColumn);
      } else {
        column.append_if_above(container, floor_last);
      }
    });
    const uint32_t found = pack_list(team, column, kColumn, list, team.scalar(kFirstList));
    low = Fmt::key_of(Fmt::class_first(floor));
    if (found <= k) return {Fmt::class_first(floor), floor_last, k - found};
    if (found <= kListCapacity) {
      const uint32_t above_floor = Fmt::key_of(floor_last) + 1;
      return team.by_first_warp(
          [&] { return list_threshold<Fmt>(list, found, above_floor, k, team.lane); });
    }
  }
  uint32_t largest = merged[0];
#pragma unroll
  for (int g = 1; g < kMerged; ++g) largest = merged[g] > largest ? merged[g] : largest;
  return threshold_by_narrowing<Fmt, kColumn, kBounded>(team, chunks, low, largest, k, lane_column,
                                                        list);
}

}  // namespace topk_mask

// Top-k plus mask over rows: y = x on the k coordinates with the largest key, +0 elsewhere, and the
// selection as packed bits. One pass over memory: a row is read once into registers, written once.
//
// A row goes through these steps; all but the last two touch registers and a few hundred words.
//   1. keys      x becomes an unsigned key in the operator's order (class Format).
//   2. floor     every lane reduces its slots to a few group maxima; a warp finds a key that its
//                share of k of them reach, and the smallest of the warps' is one that at least k
//                elements reach. That holds for every row; in rows without order it is tight.
//   3. filter    elements above the floor's class are appended to a column of shared memory per
//                lane (bank = lane: no conflicts whatever the data), then packed into one list.
//   4. threshold at most k were found: it is the floor. They fit the list: one warp bisects it.
//                Otherwise, the exact fallback: all warps bisect their registers until what is left
//                fits the list.
//   5. ties      equal keys at the threshold are taken in index order up to a cut slot, found by
//                counting them per chunk. The cost does not depend on how many there are.
//   6. write     one comparison an element gives the bits, and y by a mask.
//
// Legend. lane: thread of a warp. slot: 16 bytes of a row, what a lane loads at once (8 elements of
// 16 bits or 4 of 32). chunk: the 32 neighbouring slots of a warp, one a lane. A warp owns
// consecutive chunks, lane l holds slot l of each, so that (warp, chunk, lane, element) is index
// order. team: the warps of one row. container: a key in the top bits of a 32-bit word, whatever
// the bits under it. class: a range of keys that count as one value (all NaNs; -0 and +0).
#pragma once

#include "topk_mask_row.cuh"

namespace topk_mask {

constexpr uint32_t kAllTies = 0xffffffffu;
constexpr int kEverySlot = 0x7fffffff;
constexpr int kNoSlot = -1;

// ---- Threshold --------------------------------------------------------------------------------

// The k-th largest key by bisection, from a count of elements at or above a container.
// Needs: at least k elements have keys >= low, none has a key above high. tighten(low, high) may
// move both to keys that occur: few distinct values would else cost a step for every bit of a key.
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
  // Up to a key that occurs, so that of few distinct values the floor is the quota-th itself.
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
        uint32_t greatest = 0xffffffffu;  // complemented: the largest container that is not above
        for_each([&](uint32_t container) {
          lower_to_if_at_least(smallest, container, Fmt::container_of(low));
          lower_to_if_at_least(greatest, ~container, below_high);
        });
        low = Fmt::key_of(__reduce_min_sync(kFullWarp, smallest));
        high = Fmt::key_of(~__reduce_min_sync(kFullWarp, greatest));
      });
}

// The threshold among `size` listed containers with keys >= low; one warp, its list in registers.
template <class Fmt>
TOPK_INLINE Threshold list_threshold(const uint32_t* list, uint32_t size, uint32_t low, uint32_t k,
                                     int lane) {
  constexpr int kMost = kListCapacity / kLanes;
  if (size <= kListCapacity / 2) {
    return held_list_threshold<Fmt, kMost / 2>(list, size, low, k, lane);
  }
  return held_list_threshold<Fmt, kMost>(list, size, low, k, lane);
}

// Keys [low, high], both at the border of a class, between which the k-th largest lies; `above`
// elements are greater, `inside` in it.
struct Window {
  uint32_t low, high, above, inside;
};

// Bisects the registers until the window's elements fit the list, or it is a single class.
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
constexpr uint32_t kLost = 1u << 24;  // stands for the size of a column that overflowed

// Packs the lanes' columns into the team's list. Returns how many candidates the row has, or
// kTooMany if a column overflowed; they are in the list if they fit.

template <bool kOneWarp>
TOPK_INLINE uint32_t pack_list(Team<kOneWarp>& team, const Column& column, uint32_t capacity,
                               uint32_t* list, uint32_t& shared_size) {
  const uint32_t mine = column.size();
  const uint32_t up_to_here = inclusive_scan(mine, team.lane);
  uint32_t of_warp = __shfl_sync(kFullWarp, up_to_here, kLanes - 1);
  const bool lost = __ballot_sync(kFullWarp, mine > capacity) != 0;
  if (lost) of_warp = kLost;  // times 32 warps: no overflow
  uint32_t base = 0;
  if (!kOneWarp) {  // any order of the warps: only counts are taken of the list
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

// The threshold of a row of which too little is known: two rounds of bisection, in registers and in
// the list. Right for every row, and what large k (more than about H / 11) always takes.
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

// The maxima of a lane's groups, each of half a slot of every kUnroll-th chunk.
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

// Of `groups` a lane, at most that many may have to reach the floor: more would mean that most of
// the row passes the filter.
TOPK_INLINE constexpr uint32_t most_quota(int groups) { return groups * kLanes * 3 / 4; }

// Elements above the floor's class are candidates. All of them fit the list, or none is needed, in
// all but odd rows: sorted ones, say, whose large elements share few groups.
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

// ---- Ties -------------------------------------------------------------------------------------

// Which of a warp's ties are selected. Slots are local: chunk of the warp * 32 + lane.
struct Cut {
  int slot;      // ties of slots before this one are all taken, of later ones none
  uint32_t ties; // how many of this slot's own
};

template <class Fmt>
TOPK_INLINE uint32_t count_ties(const uint32_t (&keys)[4], Threshold threshold) {
  uint32_t count = 0;
  for_each_container<Fmt>(keys, [&](int, uint32_t container) {
    count_if_at_most(count, container - threshold.first, threshold.last - threshold.first);
  });
  return count;
}

// How many ties this lane has in each chunk: held chunks in a nibble each (a slot has 8 at most),
// streamed ones counted again.
template <class Fmt, int kHeld>
class TieCounts {
 public:
  TOPK_INLINE TieCounts(const WarpChunks<Fmt, kHeld>& chunks, Threshold threshold)
      : chunks_(chunks), threshold_(threshold) {
    chunks_.for_each([&](uint32_t v, int u, const uint32_t(&)[4], const uint32_t(&keys)[4]) {
      // Pads of the row's end come after all elements, those of other warps' chunks do not.
      const uint32_t count = chunks_.owns(v) ? count_ties<Fmt>(keys, threshold_) : 0;
      of_lane_ += count;
      nibbles_ |= count << (4 * (u % 8));
    });
  }

  TOPK_INLINE uint32_t of_lane() const { return of_lane_; }

  // f(chunk, this lane's ties in it)
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

// Where this warp's `ties` lowest ties end, of which it has that many at least.
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

// kept = raw where the container lies above the bound, else 0. Returns the slot's bits, with
// anything above them.
template <class Fmt>
TOPK_INLINE uint32_t keep_above(const uint32_t (&raw)[4], const uint32_t (&keys)[4], uint32_t bound,
                                uint32_t (&kept)[4]) {
  uint32_t bits = 0;
  if (Fmt::kWide) {
#pragma unroll
    for (int i = 0; i < 4; ++i) keep_if_above(bits, 1u << i, kept[i], raw[i], keys[i], bound);
    return bits;
  }
  // Two comparisons by one subtraction: with a top bit lent to each half of the bound, what is left
  // of it says whether the lower 15 bits of the key are no larger; the top bits decide before them.
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

// A slot of which neither all nor no ties are taken, or a bound would lie below key 0.
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
  // Slots [special, cut.slot] are chosen element by element.
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

// ---- One row ----------------------------------------------------------------------------------

template <class Fmt, int kHeld, bool kOneWarp>
TOPK_INLINE void forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k) {
  constexpr int kColumn = kHeld > 0 ? kHeld * Fmt::kElements : kStreamColumn;
  constexpr int kGroups = 2 * WarpChunks<Fmt, kHeld>::kUnroll;
  constexpr int kMerged = kHeld > 0 && !kOneWarp ? kGroups / 4 : kGroups / 2;
  constexpr int kBytes = kSlotBytes / Fmt::kElements;
  TOPK_SHARED_WORDS(shared);
  const int lane = threadIdx.x % kLanes, warp_in_block = threadIdx.x / kLanes;
  const int warps = kOneWarp ? 1 : blockDim.x / kLanes;
  const int warp = kOneWarp ? 0 : warp_in_block;
  const int row_in_block = kOneWarp ? warp_in_block : 0;
  constexpr int kRows = kOneWarp ? kRowsPerBlock : 1;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + row_in_block;
  if (row >= rows) return;  // whole warps, and of a team all or none

  uint32_t* columns = shared + row_in_block * shared_words(warps, kColumn);
  uint32_t* list = columns + warps * (kLanes * kColumn);
  Team<kOneWarp> team(warps, warp, lane, list + kListCapacity);
  const int64_t start = row * hidden * kBytes, bits_start = row * ((hidden + 31) / 32) * 4;
  const WarpChunks<Fmt, kHeld> chunks(
      {static_cast<const uint8_t*>(x) + start, static_cast<uint8_t*>(y) + start,
       reinterpret_cast<uint8_t*>(bits) + bits_start, static_cast<uint32_t>(hidden),
       rows_aligned(x, y, hidden, kBytes)},
      warps, warp, lane);
  const Threshold threshold = find_threshold<Fmt, kColumn, kHeld == 0, kGroups, kMerged>(
      team, chunks, k, columns + warp * (kLanes * kColumn) + lane, list);
  write_row<Fmt>(chunks, threshold, find_cut(team, chunks, threshold), lane);
}

// ---- Backward ---------------------------------------------------------------------------------

// dx = dy on the selected coordinates. `warps_per_row` warps walk along a row, 32 slots at a time.
template <class Fmt>
TOPK_INLINE void backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows, int hidden,
                          int warps_per_row) {
  constexpr int kBytes = kSlotBytes / Fmt::kElements;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int rows_per_block = blockDim.x / kLanes / warps_per_row;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * rows_per_block + warp / warps_per_row;
  if (row >= rows) return;
  const bool aligned = rows_aligned(dy, dx, hidden, kBytes);
  const uint32_t size = hidden, slots = (size + Fmt::kElements - 1) / Fmt::kElements;
  const uint8_t* dy_row = static_cast<const uint8_t*>(dy) + row * hidden * kBytes;
  uint8_t* dx_row = static_cast<uint8_t*>(dx) + row * hidden * kBytes;
  const uint8_t* bits_row = reinterpret_cast<const uint8_t*>(bits) + row * ((hidden + 31) / 32) * 4;
  for (uint32_t slot = warp % warps_per_row * kLanes + lane; slot < slots;
       slot += warps_per_row * kLanes) {
    const uint32_t at = slot * kSlotBytes, elements = size - slot * Fmt::kElements;
    const uint32_t of_slot =
        Fmt::kWide ? bits_row[slot / 2] >> (slot % 2 * 4) : static_cast<uint32_t>(bits_row[slot]);
    uint32_t raw[4] = {}, kept[4];
    if (aligned) {
      load_vector(dy_row + at, raw);
      keep_selected<Fmt>(raw, of_slot, kept);
      *reinterpret_cast<uint4*>(dx_row + at) = make_uint4(kept[0], kept[1], kept[2], kept[3]);
    } else {
      load_elements<Fmt>(dy_row + at, elements, raw);
      keep_selected<Fmt>(raw, of_slot, kept);
      store_elements<Fmt>(dx_row + at, elements, kept);
    }
  }
}

// ---- Kernels ----------------------------------------------------------------------------------
// C names, so that profilers and the PTX tests can tell them apart.

// X(name, dtype, abs, slots in registers or 0, one warp a row, most threads, blocks a processor has
// room for at least). The last one is the register budget: without it ptxas saves registers by
// spilling a few words.
#define TOPK_VARIANTS(X, dtype_name, dtype, mode_name, abs)                  \
  X(topk_mask_##dtype_name##_##mode_name##_warp2, dtype, abs, 2, true, 128, 8)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp4, dtype, abs, 4, true, 128, 6)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp8, dtype, abs, 8, true, 128, 4)  \
  X(topk_mask_##dtype_name##_##mode_name##_block8, dtype, abs, 8, false, 512, 1) \
  X(topk_mask_##dtype_name##_##mode_name##_stream, dtype, abs, 0, false, 1024, 1)

// In the order of ((dtype * 2) + mode) * kNumVariants + variant.
#define TOPK_FORWARD_KERNELS(X)                    \
  TOPK_VARIANTS(X, float32, 0, value, false)       \
  TOPK_VARIANTS(X, float32, 0, abs, true)          \
  TOPK_VARIANTS(X, bfloat16, 1, value, false)      \
  TOPK_VARIANTS(X, bfloat16, 1, abs, true)         \
  TOPK_VARIANTS(X, float16, 2, value, false)       \
  TOPK_VARIANTS(X, float16, 2, abs, true)

#define TOPK_DEFINE_FORWARD(name, dtype, abs, held, one_warp, threads, blocks)                    \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                   \
      name(const void* __restrict__ x, void* __restrict__ y, uint32_t* __restrict__ bits,         \
           int64_t rows, int hidden, int k) {                                                     \
    forward<Format<dtype, abs>, held, one_warp>(x, y, bits, rows, hidden, k);                     \
  }
TOPK_FORWARD_KERNELS(TOPK_DEFINE_FORWARD)
#undef TOPK_DEFINE_FORWARD

// Backward moves bits and no keys: one kernel for each width.
#define TOPK_DEFINE_BACKWARD(name, dtype)                                                         \
  extern "C" __global__ void __launch_bounds__(256)                                               \
      name(const void* __restrict__ dy, const uint32_t* __restrict__ bits, void* __restrict__ dx, \
           int64_t rows, int hidden, int warps_per_row) {                                         \
    backward<Format<dtype, true>>(dy, bits, dx, rows, hidden, warps_per_row);                     \
  }
TOPK_DEFINE_BACKWARD(topk_mask_backward_32bit, 0)
TOPK_DEFINE_BACKWARD(topk_mask_backward_16bit, 1)
#undef TOPK_DEFINE_BACKWARD

}  // namespace topk_mask

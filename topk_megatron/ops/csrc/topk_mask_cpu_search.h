// Finds the k-th largest key of a row: first a forecast or a sample, then a bracket around the key,
// then the key. topk_mask_cpu_row.h describes the steps and includes this once per instruction set.

namespace topk_megatron {
namespace TOPK_ISA {

// Everything that depends only on (hidden, k), computed once for all rows.
struct Plan {
  int64_t hidden, k;
  int64_t words;       // of the bitmask
  int64_t num_blocks;  // whole ones
  int tail;            // elements after them
  int sample_pieces;   // 64-byte pieces; 0: do not sample
  int64_t sample_stride;
  int sample_rank, sample_middle, sample_slack;
};

constexpr int kMaxSample = 256;
constexpr double kSampleSigmas = 2.5;  // less: more second passes; more: larger buffers to search

inline float log2_about(float value) {  // piecewise linear, error below 0.09
  uint32_t raw;
  std::memcpy(&raw, &value, sizeof raw);
  return (static_cast<float>(raw) - 1065353216.0f) * (1.0f / 8388608.0f);
}

template <typename F>
Plan make_plan(int64_t hidden, int64_t k) {
  constexpr int kPiece = 64 / sizeof(typename F::Raw);
  Plan plan{};
  plan.hidden = hidden;
  plan.k = k;
  plan.words = (hidden + kBlock - 1) / kBlock;
  plan.num_blocks = hidden / kBlock;
  plan.tail = static_cast<int>(hidden % kBlock);
  const int sample_size = hidden >= 4096 ? 256 : 128;
  if (sizeof(typename F::Raw) == 8 || hidden < 4 * sample_size) return plan;
  const double share = static_cast<double>(k) / static_cast<double>(hidden);
  const double mean = share * sample_size;
  const double rank = std::ceil(mean + kSampleSigmas * std::sqrt(mean * (1.0 - share)) + 1.0);
  if (rank > 0.75 * sample_size) return plan;
  plan.sample_pieces = sample_size / kPiece;
  plan.sample_stride = (hidden - kPiece) / (plan.sample_pieces - 1);
  plan.sample_rank = static_cast<int>(rank);
  plan.sample_middle = std::max(1, static_cast<int>(mean + 0.5));
  plan.sample_slack = static_cast<int>(rank / 8.0);
  return plan;
}

// A cursor between a key that at least k coordinates reach and one that fewer reach.
template <typename Key>
struct Bracket {
  Key low;          // num_low >= k coordinates have key >= low
  int64_t num_low;
  Key high;         // num_high < k coordinates have key >= high
  int64_t num_high;

  // Unsigned, because two keys of different signs can be further apart than Key can hold.
  uint64_t gap() const { return static_cast<uint64_t>(high) - static_cast<uint64_t>(low); }
  Key between(uint64_t distance) const {
    return static_cast<Key>(static_cast<uint64_t>(low) + distance);
  }
};

// Where the next row's k-th key is likely to be, because rows of one layer are alike. It affects
// only the speed, never the result: find_by_forecast verifies it by counts.
template <typename F, bool Abs>
struct Forecast {
  using Key = typename F::Key;
  double mean = 0, deviation = -1;  // of the k-th keys; exponentially weighted
  int misses = 0;                   // by how many misses have lately outnumbered hits
  int rest = 0;                     // rows not to forecast, because of them

  bool ready() const { return deviation >= 0 && rest == 0; }

  Bracket<Key> bracket() const {
    constexpr double kReach = 3.4;  // mean absolute deviations: 2.7 sigma
    const double least = static_cast<double>(F::template min_key<Abs>());
    const double most = static_cast<double>(F::kInf);
    Bracket<Key> at{};
    at.low = static_cast<Key>(std::min(std::max(mean - kReach * deviation, least), most));
    at.high = static_cast<Key>(std::min(std::max(mean + kReach * deviation, least), most));
    at.low = std::min<Key>(at.low, F::kInf - 1);
    at.high = std::min<Key>(at.high, F::kInf - 1) + 1;
    return at;
  }

  void hit(Key t) {
    const double error = static_cast<double>(t) - mean;
    mean += error / 8;
    deviation += (std::abs(error) - deviation) / 8;
    misses -= misses > 0;
  }

  // t was found without the forecast. After a miss, move the mean to t at once, in case the kind of
  // rows has changed, and forecast again after 0, 1, 3, 7, ... 63 rows, so that forecasts cost
  // little where rows are unlike each other.
  void miss(Key t, double first_deviation) {
    const double error = std::abs(static_cast<double>(t) - mean);
    mean = static_cast<double>(t);
    if (deviation < 0) {
      deviation = first_deviation;
    } else if (rest > 0) {
      --rest;
      deviation += (error - deviation) / 8;
    } else {
      deviation = std::max(deviation, error / 2);
      rest = (1 << misses) - 1;
      misses = std::min(misses + 1, 6);
    }
  }
};

template <typename F, bool Abs>
struct Search {
  using Raw = typename F::Raw;
  using Key = typename F::Key;
  using V = Ops<F, Abs>;
  static constexpr int kCloseSteps = 6;

  struct Guess {
    Key collect;  // about k + 2.5 sigma coordinates reach it
    Key probe;    // about the k-th key
  };

  static int64_t count(const Raw* p, int64_t num_blocks, Key t) {
    const auto threshold = V::threshold(t);
    int64_t total = 0;
    for (int64_t b = 0; b < num_blocks; ++b) total += V::count(p + b * kBlock, threshold);
    return total;
  }

  // The smallest key >= t among n elements, or kNanKey if there is none.
  static Key smallest_from(const Raw* p, int64_t n, Key t) {
    Key best = F::kNanKey;
    for (int64_t i = 0; i < n; ++i) {
      const Key key = F::template key<Abs>(p[i]);
      best = std::min(best, key >= t ? key : F::kNanKey);
    }
    return best;
  }

  // Shrink a bracket until at least `rank` elements of the sample reach `low`, and not many more:
  // 4-ary search on 16-bit keys.
  template <typename S>
  static void search(const uint16_t* sample, int num_blocks, int rank, int slack,
                     Bracket<int>& at) {
    using W = Ops<S, Abs>;
    while (at.high - at.low > 1 && at.num_low > rank + slack) {
      const int quarter = (at.high - at.low + 3) / 4;
      int probe[3], num[3] = {0, 0, 0};
      for (int i = 0; i < 3; ++i) probe[i] = std::min(at.low + quarter * (i + 1), at.high - 1);
      const auto t0 = W::threshold(probe[0]), t1 = W::threshold(probe[1]),
                 t2 = W::threshold(probe[2]);
      for (int b = 0; b < num_blocks; ++b) {
        num[0] += __builtin_popcount(W::ge(sample + b * kBlock, t0));
        num[1] += __builtin_popcount(W::ge(sample + b * kBlock, t1));
        num[2] += __builtin_popcount(W::ge(sample + b * kBlock, t2));
      }
      int passed = 0;
      while (passed < 3 && num[passed] >= rank) ++passed;
      if (passed < 3) at.high = probe[passed], at.num_high = num[passed];
      if (passed > 0) at.low = probe[passed - 1], at.num_low = num[passed - 1];
    }
  }

  // {the key to collect from, approximately the k-th key} as 16-bit keys.
  template <typename S>
  static std::pair<int, int> search_sample(const uint16_t* sample, int num_blocks,
                                           const Plan& plan) {
    Bracket<int> at{S::template min_key<Abs>(), num_blocks * kBlock, S::kNanKey + 1, 0};
    search<S>(sample, num_blocks, plan.sample_rank, plan.sample_slack, at);
    const int collect = at.low;
    if (at.num_high >= plan.sample_middle)  // the upper end is below the middle: start from there
      at = {at.high, at.num_high, S::kNanKey + 1, 0};
    search<S>(sample, num_blocks, plan.sample_middle, plan.sample_slack / 2, at);
    return {collect, at.low};
  }

  // The smallest key of a float32 whose upper half has this key. The upper half is a bfloat16,
  // truncated toward zero.
  static Key widen(int upper) { return upper > 0 ? upper * 65536 : upper * 65536 - 65535; }

  static Guess sample_guess(const Raw* x, const Plan& plan) {
    constexpr int kPiece = 64 / sizeof(Raw);
    const int size = plan.sample_pieces * kPiece;
    alignas(64) uint16_t narrow[kMaxSample];
    if constexpr (sizeof(Raw) == 2) {
      for (int i = 0; i < plan.sample_pieces; ++i)
        std::memcpy(narrow + i * kPiece, x + i * plan.sample_stride, 64);
      const auto [low, middle] = search_sample<F>(narrow, size / kBlock, plan);
      return {low, middle};
    } else if constexpr (sizeof(Raw) == 4) {
      alignas(64) uint32_t wide[kMaxSample];
      for (int i = 0; i < plan.sample_pieces; ++i)
        std::memcpy(wide + i * kPiece, x + i * plan.sample_stride, 64);
      for (int i = 0; i < size; ++i) narrow[i] = static_cast<uint16_t>(wide[i] >> 16);
      const auto [low, middle] = search_sample<BFloat16>(narrow, size / kBlock, plan);
      const Key t = std::max(widen(low), F::template min_key<Abs>());
      return {smallest_from(wide, size, t), widen(middle)};
    } else {
      return {F::template min_key<Abs>(), F::kNanKey};
    }
  }

  // Where the line through (low, log num_low) and (high, log num_high) crosses log(goal), at most a
  // few widths beyond `high`. It is only a guess: the caller clamps it to its bracket.
  static Key on_line(const Bracket<Key>& line, float goal) {
    if (line.high <= line.low) return line.low;  // the hint missed: everything above low is NaN
    const float top = log2_about(static_cast<float>(line.num_low));
    const float bottom = log2_about(std::max(static_cast<float>(line.num_high), 0.5f));
    const float part = (top - log2_about(std::max(goal, 0.5f))) / std::max(top - bottom, 1e-3f);
    const float distance = static_cast<float>(line.gap()) * std::min(std::max(part, 0.0f), 8.0f);
    return line.between(static_cast<uint64_t>(std::min(distance, 9e18f)));
  }

  // Shrink the bracket until the selection is known: num_low == k, or low is the k-th key. num_gone
  // coordinates are above the bracket and not among those found.
  static void narrow(Raw* found, Bracket<Key>& at, int64_t k, int64_t num_found,
                     Key probe, int64_t num_gone = 0) {
    if (at.num_low == k || at.gap() == 1) return;
    Bracket<Key> line{};  // through the two latest counts
    if (num_found > 4 * k + kBlock || probe >= F::kNanKey) {
      // Ties at low are likely (after ReLU, all equal, quantised): look above it.
      const int64_t num = num_gone + count(found, blocks_of(num_found), at.low + 1);
      if (num < k) at.high = at.low + 1, at.num_high = num;
      if (at.gap() == 1) return;
      if (num >= k && num - num_gone < num_found / 2) {
        num_found = compact(found, num_found, at.low + 1, F::kNanKey + 1);
        at.low = smallest_from(found, num_found, at.low + 1), at.num_low = num;
      }
      line = {at.low, at.num_low, V::max_key_hint(found, blocks_of(num_found)), 1};
      probe = on_line(line, static_cast<float>(k));
    }
    for (int step = 0; at.num_low != k; ++step) {
      const int64_t window = at.num_low - at.num_high;
      if (window <= kBlock || (window <= 4 * kBlock && num_found > 4 * kBlock)) {
        num_found = compact(found, num_found, at.low, at.high);
        num_gone = at.num_high;
      }
      if (window <= kBlock) return rank_window(found, at, k);
      probe = std::min(std::max<Key>(probe, at.low + 1), at.high - 1);
      const int64_t num = num_gone + count(found, blocks_of(num_found), probe);
      if (num >= k) {
        line = {at.low, at.num_low, probe, num};
        at.low = probe, at.num_low = num;
      } else {
        at.high = probe, at.num_high = num;
      }
      if (at.gap() == 1) return;
      // Aim past k, so that the next probe is likely to close the bracket from the other side.
      const float goal = static_cast<float>(k - (num - k) / 4 + (num >= k ? -2 : 2));
      if (step < 6) {
        probe = on_line(at.high > F::kNanKey ? line : at, goal);
      } else if (step % 2 == 0) {  // many equal values: step from one that occurs to the next
        at.low = smallest_from(found, num_found, at.low);
        if (at.gap() == 1) return;
        probe = at.low + 1;
      } else {
        probe = at.between(at.gap() / 2);
      }
    }
  }

  // The same for a short buffer, in steps of 4-ary search that do not branch on counts: on random
  // keys every such branch is mispredicted.
  static void close_in(Raw* found, Bracket<Key>& at, int64_t k, int64_t num_found) {
    const int64_t num_blocks = blocks_of(num_found), num_gone = at.num_high;
    for (int step = 0; step < kCloseSteps; ++step) {
      if (at.num_low == k || at.gap() == 1) return;
      const uint64_t quarter = (at.gap() + 3) / 4;
      Key key[5] = {at.low, 0, 0, 0, at.high};
      int64_t num[5] = {at.num_low, num_gone, num_gone, num_gone, at.num_high};
      for (int i = 1; i < 4; ++i) key[i] = std::min(at.between(quarter * i), at.high);
      const auto t1 = V::threshold(key[1]), t2 = V::threshold(key[2]), t3 = V::threshold(key[3]);
      for (int64_t b = 0; b < num_blocks; ++b) {
        num[1] += V::count(found + b * kBlock, t1);
        num[2] += V::count(found + b * kBlock, t2);
        num[3] += V::count(found + b * kBlock, t3);
      }
      const int passed = (num[1] >= k) + (num[2] >= k) + (num[3] >= k);
      at = {key[passed], num[passed], key[passed + 1], num[passed + 1]};
    }
    if (at.num_low == k || at.gap() == 1) return;
    at.low = smallest_from(found, num_found, at.low);  // many equal values
    narrow(found, at, k, num_found, at.low + 1, num_gone);
  }

  static int64_t blocks_of(int64_t num) { return (num + kBlock - 1) / kBlock; }

  // Keep only low <= key < high, in place: a block's result never extends past the block itself.
  static int64_t compact(Raw* found, int64_t num_found, Key low, Key high) {
    const auto from = V::threshold(low);
    Raw* end = found;
    if (high > F::kNanKey) {
      for (int64_t b = 0; b < blocks_of(num_found); ++b)
        end = V::compress(found + b * kBlock, V::ge(found + b * kBlock, from), end);
    } else {
      const auto until = V::threshold(high);
      for (int64_t b = 0; b < blocks_of(num_found); ++b) {
        const Raw* block = found + b * kBlock;
        end = V::compress(block, V::ge(block, from) & ~V::ge(block, until), end);
      }
    }
    end = std::min(end, found + num_found);  // padding has the smallest key, which may be `low`
    for (int i = 0; i < kBlock; ++i) end[i] = F::template padding<Abs>();
    return end - found;
  }

  // `found` holds exactly the bracket's members, at most one block of them: rank them.
  static void rank_window(const Raw* window, Bracket<Key>& at, int64_t k) {
    using Lane = typename F::Lane;
    const int num = static_cast<int>(at.num_low - at.num_high);
    alignas(64) Lane keys[kBlock], num_above[kBlock] = {};
    for (int i = 0; i < kBlock; ++i)
      keys[i] = i < num ? static_cast<Lane>(F::template key<Abs>(window[i]))
                        : static_cast<Lane>(F::template min_key<Abs>() - 1);
    for (int j = 0; j < num; ++j)
      for (int i = 0; i < kBlock; ++i) num_above[i] += keys[j] > keys[i];
    const Lane wanted = static_cast<Lane>(k - at.num_high);  // of this window; at most kBlock
    Lane t = static_cast<Lane>(F::kNanKey);
    for (int i = 0; i < kBlock; ++i)
      t = std::min(t, num_above[i] < wanted ? keys[i] : static_cast<Lane>(F::kNanKey));
    int64_t num_from = 0, num_over = 0;
    for (int i = 0; i < kBlock; ++i) num_from += keys[i] >= t, num_over += keys[i] > t;
    at = {t, at.num_high + num_from, t + 1, at.num_high + num_over};
  }
};

}  // namespace TOPK_ISA
}  // namespace topk_megatron

// The algorithm, once, for every instruction set.
//
// A row is read from memory once and found in L1/L2 for the rest:
//   1. sample    64-byte pieces spread over the row give a key t0 that about k + 2.5 sigma of the
//                coordinates reach. t0 occurs in the row, so that mass ties are met exactly.
//   2. collect   one pass compresses the coordinates with key >= t0 into a buffer (never overflows:
//                it holds a whole row).
//   3. narrow    counting probes over the buffer, log-linear at first, shrink a bracket around t, the
//                k-th largest key, until its members can be ranked against each other.
//   4. emit      one pass writes y and the bitmask. While ties at t remain to be taken it compares
//                twice (>= t and > t); before and after, once.
// Whatever the sample says, the result is exact: if fewer than k coordinates reach t0, the whole row
// is collected; t0 only decides how much work step 3 has.
//
// Include this with TOPK_ISA set to a namespace name, after that namespace has defined
//   template <typename F, bool Abs> struct Ops {
//     struct Threshold;                              // "key >= t" in the form the compare wants
//     struct NanWatch;                               // sees collected blocks; tripped(): see below
//     static Threshold threshold(Key t);             // min_key <= t <= kNanKey
//     static uint32_t ge(const Raw* p, Threshold);   // bit i: key(p[i]) >= t, for 32 elements
//     static int count(const Raw* p, Threshold);     // of bits set in ge
//     static Raw* compress(const Raw* p, uint32_t mask, Raw* out);
//         // writes at most 32 elements from out, so that out may be p or lie before it
//     static Raw* collect(const Raw* p, Threshold, Raw* out, NanWatch&);  // ge + compress
//     template <bool Stream> static uint32_t ge_store(const Raw* x, Raw* y, Threshold);
//     template <bool Stream> static void mask_store(const Raw* x, Raw* y, uint32_t mask);
//     static Key max_key_hint(const Raw* p, int64_t num_blocks);   // about the largest key
//     static constexpr bool kNanTies;                // threshold(kNanKey + 1) selects nothing
//   };
// A row where NanWatch trips, or whose k-th key is NaN where kNanTies is false, is left to the
// portable path: such rows are rare, and compares that need no care for them are faster.

namespace topk_megatron {
namespace TOPK_ISA {

// What depends on (hidden, k) only, computed once for all rows.
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
constexpr double kSampleSigmas = 2.5;  // fewer: more second passes; more: larger buffers to search

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

  // Unsigned, because keys of both signs lie further apart than Key can say.
  uint64_t gap() const { return static_cast<uint64_t>(high) - static_cast<uint64_t>(low); }
  Key between(uint64_t distance) const {
    return static_cast<Key>(static_cast<uint64_t>(low) + distance);
  }
};

template <typename F, bool Abs>
struct Row {
  using Raw = typename F::Raw;
  using Key = typename F::Key;
  using V = Ops<F, Abs>;

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

  // The smallest key >= t among n elements; kNanKey if there is none.
  static Key smallest_from(const Raw* p, int64_t n, Key t) {
    Key best = F::kNanKey;
    for (int64_t i = 0; i < n; ++i) {
      const Key key = F::template key<Abs>(p[i]);
      best = std::min(best, key >= t ? key : F::kNanKey);
    }
    return best;
  }

  // Move a bracket over the sample until `low` is reached by at least `rank` of it and not by many
  // more: 4-ary search on 16-bit keys.
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

  // {the key to collect from, about the k-th key} as 16-bit keys.
  template <typename S>
  static std::pair<int, int> search_sample(const uint16_t* sample, int num_blocks,
                                           const Plan& plan) {
    Bracket<int> at{S::template min_key<Abs>(), num_blocks * kBlock, S::kNanKey + 1, 0};
    search<S>(sample, num_blocks, plan.sample_rank, plan.sample_slack, at);
    const int collect = at.low;
    if (at.num_high >= plan.sample_middle)  // the upper end lies below the middle: start from it
      at = {at.high, at.num_high, S::kNanKey + 1, 0};
    search<S>(sample, num_blocks, plan.sample_middle, plan.sample_slack / 2, at);
    return {collect, at.low};
  }

  // A float32's upper half is a bfloat16 truncated toward zero: the smallest key with this one's.
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

  // Compress the row's elements with key >= t into `out`; returns how many. Memory is idle until
  // this row is written, so the next one is fetched meanwhile.
  template <bool Stream>
  static int64_t collect(const Raw* x, const Plan& plan, Key t, Raw* out,
                         typename V::NanWatch& watch) {
    const auto threshold = V::threshold(t);
    Raw* end = out;
    for (int64_t b = 0; b < plan.num_blocks; ++b) {
      const Raw* from = x + b * kBlock;
      if (Stream) prefetch<0>(from + plan.hidden);
      end = V::collect(from, threshold, end, watch);
    }
    if (plan.tail != 0) {
      alignas(64) Raw last[kBlock];
      load_tail(x, plan, last);
      watch.see(last);
      const uint32_t valid = (1u << plan.tail) - 1;
      end = V::compress(last, V::ge(last, threshold) & valid, end);
    }
    for (int i = 0; i < kBlock; ++i) end[i] = F::template padding<Abs>();
    return end - out;
  }

  static void load_tail(const Raw* x, const Plan& plan, Raw* last) {
    for (int i = 0; i < kBlock; ++i) last[i] = F::template padding<Abs>();
    std::memcpy(last, x + plan.num_blocks * kBlock, plan.tail * sizeof(Raw));
  }

  // Where the line through (low, log num_low) and (high, log num_high) crosses log(goal); up to a
  // few widths beyond `high`. Only a guess: the caller clamps it to its bracket.
  static Key on_line(const Bracket<Key>& line, float goal) {
    if (line.high <= line.low) return line.low;  // the hint missed: everything above low is NaN
    const float top = log2_about(static_cast<float>(line.num_low));
    const float bottom = log2_about(std::max(static_cast<float>(line.num_high), 0.5f));
    const float part = (top - log2_about(std::max(goal, 0.5f))) / std::max(top - bottom, 1e-3f);
    const float distance = static_cast<float>(line.gap()) * std::min(std::max(part, 0.0f), 8.0f);
    return line.between(static_cast<uint64_t>(std::min(distance, 9e18f)));
  }

  // Shrink the bracket until the selection is known: num_low == k, or low is the k-th key.
  static void narrow(Raw* found, Bracket<Key>& at, int64_t k, int64_t num_found, Key probe) {
    if (at.num_low == k || at.gap() == 1) return;
    Bracket<Key> line{};  // through the two latest counts
    if (num_found > 4 * k + kBlock || probe >= F::kNanKey) {
      // Ties at low are likely (after ReLU, all equal, quantised): look above it.
      const int64_t num = count(found, blocks_of(num_found), at.low + 1);
      if (num < k) at.high = at.low + 1, at.num_high = num;
      if (at.gap() == 1) return;
      if (num >= k && num < num_found / 2) {
        num_found = compact(found, num_found, at.low + 1, F::kNanKey + 1);
        at.low = smallest_from(found, num_found, at.low + 1), at.num_low = num;
      }
      line = {at.low, at.num_low, V::max_key_hint(found, blocks_of(num_found)), 1};
      probe = on_line(line, static_cast<float>(k));
    }
    int64_t num_gone = 0;  // coordinates above the bracket that are no longer in the buffer
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

  static int64_t blocks_of(int64_t num) { return (num + kBlock - 1) / kBlock; }

  // Keep only low <= key < high, in place: a block's result never reaches past the block itself.
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

  // The bracket's members, at most one block of them, are all of `found`: rank them.
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

  // Write everything above t and the first `num_ties` with key == t; all of them, if take_all.
  // The bitmask is stored four words at a time: its stores between those to y stall y's lines.
  template <bool Stream>
  static void emit(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Key t,
                   int64_t num_ties, bool take_all) {
    auto threshold = V::threshold(t);
    int64_t b = 0;
    bool open = !take_all;  // ties remain to be taken
    if (open) {
      const auto above = V::threshold(t + 1);
      b = emit_ties<Stream>(x, y, bits, plan, threshold, above, num_ties);
      open = num_ties > 0;
      if (!open) threshold = above;
    }
    for (; b + 4 <= plan.num_blocks; b += 4) {
      uint32_t words[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (b + i) * kBlock;
        if (!Stream) prefetch<1>(y + at + 1024 / sizeof(Raw));
        words[i] = V::template ge_store<Stream>(x + at, y + at, threshold);
      }
      store_words(bits + b, words);
    }
    for (; b < plan.num_blocks; ++b)
      bits[b] = V::template ge_store<Stream>(x + b * kBlock, y + b * kBlock, threshold);
    if (plan.tail != 0) emit_tail(x, y, bits, plan, t, num_ties, threshold, open);
  }

  // The part of emit before the last tie to be taken; returns the block after it.
  template <bool Stream>
  static int64_t emit_ties(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan,
                           typename V::Threshold threshold, typename V::Threshold above,
                           int64_t& num_ties) {
    int64_t b = 0;
    for (; b + 4 <= plan.num_blocks; b += 4) {
      uint32_t words[4];
      int found = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t at = (b + i) * kBlock;
        if (!Stream) prefetch<1>(y + at + 1024 / sizeof(Raw));
        words[i] = V::ge(x + at, threshold);
        found += __builtin_popcount(words[i] & ~V::ge(x + at, above));
      }
      if (found >= num_ties) break;
      num_ties -= found;
      for (int i = 0; i < 4; ++i)
        V::template mask_store<Stream>(x + (b + i) * kBlock, y + (b + i) * kBlock, words[i]);
      store_words(bits + b, words);
    }
    for (; b < plan.num_blocks && num_ties > 0; ++b) {
      uint32_t mask = V::ge(x + b * kBlock, threshold);
      const uint32_t more = V::ge(x + b * kBlock, above);
      const int found = __builtin_popcount(mask & ~more);
      if (found > num_ties) mask = more | lowest_bits(mask & ~more, static_cast<int>(num_ties));
      num_ties -= std::min<int64_t>(found, num_ties);
      bits[b] = mask;
      V::template mask_store<Stream>(x + b * kBlock, y + b * kBlock, mask);
    }
    return b;
  }

  static void store_words(uint32_t* bits, const uint32_t (&words)[4]) {
    const uint64_t pairs[2] = {words[0] | static_cast<uint64_t>(words[1]) << 32,
                               words[2] | static_cast<uint64_t>(words[3]) << 32};
    std::memcpy(bits, pairs, sizeof pairs);
  }

  static void emit_tail(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Key t,
                        int64_t num_ties, typename V::Threshold threshold, bool open) {
    alignas(64) Raw last[kBlock], kept[kBlock];
    load_tail(x, plan, last);
    uint32_t mask = V::ge(last, threshold) & ((1u << plan.tail) - 1);
    if (open) {
      const uint32_t more = V::ge(last, V::threshold(t + 1)) & mask;
      mask = more | lowest_bits(mask & ~more, static_cast<int>(num_ties));
    }
    V::template mask_store<false>(last, kept, mask);
    bits[plan.num_blocks] = mask;
    std::memcpy(y + plan.num_blocks * kBlock, kept, plan.tail * sizeof(Raw));
  }

  static uint32_t lowest_bits(uint32_t mask, int num) {
    uint32_t kept = 0;
    for (; num > 0 && mask != 0; --num) {
      kept |= mask & (~mask + 1);
      mask &= mask - 1;
    }
    return kept;
  }

  template <int Write>
  static void prefetch(const Raw* block) {
    for (int i = 0; i < kBlock; i += 64 / sizeof(Raw)) __builtin_prefetch(block + i, Write);
  }

  // Returns false, having written nothing, if the row needs the portable path.
  template <bool Stream>
  static bool run(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Raw* found) {
    Guess guess{F::template min_key<Abs>(), F::kNanKey};
    if (plan.sample_pieces != 0) guess = sample_guess(x, plan);
    typename V::NanWatch watch;
    int64_t num_found = collect<Stream>(x, plan, guess.collect, found, watch);
    Bracket<Key> at{guess.collect, num_found, F::kNanKey + 1, 0};
    if (num_found < plan.k) {  // the sample misled: start from the whole row
      at.high = guess.collect, at.num_high = num_found;
      at.low = F::template min_key<Abs>();
      num_found = at.num_low = collect<false>(x, plan, at.low, found, watch);
    }
    if (watch.tripped()) return false;
    narrow(found, at, plan.k, num_found, guess.probe);
    const bool take_all = at.num_low == plan.k;
    if (!V::kNanTies && !take_all && at.low == F::kNanKey) return false;
    emit<Stream>(x, y, bits, plan, at.low, plan.k - at.num_high, take_all);
    return true;
  }
};

template <typename F, bool Abs, bool Stream>
void forward_rows(const ForwardArgs& args, int64_t begin, int64_t end) {
  using Raw = typename F::Raw;
  const Plan plan = make_plan<F>(args.hidden, args.k);
  Raw* found = static_cast<Raw*>(scratch((args.hidden + 2 * kBlock) * sizeof(Raw)));
  for (int64_t r = begin; r < end; ++r) {
    const Raw* x = static_cast<const Raw*>(args.x) + r * args.hidden;
    Raw* y = static_cast<Raw*>(args.y) + r * args.hidden;
    if (!Row<F, Abs>::template run<Stream>(x, y, args.bits + r * plan.words, plan, found))
      portable_rows(args, r, r + 1);
  }
}

template <typename F, bool Stream>
void backward_rows(const BackwardArgs& args, int64_t begin, int64_t end) {
  using Raw = typename F::Raw;
  using V = Ops<F, false>;
  const Plan plan = make_plan<F>(args.hidden, 1);
  for (int64_t r = begin; r < end; ++r) {
    const Raw* dy = static_cast<const Raw*>(args.dy) + r * args.hidden;
    Raw* dx = static_cast<Raw*>(args.dx) + r * args.hidden;
    const uint32_t* bits = args.bits + r * plan.words;
    for (int64_t b = 0; b < plan.num_blocks; ++b)
      V::template mask_store<Stream>(dy + b * kBlock, dx + b * kBlock, bits[b]);
    for (int i = 0; i < plan.tail; ++i) {
      const int64_t at = plan.num_blocks * kBlock + i;
      dx[at] = (bits[plan.num_blocks] >> i) & 1 ? dy[at] : Raw{0};
    }
  }
}

inline bool streamable(const void* out, int64_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(row_bytes)) % 64 == 0;
}

template <typename F>
void forward_format(const ForwardArgs& args, int64_t begin, int64_t end) {
  const bool stream = args.stream && streamable(args.y, args.hidden * sizeof(typename F::Raw));
  const bool abs = args.mode == Mode::kAbs;
  if (stream) {
    abs ? forward_rows<F, true, true>(args, begin, end)
        : forward_rows<F, false, true>(args, begin, end);
  } else {
    abs ? forward_rows<F, true, false>(args, begin, end)
        : forward_rows<F, false, false>(args, begin, end);
  }
}

template <typename F>
void backward_format(const BackwardArgs& args, int64_t begin, int64_t end) {
  const bool stream = args.stream && streamable(args.dx, args.hidden * sizeof(typename F::Raw));
  stream ? backward_rows<F, true>(args, begin, end) : backward_rows<F, false>(args, begin, end);
}

}  // namespace TOPK_ISA
}  // namespace topk_megatron

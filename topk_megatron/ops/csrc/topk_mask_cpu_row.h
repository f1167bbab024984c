// The algorithm, once, for every instruction set.
//
// A row is read from memory once and found in L1/L2 for the rest:
//   1. sample    64-byte pieces spread over the row give a key t0 that about k + 3 sigma coordinates
//                reach. t0 is a key that occurs in the row, so that mass ties are met exactly.
//   2. collect   one pass compresses the coordinates with key >= t0 into a buffer (never overflows:
//                it holds a whole row).
//   3. narrow    log-linear interpolation, then bisection, over the buffer finds t, the k-th largest
//                key, and how many keys lie above it.
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
//     static Raw* compress(const Raw* p, uint32_t mask, Raw* out);  // may write 32 past the result
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
  int sample_rank, sample_slack;
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

  static int64_t count(const Raw* p, int64_t num_blocks, Key t) {
    const auto threshold = V::threshold(t);
    int64_t total = 0;
    for (int64_t b = 0; b < num_blocks; ++b)
      total += __builtin_popcount(V::ge(p + b * kBlock, threshold));
    return total;
  }

  // The smallest key >= t among n elements; kNanKey if there is none.
  static Key smallest_from(const Raw* p, int64_t n, Key t) {
    Key best = F::kNanKey;
    for (int64_t i = 0; i < n; ++i) {
      const Key key = F::template key<Abs>(p[i]);
      best = (key >= t && key < best) ? key : best;
    }
    return best;
  }

  // A key that at least `rank` of the sample reach and not many more: 4-ary search on 16-bit keys.
  template <typename S>
  static typename S::Key search_sample(const uint16_t* sample, int num_blocks, const Plan& plan) {
    using W = Ops<S, Abs>;
    typename S::Key low = S::template min_key<Abs>(), high = S::kNanKey + 1;
    int num_low = num_blocks * kBlock;
    while (high - low > 1 && num_low > plan.sample_rank + plan.sample_slack) {
      const auto quarter = (high - low + 3) / 4;
      typename S::Key probe[3];
      int num[3] = {0, 0, 0};
      for (int i = 0; i < 3; ++i) probe[i] = std::min(low + quarter * (i + 1), high - 1);
      const auto t0 = W::threshold(probe[0]), t1 = W::threshold(probe[1]),
                 t2 = W::threshold(probe[2]);
      for (int b = 0; b < num_blocks; ++b) {
        num[0] += __builtin_popcount(W::ge(sample + b * kBlock, t0));
        num[1] += __builtin_popcount(W::ge(sample + b * kBlock, t1));
        num[2] += __builtin_popcount(W::ge(sample + b * kBlock, t2));
      }
      int passed = 0;
      while (passed < 3 && num[passed] >= plan.sample_rank) ++passed;
      if (passed < 3) high = probe[passed];
      if (passed > 0) low = probe[passed - 1], num_low = num[passed - 1];
    }
    return low;
  }

  static Key sample_threshold(const Raw* x, const Plan& plan) {
    constexpr int kPiece = 64 / sizeof(Raw);
    const int size = plan.sample_pieces * kPiece;
    alignas(64) uint16_t narrow[kMaxSample];
    if constexpr (sizeof(Raw) == 2) {
      for (int i = 0; i < plan.sample_pieces; ++i)
        std::memcpy(narrow + i * kPiece, x + i * plan.sample_stride, 64);
      return search_sample<F>(narrow, size / kBlock, plan);
    } else if constexpr (sizeof(Raw) == 4) {
      alignas(64) uint32_t wide[kMaxSample];
      for (int i = 0; i < plan.sample_pieces; ++i)
        std::memcpy(wide + i * kPiece, x + i * plan.sample_stride, 64);
      for (int i = 0; i < size; ++i) narrow[i] = static_cast<uint16_t>(wide[i] >> 16);
      // A float32's upper half is a bfloat16 truncated toward zero.
      const Key upper = search_sample<BFloat16>(narrow, size / kBlock, plan);
      const Key t = upper > 0 ? upper * 65536 : upper * 65536 - 65535;
      return smallest_from(wide, size, std::max(t, F::template min_key<Abs>()));
    } else {
      return F::template min_key<Abs>();
    }
  }

  // Compress the row's elements with key >= t into `out`; returns how many.
  static int64_t collect(const Raw* x, const Plan& plan, Key t, Raw* out,
                         typename V::NanWatch& watch) {
    const auto threshold = V::threshold(t);
    Raw* end = out;
    for (int64_t b = 0; b < plan.num_blocks; ++b)
      end = V::collect(x + b * kBlock, threshold, end, watch);
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

  // Where log(count), taken as linear between the bracket's ends, crosses k.
  static Key interpolate(const Bracket<Key>& at, Key high, int64_t num_high, int64_t k) {
    const float top = log2_about(static_cast<float>(at.num_low));
    const float goal = log2_about(static_cast<float>(k));
    const float bottom = log2_about(std::max(static_cast<float>(num_high), 0.5f));
    const Bracket<Key> to{at.low, 0, high, 0};
    const float part = std::min(std::max((top - goal) / (top - bottom), 0.0f), 0.99f);
    return at.between(static_cast<uint64_t>(static_cast<float>(to.gap()) * part));
  }

  // Shrink the bracket until the selection is known: num_low == k, or low is the k-th key.
  static void narrow(const Raw* found, Bracket<Key>& at, int64_t k, int64_t num_found) {
    const int64_t num_blocks = (num_found + kBlock - 1) / kBlock;
    if (at.num_low == k || at.gap() == 1) return;
    // Many more than asked for: ties at low itself are likely (after ReLU, equal, quantised).
    Key probe = at.low + 1;
    const bool ties = num_found > 2 * k + 64;
    const Key hint = V::max_key_hint(found, num_blocks);
    for (int step = 0;; ++step) {
      const bool open = at.high > F::kNanKey;  // nothing is known about the upper end yet
      if (step > 0 || !ties) {
        const Key high = open && hint > at.low ? hint : at.high;
        const int64_t num_high = open ? 1 : at.num_high;
        probe = step < 6 ? interpolate(at, high, num_high, k) : at.between(at.gap() / 2);
        // Values with gaps between them: step from one that occurs to the next.
        if (step >= 6 && step % 2 == 0) {
          at.low = smallest_from(found, num_found, at.low);
          probe = at.low + 1;
        }
      }
      probe = std::min(std::max<Key>(probe, at.low + 1), at.high - 1);
      const int64_t num = count(found, num_blocks, probe);
      if (num >= k) {
        at.low = probe, at.num_low = num;
      } else {
        at.high = probe, at.num_high = num;
      }
      if (at.num_low == k || at.gap() == 1) return;
    }
  }

  // Write everything above t and the first `ties_to_take` with key == t (all, if take_all).
  template <bool Stream>
  static void emit(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Key t,
                   int64_t ties_to_take, bool take_all) {
    auto threshold = V::threshold(t);
    int64_t b = 0;
    bool open = !take_all;  // ties remain to be taken one by one
    if (open) {
      const auto above = V::threshold(t + 1);
      for (; b < plan.num_blocks && open; ++b) {
        const Raw* from = x + b * kBlock;
        if (Stream) prefetch_block(from + plan.hidden);
        uint32_t mask = V::ge(from, threshold);
        const uint32_t more = V::ge(from, above);
        const int num_ties = __builtin_popcount(mask & ~more);
        if (num_ties >= ties_to_take) {
          mask = more | lowest_bits(mask & ~more, static_cast<int>(ties_to_take));
          open = false;
        }
        ties_to_take -= num_ties;
        bits[b] = mask;
        V::template mask_store<Stream>(from, y + b * kBlock, mask);
      }
      if (!open) threshold = above;
    }
    for (; b < plan.num_blocks; ++b) {
      if (Stream) prefetch_block(x + b * kBlock + plan.hidden);
      bits[b] = V::template ge_store<Stream>(x + b * kBlock, y + b * kBlock, threshold);
    }
    if (plan.tail != 0) emit_tail(x, y, bits, plan, t, ties_to_take, threshold, open);
  }

  static void emit_tail(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Key t,
                        int64_t ties_to_take, typename V::Threshold threshold, bool open) {
    alignas(64) Raw last[kBlock], kept[kBlock];
    load_tail(x, plan, last);
    uint32_t mask = V::ge(last, threshold) & ((1u << plan.tail) - 1);
    if (open) {
      const uint32_t more = V::ge(last, V::threshold(t + 1)) & mask;
      mask = more | lowest_bits(mask & ~more, static_cast<int>(ties_to_take));
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

  static void prefetch_block(const Raw* p) {  // of the next row, while this one is written
    for (size_t line = 0; line < kBlock * sizeof(Raw); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(p) + line);
  }

  // Returns false, having written nothing, if the row needs the portable path.
  template <bool Stream>
  static bool run(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Raw* found) {
    Key t0 = F::template min_key<Abs>();
    if (plan.sample_pieces != 0) t0 = sample_threshold(x, plan);
    typename V::NanWatch watch;
    int64_t num_found = collect(x, plan, t0, found, watch);
    Bracket<Key> at{t0, num_found, F::kNanKey + 1, 0};
    if (num_found < plan.k) {  // the sample misled: start from the whole row
      at.high = t0, at.num_high = num_found;
      at.low = F::template min_key<Abs>();
      num_found = at.num_low = collect(x, plan, at.low, found, watch);
    }
    if (watch.tripped()) return false;
    narrow(found, at, plan.k, num_found);
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

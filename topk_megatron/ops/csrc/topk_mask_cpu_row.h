// The algorithm, written once for every instruction set.
//
// A row is read from memory once and stays in L1/L2 for the later passes:
//   1. forecast  the k-th keys of preceding rows give a window where this row's k-th key should be.
//   2. collect   one pass compresses the coordinates in the window into a buffer, and counts.
//   3. close in  if the counts put the k-th largest key, t, in the window, 4-ary search finds it.
//   4. emit      one pass writes y and the bitmask. It compares twice (>= t and > t) while ties at
//                t remain to be taken, and once otherwise.
// The first row, and rows that the forecast misses, replace steps 1 to 3:
//   1. sample    64-byte pieces spread over the row give a key t0 that about k + 2.5 sigma of the
//                coordinates reach. t0 occurs in the row, so mass ties are hit exactly.
//   2. collect   one pass compresses the coordinates with key >= t0.
//   3. narrow    counting probes over the buffer, log-linear at first, shrink a bracket around t
//                until its members can be ranked against each other.
// The buffer holds a whole row, so it cannot overflow. Counts decide, whatever forecast and sample
// say, so the result is exact. If fewer than k coordinates reach t0, the whole row is collected.
//
// Include this with TOPK_ISA set to a namespace name, after that namespace has defined
//   template <typename F, bool Abs> struct Ops {
//     struct Threshold;                              // t in the form that the compare needs
//     struct NanWatch;                               // sees collected blocks; tripped(): see below
//     static Threshold threshold(Key t);             // min_key <= t <= kNanKey
//     static uint32_t ge(const Raw* p, Threshold);   // bit i: key(p[i]) >= t, for 32 elements
//     static int count(const Raw* p, Threshold);     // the number of bits set in ge
//     static Raw* compress(const Raw* p, uint32_t mask, Raw* out);
//         // writes at most 32 elements from out on, so out may be p or any place before it
//     static Raw* collect(const Raw* p, Threshold, Raw* out, NanWatch&);  // ge + compress
//     struct Window { Threshold low, high; };        // plus what a compare with both needs
//     static Window window(Key low, Key high);       // low < high
//     static Raw* collect_between(const Raw* p, const Window&, Raw* out, int64_t& num_from,
//                                 NanWatch&);        // num_from counts the elements that reach low
//     template <bool Stream> static uint32_t ge_store(const Raw* x, Raw* y, Threshold);
//     template <bool Stream> static void mask_store(const Raw* x, Raw* y, uint32_t mask);
//     static Key max_key_hint(const Raw* p, int64_t num_blocks);   // approximately the largest key
//     static constexpr bool kNanTies;                // threshold(kNanKey + 1) selects nothing
//   };
// A row where NanWatch trips, or whose k-th key is NaN where kNanTies is false, is left to the
// portable unit: such rows are rare, and compares that ignore them are faster.

#include "topk_mask_cpu_search.h"

namespace topk_megatron {
namespace TOPK_ISA {

template <typename F, bool Abs>
struct Row {
  using Raw = typename F::Raw;
  using Key = typename F::Key;
  using V = Ops<F, Abs>;
  using Find = Search<F, Abs>;

  // Compress the row's elements with key >= t into `out`; return their number. Memory is idle until
  // this row is written, so prefetch the next one meanwhile.
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

  // The same, only for low <= key < high; also count the keys >= low and >= high.
  template <bool Stream>
  static int64_t collect_between(const Raw* x, const Plan& plan, Bracket<Key>& at, Raw* out,
                                 typename V::NanWatch& watch) {
    const auto window = V::window(at.low, at.high);
    Raw* end = out;
    int64_t num_from = 0;
    for (int64_t b = 0; b < plan.num_blocks; ++b) {
      const Raw* block = x + b * kBlock;
      if (Stream) prefetch<0>(block + plan.hidden);
      end = V::collect_between(block, window, end, num_from, watch);
    }
    if (plan.tail != 0) {
      alignas(64) Raw last[kBlock];
      load_tail(x, plan, last);
      watch.see(last);
      const uint32_t reached = V::ge(last, window.low) & ((1u << plan.tail) - 1);
      num_from += __builtin_popcount(reached);
      end = V::compress(last, reached & ~V::ge(last, window.high), end);
    }
    for (int i = 0; i < kBlock; ++i) end[i] = F::template padding<Abs>();
    at.num_low = num_from;
    at.num_high = num_from - (end - out);
    return end - out;
  }

  static void load_tail(const Raw* x, const Plan& plan, Raw* last) {
    for (int i = 0; i < kBlock; ++i) last[i] = F::template padding<Abs>();
    std::memcpy(last, x + plan.num_blocks * kBlock, plan.tail * sizeof(Raw));
  }

  // Write everything above t and the first `num_ties` elements with key == t, or all of them if
  // take_all. The bitmask is stored four words at a time, because its stores between those to y
  // stall y's lines.
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

  // The part of emit up to the last tie to be taken; return the block after it.
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

  // Bracket the k-th key by a sample of this row, and narrow. Return false if the row needs the
  // portable unit.
  template <bool Stream>
  static bool find_by_sample(const Raw* x, const Plan& plan, Raw* found, Bracket<Key>& at,
                             Forecast<F, Abs>& forecast) {
    typename Find::Guess guess{F::template min_key<Abs>(), F::kNanKey};
    if (plan.sample_pieces != 0) guess = Find::sample_guess(x, plan);
    typename V::NanWatch watch;
    int64_t num_found = collect<Stream>(x, plan, guess.collect, found, watch);
    at = {guess.collect, num_found, F::kNanKey + 1, 0};
    if (num_found < plan.k) {  // the sample misled: start from the whole row
      at.high = guess.collect, at.num_high = num_found;
      at.low = F::template min_key<Abs>();
      num_found = at.num_low = collect<false>(x, plan, at.low, found, watch);
    }
    if (watch.tripped()) return false;
    Find::narrow(found, at, plan.k, num_found, guess.probe);
    const double spread = static_cast<double>(guess.probe) - static_cast<double>(guess.collect);
    forecast.miss(at.low, plan.sample_pieces != 0 ? std::max(spread, 0.0) / 6 : 0.0);
    return true;
  }

  // Return false if the k-th key is not in the forecast's window, or if so many others are too that
  // the sample is the better start.
  template <bool Stream>
  static bool find_by_forecast(const Raw* x, const Plan& plan, Raw* found, Bracket<Key>& at,
                               Forecast<F, Abs>& forecast) {
    typename V::NanWatch watch;
    at = forecast.bracket();
    const int64_t num_found = collect_between<Stream>(x, plan, at, found, watch);
    if (watch.tripped() || at.num_high >= plan.k || at.num_low < plan.k) return false;
    if (num_found > 8 * kBlock + plan.k / 4 && at.gap() > 1) return false;
    Find::close_in(found, at, plan.k, num_found);
    forecast.hit(at.low);
    return true;
  }

  // Return false, having written nothing, if the row needs the portable unit.
  template <bool Stream>
  static bool run(const Raw* x, Raw* y, uint32_t* bits, const Plan& plan, Raw* found,
                  Forecast<F, Abs>& forecast) {
    Bracket<Key> at;
    if (!(forecast.ready() && find_by_forecast<Stream>(x, plan, found, at, forecast)) &&
        !find_by_sample<Stream>(x, plan, found, at, forecast))
      return false;
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
  Forecast<F, Abs> forecast;
  for (int64_t r = begin; r < end; ++r) {
    const Raw* x = static_cast<const Raw*>(args.x) + r * args.hidden;
    Raw* y = static_cast<Raw*>(args.y) + r * args.hidden;
    if (!Row<F, Abs>::template run<Stream>(x, y, args.bits + r * plan.words, plan, found, forecast))
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

}  // namespace TOPK_ISA
}  // namespace topk_megatron

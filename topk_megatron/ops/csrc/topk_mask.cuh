// Top-k plus mask over rows: y = x on the k coordinates with the largest keys, +0 elsewhere, and
// the selection as packed bits. A row is read from memory once, into registers, and written once.
//
// A row goes through these steps; all but the last two touch registers and a few hundred words.
//   1. keys      x becomes an unsigned key in the operator's order (class Format).
//   2. floor     every lane reduces its slots to a few group maxima, and each warp finds a key that
//                its share of k of them reach. At least k elements reach the smallest of the warps'
//                keys. That holds for every row, and is tight for unordered ones.
//   3. filter    elements above the floor's class are appended to a column of shared memory per
//                lane (bank = lane: no conflicts whatever the data), then packed into one list.
//   4. threshold if at most k were found, it is the floor. If they fit the list, one warp bisects
//                it. Otherwise, as the exact fallback, all warps bisect their registers until the
//                rest fits the list.
//   5. ties      equal keys at the threshold are taken in index order up to a cut slot, found by
//                counting them per chunk. The cost does not depend on the number of ties.
//   6. write     one comparison per element gives the bits, and y by a mask.
//
// Legend. lane: a thread of a warp. slot: 16 bytes of a row, which a lane loads at once (8 elements
// of 16 bits or 4 of 32). chunk: 32 neighbouring slots of a warp, one per lane. A warp owns
// consecutive chunks and lane l holds slot l of each, so (warp, chunk, lane, element) is in index
// order. team: the warps of one row. container: a key in the top bits of a 32-bit word, with any
// bits below it. class: a range of keys that count as one value (all NaNs; -0 and +0).
#pragma once

#include "topk_mask_write.cuh"

namespace topk_mask {

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
  if (row >= rows) return;  // never a part of a warp or of a team

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

// dx = dy on the selected coordinates. `warps_per_row` warps walk along a row, 32 slots each time.
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
// They have C names, so that profilers and the PTX tests can tell them apart.

// X(name, dtype, abs, slots in registers or 0, one warp per row, maximum threads, minimum blocks
// per processor). The last one sets the register budget: without it ptxas saves registers by
// spilling a few words.
#define TOPK_VARIANTS(X, dtype_name, dtype, mode_name, abs)                  \
  X(topk_mask_##dtype_name##_##mode_name##_warp2, dtype, abs, 2, true, 128, 8)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp4, dtype, abs, 4, true, 128, 6)  \
  X(topk_mask_##dtype_name##_##mode_name##_warp8, dtype, abs, 8, true, 128, 4)  \
  X(topk_mask_##dtype_name##_##mode_name##_block8, dtype, abs, 8, false, 512, 1) \
  X(topk_mask_##dtype_name##_##mode_name##_stream, dtype, abs, 0, false, 1024, 1)

// Ordered by ((dtype * 2) + mode) * kNumVariants + variant.
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

// Backward moves bits and compares no keys: one kernel for each width.
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
